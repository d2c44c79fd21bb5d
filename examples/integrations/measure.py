"""What the integrations save, measured: peak memory of a training step, products with the LM head, exactness.

    python examples/integrations/measure.py            # every row of the pages' tables, each in a process of its own

A two-layer Llama with the head of SmolLM2-135M (D = 576, V = 49152, tied). A micro-batch of `--rows` sequences of 64
prompt and 192 completion tokens; the loss is on the completions, a quarter of which is padding.

*Memory* is the peak of the process's resident memory during loss and backward, beyond what is resident before them,
after a warm-up on a small batch and with gradients in place. *Products* are the floating-point operations of torch's
matrix products with the head, in units of 2 N D V with N the tokens in the loss: a pass over padding or prompts counts
as what it costs. The op's own forward is native code that torch does not see, so for fused rows the number is what
`srppo.explain` states.
*Error* is the largest difference of a log-prob from float64, for a model in bfloat16, from the same hidden states.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from srppo_kernels import explain, linear_logprob

VOCABULARY, WIDTH, ROWS, PROMPT, COMPLETION = 49152, 576, 8, 64, 192
VARIANTS = ("hf-own", "hf-fused", "grpo-own", "grpo-fused", "grpo-fused-auto")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rollout(rows: int, length: int) -> dict[str, Tensor]:
    completion_mask = torch.ones(rows, length, dtype=torch.long)
    completion_mask[:, length // 2 :][::2] = 0
    return {
        "prompt_ids": torch.randint(1, VOCABULARY, (rows, PROMPT)),
        "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(1, VOCABULARY, (rows, length)),
        "completion_mask": completion_mask,
        "advantages": torch.randn(rows),
        "num_items_in_batch": completion_mask.sum(),
    }


def step_of(variant: str) -> tuple[Any, Callable[[dict[str, Tensor]], Tensor]]:
    """The model, and its loss on a rollout."""
    if variant.startswith("hf"):
        from srppo.integrations.hf import use_fused_cross_entropy

        own = model()
        if variant == "hf-fused":
            use_fused_cross_entropy(own)

        def cross_entropy(batch: dict[str, Tensor]) -> Tensor:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :PROMPT] = -100
            return own(input_ids=ids, attention_mask=mask, labels=labels).loss

        return own, cross_entropy
    from datasets import Dataset
    from small import byte_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    from srppo.integrations.trl import use_fused_logprobs

    folder = tempfile.mkdtemp()
    args = GRPOConfig(
        folder, per_device_train_batch_size=ROWS, num_generations=ROWS, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * ROWS), processing_class=byte_tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    if "fused" in variant:
        use_fused_logprobs(trainer, plan="auto" if variant.endswith("auto") else "recompute")
    return trainer.model.train(), lambda batch: trainer.compute_loss(trainer.model, dict(batch))


class HeadProducts(TorchDispatchMode):
    """Floating-point operations of matrix products with the head or with a gradient of logits: one of the three sizes
    is WIDTH, and another is neither a size of the layers nor the number of tokens, but a piece of the vocabulary."""

    def __init__(self, tokens: set[int]) -> None:
        super().__init__()
        self.others = {WIDTH, 192, 1536, *tokens}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            (m, k), n = a.shape, b.shape[1]
            if WIDTH in (m, k, n) and any(size not in self.others for size in (m, k, n)):
                self.flops += 2 * m * n * k
        return func(*args, **(kwargs or {}))


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, its highest since it was last reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def reset_high_water() -> None:
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def measure(variant: str, rows: int) -> None:
    own, loss = step_of(variant)
    loss(rollout(2, 8)).backward()
    for parameter in own.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are there before, so they are not counted
    batch = rollout(rows, COMPLETION)
    reset_high_water()
    before = memory("VmRSS")
    loss(batch).backward()
    grown = memory("VmHWM") - before
    live = int(batch["completion_mask"].sum())
    if "fused" in variant:
        with torch.device("meta"):
            hidden, weight = torch.empty(live, WIDTH), torch.empty(VOCABULARY, WIDTH)
        op = "linear_loss" if variant == "hf-fused" else "linear_logprob"
        plan = explain(
            hidden.requires_grad_(), weight.requires_grad_(), torch.empty(live, dtype=torch.long, device="meta"), op=op,
            entropy=True, plan="recompute" if variant == "grpo-fused" else "auto", backend="torch",
        )  # fmt: skip
        products = float(plan.gemms)
    else:
        length = PROMPT + COMPLETION
        with HeadProducts({rows * length, rows * (length - 1), rows * COMPLETION}) as seen:
            loss(batch).backward()
        products = seen.flops / (2 * live * WIDTH * VOCABULARY)
    print(f"{variant:16s} {rows} rows, N = {live}: {grown:6.0f} MiB, {products:5.2f} products", flush=True)


@torch.no_grad()
def error() -> None:
    """Log-probs in bfloat16 by TRL and by the op, against float64 on the same hidden states and head."""
    from trl.trainer.utils import add_fused_lm_head

    own = model().bfloat16().eval()
    own.lm_head.weight.mul_(6)  # logits as spread as a trained model's
    ids = torch.randint(1, VOCABULARY, (4, 128))
    hidden = own.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    exact = (hidden.double() @ own.lm_head.weight.double().T).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ours = linear_logprob(hidden, own.lm_head.weight, ids[:, 1:]).logprob
    add_fused_lm_head(own)
    theirs = own(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    for name, value in (("TRL", theirs), ("srppo", ours)):
        print(f"error of {name} in bfloat16: {(value.double() - exact).abs().max():.1e} nats", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", choices=(*VARIANTS, "error"))
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.variant == "error":
        error()
    elif arguments.variant is not None:
        measure(arguments.variant, arguments.rows)
    else:
        for rows in (8, 2):
            for name in VARIANTS:
                subprocess.run([sys.executable, __file__, name, "--rows", str(rows)], check=True)
        subprocess.run([sys.executable, __file__, "error"], check=True)


if __name__ == "__main__":
    main()
