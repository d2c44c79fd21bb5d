"""``srppo env``: the versions in use, and every backend with the reason why it is on or off."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import torch

from srppo_kernels import _extension, _triton

PACKAGES = ("srppo", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors",
            "flash-attn", "bitsandbytes", "tensorboard")  # fmt: skip


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> Iterator[str]:
    """Lines of ``name: value``, for people and for issue reports."""
    yield f"python: {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        # torch itself names its build (+cpu, +cu130), which its package leaves out where it comes from PyPI.
        installed = torch.__version__ if package == "torch" else version(package)
        yield f"{package}: {installed or 'not installed'}"
    yield f"threads: {torch.get_num_threads()}"
    yield f"cpu: {torch.backends.cpu.get_cpu_capability()} as torch sees it"
    yield f"native kernels: {'on' if _extension.available() else 'off'}: {_extension.why()}"
    for name, value in _extension.build_info().items():
        yield f"  {name}: {value}"
    yield f"cuda: {cuda_state()}"
    if torch.backends.mps.is_available():
        yield "mps: there, and not used: models go to the CPU"
    yield f"triton kernels: {_triton.why()}"
    yield f"flash attention: {flash_state()}"


def cuda_state() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"off: {f'torch is built for CUDA {built} and sees no device' if built else 'torch is a CPU build'}"
    properties = torch.cuda.get_device_properties(0)
    return f"on: {properties.name}, compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"


def flash_state() -> str:
    if version("flash-attn") is None:
        return "off: the optional package flash-attn is not installed; attention is torch's own"
    if not torch.cuda.is_available():
        return "off: no CUDA device"
    return "available: choose it with --attn_implementation flash_attention_2"
