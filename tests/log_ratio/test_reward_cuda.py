"""The CUDA kernel of the self-reward, run on the host, against the float64 reference."""

import ctypes
import math

import pytest
import torch
from backends import compile_host, make_mask, pointer, poison

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


@pytest.mark.parametrize("kind", ["gaps", "empty rows"])
@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("normalize", ["length", "running"])
@pytest.mark.parametrize("estimator", [None, *KL_ESTIMATORS])
def test_is_the_reference(host, kind, placement, normalize, estimator):
    for steps, clip in ((1, None), (600, 2.0)):
        generator = torch.Generator().manual_seed(steps)
        tokens = [-torch.rand(3, steps, generator=generator) * 3 for _ in range(4)]
        mask, truncated = make_mask(kind, 3, steps, generator), torch.tensor([True, False, True])
        sft, base, policy, ref = (poison(x, mask) for x in tokens)
        reward, penalty = torch.full_like(sft, 7.0), torch.full_like(sft, 7.0)
        score, shaped = torch.full((3,), 7.0), torch.full((3,), 7.0)
        kl = [pointer(x) if estimator else None for x in (policy, ref)]
        host.run_reward(
            pointer(sft), pointer(base), pointer(mask), *kl, pointer(truncated), placement == "token",
            normalize == "length", ctypes.c_float(math.inf if clip is None else clip),
            KL_ESTIMATORS.index(estimator or "k1") + 1, ctypes.c_int64(3), ctypes.c_int64(steps), pointer(reward),
            pointer(penalty), pointer(score), pointer(shaped),
        )  # fmt: skip
        doubles = [x.double() for x in (sft, base, policy, ref)]
        want = log_ratio_reward_reference(
            *doubles[:2], mask, placement, normalize, 2.5, -0.7, clip, truncated, 1.5,
            *(doubles[2:] if estimator else (None, None)), 0.3, estimator or "k1",
        )  # fmt: skip
        for a, b in zip((reward, penalty, score, shaped), want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)
