"""Peak memory, measured: the growth of the resident set's high-water mark of a process that does nothing else."""

from pathlib import Path

import pytest
from apart import run_apart
from linear_logprob.head_problems import BACKENDS

N, D, V = 4096, 576, 49152
QUARTER = N * V * 4 // 4  # of one fp32 [N, V] tensor: 201 MB
DWEIGHT = V * D * 4  # 113 MB

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
FROZEN = ("--shape", "256", str(D), str(V), "--frozen", "--workspace", "0")


def extra(*arguments: str) -> int:
    """What peak.py measures of a call with these arguments."""
    done = run_apart("linear_logprob/peak.py", *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward(dtype):
    taken = extra("--dtype", dtype)
    assert 0 < taken < QUARTER, f"{taken / 2**20:.0f} MiB"


@pytest.mark.parametrize("op", ["linear_logprob", "linear_ppo_loss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head_has_no_dweight(op, backend):
    """TRL 7076, Liger 237."""
    taken = extra(*FROZEN, "--op", op, "--backend", backend)
    assert taken < 0.7 * DWEIGHT, f"{taken / 2**20:.0f} MiB"
