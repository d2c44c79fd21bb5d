"""The self-reward against its definition, on every backend, and against the identities of the algorithm."""

import math

import pytest
import torch
from backends import BACKENDS, MASKS, NATIVE, TRITON, make_mask, poison, running, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from srppo_kernels.gae import gae
from srppo_kernels.log_ratio import log_ratio_reward
from srppo_kernels.log_ratio.reference import log_ratio_reward_reference


def by_definition(
    sft, base, mask, *, placement, normalize, running_std=None, scale=1.0, clip=None, truncated=None,
    missing_eos_penalty=None, logprobs_policy=None, logprobs_ref=None, kl_coef=0.0, kl_estimator="k1",
):  # fmt: skip
    """In Python floats, token by token."""
    reward = torch.zeros(mask.shape, dtype=torch.float64)
    limit = math.inf if clip is None else clip
    for b in range(mask.shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        if not valid:
            continue
        divisor = {"none": 1.0, "length": len(valid), "running": running_std}[normalize]

        def score(x, divisor=divisor):
            return min(max(x / divisor * scale, -limit), limit)

        ratios = [float(sft[b, t]) - float(base[b, t]) for t in valid]
        if placement == "eos":
            reward[b, valid[-1]] = score(sum(ratios))
        else:
            for t, ratio in zip(valid, ratios, strict=True):
                reward[b, t] = score(ratio)
        if truncated is not None and truncated[b]:
            reward[b, valid[-1]] -= missing_eos_penalty or 0.0
        if logprobs_policy is not None:
            for t in valid:
                d = float(logprobs_policy[b, t]) - float(logprobs_ref[b, t])
                k3 = math.exp(min(max(-d, -20), 20)) - 1 + d
                reward[b, t] -= kl_coef * {"k1": d, "k2": d * d / 2, "k3": k3}[kl_estimator]
    return reward


def inputs(rows: int, steps: int, kind: str = "gaps", seed: int = 0, spread: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sft, base, policy, ref = (-torch.rand(rows, steps, generator=generator) * 3 * spread for _ in range(4))
    return sft, base, policy, ref, make_mask(kind, rows, steps, generator), torch.rand(rows, generator=generator) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 7),
    steps=st.integers(0, 60),
    kind=st.sampled_from(MASKS),
    placement=st.sampled_from(("eos", "token")),
    normalize=st.sampled_from(("none", "length", "running")),
    as_tensor=st.booleans(),
    scale=st.sampled_from((1.0, 0.1, -2.0)),
    clip=st.sampled_from((None, 0.5, 10.0)),
    penalty=st.sampled_from((None, 0.0, 1.5)),
    kl=st.sampled_from((None, (0.0, "k1"), (1.0, "k1"), (0.3, "k2"), (0.3, "k3"))),
    spread=st.sampled_from((1.0, 20.0)),
    seed=st.integers(0, 2**20),
)
def test_is_the_definition(
    backend, rows, steps, kind, placement, normalize, as_tensor, scale, clip, penalty, kl, spread, seed
):
    sft, base, policy, ref, mask, truncated = inputs(rows, steps, kind, seed, spread)
    options = {"placement": placement, "normalize": normalize, "scale": scale, "clip": clip}
    if penalty is not None:
        options |= {"truncated": truncated, "missing_eos_penalty": penalty}
    std = {"running_std": 2.5} if normalize == "running" else {}
    penalised, poisoned = {}, {}
    if kl is not None:
        penalised = {"kl_coef": kl[0], "kl_estimator": kl[1], "logprobs_policy": policy, "logprobs_ref": ref}
        poisoned = {**penalised, "logprobs_policy": poison(policy, mask), "logprobs_ref": poison(ref, mask)}
    expected = by_definition(sft, base, mask, **options, **std, **penalised)
    if std and as_tensor:
        std = {"running_std": torch.tensor(2.5)}
    with running(backend) as name:
        got = log_ratio_reward(poison(sft, mask), poison(base, mask), mask, **options, **std, **poisoned, backend=name)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("placement", ["eos", "token"])
def test_a_model_against_itself_earns_exactly_nothing(backend, placement):
    sft, _, policy, _, mask, _ = inputs(6, 40)
    with running(backend) as name:
        for normalize in ("none", "length"):
            reward = log_ratio_reward(sft, sft.clone(), mask, placement=placement, normalize=normalize, backend=name)
            assert torch.equal(reward, torch.zeros(6, 40))
        # Nor does the KL penalty cost before the first update, whatever its estimator.
        for kl in ("k1", "k2", "k3"):
            reward = log_ratio_reward(
                sft, sft, mask, logprobs_policy=policy, logprobs_ref=policy.clone(), kl_coef=1.0, kl_estimator=kl,
                placement=placement, backend=name,
            )  # fmt: skip
            assert torch.equal(reward, torch.zeros(6, 40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["none", "length"])
def test_both_placements_sum_to_the_same_return(backend, normalize):
    sft, base, policy, ref, mask, truncated = inputs(8, 50)
    with running(backend) as name:
        totals = [
            log_ratio_reward(
                sft, base, mask, placement=placement, normalize=normalize, truncated=truncated,
                missing_eos_penalty=1.0, logprobs_policy=policy, logprobs_ref=ref, kl_coef=0.2, backend=name,
            )
            for placement in ("eos", "token")
        ]  # fmt: skip
        # With gamma = lambda = 1 the return of a row's first token is that sum.
        _, returns = gae(totals[1], torch.zeros(8, 50), mask, lam=1.0, backend=name)
    torch.testing.assert_close(totals[0].sum(1), totals[1].sum(1), rtol=1e-5, atol=1e-5)
    first = mask.int().argmax(1)
    torch.testing.assert_close(returns[torch.arange(8), first], totals[0].sum(1), rtol=1e-5, atol=1e-5)


def test_expected_reward_is_the_divergence_of_the_two_models():
    # E under sft of the reward is KL(sft || base), and under base -KL(base || sft): summed over all 3-token sequences.
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = 5, 3
    sft, base = (torch.randn(vocabulary, vocabulary, generator=generator).double().log_softmax(1) for _ in range(2))
    sequences = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    previous = torch.cat((torch.zeros(len(sequences), 1, dtype=torch.long), sequences[:, :-1]), 1)
    lp_sft, lp_base = sft[previous, sequences], base[previous, sequences]
    reward = log_ratio_reward(lp_sft, lp_base, torch.ones_like(sequences, dtype=torch.bool)).sum(1)
    p, q = lp_sft.sum(1), lp_base.sum(1)
    under_sft, under_base = (p.exp() * reward).sum(), (q.exp() * reward).sum()
    torch.testing.assert_close(under_sft, (p.exp() * (p - q)).sum())
    torch.testing.assert_close(under_base, -(q.exp() * (q - p)).sum())
    assert under_sft > 0 > under_base


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reward_sits_on_the_last_valid_token(backend):
    mask = torch.tensor(
        [[True, True, False, False], [False, True, False, True], [False] * 4, [True, False, False, False]]
    )
    ones, zeros = torch.ones(4, 4), torch.zeros(4, 4)
    truncated = torch.tensor([True, False, True, True])
    with running(backend) as name:
        reward = log_ratio_reward(ones, zeros, mask, truncated=truncated, missing_eos_penalty=0.25, backend=name)
        clipped = log_ratio_reward(
            ones, zeros, mask, clip=0.5, scale=-1.0, truncated=truncated, missing_eos_penalty=0.25, backend=name
        )
    expected = torch.tensor([[0, 1.75, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [0.75, 0, 0, 0]])
    assert torch.equal(reward, expected)
    assert torch.equal(clipped, torch.tensor([[0, -0.75, 0, 0], [0, 0, 0, -0.5], [0, 0, 0, 0], [-0.75, 0, 0, 0]]))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("placement", ["eos", "token"])
def test_bits_do_not_depend_on_padding_batch_or_threads(backend, kind, placement):
    sft, base, policy, ref, mask, truncated = inputs(9, 3000, kind, seed=2)

    def run(pad=(0, 0), rows=slice(None)):
        wide = [torch.nn.functional.pad(x[rows], pad, value=float("nan")) for x in (sft, base, policy, ref)]
        out = log_ratio_reward(
            *wide[:2], torch.nn.functional.pad(mask[rows], pad, value=False), placement=placement, normalize="length",
            truncated=truncated[rows], missing_eos_penalty=0.1, logprobs_policy=wide[2], logprobs_ref=wide[3],
            kl_coef=0.1, kl_estimator="k3", backend=name,
        )  # fmt: skip
        return out[:, pad[0] : pad[0] + 3000].contiguous()

    with running(backend) as name:
        whole = run()
        assert all(same_bits(whole, run(pad)) for pad in ((0, 5), (3, 0), (17, 2000)))
        assert all(same_bits(whole[row : row + 1], run(rows=slice(row, row + 1))) for row in (0, 4, 8))
        for n in (1, 3):
            with threads(n):
                assert same_bits(whole, run())


@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("normalize", ["none", "length", "running"])
def test_gradient(placement, kl_estimator, normalize):
    *logprobs, mask, truncated = inputs(3, 6)
    leaves = [x.double().requires_grad_() for x in logprobs]

    def run(sft, base, policy, ref):
        return log_ratio_reward(
            sft, base, mask, placement=placement, normalize=normalize, clip=0.6, scale=0.7, truncated=truncated,
            running_std=2.0 if normalize == "running" else None, missing_eos_penalty=1.0, logprobs_policy=policy,
            logprobs_ref=ref, kl_coef=0.3, kl_estimator=kl_estimator,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)
    poisoned = [poison(x, mask) for x in leaves]
    loss = run(*poisoned).square().sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in poisoned]
    loss.backward()
    for x, gradient in zip(poisoned, first, strict=True):
        assert torch.equal(x.grad, 2 * gradient)
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("normalize", ["none", "length", "running"])
def test_gradients_at_the_bounds_and_beyond_are_autograds_of_the_reference(placement, normalize):
    """Of the clip, and of the log-ratio in k3; a row has one token here, and its score is the token's."""
    scores = torch.tensor([[0.5], [-0.5], [0.75], [-0.75], [0.25], [-0.25]], dtype=torch.float64)
    kl = torch.tensor([[20.0], [-20.0], [21.0], [-21.0], [0.5], [-0.5]], dtype=torch.float64)
    mask, zero = torch.ones(6, 1, dtype=torch.bool), torch.zeros(6, 1, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (scores, zero, kl, zero)]
    std = 0.25 if normalize == "running" else None
    towards = {"logprobs_policy": leaves[2], "logprobs_ref": leaves[3], "kl_coef": 0.1, "kl_estimator": "k3"}
    options = {"placement": placement, "normalize": normalize, "running_std": std, "scale": 2.0, **towards}
    clip = 4.0 if std else 1.0
    got = log_ratio_reward(*leaves[:2], mask, **options, clip=clip)
    want, *_ = log_ratio_reward_reference(*leaves[:2], mask, **options, clip=clip)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_gradient_takes_the_same_score_for_clipped_as_the_reward_does():
    """A sum of float32 is 0 here, and inside of the clip."""
    sft = torch.tensor([[1e8, 1.0, -1e8]], requires_grad=True)
    reward = log_ratio_reward(sft, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), clip=0.5)
    assert reward.tolist() == [[0.0, 0.0, 0.5]]
    (gradient,) = torch.autograd.grad(reward.sum(), sft)
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("kl", [True, False])
def test_parts_are_what_two_calls_tell_apart(backend, placement, kl):
    sft, base, policy, ref, mask, truncated = inputs(6, 40, "gaps", seed=9)
    mask[2] = False
    options = {
        "placement": placement, "normalize": "length" if kl else "none", "scale": 3.0, "clip": 2.0,
        "truncated": truncated, "missing_eos_penalty": 0.7,
    }  # fmt: skip
    towards = {"logprobs_policy": poison(policy, mask), "logprobs_ref": poison(ref, mask), "kl_coef": 0.3} if kl else {}
    sft.requires_grad_()
    leaf = poison(sft, mask)
    with running(backend) as name:
        parts = log_ratio_reward(leaf, poison(base, mask), mask, **options, **towards, parts=True, backend=name)
        reward = log_ratio_reward(leaf, poison(base, mask), mask, **options, **towards, backend=name)
        alone = log_ratio_reward(leaf, poison(base, mask), mask, **options, backend=name)
    assert same_bits(parts.reward, reward)
    assert parts.reward.requires_grad
    assert not any(part.requires_grad for part in parts[1:])
    torch.testing.assert_close(parts.score, torch.where(mask, sft - base, 0).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.shaped, alone.sum(-1), rtol=1e-6, atol=1e-6)
    expected = torch.where(mask, -0.3 * (policy - ref), 0) if kl else torch.zeros_like(mask, dtype=torch.float32)
    torch.testing.assert_close(parts.penalty, expected, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(parts.reward.sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_parts_of_rows_without_tokens(backend):
    tokens, mask = torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        with running(backend) as name:
            parts = log_ratio_reward(tokens, tokens, mask, parts=True, backend=name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert parts.reward.shape == parts.penalty.shape == (3, 0)
    assert parts.score.tolist() == parts.shaped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_running_std_of_another_dtype(backend, dtype):
    sft, base, *_, mask, _ = inputs(3, 6)
    with running(backend) as name:
        want, got = (
            log_ratio_reward(sft, base, mask, normalize="running", running_std=std, backend=name)
            for std in (2.0, torch.tensor(2, dtype=dtype))
        )
    assert same_bits(want, got)


def test_a_running_std_is_a_constant():
    sft, base, *_, mask, _ = inputs(3, 6)
    std = torch.tensor(2.0, requires_grad=True)
    assert not log_ratio_reward(sft, base, mask, normalize="running", running_std=std).requires_grad


@pytest.mark.parametrize("which", range(4))
def test_one_input_in_float64_makes_all_of_it_float64(which):
    *logprobs, mask, _ = inputs(3, 6)
    logprobs[which] = logprobs[which].double() * (1 + 1e-10)  # which float32 would lose
    sft, base, policy, ref = logprobs
    options = {"placement": "token", "logprobs_policy": policy, "logprobs_ref": ref, "kl_coef": 0.5}
    got = log_ratio_reward(sft, base, mask, **options)
    expected = by_definition(sft, base, mask, normalize="none", **options)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    with FakeTensorMode() as mode:
        told = log_ratio_reward(
            *(mode.from_tensor(t) for t in (sft, base, mask)),
            **{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in options.items()},
        )
    assert told.dtype == torch.float64


def test_a_running_std_keeps_its_digits_where_any_input_is_float64():
    sft, base, *_, mask, _ = inputs(3, 6)
    want, got = (
        log_ratio_reward(sft, base.double(), mask, normalize="running", running_std=std)
        for std in (0.1, torch.tensor(0.1, dtype=torch.float64))
    )
    assert torch.equal(want, got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    tensors = inputs(5, 12)
    sft, base = (x.to(dtype).t().contiguous().t() for x in tensors[:2])
    mask = tensors[4].t().contiguous().t()
    options = {"placement": "token", "truncated": tensors[5], "missing_eos_penalty": 0.1}
    got = log_ratio_reward(sft, base, mask, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = by_definition(sft, base, mask, normalize="none", **options)
    close = 1e-14 if dtype == torch.float64 else 1e-6  # of 0.1 too, which is no float32
    torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_opcheck_and_compile(backend):
    sft, base, policy, ref, mask, truncated = inputs(3, 6)
    leaves = [x.requires_grad_() for x in (sft, base, policy, ref)]
    std = torch.tensor(2.0)
    args = (
        sft,
        base,
        mask,
        "eos",
        "running",
        None,
        std,
        0.5,
        3.0,
        truncated,
        1.0,
        policy,
        ref,
        0.1,
        "k3",
        True,
        backend,
    )
    torch.library.opcheck(torch.ops.srppo.log_ratio_reward, args)
    without_parts = (*args[:-2], False, backend)
    torch.library.opcheck(torch.ops.srppo.log_ratio_reward, without_parts, test_utils="test_faketensor")

    def run(sft, base, policy, ref):
        return log_ratio_reward(
            sft, base, mask, logprobs_policy=policy, logprobs_ref=ref, kl_coef=0.2, truncated=truncated,
            missing_eos_penalty=1.0, backend=backend,
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    eager = run(*leaves)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(a, b)


X, M = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": X}, TypeError, "mask has dtype torch.float32; pass a bool tensor"),
        ({"logprobs_base": torch.ones(3, 2)}, ValueError, "logprobs_base has shape"),
        ({"logprobs_sft": torch.ones(3)}, ValueError, r"logprobs_sft has shape \(3,\); pass \[B, T\]"),
        ({"logprobs_sft": torch.ones(2, 3, 1)}, ValueError, r"logprobs_sft has shape \(2, 3, 1\); pass \[B, T\]"),
        ({"logprobs_sft": [[1.0]]}, TypeError, "logprobs_sft must be a tensor, got list"),
        ({"logprobs_base": None}, TypeError, "logprobs_base must be a tensor, got NoneType"),
        ({"placement": "end"}, ValueError, "placement='end' is unknown; choose one of 'eos', 'token'"),
        ({"normalize": "std"}, ValueError, "normalize='std' is unknown; choose one of 'none', 'length', 'running'"),
        ({"kl_estimator": "kl"}, ValueError, "kl_estimator='kl' is unknown; choose one of 'k1', 'k2', 'k3'"),
        ({"normalize": "running"}, ValueError, "running_std goes with normalize='running' and only with it"),
        ({"running_std": 1.0}, ValueError, "running_std goes with normalize='running' and only with it"),
        ({"normalize": "running", "running_std": 0.0}, ValueError, "running_std=0.0 must be positive"),
        ({"normalize": "running", "running_std": torch.ones(2)}, ValueError, "running_std has shape"),
        (
            {"normalize": "running", "running_std": float("inf")},
            ValueError,
            "running_std=inf must be positive and finite",
        ),
        ({"scale": float("nan")}, ValueError, "scale=nan must be finite"),
        ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale requires a gradient"),
        ({"scale": torch.ones(2)}, TypeError, "must be a number, got Tensor"),
        ({"scale": torch.ones(2).numpy()}, TypeError, "must be a number, got ndarray"),
        ({"scale": float("-inf")}, ValueError, "scale=-inf must be finite"),
        ({"kl_coef": float("inf")}, ValueError, "kl_coef=inf must be finite"),
        ({"missing_eos_penalty": float("nan")}, ValueError, "missing_eos_penalty=nan must be finite"),
        ({"clip": 0.0}, ValueError, "clip=0.0 must be positive; pass None"),
        ({"missing_eos_penalty": 1.0}, ValueError, "missing_eos_penalty=1.0 needs truncated"),
        ({"truncated": M}, ValueError, "truncated has shape"),
        ({"truncated": torch.ones(2)}, TypeError, "truncated has dtype torch.float32"),
        ({"truncated": [True, False]}, TypeError, "truncated must be a tensor, got list"),
        (
            {"normalize": "running", "running_std": torch.ones((), device="meta")},
            ValueError,
            "running_std is on meta but the other inputs on cpu",
        ),
        ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs logprobs_policy and logprobs_ref"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef=-0.1 needs logprobs_policy and logprobs_ref"),
        ({"logprobs_policy": X}, ValueError, "logprobs_ref is missing"),
        ({"logprobs_ref": X}, ValueError, "logprobs_policy is missing"),
        ({"logprobs_policy": X, "logprobs_ref": X[:1]}, ValueError, "logprobs_ref has shape"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        log_ratio_reward(**{"logprobs_sft": X, "logprobs_base": X, "mask": M, **change})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_of_weight_zero_is_not_read(estimator):
    """Neither forward nor backward: a NaN there reaches nobody."""
    policy, sft = (torch.full_like(X, value, requires_grad=True) for value in (math.nan, -1.0))
    reward = log_ratio_reward(sft, X, M, logprobs_policy=policy, logprobs_ref=X, kl_coef=0.0, kl_estimator=estimator)
    grad, none = torch.autograd.grad(reward.sum(), [sft, policy], allow_unused=True)
    assert reward.isfinite().all()
    assert grad.isfinite().all()
    assert none is None
