"""The demo's base model: a byte-level tokenizer, a tiny Llama, and its pretraining."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srppo.console import Console

from .world import Example

EOS_TOKEN, PAD_TOKEN = "<|end|>", "<|pad|>"
MAX_POSITIONS = 128

Line = tuple[list[int], list[int]]  # prompt and completion with EOS, as token ids


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: one token a byte, so any text survives encoding and decoding.

    EOS and pad are tokens of their own, distinct from each other; there is no BOS, and encoding adds nothing.
    """
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        # Otherwise decoding would drop the space in " ,", and a decoded completion would not be what was sampled.
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class ModelSize:
    """Shape of the base model. The default has 0.4 M parameters."""

    hidden_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 4


def build_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with its own LM head (untied), in fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_attention_heads,
        max_position_embeddings=MAX_POSITIONS,
        # Both for learning to copy letters in hundreds of steps instead of thousands: the usual 0.02 is meant for much
        # wider models, and the usual rotary base of 10,000 for contexts of thousands of tokens, not of 35.
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Pretraining:
    """Settings of the pretraining loop."""

    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Sequence[Example],
    settings: Pretraining,
    *,
    seed: int,
    console: Console,
) -> list[float]:
    """Train ``model`` in place on ``corpus`` and return the loss of each step, in nats per token.

    The loss covers completions only. A prompt's letters are drawn at random, so a loss on them could only fall to a
    constant, while its gradient is noise: with it, the same accuracy takes more than twice as many steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, settings))
    lines = _encode(tokenizer, corpus)
    batches = _batches(lines, settings.batch_size, tokenizer.pad_token_id, random.Random(f"{seed}:pretraining"))
    losses: list[float] = []
    model.train()
    with console.progress("Pretraining", settings.steps) as bar:
        for _ in range(settings.steps):
            inputs, labels = next(batches)
            # Causal attention: padding on the right is never seen by a token that has a label, so no mask is needed.
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.advance(int((labels != -100).sum()), f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def _warmup_cosine(step: int, settings: Pretraining) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _encode(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Example]) -> list[Line]:
    # Prompt and completion are encoded apart, as the later stages do. With one token a byte it makes no difference
    # here; with merges it would, at the seam.
    prompts: Any = tokenizer([example.prompt for example in corpus])["input_ids"]
    completions: Any = tokenizer([example.completion or "" for example in corpus])["input_ids"]
    return [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def _batches(
    lines: list[Line], batch_size: int, pad_token_id: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of ``(inputs, labels)``, padded on the right; labels are -100 on prompts and padding.

    Lines are not grouped by length, though that would halve the padding: a batch of short lines only, with a loss per
    token, weighs each of its tokens more, and the shortest way to answer would be learnt to be the most frequent.
    """
    order = list(range(len(lines)))
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(prompt) + len(completion) for prompt, completion in (lines[i] for i in batch))
            inputs = torch.full((len(batch), width), pad_token_id)
            labels = torch.full((len(batch), width), -100)
            for row, i in enumerate(batch):
                prompt, completion = lines[i]
                end = len(prompt) + len(completion)
                inputs[row, :end] = torch.tensor(prompt + completion)
                labels[row, len(prompt) : end] = torch.tensor(completion)
            yield inputs, labels
