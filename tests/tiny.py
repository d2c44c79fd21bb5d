"""Tiny models and a tokenizer that the tests make themselves, with no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

KINDS = ["llama", "qwen2", "gpt2", "gemma2", "cohere2", "granite"]
# Gemma 2 has no sdpa: its attention caps its scores.
ATTENTIONS = [(kind, how) for how in ("eager", "sdpa") for kind in KINDS if (kind, how) != ("gemma2", "sdpa")]

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(*, pad: str | None = "<|pad|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE with no merges; ``pad=None`` leaves the pad token out."""
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(kind: str = "llama", *, seed: int = 0, vocab_size: int = 264, hidden: int = 32) -> PreTrainedModel:
    """A two-layer model: ``llama`` (untied head), ``qwen2`` (tied), ``gpt2``, ``gemma2``, ``cohere2``, ``granite``."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).eval()
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=5.0)).eval()
    if kind == "cohere2":
        return Cohere2ForCausalLM(Cohere2Config(**sizes, logit_scale=0.25)).eval()
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)).eval()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_embd=hidden, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0,
            initializer_range=0.2,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    raise ValueError(kind)


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """A model folder as a user would have it."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)
