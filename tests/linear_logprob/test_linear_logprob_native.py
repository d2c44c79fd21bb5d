"""The C++ scan at every instruction level that this machine has: values, bits over threads and rows, what it keeps."""

import pytest
import torch
from backends import LEVELS, threads
from linear_logprob.head_problems import make, relative, value_bound

from srppo_kernels import _extension, explain, linear_logprob
from srppo_kernels.linear_logprob import native

pytestmark = pytest.mark.skipif(
    bool(native.obstacle(torch.device("cpu"), (torch.float32, torch.float32))), reason="the extension is not built"
)
BIG = 1 << 30
ALL_LEVELS = [*LEVELS, *(level for level in ("avx512_bf16", "amx") if level in _extension.cpu_levels())]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_each_level(level, dtype):
    """Rows and widths that are multiples of no tile; every option; the target's own column; NaN stays in its row."""
    for n, d, v in ((1, 1, 1), (17, 33, 2081), (29, 300, 70), (345, 7, 130)):
        p = make("random", n=n, d=d, v=v, dtype=dtype, bias=True, softcap=4.0, logit_scale=1.5)
        p.options["temperature"] = torch.rand(n) + 0.5
        with torch.no_grad():
            p.options["bias"][v // 2] = -torch.inf if v > 1 else 0.0
        p.targets[p.targets == v // 2] = 0
        with _extension.cpu_level(level):
            got = p.run(entropy=True, lse=True, plan="score", backend="native")
        twin = p.double()
        twin.options["bias"] = twin.options["bias"].clamp(min=-1e30)
        for a, b in zip(got, twin.oracle(), strict=True):
            assert (a.double() - b).abs().max() < 1e-5
    p = make("random", n=20, d=9, v=300, dtype=dtype)
    clean = p.run(plan="score", backend="native").logprob
    with torch.no_grad():
        p.hidden[3] = torch.nan
        p.weight[7, 0] = torch.nan
    with _extension.cpu_level(level):
        assert p.run(plan="score", backend="native").logprob.isnan().all()
        with torch.no_grad():
            p.weight[7, 0] = 0.0
        got = p.run(plan="score", backend="native").logprob
    assert got[3].isnan()
    assert got.isnan().sum() == 1
    assert not torch.equal(got, clean)


@pytest.mark.parametrize("kind", ["random", "peaked", "offset+1e4"])
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_each_level_on_hard_rows(level, kind):
    p = make(kind, n=60, dtype=torch.bfloat16)
    with _extension.cpu_level(level):
        got = p.run(entropy=True, lse=True, plan="score", backend="native")
    for a, b in zip(got, p.double().oracle(), strict=True):
        assert (a.double() - b).abs().max() <= value_bound(p)


@pytest.mark.parametrize("softcap", [0.01, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_softcap_far_from_the_logits_costs_no_digits(level, softcap):
    p = make("random", n=60, v=300, softcap=softcap)
    with _extension.cpu_level(level):
        got = p.run(entropy=True, lse=True, plan="score", backend="native")
    for a, b in zip(got, p.double().oracle(), strict=True):
        assert (a.double() - b).abs().max() < 2.5e-6


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_each_level_on_wide_rows(level):
    """K of several blocks, whose sums are added up in memory."""
    p = make("random", n=40, d=1101, v=2300, dtype=torch.bfloat16, grad=(False, False))
    p.weight *= 0.3
    with _extension.cpu_level(level):
        got = p.run(entropy=True, lse=True, plan="score", backend="native")
    for a, b in zip(got, p.double().oracle(), strict=True):
        assert (a.double() - b).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_bits_over_threads_and_rows(level, dtype):
    """The same bits for 1, 2 and 3 threads, and for a row alone, batched or permuted, beyond one row block too."""
    p = make("random", n=700, d=260, v=4200, dtype=dtype)
    order = torch.randperm(700)
    with _extension.cpu_level(level):
        want = p.run(entropy=True, lse=True, plan="score", backend="native")
        for count in (1, 2, 3):
            with threads(count):
                for a, b in zip(p.run(entropy=True, lse=True, plan="score", backend="native"), want, strict=True):
                    assert torch.equal(a, b)
        shuffled = linear_logprob(p.hidden[order], p.weight, p.targets[order], plan="score", backend="native").logprob
        assert torch.equal(shuffled, want.logprob[order])
        for count in range(1, 30):  # tiles of every height
            few = linear_logprob(p.hidden[:count], p.weight, p.targets[:count], plan="score", backend="native").logprob
            assert torch.equal(few, want.logprob[:count])
        for row in (0, 13, 335, 336, 699):
            alone = linear_logprob(p.hidden[row], p.weight, p.targets[row], plan="score", backend="native").logprob
            assert torch.equal(alone, want.logprob[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_kept_exponentials(level, dtype):
    """Plans that keep exponentials get from the scan what they get from torch."""
    p = make("random", n=90, dtype=dtype, mask=torch.rand(90) > 0.3, softcap=5.0)
    gradients = []
    for backend in ("native", "torch"):
        with _extension.cpu_level(level):
            out = p.run(entropy=True, plan="cache", workspace_bytes=BIG, backend=backend)
        gradients.append(torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), p.inputs()))
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b.double()) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("climb", [{600: 100.0}, {256: 50.0, 512: 64.0}, {256: -90.0, 512: 120.0, 1800: 200.0}])
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_kept_exponentials_of_rows_with_a_late_maximum(level, climb):
    """From an entry on all are that many nats above the first ones, of which a scan by chunks has kept some by then."""
    p = make("random", n=40, v=2300, dtype=torch.bfloat16)
    with torch.no_grad():
        p.hidden[:, 0], p.weight[:, 0] = 10.0, 0.0
        for first, nats in climb.items():
            p.weight[first:, 0] = nats / 10
    gradients = []
    for backend in ("native", "torch"):
        with _extension.cpu_level(level):
            out = p.run(entropy=True, plan="cache", workspace_bytes=BIG, backend=backend)
        assert out.entropy.isfinite().all()
        gradients.append(torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), p.inputs()))
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b.double()) < 5e-3


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_kept_exponentials_of_rows_that_climb_twice(level):
    """59 nats above the first entries, then 51 above those: e^-51 of the largest is kept, and what is e^-110 is not."""
    weight = torch.tensor([[0.0], [59.0], [110.0]]).repeat_interleave(32, 0).bfloat16()
    hidden, targets = torch.ones(3, 1).bfloat16(), torch.tensor([0, 40, 95])
    kept, largest = torch.full((3, 96), torch.nan).bfloat16(), torch.full((3, 1), torch.nan)
    scan = torch.ops.srppo_native.linear_logprob_scan
    with _extension.cpu_level(level):
        scan(hidden, weight, None, targets, None, None, 1.0, 1.0, 0.0, True, 2048, kept, largest, None, None)
    assert (kept[:, :32] == 0).all()
    nats = kept[:, 32:].double().log() + largest.double()
    assert (nats - weight[32:, 0].double()).abs().max() < 2**-7  # rounded twice


def test_auto_takes_it_where_it_was_measured():
    p = make("random", n=4, d=4, v=9, grad=(False, False))
    for level in ALL_LEVELS:
        with _extension.cpu_level(level):
            plan = explain(p.hidden, p.weight, p.targets)
        assert plan.backend == ("native" if level in native.FASTER_LEVELS else "torch")
        if plan.backend == "torch":
            assert f"not measured to be faster at CPU level '{level}'" in plan.reason
    double = p.double()
    assert "float64" in explain(double.hidden, double.weight, p.targets).reason
    with pytest.raises(ValueError, match=r"backend='native' cannot run: .*float64"):
        linear_logprob(double.hidden, double.weight, p.targets, backend="native")


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_many_threads_share_a_bounded_workspace(level):
    """Blocks of rows shrink with the number of threads, then fewer of them work: within any bound, the same bits."""
    p = make("random", n=200, d=2048, v=2100, dtype=torch.bfloat16, grad=(False, False))
    head = torch.empty(128256, 1, dtype=torch.bfloat16).expand(128256, 2048)
    hidden, targets = torch.empty(4096, 2048, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int64)
    with _extension.cpu_level(level):
        want = p.run(plan="score", backend="native").logprob
        for count in (1, 32, 100):
            with threads(count):
                assert explain(hidden, head, targets, plan="score", backend="native").workspace_bytes <= 64 << 20
                for bound in (None, 4 << 20):
                    options = {"plan": "score", "backend": "native", "workspace_bytes": bound}
                    said = explain(p.hidden, p.weight, p.targets, **options).workspace_bytes
                    assert said <= (bound or 64 << 20)
                    assert torch.equal(p.run(**options).logprob, want)
