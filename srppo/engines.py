"""Rollout engines: what samples the completions.

An engine takes prompts as token ids and gives a :class:`srppo.rollout.Rollout`: token ids, masks, and where it has them
the log-probs of its own sampler. Text is never involved. ``hf`` is transformers' ``generate`` in this process; ``vllm``
a server beside it, that is brought up to date with the policy's adapter before each rollout.

A sampler's kernels, dtype, top-p or key-value cache give other log-probs than the training forward: log mu where PPO
has log pi_old. Sampling from mu biases the gradient; ``sampling/logp_difference/*`` tells how far the two are apart,
and truncated importance weights ``min(pi_old / mu, C)`` on the advantages take the bias out of what is below C.
"""

from __future__ import annotations

import json
import math
import shutil
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from srppo import checkpoint, distributed
from srppo.config import PipelineConfig, SRPPOConfig
from srppo.errors import UserError
from srppo.models import is_peft
from srppo.roles import Role
from srppo.rollout import Rollout, collate, generate

VLLM_URL = PipelineConfig.vllm_url
ADAPTER = "srppo-policy-"  # what the names of adapters on a server begin with
LOAD = "/v1/load_lora_adapter"
NO_FOLDER = "LoRA adapter path must exist"  # vLLM's frontend in Rust says it of one that is not there, and no name
TO_LOAD = (
    "; to load adapters it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, --enable-lora, a "
    "--max-lora-rank of lora_r or more, the model that the adapter stands on, and the trainer's output_dir to read"
)


class Engine(Protocol):
    """Samples completions from the policy as it is now."""

    def start(self, policy: Role) -> str:
        """Checks that sampling will work, before anything is trained, and says in one line what samples."""

    def sample(self, policy: Role, prompts: Sequence[Sequence[int]], *, step: int) -> Rollout:
        """One completion per prompt, in their order, from the policy after ``step`` iterations."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How every engine samples, and what padding is filled with."""

    temperature: float
    top_p: float
    max_completion_length: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int

    @classmethod
    def of(cls, args: SRPPOConfig, stop_token_ids: Sequence[int], pad_token_id: int) -> Sampling:
        return cls(args.temperature, args.top_p, args.max_completion_length, tuple(stop_token_ids), pad_token_id)


@dataclass(frozen=True, slots=True)
class HFEngine:
    """transformers' ``generate``, in this process. Its log-probs tell whether the cache that it samples with gives what
    the forward does: a ``sliding_window`` that the layers ignore and the cache does not cost 0.3 nats a token in small
    random models."""

    sampling: Sampling

    def start(self, policy: Role) -> str:
        return "rollouts: transformers' generate"

    def sample(self, policy: Role, prompts: Sequence[Sequence[int]], *, step: int) -> Rollout:
        how = self.sampling
        return generate(
            policy, prompts, max_completion_length=how.max_completion_length, pad_token_id=how.pad_token_id,
            stop_token_ids=how.stop_token_ids, temperature=how.temperature, top_p=how.top_p, sampler_logprobs=True,
        )  # fmt: skip


class VLLMEngine:
    """A vLLM server that samples from the policy's LoRA adapter over HTTP.

    For vLLM 0.10.2 and later (``return_token_ids``). Run with 0.32.0, and 0.33.0's Python code on kernels compiled from
    its sources, on a CPU, with two-layer Llama and Qwen2 models of width 256; not yet on a GPU. In float32 the server's
    log-probs were within 3e-5 nats of the trainer's, at most 3e-6 on average, for every adapter of runs that moved the
    policy by nats, at temperatures 0.7, 1 and 1.3; with top-p, within 1e-5 of transformers' processors on the trainer's
    logits; in bfloat16 0.004 to 0.012 apart on average. Two runs of a seed, and runs that went on after the trainer or
    the server was killed, had the same bits. With ``importance_cap`` they need not: the server's log-probs, which it
    reads, differ in rounding with what else was in a batch (6e-6 nats with 0.33.0). With 0.16.0 the Llama at
    temperature 1.3 agreed as closely. The tests' fake server answers as 0.32.0 did.

    The server is started beside the trainer, with the model that the adapter stands on (the base; for a full SFT model,
    that one), on a machine that sees the same file system::

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank R
            --logprobs-mode processed_logprobs --generation-config vllm

    and serves one run at a time, which takes off what others left there. The newest adapter stays on it when the run
    ends. ``processed_logprobs`` are those after temperature and top-p, which are what was sampled from. What the
    checkpoint's generation_config would add to a request is off in each of them, but for its ``max_new_tokens``, which
    bounds every request of a 0.16.0 server without that last option (of 0.32.0 it does not), and is refused. Each
    sequence has a seed of its own, drawn from torch's generator, so that a resumed run asks for the same samples. The
    frontend in Rust of 0.33.0 (``VLLM_USE_RUST_FRONTEND=1``) also needs ``VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES``, a
    folder that the trainer's output_dir is in, and keeps the names of adapters that it has no more.

    Args:
        url: of the server.
        folder: where adapters are written for the server to read; only the newest stays.
        seconds: that a request may take.
        requests: at the same time; the server forms its batches from them.
    """

    def __init__(
        self, sampling: Sampling, folder: Path, *, url: str = VLLM_URL, seconds: float = 600.0, requests: int = 64
    ) -> None:
        self.sampling, self.folder, self.url = sampling, folder, url.rstrip("/")
        self.seconds, self.requests = seconds, requests
        self.prefix = f"{ADAPTER}{uuid.uuid4().hex[:8]}-"  # a run that goes on after a crash has other names
        self.loaded: str | None = None  # the adapter that the server has

    def models(self, *, adapters: bool) -> list[dict[str, Any]]:
        """What the server serves, which it is asked for before anything is trained.

        Args:
            adapters: whether the policy is an adapter.
        """
        if not adapters:
            raise UserError(
                "rollout_engine=vllm brings the server up to date by a LoRA adapter, so it needs use_peft=true; full "
                "fine-tuning samples with rollout_engine=hf"
            )
        models: list[dict[str, Any]] = self.call("/v1/models", None).get("data", [])
        if not models:
            raise UserError(f"the vLLM server at {self.url} serves no model")
        room, wanted = models[0].get("max_model_len"), self.sampling.max_completion_length
        if isinstance(room, int) and room <= wanted:
            raise UserError(
                f"the vLLM server at {self.url} takes {room} tokens of prompt and completion, which leaves a prompt "
                f"none beside max_completion_length={wanted}: start it with a larger --max-model-len, or ask for less"
            )
        self.require_adapters()
        self.require_processed_logprobs(str(models[0].get("id")))
        return models

    def require_adapters(self) -> None:
        """Stops where no adapter could be loaded: of one that is not there a server that can load says just that."""
        nothing = f"{self.prefix}nothing"
        try:
            self.load(nothing)
        except UserError as error:
            if nothing not in str(error) and NO_FOLDER not in str(error):
                raise

    def require_processed_logprobs(self, model: str) -> None:
        """Stops where log-probs are those before temperature and top-p: with one token to choose from they are 0."""
        how = self.sampling
        if how.temperature == how.top_p == 1:
            return
        body = {"model": model, "prompt": [how.pad_token_id], "max_tokens": 1, "logprobs": 0, "seed": 0}
        reply = self.call("/v1/completions", body | {"temperature": how.temperature, "top_p": 1e-6})
        try:
            (logprob,) = reply["choices"][0]["logprobs"]["token_logprobs"]
            raw = logprob < -1e-3
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self.surprise(f"its reply has no {error}") from None
        if raw:
            raise self.surprise(
                "its log-probs are not those that it samples from; start it with --logprobs-mode processed_logprobs"
            )

    def start(self, policy: Role) -> str:
        models = self.models(adapters=is_peft(policy.model))
        left = [str(model["id"]) for model in models if str(model.get("id")).startswith(ADAPTER)]
        distributed.on_main(lambda: self.clear(left))  # of a run that was killed
        return f"rollouts: vLLM at {self.url}, serving {models[0].get('id')}, with the policy's adapter"

    def clear(self, names: Sequence[str]) -> None:
        """Takes adapters of these names off the server, and all that there are off the disk."""
        self.unload(names)
        for folder in self.folder.glob(f"{ADAPTER}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def sample(self, policy: Role, prompts: Sequence[Sequence[int]], *, step: int) -> Rollout:
        self.loaded = distributed.on_main(lambda: self.synchronise(policy, f"{self.prefix}{step}"))
        seeds: list[int] = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        with ThreadPoolExecutor(min(self.requests, max(len(prompts), 1))) as pool:
            sampled = list(pool.map(self.complete, prompts, seeds))
        completions = [ids for ids, _ in sampled]
        rollout = collate(
            prompts, completions, pad_token_id=self.sampling.pad_token_id,
            stop_token_ids=self.sampling.stop_token_ids, device=policy.device,
        )  # fmt: skip
        logprobs = torch.tensor([value for _, values in sampled for value in values], device=policy.device)
        return rollout.with_sampler_logprobs(rollout.in_place(logprobs))

    def synchronise(self, policy: Role, name: str) -> str:
        """Gives the server the policy's adapter as it is now, under a name that it has not seen; returns the name."""
        if self.loaded == name:
            return name
        folder = self.folder / name
        with checkpoint.atomic_folder(folder, replace=True) as writing:
            checkpoint.save_weights(policy, writing)
        self.load(name)
        if self.loaded is not None:
            self.unload([self.loaded])
            shutil.rmtree(self.folder / self.loaded, ignore_errors=True)
        return name

    def load(self, name: str) -> None:
        self.call(LOAD, {"lora_name": name, "lora_path": str((self.folder / name).resolve())})

    def unload(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self.call("/v1/unload_lora_adapter", {"lora_name": name})
            except UserError as error:
                if name not in str(error):  # a server that was started again says that it has not this one
                    raise

    def complete(self, prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
        """Token ids and log-probs of one completion, its stop token included."""
        how = self.sampling
        reply = self.call(
            "/v1/completions",
            {
                "model": self.loaded,
                "prompt": list(prompt),
                "max_tokens": how.max_completion_length,
                "temperature": how.temperature,
                "top_p": how.top_p,
                "stop_token_ids": list(how.stop_token_ids),
                "ignore_eos": True,  # what else the checkpoint stops at ends nothing here
                # what a request leaves out, the server takes from the checkpoint's generation_config
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": seed,
                "logprobs": 0,  # of the token taken, and of no other
                "return_token_ids": True,
                "skip_special_tokens": False,
            },
        )
        try:
            (choice,) = reply["choices"]
            ids = [int(token) for token in choice["token_ids"]]
            logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise self.surprise(f"its reply has no {error}: is it vLLM 0.10.2 or later?") from None
        if not ids or len(ids) != len(logprobs) or len(ids) > how.max_completion_length:
            raise self.surprise(f"it gave {len(ids)} tokens and {len(logprobs)} log-probs")
        if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
            raise self.surprise("it gave log-probs that are none")
        ended = ids[-1] in how.stop_token_ids  # in the last place vLLM 0.10.2 says length of it
        if any(token in how.stop_token_ids for token in ids[:-1]) or (reason == "stop" and not ended):
            raise self.surprise(f"it ended for {reason!r} with token {ids[-1]}, which does not fit the stop tokens")
        if reason == "length" and not ended and len(ids) < how.max_completion_length:
            raise self.surprise(
                f"it cut a completion at {len(ids)} tokens, of {how.max_completion_length}: raise its --max-model-len, "
                f"which the prompt's {len(prompt)} count against, and start it with --generation-config vllm"
            )
        return ids, logprobs

    def surprise(self, what: str) -> UserError:
        return UserError(f"the vLLM server at {self.url} does not do what the trainer relies on: {what}")

    def call(self, path: str, body: dict[str, Any] | None) -> Any:
        """POSTs JSON (GETs without a body) and returns the JSON of the answer, or its text."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            said, hint = error.read().decode(errors="replace")[:300], TO_LOAD if path == LOAD else ""
            raise UserError(f"the vLLM server at {self.url} refused {path} ({error.code}): {said}{hint}") from None
        except (OSError, ValueError, HTTPException) as error:  # the last two, of what is no URL or no answer in HTTP
            raise UserError(
                f"no vLLM server answers at {self.url} ({error}): start one, or rollout_engine=hf"
            ) from None
        try:
            return json.loads(text)
        except ValueError:
            return text


def make_engine(args: SRPPOConfig, sampling: Sampling) -> Engine:
    """The engine that ``args.rollout_engine`` names."""
    if args.rollout_engine == "vllm":
        url = args.vllm_url if isinstance(args, PipelineConfig) else VLLM_URL
        return VLLMEngine(sampling, Path(args.output_dir) / "rollout-adapters", url=url)
    return HFEngine(sampling)


# -- where the sampler is not the policy ------------------------------------------------------------------------------


def sampling_metrics(rollout: Rollout, logprobs: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the training forward's; nothing where the engine gives none, or no
    token.

    Args:
        logprobs: log pi_old of the tokens taken, ``[B, T]``.
    """
    if rollout.sampler_logprobs is None or not rollout.completion_mask.any():
        return {}
    gaps = rollout.of_tokens((logprobs - rollout.sampler_logprobs).abs())
    return {
        "sampling/logp_difference/mean": gaps.mean().item(),
        "sampling/logp_difference/max": gaps.max().item(),
    }


def importance_weights(rollout: Rollout, logprobs: Tensor, cap: float) -> Tensor:
    """``min(pi_old / mu, cap)`` per token, ``[B, T]``, 0 where masked; 1 where the engine gives no log-probs."""
    mask = rollout.completion_mask
    if rollout.sampler_logprobs is None:
        return mask.to(logprobs.dtype)
    return (logprobs - rollout.sampler_logprobs).exp().clamp(max=cap) * mask
