"""Peak memory, measured: the growth of the resident set's high-water mark of a process that does nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from linear_logprob.head_problems import BACKENDS

N, D, V = 4096, 576, 49152
QUARTER = N * V * 4 // 4  # of one fp32 [N, V] tensor: 201 MB
DWEIGHT = V * D * 4  # 113 MB


def peak(*arguments: str) -> int:
    script = Path(__file__).with_name("peak.py")
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward(dtype):
    extra = peak("--dtype", dtype)
    assert 0 < extra < QUARTER, f"{extra / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head_has_no_dweight(backend):
    """TRL 7076, Liger 237."""
    for op in ("linear_logprob", "linear_ppo_loss"):
        extra = peak("--shape", "256", str(D), str(V), "--frozen", "--workspace", "0", "--op", op, "--backend", backend)
        assert extra < 0.7 * DWEIGHT, f"{op}: {extra / 2**20:.0f} MiB"
