"""The kernels at CPU level "amx" without a CPU that has it: the sources of the extension, built with emulated tiles.

The tests that every level has to pass (test_linear_logprob_native.py, test_linear_logprob_gradients.py) run once more
in a process whose extension is that build: values against float64, bits over threads and rows, kept exponentials, and
the product with an fp32 result, in one chunk, in several and into a caller's buffer.
"""

import json

import pytest
from linear_logprob.amx_level import no_avx512_bf16, no_compiler


@no_avx512_bf16
@no_compiler
@pytest.mark.beside("linear_logprob/amx_level.py")
def test_what_every_level_has_to_pass(beside, request):
    done = beside(request.node)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["level"] == "amx"
    assert seen["breach"] == ""
    assert seen["configured"] == 0  # nobody kept the tiles
    assert seen["products"] > 500_000  # forwards and adding products went through them
    assert "skipped" not in done.stdout
