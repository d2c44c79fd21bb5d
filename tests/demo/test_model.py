"""The demo's tokenizer and base model."""

import pytest
import torch
from transformers import AutoTokenizer

from srppo.console import Console
from srppo.demo.model import EOS_TOKEN, ModelSize, Pretraining, build_model, build_tokenizer, pretrain
from srppo.demo.world import World


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["roll badge>", "adgeb um ok", " a  b ", "a , b .", "Zürich\n\t→ 猫", "<pad>"])
def test_any_text_survives_saving_encoding_and_decoding(tokenizer, reloaded, text):
    for each in (tokenizer, reloaded):
        ids = each(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert each.decode(ids) == text


def test_saving_keeps_every_id(tokenizer, reloaded):
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert (reloaded.eos_token_id, reloaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert reloaded.padding_side == "left"


def test_eos_and_pad_are_two_tokens_that_no_text_contains(tokenizer):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == 258
    every_byte = "".join(chr(code) for code in range(0x800))
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(tokenizer(every_byte)["input_ids"])


def test_encoding_adds_nothing_and_skipping_special_tokens_drops_only_them(tokenizer):
    ids = tokenizer("ab")["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "ab"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "ab" + EOS_TOKEN


def test_the_model_knows_the_tokenizers_special_tokens(tokenizer):
    model = build_model(tokenizer, ModelSize(16, 1, 2), seed=0)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_building_a_model_is_seeded_and_leaves_torchs_generator_alone(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (build_model(tokenizer, ModelSize(16, 1, 2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_pretraining_lowers_the_loss_and_is_deterministic(tokenizer):
    settings = Pretraining(steps=30, batch_size=32, warmup_steps=3)

    def run():
        model = build_model(tokenizer, ModelSize(32, 1, 2), seed=0)
        return pretrain(model, tokenizer, World(0).corpus(500), settings, seed=0, console=Console(quiet=True)), model

    (losses, model), (again, _) = run(), run()
    assert losses == again
    assert losses[0] > 5.0  # about log 258
    assert losses[-1] < 4.0
    assert not model.training


def test_pretraining_against_a_plain_loop(tokenizer):
    """Prompts and padding have no loss: it is the mean over the completions' own tokens, each line run alone. AdamW,
    clipped, under a linear warm-up and a cosine."""
    corpus = World(0).corpus(6)
    settings = Pretraining(steps=5, batch_size=len(corpus), warmup_steps=2, max_grad_norm=0.5, learning_rate=1e-2)
    model, plain = (build_model(tokenizer, ModelSize(16, 1, 2), seed=0) for _ in range(2))
    losses = pretrain(model, tokenizer, corpus, settings, seed=0, console=Console(quiet=True))
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for got, factor in zip(losses, (0.5, 1, 1, 0.75, 0.25), strict=True):
        total, count = 0.0, 0
        for example in corpus:
            ids = torch.tensor([tokenizer(example.prompt + example.completion)["input_ids"] + [tokenizer.eos_token_id]])
            start = len(example.prompt)
            logits = plain(ids).logits[0, start - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
            count += ids.shape[1] - start
        optimizer.zero_grad()
        (total / count).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.6
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        assert got == pytest.approx(total.item() / count, rel=1e-4)
    assert losses[-1] < losses[0] - 0.1
