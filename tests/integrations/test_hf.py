"""Fused cross-entropy in the forward of Hugging Face models: equal to the model's own, and without logits."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from largest import LargestTensor
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from srppo import UserError
from srppo.integrations import hf
from srppo.integrations.hf import use_fused_cross_entropy

KINDS = ("llama", "qwen2", "gpt2", "gemma2", "cohere2", "granite")


def batch(rows: int = 3, length: int = 20, *, vocab: int = 264) -> dict[str, Tensor]:
    """Prompts and padding without labels; the last row has no label at all."""
    ids = torch.randint(5, vocab, (rows, length))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training(kind: str = "llama", **options: Any) -> PreTrainedModel:
    """In training mode, without dropout, so that two passes can be compared."""
    model = tiny_model(kind, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model: nn.Module, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(plain: nn.Module, fused: nn.Module, *, tolerance: float = 1e-6, **inputs: Any) -> None:
    (loss, theirs), (fused_loss, ours) = gradients(plain, **inputs), gradients(fused, **inputs)
    assert fused_loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert theirs.keys() == ours.keys() and theirs
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=tolerance, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("items", [None, 37, torch.tensor(11)])
def test_loss_and_gradients_are_the_models_own(kind: str, items: Any) -> None:
    plain = training(kind)
    fused = use_fused_cross_entropy(copy.deepcopy(plain))
    assert_equal(plain, fused, num_items_in_batch=items, **batch())


def test_a_head_with_a_bias() -> None:
    plain = training()
    plain.lm_head = nn.Linear(32, 264)
    assert_equal(plain, use_fused_cross_entropy(copy.deepcopy(plain)), **batch())


@pytest.mark.parametrize("kind", ["mamba", "llama4"])
def test_a_model_without_attentions_and_one_without_a_base_model(kind: str) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    if kind == "mamba":
        plain: PreTrainedModel = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 1}
        experts = {"num_local_experts": 2, "intermediate_size_mlp": 16}
        plain = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts))
        assert plain.base_model is plain  # its prefix is that of the model with images
    assert_equal(plain, use_fused_cross_entropy(copy.deepcopy(plain)), **batch())


def test_labels_that_are_shifted_already_and_another_index_that_is_ignored() -> None:
    plain = training()
    fused = use_fused_cross_entropy(copy.deepcopy(plain))
    inputs = batch()
    labels = inputs["input_ids"]
    assert_equal(plain, fused, input_ids=labels, labels=labels, ignore_index=int(labels[0, 5]))
    inputs["shift_labels"] = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    inputs["labels"] = torch.full_like(labels, -100)  # which they stand in for
    assert_equal(plain, fused, **inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain = training()
    fused = use_fused_cross_entropy(copy.deepcopy(plain))
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        fused.enable_input_require_grads()
    assert_equal(plain, fused, **batch())


def test_a_lora_model_learns_the_same() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    plain = get_peft_model(training("gemma2"), config)
    fused = use_fused_cross_entropy(copy.deepcopy(plain))
    assert_equal(plain, fused, **batch())


def test_autocast_reaches_the_head_where_a_trainer_does_not_keep_it_in_32_bit() -> None:
    model = tiny_model("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    fused, hidden = hf.fuse(model), torch.randn(3, model.config.hidden_size)
    for reaches, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        fused.autocast = reaches
        with torch.autocast("cpu", torch.bfloat16):
            got, head = hf.head_inputs(model, hidden)
        assert (got.dtype, head.weight.dtype, head.bias.dtype) == (dtype,) * 3
        assert torch.equal(got, hidden.to(dtype)) and torch.equal(head.bias, model.lm_head.bias.to(dtype))


def test_autocast_is_followed_and_logits_are_not_rounded() -> None:
    exact = training()
    plain, fused = copy.deepcopy(exact), use_fused_cross_entropy(copy.deepcopy(exact))
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (model(**inputs).loss.item() for model in (plain, fused))
    assert ours == pytest.approx(theirs, abs=2e-2)
    assert ours != exact(**inputs).loss.item()  # the backbone and the head's inputs are in 16 bit


def test_no_tensor_of_the_logits_size() -> None:
    vocab, rows, length = 40_000, 4, 60
    fused = use_fused_cross_entropy(training(vocab_size=vocab, hidden=16), workspace_bytes=0)
    plain = training(vocab_size=vocab, hidden=16)
    inputs = batch(rows, length, vocab=vocab)
    with LargestTensor() as theirs:
        gradients(plain, **inputs)
    with LargestTensor() as ours:
        gradients(fused, **inputs)
    assert theirs.numel >= rows * length * vocab  # the check sees logits where there are some
    assert ours.numel < rows * (length - 1) * vocab


def test_the_workspace_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], hf.linear_loss
    monkeypatch.setattr(hf, "linear_loss", lambda *a, **k: seen.append(k["workspace_bytes"]) or original(*a, **k))
    use_fused_cross_entropy(training(), workspace_bytes=12345)(**batch())
    assert seen == [12345]


def test_without_labels_the_forward_is_the_models_own() -> None:
    plain = training().eval()
    fused = use_fused_cross_entropy(copy.deepcopy(plain))
    ids = batch()["input_ids"]
    torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0)
    prompt = {"input_ids": ids[:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    texts = [model.generate(**prompt, max_new_tokens=6, do_sample=False) for model in (plain, fused)]
    assert texts[0].tolist() == texts[1].tolist()


def test_a_forward_that_has_no_logits_with_labels() -> None:
    """As TRL's chunked loss patched it before 1.15."""
    plain = training()
    patched, own = copy.deepcopy(plain), type(plain).forward

    def forward(self: PreTrainedModel, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = own(self, *args, labels=labels, **kwargs)
        if labels is not None:
            output.logits = None
        return output

    patched.forward = types.MethodType(forward, patched)
    assert_equal(plain, use_fused_cross_entropy(patched), **batch())


def test_evaluation_has_logits_where_they_are_asked_for() -> None:
    inputs = batch()
    fused = use_fused_cross_entropy(training())
    assert fused.eval()(**inputs).logits is None
    loss = fused(**inputs).loss.item()
    again = use_fused_cross_entropy(fused, eval_logits=True)
    assert again is fused
    output = fused(**inputs)
    assert output.logits.shape == (3, 20, 264)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert fused.train()(**inputs).logits is None


def test_a_tuple_and_hidden_states_where_they_are_asked_for() -> None:
    fused, inputs = use_fused_cross_entropy(training()), batch()
    loss, *_ = fused(**inputs, return_dict=False)
    output = fused(**inputs, output_hidden_states=True)
    assert loss.item() == output.loss.item()
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_has_loss_zero(items: Any) -> None:
    fused, inputs = use_fused_cross_entropy(training()), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = gradients(fused, num_items_in_batch=items, **inputs)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in grads.values())


def test_unwrapping_by_accelerate_takes_off_its_own_wrapper_only() -> None:
    fused = use_fused_cross_entropy(training())
    names = list(inspect.signature(type(fused).forward).parameters)[1:]
    assert list(inspect.signature(fused.forward).parameters) == names  # as generate and Trainer look at them
    fused._original_forward = fused.forward  # as prepare does it for mixed precision
    fused.forward = types.MethodType(convert_outputs_to_fp32(fused.forward.__func__), fused)
    assert extract_model_from_parallel(fused, keep_fp32_wrapper=False) is fused
    assert fused(**batch()).logits is None


def test_a_copy_has_its_own_weights() -> None:
    fused = use_fused_cross_entropy(training())
    twin = copy.deepcopy(fused)
    inputs = batch()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert twin(**inputs).loss != fused(**inputs).loss
        assert (twin(input_ids=inputs["input_ids"]).logits != fused(input_ids=inputs["input_ids"]).logits).any()


def test_a_pickled_model_can_be_fused_again() -> None:
    fused = use_fused_cross_entropy(training())
    back = pickle.loads(pickle.dumps(fused))
    assert back(**batch()).logits is not None  # pickle gives methods back by name: the class's own
    assert use_fused_cross_entropy(back)(**batch()).logits is None


def test_dropout_does_not_disturb_the_check_and_comes_back() -> None:
    model = tiny_model("gpt2").train()
    frozen = model.transformer.h[0].eval()
    use_fused_cross_entropy(model)
    assert model.training and model.transformer.h[1].training and not frozen.training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_the_trainer(tmp_path: Path, accumulation: int) -> None:
    """The same losses, gradient norms, evaluation and weights, with labels of different number in each micro-batch."""

    def run(fused: bool) -> tuple[list[dict[str, float]], list[Tensor]]:
        torch.manual_seed(0)
        rows = [{name: row[i] for name, row in batch(6, 12).items()} for i in range(5)]
        for i, row in enumerate(rows):
            row["labels"] = row["labels"].clone()
            row["labels"][: 2 * i] = -100
        model = tiny_model("qwen2")
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, max_steps=3,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(
            use_fused_cross_entropy(model) if fused else model, args, train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        history = [{k: h[k] for k in ("loss", "grad_norm") if k in h} for h in trainer.state.log_history]
        return [*history, {"eval_loss": trainer.evaluate()["eval_loss"]}], list(model.parameters())

    (theirs, expected), (ours, weights) = run(False), run(True)
    assert len(theirs) == len(ours) >= 4
    for a, b in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for a, b in zip(expected, weights, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-3)  # Adam's first steps divide by tiny gradients


def test_predictions_with_logits(tmp_path: Path) -> None:
    rows = [{name: row[i] for name, row in batch(3, 12).items()} for i in range(3)]
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    with_logits = Trainer(use_fused_cross_entropy(tiny_model(), eval_logits=True), args).predict(rows)
    assert with_logits.predictions.shape == (3, 12, 264)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(2, 2), "no transformers model"),
        (
            lambda: get_peft_model(
                tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
            ),
            "adapter",
        ),
        (
            lambda: get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "learned prompt",
        ),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2)), "encoder-decoder"),
        (lambda: mixtral(), "load-balancing"),
        (lambda: with_loss(tiny_model()), "not with the next-token"),
        (lambda: strange(tiny_model(), lambda logits: logits * 1.5), "does not reproduce"),
        (lambda: strange(untrained(), lambda logits: 30 * torch.tanh(logits / 30)), "does not reproduce"),
        (lambda: with_scales(tiny_model()), "nor is a head that computes more"),
        (lambda: with_z_loss(tiny_model()), "where the next-token cross-entropy is"),
        (lambda: sharded(tiny_model()), "before fully_shard"),
        (lambda: tiny_model().to("meta"), "not in memory"),
        (lambda: pruned(tiny_model()), "computed by a hook"),
    ],
)
def test_what_is_refused(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        use_fused_cross_entropy(make())


def test_router_logits_asked_for_in_a_call_are_refused() -> None:
    fused = use_fused_cross_entropy(training())
    with pytest.raises(UserError, match="load-balancing"):
        fused(**batch(), output_router_logits=True)
    fused.config.output_router_logits = True  # the model's own forward would follow it
    with pytest.raises(UserError, match="load-balancing"):
        fused(**batch())


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def with_loss(model: PreTrainedModel) -> PreTrainedModel:
    model.loss_function = lambda *_, **__: torch.zeros(())
    return model


def with_z_loss(model: PreTrainedModel) -> PreTrainedModel:
    """As Bamba with a z_loss_coefficient."""
    forward = model.forward

    def with_addition(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.loss is not None:
            output.loss += 1e-2 * output.logits.logsumexp(-1).square().mean()
        return output

    model.forward = with_addition
    return model


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """As fully_shard leaves it, as far as it can be told."""
    model.set_reshard_after_forward = lambda *_: None
    return model


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """With a weight that a hook computes anew when the head is called: read alone, it had no gradient."""
    prune.random_unstructured(model.lm_head, "weight", 0.3)
    return model


def with_scales(model: PreTrainedModel) -> PreTrainedModel:
    """A head with a learned scale for each token, which are all 1 before training."""

    class ScaledLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 264, bias=False)
            self.scale = nn.Parameter(torch.ones(264))

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * self.scale

    model.lm_head = ScaledLinear()
    return model


def untrained() -> PreTrainedModel:
    """With logits as small as those of random weights in a real model."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return model


def strange(model: PreTrainedModel, transform: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """An architecture that does something to its logits that no configuration names."""
    model.lm_head.register_forward_hook(lambda _, __, logits: transform(logits))
    return model
