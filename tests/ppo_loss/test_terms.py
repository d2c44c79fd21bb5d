"""The scalar maths that the CUDA kernels run (csrc/ppo_loss/terms.h), compiled for the host, against the formulas."""

import ctypes
import math

import pytest
import torch
from backends import compile_host, pointer

SOURCE = """
#include "csrc/common/scalar.h"
namespace srppo::scalar {
#include "csrc/ppo_loss/terms.h"
}
using namespace srppo::scalar;

extern "C" void exponentials(const float* x, int n, float* e, float* remainder) {
  for (int i = 0; i < n; ++i) {
    const ExpParts parts = exp_parts(x[i]);
    e[i] = parts.exp;
    remainder[i] = parts.remainder;
  }
}

extern "C" void policy(const float* lp, const float* old, const float* a, int n, float low, float high, float dual,
                       float* loss, float* gradient) {
  for (int i = 0; i < n; ++i) {
    const PpoTerms terms = ppo_terms(lp[i], old[i], a[i], true, {low, high, dual});
    loss[i] = terms.loss;
    gradient[i] = terms.d_logprob;
  }
}

extern "C" void value(const float* v, const float* old, const float* r, int n, float clip, float* loss,
                      float* gradient) {
  for (int i = 0; i < n; ++i) {
    const ValueTerms terms = value_terms(v[i], old[i], r[i], true, clip);
    loss[i] = terms.loss;
    gradient[i] = terms.d_value;
  }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE, tmp_path_factory.mktemp("terms"))


def test_exponentials(host):
    small = torch.logspace(-12, 0, 2001, dtype=torch.float64)
    wide = torch.cat([torch.linspace(-bound, bound, 40001, dtype=torch.float64) for bound in (20, 87)])
    x = torch.cat((wide, small, -small, torch.zeros(1).double())).float()
    e, remainder = torch.empty_like(x), torch.empty_like(x)
    host.exponentials(pointer(x), len(x), pointer(e), pointer(remainder))
    exact = x.double().exp()
    assert ((e.double() - exact).abs() / exact).max() < 1e-7
    # e^x - 1 - x in float64 cancels below 1e-6 itself: x^2/2 is exact there to that order.
    exact = torch.where(
        x.abs() < 1e-5, x.double() ** 2 / 2 * (1 + x.double() / 3), torch.expm1(x.double()) - x.double()
    )
    error = (remainder.double() - exact).abs() / exact.abs().clamp(min=1e-300)
    assert error[x != 0].max() < 3e-6
    assert remainder[-1] == 0
    assert e[-1] == 1


def test_policy_terms(host):
    generator = torch.Generator().manual_seed(0)
    lp, old, a = (torch.randn(5000, generator=generator) for _ in range(3))
    loss, gradient = torch.empty(5000), torch.empty(5000)
    bounds = [ctypes.c_float(x) for x in (0.8, 1.28, 2.0)]
    host.policy(pointer(lp), pointer(old), pointer(a), 5000, *bounds, pointer(loss), pointer(gradient))
    lp64 = lp.double().requires_grad_()
    ratio = (lp64 - old.double()).exp()
    expected = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.28))
    expected = torch.where(a < 0, torch.min(expected, -a * 2.0), expected)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), lp64.grad, rtol=1e-6, atol=1e-6)
    nan = torch.full((1,), math.nan)
    host.policy(pointer(nan), pointer(old), pointer(a), 1, *bounds, pointer(loss), pointer(gradient))
    assert loss[0].isnan()
    assert gradient[0].isnan()


def test_value_terms(host):
    generator = torch.Generator().manual_seed(0)
    v, old, r = (torch.randn(5000, generator=generator) for _ in range(3))
    loss, gradient = torch.empty(5000), torch.empty(5000)
    for clip in (0.2, math.inf):
        host.value(pointer(v), pointer(old), pointer(r), 5000, ctypes.c_float(clip), pointer(loss), pointer(gradient))
        v64 = v.double().requires_grad_()
        clipped = old + (v64 - old).clamp(-clip, clip)
        expected = 0.5 * torch.max((v64 - r) ** 2, (clipped - r) ** 2)
        expected.sum().backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), v64.grad, rtol=1e-5, atol=1e-6)
