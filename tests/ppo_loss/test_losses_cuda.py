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

static unsigned finished = 0;  // one counter for all launches: the last block of each leaves 0

// As Buffers in csrc/ppo_loss/cuda.cu.
struct Scratch {
  std::vector<double> partials;
  Divisor divisor{};
  std::int64_t blocks;

  Scratch(int reduction, float given, std::int64_t rows, std::int64_t steps, int sums, float* weight) {
    const float total = static_cast<float>(rows * steps);
    divisor.shape = {rows, steps};
    divisor.reduction = reduction;
    divisor.given = given != 0.0f ? given : reduction == kConstantLength ? total : 1.0f;
    divisor.weight = given == 0.0f && (reduction == kTokenMean || reduction == kSequenceMean) ? weight : nullptr;
    blocks = srppo::blocks_of(divisor.shape, kTokens);
    partials.resize(blocks * sums);
  }
};

extern "C" void run_policy(const float* new_, const float* old, const float* advantages, const bool* mask,
                           const float* entropy, float dual, float coef, int reduction, float given, std::int64_t rows,
                           std::int64_t steps, unsigned seed, float* d_logprobs, float* d_entropy, float* loss,
                           float* stats, float* weight) {
  Scratch s(reduction, given, rows, steps, kPolicySums, weight);
  const PolicyParams p{new_, old, advantages, mask, entropy, {0.8f, 1.2f, dual}, coef, d_logprobs, d_entropy, loss,
                       stats, s.partials.data(), &finished};
  emulator::launch(s.blocks, kThreads, seed, [&] { ppo_kernel(p, s.divisor); });
}

extern "C" void run_value(const float* values, const float* old, const float* returns, const bool* mask, float clip,
                          float given, std::int64_t rows, std::int64_t steps, unsigned seed, float* d_values,
                          float* loss, float* stats, float* weight) {
  Scratch s(kTokenMean, given, rows, steps, kValueSums, weight);
  const ValueParams p{values, old, returns, mask, clip, d_values, loss, stats, s.partials.data(), &finished};
  emulator::launch(s.blocks, kThreads, seed, [&] { value_kernel(p, s.divisor); });
}

extern "C" void run_scale(const float* upstream, const float* weight, const float* first, const float* second,
                          std::int64_t total, float* out_first, float* out_second) {
  const std::int64_t blocks = (total + kTokens - 1) / kTokens;
  emulator::launch(blocks, kThreads, 0, [&] {
    scale_kernel(upstream, weight, first, second, total, out_first, out_second);
  });
}

extern "C" unsigned left_in_counter() { return finished; }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = compile_host(SOURCE, tmp_path_factory.mktemp("losses_cuda"))
    yield library
    assert library.left_in_counter() == 0


def tokens(rows: int, steps: int, kind: str) -> list[torch.Tensor]:
    """new, old, advantages, entropy, mask; no ratio or value within rounding of a clip bound."""
    generator = torch.Generator().manual_seed(steps)
    old, shift, advantages, entropy = (torch.randn(rows, steps, generator=generator) for _ in range(4))
    shift = shift * 0.3
    for bound in (math.log(0.8), math.log(1.2), math.log(1.5), 0.2, -0.2):
        shift = torch.where((shift - bound).abs() < 1e-4, 0.01, shift)
    mask = make_mask(kind, rows, steps, generator)
    return [*(poison(x, mask) for x in (old + shift, old, advantages, entropy.abs())), mask]


def scaled(host, weight, first, second=None):
    """By an upstream gradient of 1."""
    out = torch.full_like(first, 7.0), None if second is None else torch.full_like(second, 7.0)
    inputs = torch.ones(()), weight, first, second
    host.run_scale(
        *(None if x is None else pointer(x) for x in inputs), ctypes.c_int64(first.numel()),
        *(None if x is None else pointer(x) for x in out),
    )  # fmt: skip
    return out


def run_policy(host, tensors, reduction, given, seed):
    """-> loss, both gradients as the backward leaves them, statistics."""
    new, old, advantages, entropy, mask = tensors
    d_logprobs, d_entropy = torch.full_like(new, 7.0), torch.full_like(new, 7.0)
    loss, stats, weight = torch.empty(()), torch.empty(10), torch.tensor(1.0)
    numbers = [ctypes.c_float(1.5), ctypes.c_float(0.01), REDUCTIONS.index(reduction), ctypes.c_float(given or 0)]
    host.run_policy(
        *(pointer(x) for x in (new, old, advantages, mask, entropy)), *numbers, *(ctypes.c_int64(n) for n in new.shape),
        seed, *(pointer(x) for x in (d_logprobs, d_entropy, loss, stats, weight)),
    )  # fmt: skip
    return [loss, *scaled(host, weight, d_logprobs, d_entropy), stats]


def run_value(host, tensors, clip, given, seed=1):
    values, old, returns, _, mask = tensors
    d_values, loss, stats, weight = torch.full_like(values, 7.0), torch.empty(()), torch.empty(8), torch.tensor(1.0)
    host.run_value(
        *(pointer(x) for x in (values, old, returns, mask)), ctypes.c_float(math.inf if clip is None else clip),
        ctypes.c_float(given or 0), *(ctypes.c_int64(n) for n in values.shape), seed,
        *(pointer(x) for x in (d_values, loss, stats, weight)),
    )  # fmt: skip
    return [loss, scaled(host, weight, d_values)[0], stats]


@pytest.mark.parametrize("kind", ["full", "gaps", "empty rows"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", [None, 50.0])
def test_policy_loss(host, kind, reduction, given):
    for steps in (1, 1100):  # a block takes 1024 tokens
        new, old, advantages, entropy, mask = tensors = tokens(3, steps, kind)
        results = [run_policy(host, tensors, reduction, given, seed) for seed in range(2)]
        weights = token_weights(mask, reduction, given, None, torch.float64)
        want = ppo_loss_reference(new, old, advantages, mask, entropy, 0.2, 0.2, 1.5, 0.01, weights)
        for a, b in zip(results[0], want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-6)
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["full", "gaps", "empty rows"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("given", [None, 50.0])
def test_value_loss(host, kind, clip, given):
    values, old, returns, _, mask = tensors = tokens(3, 1100, kind)
    loss, d_values, stats = run_value(host, tensors, clip, given)
    weights = token_weights(mask, "token_mean", given, None, torch.float64)
    want = value_loss_reference(values, old, returns, mask, clip, weights)
    for a, b in zip((loss, d_values, stats), want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS[:2])
def test_padding_on_either_side_changes_no_bit(host, reduction):
    tensors = tokens(3, 1100, "gaps")

    def run(left, right):
        pad = torch.nn.functional.pad
        wide = [pad(x, (left, right), value=False if x.dtype == torch.bool else math.nan) for x in tensors]
        made = [*run_policy(host, wide, reduction, None, left), *run_value(host, wide, 0.2, None)]
        return [x[:, left : left + 1100].contiguous() if x.dim() == 2 else x for x in made]

    assert all(same_bits(a, b) for a, b in zip(run(0, 0), run(2100, 1500), strict=True))
