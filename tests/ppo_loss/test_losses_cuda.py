"""The CUDA kernels of both losses, run on the host, against the float64 reference, whichever block is last."""

import ctypes
import math

import pytest
import torch
from backends import compile_host, make_mask, pointer, poison, same_bits

from srppo_kernels.ppo_loss.reference import REDUCTIONS, ppo_loss_reference, token_weights, value_loss_reference

SOURCE = """
#include "tests/cuda_emulator.h"
#include "csrc/ppo_loss/cuda_kernels.h"

using namespace srppo::scalar;

// As Buffers in csrc/ppo_loss/cuda.cu.
struct Scratch {
  std::vector<int> lengths;
  std::vector<double> partials;
  unsigned finished = 0;
  Divisor divisor{};
  std::int64_t blocks;

  Scratch(const bool* mask, int reduction, float given, std::int64_t rows, std::int64_t steps, int sums, unsigned seed)
      : lengths(rows), blocks(std::max<std::int64_t>(1, (rows * steps + kTokens - 1) / kTokens)) {
    partials.resize(blocks * sums);
    divisor = {reduction, given, nullptr, nullptr, rows, steps, rows * steps};
    if (reduction != kSequenceMean && (reduction != kTokenMean || given != 0.0f)) return;
    emulator::launch(rows, kThreads, seed, [&] { count_kernel(mask, steps, lengths.data()); });
    divisor.lengths = lengths.data();
  }
};

extern "C" void run_policy(const float* new_, const float* old, const float* advantages, const bool* mask,
                           const float* entropy, float dual, float coef, int reduction, float given, std::int64_t rows,
                           std::int64_t steps, unsigned seed, float* d_logprobs, float* d_entropy, float* loss,
                           float* stats) {
  Scratch s(mask, reduction, given, rows, steps, kPolicySums, seed);
  const PolicyParams p{new_, old, advantages, mask, entropy, {0.8f, 1.2f, dual}, coef, d_logprobs, d_entropy, loss,
                       stats, s.partials.data(), &s.finished};
  emulator::launch(s.blocks, kThreads, seed, [&] { ppo_kernel(p, s.divisor); });
}

extern "C" void run_value(const float* values, const float* old, const float* returns, const bool* mask, float clip,
                          float given, std::int64_t rows, std::int64_t steps, unsigned seed, float* d_values,
                          float* loss, float* stats) {
  Scratch s(mask, kTokenMean, given, rows, steps, kValueSums, seed);
  const ValueParams p{values, old, returns, mask, clip, d_values, loss, stats, s.partials.data(), &s.finished};
  emulator::launch(s.blocks, kThreads, seed, [&] { value_kernel(p, s.divisor); });
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE, tmp_path_factory.mktemp("losses_cuda"))


def tokens(rows: int, steps: int, kind: str) -> list[torch.Tensor]:
    """new, old, advantages, entropy, mask; no ratio or value within rounding of a clip bound."""
    generator = torch.Generator().manual_seed(steps)
    old, shift, advantages, entropy = (torch.randn(rows, steps, generator=generator) for _ in range(4))
    shift = shift * 0.3
    for bound in (math.log(0.8), math.log(1.2), math.log(1.5), 0.2, -0.2):
        shift = torch.where((shift - bound).abs() < 1e-4, 0.01, shift)
    mask = make_mask(kind, rows, steps, generator)
    return [*(poison(x, mask) for x in (old + shift, old, advantages, entropy.abs())), mask]


@pytest.mark.parametrize("kind", ["full", "gaps", "empty rows"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", [None, 50.0])
def test_policy_loss(host, kind, reduction, given):
    for steps in (1, 1100):  # a block takes 1024 tokens
        new, old, advantages, entropy, mask = tokens(3, steps, kind)
        results = []
        for seed in range(2):
            d_logprobs, d_entropy = torch.full_like(new, 7.0), torch.full_like(new, 7.0)
            loss, stats = torch.empty(()), torch.empty(10)
            numbers = [
                ctypes.c_float(1.5),
                ctypes.c_float(0.01),
                REDUCTIONS.index(reduction),
                ctypes.c_float(given or 0),
            ]
            host.run_policy(
                *(pointer(x) for x in (new, old, advantages, mask, entropy)), *numbers, ctypes.c_int64(3),
                ctypes.c_int64(steps), seed, *(pointer(x) for x in (d_logprobs, d_entropy, loss, stats)),
            )  # fmt: skip
            results.append((loss, d_logprobs, d_entropy, stats))
        weights = token_weights(mask, reduction, given, None, torch.float64)
        want = ppo_loss_reference(new, old, advantages, mask, entropy, 0.2, 0.2, 1.5, 0.01, weights)
        for a, b in zip(results[0], want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-6)
        assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["full", "gaps", "empty rows"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("given", [None, 50.0])
def test_value_loss(host, kind, clip, given):
    values, old, returns, _, mask = tokens(3, 1100, kind)
    d_values, loss, stats = torch.full_like(values, 7.0), torch.empty(()), torch.empty(7)
    host.run_value(
        *(pointer(x) for x in (values, old, returns, mask)), ctypes.c_float(math.inf if clip is None else clip),
        ctypes.c_float(given or 0), ctypes.c_int64(3), ctypes.c_int64(1100), 1,
        *(pointer(x) for x in (d_values, loss, stats)),
    )  # fmt: skip
    weights = token_weights(mask, "token_mean", given, None, torch.float64)
    want = value_loss_reference(values, old, returns, mask, clip, weights)
    for a, b in zip((loss, d_values, stats), want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-6)
