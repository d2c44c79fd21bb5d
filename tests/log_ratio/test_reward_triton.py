"""The self-reward's Triton kernel, interpreted, against the float64 reference."""

import pytest
import torch
from backends import MASKS, make_mask, needs_triton, poison, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import fresh_memory_is_nan

from srppo_kernels.log_ratio import log_ratio_reward

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Loops that small shapes would go through once take several turns, as those of large ones do."""
    import triton.language as tl

    from srppo_kernels import _triton_language

    monkeypatch.setattr(_triton_language, "_SEARCH", tl.constexpr(512))
    with fresh_memory_is_nan():
        yield


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 4),
    steps=st.sampled_from([0, 1, 60, 1024, 1500]),  # tiles have 1024 tokens
    kind=st.sampled_from(MASKS),
    placement=st.sampled_from(("eos", "token")),
    normalize=st.sampled_from(("none", "length", "running")),
    as_tensor=st.booleans(),
    clip=st.sampled_from((None, 0.5, 10.0)),
    missing_eos=st.sampled_from((None, 1.5)),
    kl=st.sampled_from((None, (0.0, "k1"), (1.0, "k1"), (0.3, "k2"), (0.3, "k3"))),
    spread=st.sampled_from((1.0, 1e-3, 20.0)),
    seed=st.integers(0, 2**20),
)
def test_is_the_reference(rows, steps, kind, placement, normalize, as_tensor, clip, missing_eos, kl, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    sft, base, policy, ref = (-torch.rand(rows, steps, generator=generator) * 3 * spread for _ in range(4))
    mask = make_mask(kind, rows, steps, generator)
    options = {"placement": placement, "normalize": normalize, "clip": clip, "scale": -0.7, "parts": True}
    if normalize == "running":
        options["running_std"] = torch.tensor(2.5) if as_tensor else 2.5
    if missing_eos is not None:
        options |= {"truncated": torch.rand(rows, generator=generator) < 0.5, "missing_eos_penalty": missing_eos}
    if kl is not None:
        options |= {"kl_coef": kl[0], "kl_estimator": kl[1]}

    def run(backend, convert):
        tokens = [convert(x) for x in (sft, base, policy, ref)]
        towards = {"logprobs_policy": tokens[2], "logprobs_ref": tokens[3]} if kl is not None else {}
        return log_ratio_reward(tokens[0], tokens[1], mask, **options, **towards, backend=backend)

    got = run("triton", lambda x: poison(x, mask))
    expected = run("reference", torch.Tensor.double)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.double(), b, rtol=3e-6, atol=2e-6 * spread, msg=lambda text, n=name: f"{n}: {text}"
        )
        if a.shape == mask.shape:
            assert (a[~mask] == 0).all()


def test_equal_models_earn_exactly_nothing_and_padding_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    sft, base = (torch.randn(3, 90, generator=generator) for _ in range(2))
    mask = make_mask("gaps", 3, 90, generator)
    assert (log_ratio_reward(sft, sft, mask, backend="triton") == 0).all()
    pad = torch.nn.functional.pad
    wide = [pad(x, (1100, 1200), value=float("nan")) for x in (sft, base)]
    padded = log_ratio_reward(*wide, pad(mask, (1100, 1200), value=False), parts=True, backend="triton")
    whole = log_ratio_reward(sft, base, mask, parts=True, backend="triton")
    for a, b in zip(whole, padded, strict=True):
        assert same_bits(a, b[:, 1100:1190].contiguous() if b.dim() == 2 else b)
    assert (padded.reward[:, :1100] == 0).all() and (padded.penalty[:, :1100] == 0).all()


def test_a_score_is_summed_in_float64_and_a_kl_of_weight_0_is_not_read():
    sft, mask = torch.tensor([[1e9, 1.0, -1e9, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
    nothing = torch.full_like(sft, torch.nan)
    towards = {"logprobs_policy": nothing, "logprobs_ref": nothing, "kl_coef": 0.0}
    got = log_ratio_reward(sft, torch.zeros_like(sft), mask, **towards, parts=True, backend="triton")
    assert got.score == 2 and got.reward.tolist() == [[0, 0, 0, 2]] and (got.penalty == 0).all()
