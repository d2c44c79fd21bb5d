"""The CUDA kernel of the self-reward, run on the host, against the float64 reference."""

import ctypes
import math

import pytest
import torch
from backends import compile_host, make_mask, pointer, poison, same_bits

from srppo_kernels.log_ratio.reference import KL_ESTIMATORS, log_ratio_reward_reference

SOURCE = """
#include "tests/cuda_emulator.h"
#include "csrc/log_ratio/cuda_kernels.h"

extern "C" void run_reward(const float* sft, const float* base, const bool* mask, const float* policy, const float* ref,
                           const bool* truncated, bool per_token, bool by_length, float clip, int estimator,
                           std::int64_t rows, std::int64_t steps, float* reward, float* penalty, float* score,
                           float* shaped) {
  const srppo::scalar::RewardParams p{sft, base, mask, policy, ref, truncated, nullptr, per_token, by_length, 2.5f,
                                      -0.7f, clip, 1.5f, 0.3f, estimator, steps, reward, penalty, score, shaped};
  emulator::launch(rows, srppo::scalar::kThreads, 1, [&] { srppo::scalar::reward_rows(p); });
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE, tmp_path_factory.mktemp("reward_cuda"))


def run(host, tokens, mask, truncated, placement, normalize, clip, estimator):
    """-> reward, penalty, score, shaped."""
    sft, base, policy, ref = tokens
    rows, steps = mask.shape
    out = *(torch.full_like(sft, 7.0) for _ in range(2)), *(torch.full((rows,), 7.0) for _ in range(2))
    kl = [pointer(x) if estimator else None for x in (policy, ref)]
    host.run_reward(
        pointer(sft), pointer(base), pointer(mask), *kl, pointer(truncated), placement == "token",
        normalize == "length", ctypes.c_float(math.inf if clip is None else clip),
        KL_ESTIMATORS.index(estimator or "k1") + 1, ctypes.c_int64(rows), ctypes.c_int64(steps),
        *(pointer(x) for x in out),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["gaps", "empty rows"])
@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("normalize", ["length", "running"])
@pytest.mark.parametrize("estimator", [None, *KL_ESTIMATORS])
def test_is_the_reference(host, kind, placement, normalize, estimator):
    for steps, clip in ((1, None), (600, 2.0)):
        generator = torch.Generator().manual_seed(steps)
        tokens = [-torch.rand(3, steps, generator=generator) * 3 for _ in range(4)]
        mask, truncated = make_mask(kind, 3, steps, generator), torch.tensor([True, False, True])
        tokens = [poison(x, mask) for x in tokens]
        got = run(host, tokens, mask, truncated, placement, normalize, clip, estimator)
        doubles = [x.double() for x in tokens]
        want = log_ratio_reward_reference(
            *doubles[:2], mask, placement, normalize, 2.5, -0.7, clip, truncated, 1.5,
            *(doubles[2:] if estimator else (None, None)), 0.3, estimator or "k1",
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("placement", ["eos", "token"])
def test_padding_on_either_side_changes_no_bit(host, placement):
    generator = torch.Generator().manual_seed(0)
    tokens, mask = [torch.randn(3, 600, generator=generator) for _ in range(4)], make_mask("gaps", 3, 600, generator)
    made = []
    for left, right in ((0, 0), (2100, 300)):
        wide = [torch.nn.functional.pad(x, (left, right), value=math.nan) for x in tokens]
        padded = torch.nn.functional.pad(mask, (left, right), value=False)
        out = run(host, wide, padded, torch.tensor([True, False, True]), placement, "length", 2.0, "k3")
        made.append([x[:, left : left + 600].contiguous() if x.dim() == 2 else x for x in out])
    assert all(same_bits(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("placement", ["eos", "token"])
def test_a_valid_token_counts_once_whatever_byte_its_mask_is(host, placement):
    """As of a uint8 mask, 255 where valid, that is viewed as bool."""
    generator = torch.Generator().manual_seed(0)
    tokens, mask = [torch.randn(3, 600, generator=generator) for _ in range(4)], make_mask("gaps", 3, 600, generator)
    truncated, made = torch.tensor([True, False, True]), []
    for m in (mask, (mask.to(torch.uint8) * 255).view(torch.bool)):
        made.append(run(host, tokens, m, truncated, placement, "length", 2.0, "k3"))
    assert all(same_bits(a, b) for a, b in zip(*made, strict=True))
