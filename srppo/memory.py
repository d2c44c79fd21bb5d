"""How much memory a run will take, told before anything is allocated, so that it need not be found out by running out.

With ``N`` weights of a model, ``n`` of an adapter, ``s`` bytes of a frozen weight, ``tokens`` in a micro-batch::

    weights       s N for each model that is held, 4 n for each adapter
    learning      12 bytes for each weight that is trained: its gradient and AdamW's two moments, in fp32
    activations   tokens * layers * a                   a = (10 H + 4 I) s of hidden size H and MLP size I
                  with checkpointing tokens * (layers H s + a)
    head          what srppo_kernels.explain says of the policy's loss on a micro-batch
    sampling      key-value cache of all sequences of a rollout, and a few rows of logits each
    peak          weights + learning + max(activations + head, sampling)

10 H + 4 I is what a Llama layer saves for its backward, 0.85 to 1.04 of it as counted with saved-tensor hooks, LoRA or
not, with attention that does not hold its scores (sdpa, flash). Adapters are float32: beside 16-bit weights each of a
layer's seven keeps an input of its own in that precision, 4 (6 H + I) bytes more in a. A bf16 model with LoRA held 0.84
of that sum. What Python, torch and the allocator's slack take comes on top: some hundred MiB. A run with SmolLM2-135M's
shapes took 1.22 times its estimate with LoRA, and 0.88 times with full fine-tuning (one iteration of 6 sequences of 64
tokens on a CPU, growth of the process).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from srppo.config import SRPPOConfig
from srppo.data import Example
from srppo.metrics import peak_memory_gib
from srppo.models import choose_device, choose_dtype, is_adapter_folder, lora_config
from srppo_kernels import explain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 2**30
FOUR_BIT = 0.5 + 4 / 64  # bytes of an NF4 weight, with its share of an fp32 scale for each 64


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for."""

    weights: dict[str, int] = field(default_factory=dict)  # role and dtype -> bytes
    learning: int = 0
    activations: int = 0
    head: int = 0
    sampling: int = 0

    @property
    def peak(self) -> int:
        return sum(self.weights.values()) + self.learning + max(self.activations + self.head, self.sampling)

    def __str__(self) -> str:
        parts = [f"{name} {gib(size)}" for name, size in self.weights.items()]
        parts += [f"gradients and optimizer {gib(self.learning)}"]
        training = self.activations + self.head
        if training >= self.sampling:
            parts += [f"a micro-batch {gib(self.activations)}", f"its head {gib(self.head)}"]
        else:
            parts += [f"sampling {gib(self.sampling)}"]
        return f"memory: about {gib(self.peak)} = {' + '.join(parts)}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def estimate(
    args: SRPPOConfig, base: str | PreTrainedModel, sft: str | PreTrainedModel, *, longest_prompt: int
) -> Estimate | None:
    """The memory of a run's models and of its largest step; None where a model's configuration cannot be read.

    Args:
        base, sft: as the trainer takes them; folders are looked at and not loaded.
        longest_prompt: of the data, in tokens.
    """
    try:
        base_model = skeleton(base, args)
        adapter = isinstance(sft, str) and is_adapter_folder(sft)
        sft_model = base_model if adapter else skeleton(sft, args)
    except Exception:  # whatever is wrong with a model is said when it is loaded
        return None
    device = choose_device()
    dtype = choose_dtype(args, device)
    size, total = dtype.itemsize, count(sft_model)
    name = "nf4" if args.dtype == "nf4" else str(dtype).removeprefix("torch.")
    frozen = [size * count(model) - int(in_four_bit(model) * (size - FOUR_BIT) * (args.dtype == "nf4"))
              for model in (base_model, sft_model)]  # fmt: skip
    separate = args.value_model == "separate" or not args.use_peft
    if not args.use_peft:
        weights = {f"base {name}": size * count(base_model)} | {
            f"{role} {name}": size * total for role in ("SFT", "policy", "critic")
        }
        trained = 2 * total
    else:
        own = adapter_size(str(sft)) if adapter else new_adapter_size(sft_model, args)
        weights = {f"base {name}": frozen[0]}
        if not adapter:
            weights[f"SFT {name}"] = frozen[1]
        adapters = ["SFT"] * adapter + ["policy"] + ["critic"] * (not separate)
        weights[f"adapters {', '.join(adapters)} float32"] = 4 * own * len(adapters)
        trained = own + (total if separate else own)
        if separate:
            weights["critic float32"] = 4 * total
    config = sft_model.config.get_text_config()
    if not (hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers")):  # BLT's parts have their own
        return None
    hidden, layers = config.hidden_size, config.num_hidden_layers
    mlp = widest(config, "intermediate_size") or 4 * hidden
    length = longest_prompt + args.max_completion_length
    limit, sequences = args.max_tokens_per_micro_batch, args.per_device_train_batch_size
    # a sequence beyond the limit goes alone, and no micro-batch is more than its mini-batch
    tokens = sequences * length if limit is None else min(max(limit, length), args.mini_batch_size * length)
    layer = (10 * hidden + 4 * mlp) * size + 4 * (6 * hidden + mlp) * (args.use_peft and size < 4)
    saved = layers * hidden * size + layer if args.gradient_checkpointing else layers * layer
    heads = widest(config, "num_attention_heads")  # none in a state-space model, which keeps no cache of tokens
    head_size = widest(config, "head_dim") or hidden // max(heads, 1)
    cache = 2 * layers * (widest(config, "num_key_value_heads") or heads) * head_size * size * length
    logits = 3 * 4 * config.vocab_size  # of the last position: logits, their softmax, and what sampling makes of it
    rows = max(1, tokens * args.max_completion_length // length)
    return Estimate(
        weights=weights,
        learning=12 * trained,
        activations=tokens * saved,
        head=head_workspace(rows, hidden, config.vocab_size, dtype, device),
        sampling=0 if args.rollout_engine == "vllm" else args.batch_size * (cache + logits),
    )


def expectation(
    args: SRPPOConfig, base: str | PreTrainedModel, sft: str | PreTrainedModel, examples: Sequence[Example]
) -> str:
    """The line about memory at a run's start, with a warning in it where a GPU has less."""
    told = estimate(args, base, sft, longest_prompt=max(len(example.prompt_ids) for example in examples))
    if told is None:
        return "memory: not estimated, as a model's configuration could not be read"
    if choose_device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if told.peak > free:
            limited = args.max_tokens_per_micro_batch is not None
            name = "max_tokens_per_micro_batch" if limited else "per_device_train_batch_size"
            return f"{told}; only {gib(free)} are free: lower {name}, or gradient_checkpointing=true"
    return str(told)


def measured() -> str:
    """What the run took at its peak, to hold against the estimate."""
    peak = gib(peak_memory_gib() * GIB)
    return f"{peak} at the peak" + ("" if torch.cuda.is_available() else ", of the whole process with its libraries")


def skeleton(model: str | PreTrainedModel, args: SRPPOConfig) -> PreTrainedModel:
    """A model with shapes and no weights."""
    if not isinstance(model, str):
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    made.tie_weights()
    return made


def widest(config: PretrainedConfig, name: str) -> int:
    """A size of a model's layers, the largest where they differ: Gemma 3n has a list of them, Gemma 4 a configuration
    for each layer. 0 where there is none."""
    sizes = [getattr(layer, name, None) or 0 for layer in getattr(config, "per_layer_config", ()) or (config,)]
    return max(max(size) if isinstance(size, list) else size for size in sizes)


def count(model: nn.Module) -> int:
    """Weights of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def in_four_bit(model: PreTrainedModel) -> int:
    """Weights that ``dtype=nf4`` puts into 4 bit: those of the linear layers but the head."""
    return sum(first * second for _, (first, second) in linear_layers(model))


def adapter_size(folder: str) -> int:
    """Weights in an adapter folder, from the file's header."""
    try:
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError):
        return 0


def new_adapter_size(model: PreTrainedModel, args: SRPPOConfig) -> int:
    """Weights of a LoRA adapter yet to be made: ``r (in + out)`` for each linear layer that gets one."""
    targets = lora_config(args, model).target_modules
    return sum(
        args.lora_r * sum(shape)
        for name, shape in linear_layers(model)
        if isinstance(targets, str) or any(name == t or name.endswith("." + t) for t in targets)
    )


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linear layers (GPT-2's transposed ones included) with their two sizes, without the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            first, second = module.weight.shape
            yield name, (first, second)


def head_workspace(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """What the fused policy loss holds at its peak, for ``rows`` completion tokens."""
    with FakeTensorMode():
        states = torch.empty(rows, hidden, dtype=dtype, device=device, requires_grad=True)
        weight = torch.empty(vocabulary, hidden, dtype=dtype, device=device)
        targets: Any = torch.zeros(rows, dtype=torch.int64, device=device)
        return explain(states, weight, targets, op="linear_ppo_loss").workspace_bytes
