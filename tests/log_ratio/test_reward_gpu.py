"""The self-reward on a device: values, launches, graphs."""

import pytest
import torch
from backends import MASKS, make_mask, poison, same_bits
from cuda_checks import BACKENDS, launches, no_waiting, replayed

from srppo_kernels import log_ratio_reward

pytestmark = pytest.mark.gpu


# A test runs all masks on what Triton compiles once: it compiles anew for another placement or estimator.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("placement", "estimator"), [("eos", "k1"), ("token", "k1"), ("eos", "k2"), ("token", "k3"), ("eos", "k3")]
)
def test_values_launches_and_graphs(placement, estimator, backend):
    options = {
        "placement": placement, "normalize": "length", "scale": 2.0, "clip": 1.0, "missing_eos_penalty": 0.5,
        "truncated": torch.arange(33, device="cuda") % 3 == 0, "kl_coef": 0.3, "kl_estimator": estimator, "parts": True,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    whole = [-torch.rand(33, 2500, generator=generator) * 3 for _ in range(4)]

    def call():
        towards = {"logprobs_policy": policy, "logprobs_ref": ref}
        return log_ratio_reward(sft, base, mask, **towards, **options, backend=backend)

    for kind in MASKS:
        mask = make_mask(kind, 33, 2500, generator)
        sft, base, policy, ref = (poison(x, mask).cuda() for x in whole)
        mask = mask.cuda()
        exact = [x.double() for x in (sft, base, policy, ref)]
        want = log_ratio_reward(*exact[:2], mask, logprobs_policy=exact[2], logprobs_ref=exact[3], **options)
        for a, b in zip(call(), want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)
        with no_waiting():
            call()
    assert len(launches(call)) == 1
    graph = replayed(call, lambda: sft.mul_(0.5))
    assert all(same_bits(a, b) for a, b in zip(graph, call(), strict=True))
