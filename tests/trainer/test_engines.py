"""Rollout engines: the vLLM one against a fake server of the same protocol; rollouts saved and replayed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVLLM
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import QUIET, ROWS, STOPS, config, examples, rollout, trainer

from srppo import PipelineConfig, SRPPOConfig, SRPPOTrainer, UserError, ppo, startup
from srppo.engines import HFEngine, Sampling, VLLMEngine, importance_weights, make_engine, sampling_metrics
from srppo.metrics import METRICS
from srppo.rollout import collate, generate
from srppo.rollout_store import path_of, problem

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_completion_length=5, stop_token_ids=tuple(STOPS), pad_token_id=1)
PROMPTS = [[10, 11, 12], [13], [14, 15], [16, 17, 18]]


@pytest.fixture
def server(tiny_models) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(tiny_models.base)
    yield fake
    fake.close()


def run_with(tiny_models, folder: Path, url: str, **settings):
    """A LoRA run whose engine is the fake server."""
    engine = VLLMEngine(SAMPLING, folder / "adapters", url=url, requests=2)
    return trainer(tiny_models, folder, kind="adapter", engine=engine, **settings)


# -- engines ----------------------------------------------------------------------------------------------------------


def test_hf_engine_is_generate(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path)
    assert isinstance(run.engine, HFEngine)
    torch.manual_seed(3)
    got = run.engine.sample(run.roles.policy, PROMPTS, step=0)
    torch.manual_seed(3)
    expected = generate(run.roles.policy, PROMPTS, max_completion_length=5, pad_token_id=1, stop_token_ids=STOPS)
    assert torch.equal(got.completions[got.completion_mask], expected.completions[expected.completion_mask])
    assert expected.sampler_logprobs is None and sampling_metrics(expected, torch.zeros(1)) == {}


@pytest.mark.parametrize(("window", "top_p"), [(None, 1.0), (None, 0.6), (2, 1.0), (2, 0.6)])
def test_a_cache_that_drops_what_the_forward_reads_is_said(tiny_models, tmp_path, window, top_p):
    """Once, of the first rollout."""
    run = trainer(tiny_models, tmp_path, max_steps=2 if window else 1, top_p=top_p)
    # Llama's layers ignore it, and transformers' cache does not
    run.roles.policy.causal_lm.config.sliding_window = window
    said: list[str] = []
    run.console.warn = said.append
    run.train()
    gap = run.history[0]["sampling/logp_difference/mean"]
    if window is None:
        assert said == [] and (gap < 1e-5 if top_p == 1 else 0 < gap < -math.log(top_p))
    else:
        assert gap > 0.1 and ["sliding_window" in text and f"{gap:.2f} nats" in text for text in said] == [True]
    apart = [startup.sampler_apart({"sampling/logp_difference/mean": mean}, 1.0) for mean in (0.09, 0.11)]
    assert apart[0] is None and "0.11 nats a token" in str(apart[1])


def test_a_run_samples_from_a_server_that_is_given_every_new_policy(tiny_models, tmp_path, server):
    run = run_with(tiny_models, tmp_path, server.url, max_steps=3, learning_rate=1e-2)
    run.train()
    names = {"sampling/logp_difference/mean", "sampling/logp_difference/max"}
    assert all(names <= set(entry) and names <= set(METRICS) for entry in run.history)
    largest = [entry["sampling/logp_difference/max"] for entry in run.history]
    assert all(0 < value < 1e-4 for value in largest), "the server's policy is the trainer's, up to rounding"
    moved = max(abs(run.history[2][name] - run.history[0][name]) for name in ("objective/kl", "objective/logp_sft"))
    assert moved > 1e-3, "otherwise a server that was never brought up to date would have passed"
    kinds = [path for path, _ in server.requests]
    assert kinds.count("/v1/load_lora_adapter") == 1 + 3, "the first is of none, which tells whether one could be"
    assert kinds.count("/v1/completions") == 12
    assert list(server.models) == [f"{run.engine.prefix}2"], "older adapters are unloaded"
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == list(server.models)
    asked = [body for path, body in server.requests if path == "/v1/completions"]
    assert len({body["seed"] for body in asked}) == 12
    assert all(body["temperature"] == 1.0 and set(body["stop_token_ids"]) == set(STOPS) for body in asked)


def test_a_server_with_an_old_policy_shows_in_the_metrics_and_in_the_weights(
    tiny_models, tmp_path, server, monkeypatch
):
    run = run_with(tiny_models, tmp_path, server.url, max_steps=2, learning_rate=1e-2, importance_cap=1.5)
    synchronise, advantages, seen = run.engine.synchronise, ppo.advantages, []
    first_name = f"{run.engine.prefix}0"
    run.engine.synchronise = lambda policy, name: synchronise(policy, first_name)

    def watched(given, scores, *rest, weights, **options):
        seen.append((weights, importance_weights(given, scores.policy, 1.5)))
        return advantages(given, scores, *rest, weights=weights, **options)

    monkeypatch.setattr(ppo, "advantages", watched)
    run.train()
    first, second = (entry["sampling/logp_difference/max"] for entry in run.history)
    assert first < 1e-4 < 1e-2 < second
    assert all(torch.equal(used, expected) for used, expected in seen) and seen[1][0].max() > 1.01


def test_what_a_killed_run_left_on_the_server_is_taken_off_and_in_nobodys_way(tiny_models, tmp_path, server):
    first = run_with(tiny_models, tmp_path / "a", server.url)
    first.engine.sample(first.roles.policy, PROMPTS, step=0)
    (left,) = server.models
    second = run_with(tiny_models, tmp_path / "b", server.url, max_steps=1)
    (second.engine.folder / left).mkdir(parents=True)
    second.train()
    assert left not in server.models and list(server.models) == [f"{second.engine.prefix}0"]
    assert [folder.name for folder in second.engine.folder.iterdir()] == [f"{second.engine.prefix}0"]


def test_the_same_seed_asks_for_the_same_samples(tiny_models, tmp_path, server):
    run = run_with(tiny_models, tmp_path, server.url)
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(run.engine.sample(run.roles.policy, PROMPTS, step=0))
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)
    other = run.engine.sample(run.roles.policy, PROMPTS, step=0)
    assert other.input_ids.shape != samples[0].input_ids.shape or not torch.equal(other.input_ids, samples[0].input_ids)


@pytest.mark.parametrize(
    "given", [{"top_k": 1}, {"presence_penalty": -2.0}, {"eos_token_id": [t for t in range(260) if t not in STOPS]}]
)
def test_what_a_checkpoint_asks_for_in_its_generation_config_does_not_reach_the_server(
    tiny_models, tmp_path, server, given
):
    run, samples = run_with(tiny_models, tmp_path, server.url), []
    for server.generation_config in ({}, given):
        torch.manual_seed(5)
        samples.append(run.engine.sample(run.roles.policy, PROMPTS, step=0))
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)
    _, asked = server.requests[-1]
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (0, 0.0, 1.0)
    assert asked["presence_penalty"] == asked["frequency_penalty"] == 0.0
    run.engine.sampling = dataclasses.replace(SAMPLING, temperature=0.7, top_p=0.9, max_completion_length=3)
    run.engine.sample(run.roles.policy, PROMPTS[:1], step=0)
    _, asked = server.requests[-1]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.7, 0.9, 3)


def change(**changes):
    return lambda answer: {"choices": [answer["choices"][0] | changes]}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda answer: {"choices": []}, "its reply has no"),
        (lambda answer: "not json", "its reply has no"),
        (change(token_ids=None), "its reply has no"),
        (lambda answer: {"choices": [{"text": "abc", "finish_reason": "stop"}]}, "vLLM 0.10.2 or later"),
        (change(token_ids=[]), "it gave 0 tokens and"),
        (change(logprobs={"token_logprobs": [-1.0] * 9}), r"tokens and 9 log-probs"),
        (change(token_ids=[1] * 6, logprobs={"token_logprobs": [-1.0] * 6}), "it gave 6 tokens and 6"),
        (change(token_ids=[1], logprobs={"token_logprobs": [0.5]}, finish_reason="length"), "log-probs that are none"),
        (change(token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"), "does not fit the stop"),
        (change(token_ids=[0, 1], logprobs={"token_logprobs": [-1.0, -1.0]}, finish_reason="length"), "does not fit"),
        (change(token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"), "cut a completion at 1 t"),
        (change(token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"), None),
    ],
)
def test_an_answer_that_is_not_what_the_trainer_relies_on_is_refused(tiny_models, tmp_path, server, alter, message):
    run = run_with(tiny_models, tmp_path, server.url)
    server.alter = alter
    if message is None:  # cut by the server: a sequence without its stop token, as any other
        assert run.engine.sample(run.roles.policy, PROMPTS, step=0).truncated.all()
        return
    with pytest.raises(UserError, match=message):
        run.engine.sample(run.roles.policy, PROMPTS, step=0)


def test_what_is_wrong_with_the_server_is_said_before_training(tiny_models, tmp_path, server):
    run = run_with(tiny_models, tmp_path / "a", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no vLLM server answers at http://127\.0\.0\.1:9 .*rollout_engine=hf"):
        run.train()
    assert not (tmp_path / "a" / "run").exists()
    for url in ("a-host", "http://a-host:port"):
        run.engine.url = url
        with pytest.raises(UserError, match=f"no vLLM server answers at {url} "):
            run.train()
    full = trainer(tiny_models, tmp_path / "b", rollout_engine="vllm")
    assert isinstance(full.engine, VLLMEngine)
    with pytest.raises(UserError, match="needs use_peft=true"):
        full.train()
    run = run_with(tiny_models, tmp_path / "c", server.url)
    server.act = lambda path, body: (400, "No")
    with pytest.raises(UserError, match=r"refused /v1/load_lora_adapter \(400\): No; to load adapters it needs"):
        run.train()


def test_a_server_that_was_started_without_what_adapters_need_is_refused_before_training(tiny_models, tmp_path, server):
    run, needs = run_with(tiny_models, tmp_path, server.url), "; to load adapters it needs VLLM_ALLOW_RUNTIME_LORA_UPD"
    for started, said in (({"runtime_updating": False}, r'\(404\): {"detail": "Not Found"}'),
                          ({"max_lora_rank": None}, r"\(500\): .*LoRA is not enabled.*")):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, value in started.items():
                patch.setattr(server, name, value)
            with pytest.raises(UserError, match=said + needs):
                run.engine.models(adapters=True)  # what is asked before SFT
    assert run.engine.models(adapters=True)[0]["id"] == tiny_models.base
    server.max_lora_rank = 3
    with pytest.raises(UserError, match=r"LoRA rank 4 is greater than max_lora_rank 3.*a --max-lora-rank of lora_r or"):
        run.train()


def test_a_server_whose_frontend_is_the_one_in_rust_is_used_or_refused_for_what_it_lacks(tiny_models, tmp_path, server):
    """It names no adapter where it finds no folder, and refuses to unload one that the next has driven out."""
    run, server.rust_frontend = run_with(tiny_models, tmp_path, server.url, max_steps=2), True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "max_lora_rank", None)
        with pytest.raises(UserError, match=r"\(400\): .*engine was not started with LoRA enabled"):
            run.engine.models(adapters=True)
    run.train()
    assert list(server.models) == [f"{run.engine.prefix}{step}" for step in range(2)]
    assert max(entry["sampling/logp_difference/max"] for entry in run.history) < 1e-4


@pytest.mark.parametrize(("temperature", "top_p", "harmless"), [(1.0, 1.0, True), (0.7, 1.0, False), (1.0, 0.9, False)])
def test_log_probs_from_before_temperature_and_top_p_are_refused_before_training(
    tiny_models, tmp_path, server, temperature, top_p, harmless
):
    run = run_with(tiny_models, tmp_path, server.url)
    run.engine.sampling = dataclasses.replace(SAMPLING, temperature=temperature, top_p=top_p)
    run.engine.models(adapters=True)
    server.processed_logprobs = False
    if harmless:
        run.engine.models(adapters=True)
    else:
        with pytest.raises(UserError, match="start it with --logprobs-mode processed_logprobs"):
            run.engine.models(adapters=True)


def test_a_stop_token_in_the_last_place_ends_a_completion_whatever_the_server_says_of_it(tiny_models, tmp_path, server):
    """vLLM 0.32.0 says stop; 0.10.2 looks at the length first, and says length."""
    run = run_with(tiny_models, tmp_path, server.url)
    for reason in ("stop", "length"):
        server.alter = change(token_ids=[1, 1, 1, 1, 0], logprobs={"token_logprobs": [-1.0] * 5}, finish_reason=reason)
        assert not run.engine.sample(run.roles.policy, PROMPTS, step=0).truncated.any()


def test_a_completion_that_the_servers_context_cuts_is_refused(tiny_models, tmp_path, server):
    """vLLM cuts it without a word, and PPO would learn that completions of long prompts are short."""
    run = run_with(tiny_models, tmp_path, server.url)
    run.engine.sampling = dataclasses.replace(SAMPLING, stop_token_ids=())
    server.max_model_len = 7
    with pytest.raises(UserError, match=r"cut a completion at 4 tokens, of 5: raise its --max-model-len, .* 3 count"):
        run.engine.sample(run.roles.policy, PROMPTS, step=0)
    server.max_model_len = SAMPLING.max_completion_length  # no prompt fits beside it: said before anything is trained
    with pytest.raises(UserError, match=r"takes 5 tokens .* max_completion_length=5: start it with a larger --max-"):
        run.engine.models(adapters=True)
    server.max_model_len += 1
    run.engine.models(adapters=True)


def test_a_server_that_was_started_again_is_given_the_next_adapter(tiny_models, tmp_path, server):
    run = run_with(tiny_models, tmp_path, server.url)
    run.engine.sample(run.roles.policy, PROMPTS, step=0)
    server.models.clear()
    run.engine.sample(run.roles.policy, PROMPTS, step=1)
    assert list(server.models) == [folder.name for folder in run.engine.folder.iterdir()] == [f"{run.engine.prefix}1"]
    server.runtime_updating = False
    with pytest.raises(UserError, match="refused /v1/unload_lora_adapter"):
        run.engine.unload(["it"])


class Silent(HFEngine):
    """An engine that gives no tokens at all."""

    def sample(self, policy, prompts, *, step):
        return collate(prompts, [()] * len(prompts), pad_token_id=1, stop_token_ids=STOPS)


def test_a_first_rollout_without_a_token_is_refused_for_what_it_is(tiny_models, tmp_path):
    """And not because SFT and base, which give the same log-probs to no tokens, were alike."""
    with pytest.raises(UserError, match=r"every completion of the first rollout is empty.*check the engine"):
        trainer(tiny_models, tmp_path, engine=Silent(SAMPLING)).train()


def test_the_configuration_chooses_the_engine(tmp_path):
    assert isinstance(make_engine(config(tmp_path), SAMPLING), HFEngine)
    made = make_engine(config(tmp_path, rollout_engine="vllm", vllm_url="http://there:1/"), SAMPLING)
    assert isinstance(made, VLLMEngine) and made.url == "http://there:1"
    plain = SRPPOConfig(rollout_engine="vllm", output_dir=str(tmp_path))
    assert make_engine(plain, SAMPLING).url == PipelineConfig().vllm_url


def test_what_a_pipelines_configuration_says_of_rollouts_holds_for_a_trainer_from_python(tiny_models, tmp_path):
    """As one is written for run_sft and the trainer: only the command read that part of it."""
    kept = {"save_rollouts": str(tmp_path / "kept"), "importance_cap": 2.0}
    args = config(tmp_path, max_steps=1, vllm_url="http://there:1", rollout_engine="vllm", **kept)
    run = SRPPOTrainer(tiny_models.sft, tiny_models.base, args, examples(ROWS), console=QUIET)
    assert (run.save_rollouts, run.importance_cap, run.engine.url) == (tmp_path / "kept", 2.0, "http://there:1")
    given = SRPPOTrainer(tiny_models.sft, tiny_models.base, args, examples(ROWS), console=QUIET,
                         save_rollouts=tmp_path / "there", importance_cap=3.0)  # fmt: skip
    assert (given.save_rollouts, given.importance_cap) == (tmp_path / "there", 3.0)
    with pytest.raises(UserError, match="fsdp cuts weights over processes, and there is one"):
        SRPPOTrainer(tiny_models.sft, tiny_models.base, config(tmp_path, fsdp=True), examples(ROWS), console=QUIET)
    args = config(tmp_path, from_rollouts=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is not there to be replayed"):
        SRPPOTrainer(tiny_models.sft, tiny_models.base, args, examples(ROWS), console=QUIET).train()


# -- importance weights -----------------------------------------------------------------------------------------------


def test_importance_weights_are_truncated_ratios_and_sampling_metrics_mean_over_tokens():
    given = rollout()
    mask = given.completion_mask
    logprobs = -torch.rand(mask.shape) * mask
    gaps = torch.linspace(-2, 2, mask.numel()).reshape(mask.shape) * mask
    given = given.with_sampler_logprobs((logprobs - gaps) * mask)
    weights = importance_weights(given, logprobs, 1.5)
    assert torch.allclose(weights[mask], gaps[mask].exp().clamp(max=1.5)) and not weights[~mask].any()
    assert importance_weights(rollout(), logprobs, 1.5)[mask].unique().tolist() == [1.0]
    got = sampling_metrics(given, logprobs)
    assert got["sampling/logp_difference/mean"] == pytest.approx(gaps[mask].abs().mean().item(), rel=1e-5)
    assert got["sampling/logp_difference/max"] == pytest.approx(gaps[mask].abs().max().item(), rel=1e-5)
    empty = rollout(completions=((),) * 4).with_sampler_logprobs(torch.zeros(4, 1))
    assert sampling_metrics(empty, torch.zeros(4, 1)) == {}


def test_weights_multiply_the_advantages_and_nothing_else(tmp_path):
    args, given = config(tmp_path), rollout()
    scores = ppo.Scores(*(-torch.rand(given.completion_mask.shape) * given.completion_mask for _ in range(6)))
    weights = torch.rand(given.completion_mask.shape)
    plain = ppo.advantages(given, scores, args)
    weighted = ppo.advantages(given, scores, args, weights=weights)
    assert torch.equal(weighted.advantages, plain.advantages * weights)
    assert torch.equal(weighted.returns, plain.returns)


# -- saved and replayed -----------------------------------------------------------------------------------------------


def numbers(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if "time" not in k and "perf/" not in k} for entry in history]


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_replayed_run_has_the_numbers_of_the_live_one(tiny_models, tmp_path, server, engine):
    saved = tmp_path / "rollouts"
    if engine == "hf":
        live = trainer(tiny_models, tmp_path / "a", kind="adapter", save_rollouts=saved, importance_cap=2.0)
    else:
        live = run_with(tiny_models, tmp_path / "a", server.url, save_rollouts=saved, importance_cap=2.0)
    live.train()
    server.close()
    replayed = trainer(tiny_models, tmp_path / "b", kind="adapter", from_rollouts=saved, importance_cap=2.0)
    torch.manual_seed(77)
    replayed.train()
    assert numbers(replayed.history) == numbers(live.history)
    pairs = zip(live.roles.policy.parameters(), replayed.roles.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert sorted(path.name for path in saved.iterdir()) == [
        "rollout_00001.safetensors", "rollout_00002.safetensors",
    ]  # fmt: skip


def rewrite(path: Path, **changes) -> None:
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, value in changes.items():
        if name in tensors:
            tensors[name] = value(tensors[name])
        else:
            metadata[name] = value
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not there to be replayed"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be replayed"),
        (lambda path: path.write_bytes(b""), "cannot be replayed"),
        (lambda path: rewrite(path, version="0"), "not written by this version"),
        (lambda path: rewrite(path, step="2"), "its step is 2, and this run's is 1"),
        (lambda path: rewrite(path, temperature="0.5"), "its temperature is 0.5, and this run's is 1.0"),
        (lambda path: rewrite(path, stop_token_ids="[5]"), "its stop_token_ids is"),
        (lambda path: rewrite(path, input_ids=lambda x: x + 10_000), "outside the vocabulary"),
        (lambda path: rewrite(path, input_ids=lambda x: x.float()), "input_ids is .* of torch.float32"),
        (lambda path: rewrite(path, truncated=lambda x: x[:2].clone()), r"truncated is \(2,\)"),
        (lambda path: rewrite(path, completion_mask=lambda x: ~x), "its masks contradict each other"),
        (lambda path: rewrite(path, input_ids=lambda x: (x + 1) % 200), "its prompts are not those that this run drew"),
    ],
)
def test_a_saved_rollout_that_does_not_fit_is_refused_by_name(tiny_models, tmp_path, damage, message):
    saved = tmp_path / "rollouts"
    trainer(tiny_models, tmp_path / "a", save_rollouts=saved, max_steps=1).train()
    damage(path_of(saved, 1))
    run = trainer(tiny_models, tmp_path / "b", from_rollouts=saved, max_steps=1)
    with pytest.raises(UserError, match=message) as caught:
        run.train()
    assert "rollout_00001.safetensors" in str(caught.value)
    assert not (tmp_path / "b" / "run").exists()


def test_a_rollout_with_a_gap_or_a_log_prob_that_is_no_number_is_told():
    given = rollout()
    logprobs, mask, attention = torch.zeros(4, 4), given.completion_mask.clone(), given.attention_mask.clone()
    given = given.with_sampler_logprobs(logprobs)
    assert problem(given, 264) is None
    mask[2, 1] = False
    attention[:, given.prompt_length :] = mask
    gap = dataclasses.replace(given, completion_mask=mask, attention_mask=attention)
    assert problem(gap, 264) == "its masks contradict each other"
    logprobs[2, 1] = math.nan
    assert problem(given, 264) == "its sampler_logprobs are not a finite number per completion token"


def test_rollouts_from_a_folder_that_is_not_there_are_refused_at_the_start(tiny_models, tmp_path):
    with pytest.raises(UserError, match=r"rollout_00001\.safetensors, the rollout of iteration 1, is not there"):
        trainer(tiny_models, tmp_path, from_rollouts=tmp_path / "nowhere").train()
    with pytest.raises(UserError, match="save_rollouts is for rollouts that are sampled, and from_rollouts replays"):
        trainer(tiny_models, tmp_path, from_rollouts=tmp_path / "a", save_rollouts=tmp_path / "b").train()


def test_rollouts_of_too_few_iterations_are_refused_at_the_start_and_none_are_written_over(tiny_models, tmp_path):
    saved, done = tmp_path / "rollouts", []
    trainer(tiny_models, tmp_path / "a", save_rollouts=saved, max_steps=1).train()
    kept = (saved / "rollout_00001.safetensors").read_bytes()
    with pytest.raises(UserError, match="the rollout of iteration 2, is not there to be replayed"):
        trainer(tiny_models, tmp_path / "b", from_rollouts=saved, callbacks=[lambda *a: done.append(a)]).train()
    with pytest.raises(UserError, match=r"save_rollouts .*rollouts exists and is not empty"):
        trainer(tiny_models, tmp_path / "c", save_rollouts=saved, seed=5, max_steps=1).train()
    assert not done and (saved / "rollout_00001.safetensors").read_bytes() == kept


def test_sampler_logprobs_follow_their_sequences(tmp_path):
    given = rollout()
    given = given.with_sampler_logprobs(torch.arange(given.completion_mask.numel()).reshape_as(given.completions) * 1.0)
    part = given.select([3, 0])
    assert torch.equal(part.sampler_logprobs[0, :2], given.sampler_logprobs[3, :2])
    assert part.sampler_logprobs.shape == part.completion_mask.shape
    assert dataclasses.replace(part, sampler_logprobs=None).select([0]).sampler_logprobs is None
    assert collate([[1]], [[2]], pad_token_id=0, stop_token_ids=[2]).sampler_logprobs is None
    assert math.isfinite(part.to(torch.device("cpu")).sampler_logprobs.sum().item())
