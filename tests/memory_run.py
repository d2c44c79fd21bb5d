"""A process of its own that runs one iteration and prints what was estimated and what it took, in bytes, as JSON."""

from __future__ import annotations

import gc
import json
import sys

import torch
from tiny import tiny_tokenizer
from tiny_runs import QUIET
from transformers import LlamaConfig, LlamaForCausalLM

from bench.method import reset_resident_peak, resident
from srppo import SRPPOConfig, SRPPOTrainer
from srppo.data import Example
from srppo.memory import estimate
from srppo.metrics import peak_memory_gib

SIZES = {
    "tiny": {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "small": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
              "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
PROMPT, COMPLETION, BATCH = 48, 16, 6


def iteration(size: str, args: SRPPOConfig) -> int:
    """Runs one; returns the estimate."""
    prompts = [Example([5 + row] * PROMPT, None, None, "") for row in range(BATCH)]
    base, sft = (LlamaForCausalLM(LlamaConfig(**SIZES[size])) for _ in range(2))
    told = estimate(args, base, sft, longest_prompt=PROMPT)
    assert told is not None
    run = SRPPOTrainer(sft, base, args, prompts, processing_class=tiny_tokenizer(), console=QUIET)
    with QUIET.progress("", 1) as bar:
        run.iterate(bar)
    return told.peak


def main(size: str, use_peft: bool, folder: str) -> None:
    torch.set_num_threads(1)
    args = SRPPOConfig(
        use_peft=use_peft, output_dir=folder, max_steps=1, num_ppo_epochs=1, per_device_train_batch_size=BATCH,
        max_completion_length=COMPLETION, report_to=["none"], log_completions=0, stop_token_ids=[0],
    )  # fmt: skip
    iteration("tiny", args)  # what imports and first uses take is no part of a run, and depends on what is cached
    gc.collect()
    before = resident("VmRSS")
    reset_resident_peak()  # it starts again from what is resident now
    estimated = iteration(size, args)
    taken = int(peak_memory_gib() * 2**30) - before
    print(json.dumps({"estimated": estimated, "taken": taken}))


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3] == "lora", sys.argv[1])
