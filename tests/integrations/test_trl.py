"""TRL's trainers with fused log-probs, fused cross-entropy and the self-reward, against the same trainers without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from largest import LargestTensor
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from srppo import UserError
from srppo.self_reward import SelfReward

pytest.importorskip("trl", reason="the trainers that are patched are TRL's: pip install trl")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from srppo.integrations.trl import use_exact_prompts, use_fused_cross_entropy, use_fused_logprobs

PROMPTS = [{"prompt": prompt} for prompt in ("ab:", "cde:", "fghi:", "j:")]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
CLASSES = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def reward_by_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make(
    folder: Path,
    *,
    algorithm: str = "grpo",
    kind: str = "llama",
    model: Any = None,
    reward: Any = reward_by_ids,
    data: Any = PROMPTS,
    peft_config: Any = None,
    sizes: dict[str, int] | None = None,
    **settings: Any,
) -> Any:
    trainer, config = CLASSES[algorithm]
    defaults = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "temperature": 0.7,
        "beta": 0.1,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if model is None:
        model = save(tiny_model(kind, **(sizes or {})), folder / kind)
    return trainer(
        model,
        reward_funcs=reward,
        args=config(**{**defaults, **settings}),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def rollout(rows: int = 4, prompt: int = 5, length: int = 7, *, vocab: int = 264) -> dict[str, Tensor]:
    """What TRL hands to its loss: prompts padded on the left, completions on the right, one of a single token."""
    prompt_mask, completion_mask = (torch.ones(rows, n, dtype=torch.long) for n in (prompt, length))
    prompt_mask[0, :3] = 0
    completion_mask[1, 4:] = 0
    completion_mask[2, 1:] = 0
    return {
        "prompt_ids": torch.randint(5, vocab, (rows, prompt)),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(5, vocab, (rows, length)),
        "completion_mask": completion_mask,
        "advantages": torch.randn(rows),
        "num_items_in_batch": completion_mask.sum(),
    }


def step(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
    """Loss, gradients and metrics of one training micro-batch."""
    trainer.model.train().zero_grad()
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = 1  # what train() sets
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads, dict(trainer._metrics["train"])


def logprobs_and_entropies(
    trainer: Any, inputs: dict[str, Tensor], *, model: Any = None, **options: Any
) -> tuple[Tensor, ...]:
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    keep = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model or trainer.model, ids, mask, keep, **options)


def assert_same_step(plain: Any, fused: Any, inputs: dict[str, Tensor]) -> None:
    now = logprobs_and_entropies(plain, inputs)[0]
    old, ref = (now + scale * torch.randn_like(now) for scale in (0.1, 0.3))
    inputs["old_per_token_logps"], inputs["ref_per_token_logps"] = old, ref
    inputs["old_logps"] = (old * inputs["completion_mask"]).sum(-1)
    (loss, theirs, metrics), (fused_loss, ours, fused_metrics) = step(plain, inputs), step(fused, inputs)
    assert fused_loss == pytest.approx(loss, abs=1e-5, rel=1e-5)
    assert theirs.keys() == ours.keys() and theirs
    assert max(gradient.abs().max().item() for gradient in theirs.values()) > 1e-3
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5, msg=name)
    assert fused_metrics.keys() == metrics.keys()
    for name, values in metrics.items():
        assert fused_metrics[name] == pytest.approx(values, abs=1e-5, rel=1e-5), name


# -- fused log-probs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "cohere2", "granite"])
def test_a_steps_loss_and_gradients_are_trls(tmp_path: Path, algorithm: str, kind: str) -> None:
    """Untied, tied, soft-capped and scaled heads; a ratio that is not 1; padding on both sides."""
    plain, fused = (make(tmp_path, algorithm=algorithm, kind=kind) for _ in range(2))
    use_fused_logprobs(fused)
    assert_same_step(plain, fused, rollout())


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "beta": 0.0},
        {"loss_type": "dr_grpo", "entropy_coef": 0.5},
        {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "dapo", "top_entropy_quantile": 0.5},
        {"loss_type": "sapo"},
        {"loss_type": "dapo", "delta": 1.5, "epsilon_high": 0.28},
    ],
)
def test_every_loss_of_grpo(tmp_path: Path, settings: dict[str, Any]) -> None:
    unknown = settings.keys() - GRPOConfig.__dataclass_fields__.keys()
    if unknown:
        pytest.skip(f"this version of TRL has no {unknown.pop()}")
    plain, fused = (make(tmp_path, **settings) for _ in range(2))
    use_fused_logprobs(fused, plan="auto")
    assert_same_step(plain, fused, rollout())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_learns_the_same(tmp_path: Path, checkpointing: bool) -> None:
    def peft_trainer() -> Any:
        torch.manual_seed(1)
        return make(tmp_path, peft_config=LORA, gradient_checkpointing=checkpointing)

    plain, fused = peft_trainer(), peft_trainer()
    use_fused_logprobs(fused)
    assert_same_step(plain, fused, rollout())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_reference_model_in_mixed_precision(tmp_path: Path, algorithm: str) -> None:
    """Accelerate has put its autocast around the reference model, and not yet around the policy."""
    plain, fused = (make(tmp_path, algorithm=algorithm, bf16=True) for _ in range(2))
    use_fused_logprobs(fused)
    data = rollout()
    live = data["completion_mask"].bool()
    for name in ("model", "ref_model"):
        theirs, ours = (logprobs_and_entropies(t, data, model=getattr(t, name))[0] for t in (plain, fused))
        torch.testing.assert_close(ours[live], theirs[live], atol=5e-2, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_in_32_bit_on_a_model_in_16(tmp_path: Path, kind: str) -> None:
    if "cast_lm_head_to_fp32" not in GRPOConfig.__dataclass_fields__:
        pytest.skip("this version of TRL has no cast_lm_head_to_fp32")
    settings = {"kind": kind, "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    plain, fused = (make(tmp_path, **settings) for _ in range(2))
    use_fused_logprobs(fused)
    assert not vars(fused.accelerator.unwrap_model(fused.model))["_srppo_fused"].autocast
    assert_same_step(plain, fused, rollout())


def test_chunks_of_sequences_and_padding(tmp_path: Path) -> None:
    plain, fused = (make(tmp_path) for _ in range(2))
    use_fused_logprobs(fused)
    data = rollout()
    expected = logprobs_and_entropies(plain, data, compute_entropy=True)
    results = [logprobs_and_entropies(fused, data, batch_size=n, compute_entropy=True) for n in (None, 3)]
    live = data["completion_mask"].bool()
    for ours in results:
        assert len(ours) == len(expected)
        for a, b in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(a[live], b[live], atol=1e-5, rtol=1e-5)
            assert (a[~live] == 0).all()
    logprobs, entropies, *_ = logprobs_and_entropies(fused, data)
    assert entropies is None and torch.equal(logprobs, results[0][0])


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_run_is_trls(tmp_path: Path, algorithm: str) -> None:
    """Two iterations, the second on old log-probs of an earlier policy, with a reference model."""
    histories, weights = [], []
    for fused in (False, True):
        trainer = make(tmp_path, algorithm=algorithm, num_iterations=2, max_steps=4, optim="sgd", learning_rate=0.1)
        if fused:
            use_fused_logprobs(trainer)
        trainer.train()
        histories.append(trainer.state.log_history)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])  # the next make() writes its file anew
    for a, b in zip(*histories, strict=True):
        keys = [key for key in a if not key.startswith(("step_time", "train_"))]
        assert [b[key] for key in keys] == pytest.approx([a[key] for key in keys], abs=1e-4, rel=1e-4)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


def test_no_tensor_of_the_logits_size(tmp_path: Path) -> None:
    vocab, length = 40_000, 60
    sizes = {"vocab_size": vocab, "hidden": 16}
    trainer = make(tmp_path, sizes=sizes, max_completion_length=length, beta=0.0)
    use_fused_logprobs(trainer)
    inputs = rollout(length=length, vocab=vocab)
    inputs["completion_mask"].fill_(1)
    size = inputs["completion_ids"].numel() * vocab
    with LargestTensor() as ours:
        step(trainer, inputs)
    assert ours.numel < size, ours.by
    assert {"srppo::linear_logprob", "srppo::linear_logprob_backward"} <= ours.ops
    with LargestTensor() as naive:  # the check sees logits where there are some
        trainer.model(input_ids=inputs["completion_ids"])
    assert naive.numel >= size


def test_generation_is_not_touched(tmp_path: Path) -> None:
    plain, fused = (make(tmp_path) for _ in range(2))
    use_fused_logprobs(fused)
    prompt = torch.tensor([[10, 11, 12]])
    texts = [t.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for t in (plain, fused)]
    assert texts[0].tolist() == texts[1].tolist()


def test_images_go_trls_own_way(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    seen = []
    trainer._get_per_token_logps_and_entropies = lambda *a, compute_aux_loss=False, **k: seen.append(k)
    use_fused_logprobs(trainer)
    ids = torch.ones(2, 6, dtype=torch.long)
    with pytest.warns(UserWarning, match="images"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 3, pixel_values=torch.ones(2, 3))
    assert seen[0]["pixel_values"].shape == (2, 3)


def test_twice_is_once(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    use_fused_logprobs(trainer)
    method, forward = trainer._get_per_token_logps_and_entropies, trainer.model.forward
    use_fused_logprobs(trainer, plan="auto")
    assert trainer._get_per_token_logps_and_entropies is method and trainer.model.forward == forward
    assert method.plan == "auto"


# -- SFT --------------------------------------------------------------------------------------------------------------

DEMONSTRATIONS = [{"prompt": p, "completion": p[::-1]} for p in ("ab", "cde", "fghi", "j", "klmno", "pq")]


def sft(folder: Path, *, kind: str = "qwen2", **settings: Any) -> SFTTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "sft"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    return SFTTrainer(
        save(tiny_model(kind), folder / kind),
        args=SFTConfig(**{**defaults, **settings}),
        train_dataset=Dataset.from_list(DEMONSTRATIONS),
        eval_dataset=Dataset.from_list(DEMONSTRATIONS),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 16}, {"gradient_checkpointing": False}])
def test_sft_has_the_losses_that_trl_computes(tmp_path: Path, settings: dict[str, Any]) -> None:
    runs, evaluations = [], []
    for fused in (False, True):
        trainer = sft(tmp_path, **settings)
        if fused:
            use_fused_cross_entropy(trainer)
        trainer.train()
        runs.append([h for h in trainer.state.log_history if "loss" in h])
        trainer.evaluate()
        evaluation = trainer.state.log_history[-1]  # TRL 1.0 logs the number of tokens and does not return it
        evaluations.append([evaluation[key] for key in ("eval_loss", "eval_num_tokens")])
    assert len(runs[0]) == 3
    for a, b in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert b[key] == pytest.approx(a[key], abs=1e-5, rel=1e-4), key
    assert evaluations[1] == pytest.approx(evaluations[0], abs=1e-5, rel=1e-4)


def test_sft_counts_the_tokens_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, whose other one has a token more in each batch; none in evaluation."""
    trainer = sft(tmp_path)
    use_fused_cross_entropy(trainer)
    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", lambda local: torch.stack([local, local + 1]))
    batches = list(trainer.get_train_dataloader())[:2]
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    for mode, batch in ((True, batches[0]), (True, batches[1]), (False, batches[0])):
        trainer.model.train(mode)
        trainer.compute_loss(trainer.model, batch)
    assert trainer._total_train_tokens == 2 * sum(counts) + 2


# -- the self-reward --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[[], PeftModel]:
    """A base with an "sft" adapter, and a policy that starts as its copy."""

    def build() -> PeftModel:
        torch.manual_seed(1)
        model = get_peft_model(tiny_model("llama"), LORA, adapter_name="default")
        model.add_adapter("sft", LORA)
        state = model.state_dict()
        model.load_state_dict({k.replace(".default.", ".sft."): v for k, v in state.items()}, strict=False)
        return model

    return build


def spy(reward: SelfReward) -> list[tuple[Any, Any, Tensor]]:
    """Prompts, completions and rewards of every call, by token ids."""
    seen, original = [], reward.log_ratios

    def log_ratios(prompt_ids: Any, completion_ids: Any) -> Any:
        ratios, rollout = original(prompt_ids, completion_ids)
        seen.append((prompt_ids, completion_ids, ratios.sum(-1)))
        return ratios, rollout

    reward.log_ratios = log_ratios  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_on_the_self_reward(
    tmp_path: Path, adapted: Callable[[], PeftModel], algorithm: str, fused: bool
) -> None:
    """One model in memory is policy, SFT and base; only the policy's adapter learns; rewards are exact by token id."""
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reward = SelfReward.from_peft(model, "sft", tiny_tokenizer())
    seen = spy(reward)
    trainer = make(tmp_path, algorithm=algorithm, model=model, reward=reward, max_steps=3)
    use_exact_prompts(trainer)
    if fused:
        use_fused_logprobs(trainer)
    trainer.train()
    assert len(seen) >= 2
    logged = [h["rewards/self_reward/mean"] for h in trainer.state.log_history if "reward" in h]
    assert logged == pytest.approx([rewards.mean().item() for *_, rewards in seen], abs=1e-5)
    base, twin = tiny_model("llama"), adapted()
    twin.set_adapter("sft")
    by_hand = lambda m, p, c: m.eval()(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].log_softmax(-1)  # noqa: E731
    for prompts, completions, rewards in seen:
        for p, c, r in zip(prompts, completions, rewards.tolist(), strict=True):
            with torch.no_grad():
                ratio = by_hand(twin, p, c) - by_hand(base, p, c)
            assert r == pytest.approx(ratio.gather(-1, torch.tensor(c)[:, None]).sum().item(), abs=1e-4)
    for name, parameter in model.named_parameters():
        if name in before:  # TRL adds a copy of the policy as "ref"
            assert torch.equal(parameter, before[name]) == (".default." not in name), name


def test_prompts_are_the_ids_that_were_sampled_from(tmp_path: Path, adapted: Callable[[], PeftModel]) -> None:
    """A template option that only the trainer knows changes the prompt; the self-reward sees it all the same."""
    model = adapted()
    tokenizer = tiny_tokenizer()
    data = [{"prompt": [{"role": "user", "content": p["prompt"]}]} for p in PROMPTS]
    reward = SelfReward.from_peft(model, "sft", tokenizer)
    seen = spy(reward)
    trainer = make(
        tmp_path, model=model, reward=reward, data=data, max_steps=1, chat_template_kwargs={"thinking": True}
    )
    template = "{% if thinking %}T{% endif %}" + tokenizer.chat_template
    trainer.processing_class.chat_template = template
    use_exact_prompts(trainer)
    trainer.train()
    first = tokenizer("T", add_special_tokens=False)["input_ids"]
    assert [prompt[:1] for prompts, *_ in seen for prompt in prompts] == [first] * 4
    trainer.reward_funcs[0]([row["prompt"] for row in data[:2]], ["a", "b"], completion_ids=[[5, 0], [6, 0]])
    for ids, row in zip(seen[-1][0], PROMPTS[:2], strict=True):
        assert row["prompt"] in tokenizer.decode(ids)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_lora_on_the_head_is_refused(tmp_path: Path) -> None:
    """Newer versions of TRL refuse it themselves."""
    config = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"lm_head"):
        use_fused_logprobs(make(tmp_path, peft_config=config))


def test_lora_on_the_head_that_comes_later_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    use_fused_logprobs(trainer)
    get_peft_model(trainer.model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="adapter"):
        step(trainer, rollout())


def test_what_is_refused(tmp_path: Path, adapted: Callable[[], PeftModel]) -> None:
    with pytest.raises(UserError, match="pass a GRPOTrainer or RLOOTrainer"):
        use_fused_logprobs(sft(tmp_path))
    with pytest.raises(UserError, match="no SFTTrainer"):
        use_fused_cross_entropy(make(tmp_path))
    with pytest.raises(UserError, match="loss_type='dft'"):
        use_fused_cross_entropy(sft(tmp_path, loss_type="dft"))
    with pytest.raises(UserError, match="label_smoothing_factor"):
        use_fused_cross_entropy(sft(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(UserError, match="none of the trainer's reward_funcs"):
        use_exact_prompts(make(tmp_path))
    trainer = make(tmp_path)
    trainer.aux_loss_enabled = True
    with pytest.raises(UserError, match="load-balancing"):
        use_fused_logprobs(trainer)
    trainer = make(tmp_path)
    with pytest.raises(UserError, match="plan='cache'"):
        use_fused_logprobs(trainer, plan="cache")
    trainer.args.use_liger_kernel = True
    with pytest.raises(UserError, match="use_liger_kernel"):
        use_fused_logprobs(trainer)
    trainer.args.use_liger_kernel = False
    trainer.args._n_gpu = 2
    with pytest.raises(UserError, match="DataParallel"):
        use_fused_logprobs(trainer)
    trainer = make(tmp_path)
    trainer.model.lm_head = nn.Sequential(trainer.model.lm_head)
    with pytest.raises(UserError, match="LM head is a Sequential"):
        use_fused_logprobs(trainer)


def test_tools_and_another_tokenizer_are_refused(tmp_path: Path, adapted: Callable[[], PeftModel]) -> None:
    model, other = adapted(), tiny_tokenizer()
    other.add_tokens(["<|new|>"])
    trainer = make(tmp_path, model=model, reward=SelfReward.from_peft(model, "sft", tiny_tokenizer()))
    trainer.tools = [len]
    with pytest.raises(UserError, match="leave out tools"):
        use_exact_prompts(trainer)
    trainer.tools, trainer.processing_class = [], other
    with pytest.raises(UserError, match="policy's tokenizer is not that of base and SFT"):
        use_exact_prompts(trainer)
