"""Hugging Face Trainer with cross-entropy from hidden states: the same run without and with it.

python examples/integrations/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from small import byte_tokenizer, tiny_llama
from transformers import Trainer, TrainingArguments

from srppo.integrations.hf import use_fused_cross_entropy


def rows() -> list[dict[str, torch.Tensor]]:
    """Words and themselves backwards; the labels leave the prompt out."""
    tokenizer = byte_tokenizer()
    examples = []
    for word in ("stone", "river", "cloud", "grass", "flame", "north", "bread", "chair"):
        prompt = tokenizer(f"{word}:", return_tensors="pt")["input_ids"][0]
        answer = tokenizer(f"{word[::-1]}<|end|>", return_tensors="pt")["input_ids"][0]
        ids = torch.cat([prompt, answer])
        examples.append({"input_ids": ids, "labels": torch.cat([torch.full_like(prompt, -100), answer])})
    return examples


def losses(fused: bool) -> list[float]:
    model = tiny_llama()
    if fused:
        model = use_fused_cross_entropy(model)  # the one line
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=4, max_steps=40, learning_rate=3e-3, logging_steps=10, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    own, fused = losses(False), losses(True)
    for number, (a, b) in enumerate(zip(own, fused, strict=True), 1):
        print(f"step {10 * number}: loss {a:.5f} by the model, {b:.5f} fused")


if __name__ == "__main__":
    main()
