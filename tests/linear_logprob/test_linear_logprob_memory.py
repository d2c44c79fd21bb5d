"""Peak memory, measured: the growth of the resident set's high-water mark of a process that does nothing else."""

from pathlib import Path
from typing import Any

import pytest
from linear_logprob.head_problems import BACKENDS

N, D, V = 4096, 576, 49152
QUARTER = N * V * 4 // 4  # of one fp32 [N, V] tensor: 201 MB
DWEIGHT = V * D * 4  # 113 MB


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
FROZEN = ("--shape", "256", str(D), str(V), "--frozen", "--workspace", "0")


def measured(*arguments: str) -> Any:
    """A case of these arguments for peak.py."""
    marks = pytest.mark.beside("linear_logprob/peak.py", *arguments)
    return pytest.param(arguments, marks=marks, id="-".join(a for a in arguments if a not in FROZEN and a[0] != "-"))


@pytest.fixture
def extra(beside, request) -> int:
    done = beside(request.node)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("extra", [measured("--dtype", dtype) for dtype in ("float32", "bfloat16")], indirect=True)
def test_forward_and_backward(extra):
    assert 0 < extra < QUARTER, f"{extra / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    "extra",
    [
        measured(*FROZEN, "--op", op, "--backend", backend)
        for op in ("linear_logprob", "linear_ppo_loss")
        for backend in BACKENDS
    ],
    indirect=True,
)
def test_a_frozen_head_has_no_dweight(extra):
    """TRL 7076, Liger 237."""
    assert extra < 0.7 * DWEIGHT, f"{extra / 2**20:.0f} MiB"
