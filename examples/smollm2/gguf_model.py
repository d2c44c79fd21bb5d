"""A Llama model in a GGUF file as the folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

transformers reads GGUF files itself, and of this model it gets the weights right but not the tokenizer: it puts a BOS
token before every text and takes a token for EOS that the model never writes, so that answers run on as garbage. The
file says what is right (no BOS, EOS ``<|im_end|>``, merges, chat template), so everything is taken from it here.

A GGUF differs from a transformers folder in three ways:

- tensors are quantised (here mostly Q4_1, 4 bits with a scale and a minimum per 32 weights) and have other names;
- rows of the query and key projections are in another order: llama.cpp rotates neighbours ``(2i, 2i + 1)``,
  transformers rotates ``(i, i + d/2)``;
- there is no ``lm_head.weight`` where the head is the embedding, as in every small model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srppo.checkpoint import atomic_folder
from srppo.errors import UserError

CONTROL = 3  # llama.cpp's token type of tokens that never come out of text
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, target: Path) -> None:
    """Writes the model and tokenizer in the GGUF file ``source`` to the new folder ``target``, all at once."""
    reader = gguf.GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    check_kind(fields, source)
    model = build_model(fields, reader.tensors)
    tokenizer = build_tokenizer(fields)
    with atomic_folder(target) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def check_kind(fields: dict[str, Any], source: Path) -> None:
    """Another architecture or pre-tokenizer would convert without an error, to a model that writes nonsense."""
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, value in known.items():
        if fields.get(name) != value:
            raise UserError(f"{source}: {name} is {fields.get(name)!r}, and only {value!r} can be converted here")


# -- the model --------------------------------------------------------------------------------------------------------


def build_model(fields: dict[str, Any], tensors: list[Any]) -> LlamaForCausalLM:
    """The model in fp32, with every weight accounted for."""
    special = special_tokens(fields)
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in tensors),
        **special,
    )
    weights = {}
    for tensor in tensors:
        name, weight = hf_name(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = halves_together(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = halves_together(weight, config.num_key_value_heads)
        weights[name] = torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    model.generation_config = GenerationConfig(**special)
    return model


def hf_name(name: str) -> str:
    """``blk.7.attn_q.weight`` becomes ``model.layers.7.self_attn.q_proj.weight``."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in TENSORS:
        raise UserError(f"the GGUF file has a tensor {name!r}, which a Llama model has no place for")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{TENSORS[match[2]]}.weight"


def halves_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order (first pair, second pair, ...) to transformers' (first halves, second
    halves)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def special_tokens(fields: dict[str, Any]) -> dict[str, int]:
    """Ids as the file has them. EOS ends a turn (``<|im_end|>``) and pads too: the trainer carries masks, so that is
    no ambiguity."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as SmolLM2 was trained with: each digit a token of its own, no BOS, nothing after a text.

    The absence of a post-processor is the point: it is what would put BOS and EOS around a text. The chat template
    writes ``<|im_start|>`` itself.
    """
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = special_tokens(fields)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[special["bos_token_id"]],
        eos_token=tokens[special["eos_token_id"]],
        pad_token=tokens[special["pad_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = fields["tokenizer.chat_template"]
    return wrapped
