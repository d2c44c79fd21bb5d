"""Gradients by native passes and whole GEMMs: against the block-by-block path, over chunks, bits, what explain says."""

import pytest
import torch
from backends import threads
from linear_logprob.head_problems import make, naive_gradients, relative

from srppo_kernels import _extension, explain, linear_loss
from srppo_kernels.linear_logprob import backward, native, native_gradients
from srppo_kernels.linear_logprob.plan import CALL_BYTES

BIG = 1 << 30
CPU = torch.device("cpu")
DTYPES = [d for d in (torch.float32, torch.bfloat16, torch.float16) if native_gradients.serves(CPU, d, d)]
if not DTYPES:
    pytest.skip("no dtype has native gradients on this machine", allow_module_level=True)
BF16_PRODUCTS = native_gradients.dz_dtype(torch.bfloat16, torch.bfloat16) == torch.bfloat16


@pytest.fixture(params=["one chunk", "many"])
def chunks(request, monkeypatch):
    """dz whole, and 32-row blocks of one group each, whose last ones are smaller."""
    if request.param == "many":
        monkeypatch.setattr(
            native_gradients.Sizes, "chunk", lambda self, dz_bytes: (min(self.rows, 32), min(self.vocab, 2048))
        )


def gradients(p, plan, every_row=False, **options):
    """Of a loss that some rows do not enter, unless all do, with gradients into all three outputs."""
    g = torch.linspace(-1, 1, 150) * (torch.arange(150) % 3 > 0) + every_row
    if plan == "precompute":

        def loss(logprob, entropy, g):
            return (g * logprob).sum() + (0.3 * g * entropy).sum(), {}

        total = linear_loss(p.hidden, p.weight, p.targets, loss, g, **p.options, **options)[0]
    else:
        out = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG, **options)
        total = (g * out.logprob).sum() + (0.3 * g * out.entropy).sum() + (0.1 * g * out.lse).sum()
    return torch.autograd.grad(total, p.inputs())


@pytest.mark.parametrize("more", [{}, {"softcap": 4.0, "logit_scale": 1.5}, {"rows": True}, {"every_row": True}])
@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_block_by_block(dtype, plan, more, chunks, monkeypatch):
    every_row, more = more.get("every_row", False), {k: v for k, v in more.items() if k != "every_row"}
    p = make("random", v=4500, dtype=dtype, bias=True, **{k: v for k, v in more.items() if k != "rows"})
    if "rows" in more:
        p.options["mask"] = torch.rand(150) > 0.3
        p.options["temperature"] = torch.rand(150) + 0.5
        with torch.no_grad():
            p.options["bias"][77] = -torch.inf
            p.hidden[~p.options["mask"]] = torch.nan
        p.targets[p.targets == 77] = 0
    got = gradients(p, plan, every_row)
    monkeypatch.setattr(native_gradients, "serves", lambda *arguments, **options: False)
    for a, b in zip(got, gradients(p, plan, every_row), strict=True):
        assert a.isfinite().all()
        assert relative(a, b.double()) < (2e-6 if dtype == torch.float32 else 6e-3)


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)]
WITHOUT_BF16 = [(dtypes, "avx2") for dtypes in [(torch.bfloat16, torch.bfloat16), *MIXED]]


@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
@pytest.mark.parametrize(
    ("dtypes", "level"), WITHOUT_BF16 + [(dtypes, _extension.cpu_levels()[-1]) for dtypes in MIXED]
)
def test_inputs_that_are_widened(dtypes, level, plan, chunks, monkeypatch):
    """The same dz and GEMMs as block by block, and the same bits from two threads where the GEMMs are native."""
    p = make("random", v=4500, dtype=dtypes[0], bias=True, softcap=8.0)
    p.weight = p.weight.detach().to(dtypes[1]).requires_grad_()
    with _extension.cpu_level(level):
        assert native_gradients.dz_dtype(*dtypes) == torch.float32
        got = gradients(p, plan)
        with threads(2):
            two = gradients(p, plan)
        if native_gradients.fp32_product_is_native():
            assert all(torch.equal(a, b) for a, b in zip(got, two, strict=True))
        monkeypatch.setattr(native_gradients, "serves", lambda *arguments: False)
        want = gradients(p, plan)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b.double()) < 1e-3


@pytest.mark.parametrize("workspace_bytes", [BIG, 0])
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_loss_no_worse_than_torch(dtype, kind, workspace_bytes):
    """The op's plans are held to this elsewhere; here one chunk, and several whose dweights add up."""
    p = make(kind, n=300, v=6000, dtype=dtype)

    def loss(logprob, entropy):
        return (torch.linspace(-1, 1, 300)[: logprob.numel()] * logprob).sum(), {}

    def whole(logprob, *_):
        step = 300 if workspace_bytes else 128
        return sum(loss(part, None)[0] for part in logprob.split(step))

    twin = p.double()
    want = torch.autograd.grad(whole(twin.oracle()[0]), twin.inputs())
    total, _ = linear_loss(p.hidden, p.weight, p.targets, loss, workspace_bytes=workspace_bytes)
    theirs = naive_gradients(p, whole)
    for a, b, t in zip(torch.autograd.grad(total, p.inputs()), want, theirs, strict=True):
        assert relative(a, b) <= max(1.2 * relative(t, b), 1e-6)


@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_over_threads_and_backwards(dtype, plan):
    """dz is formed in place over exponentials: not over those that a second backward reads."""
    p = make("random", v=4500, dtype=dtype)
    want = gradients(p, plan)
    with threads(2):
        two = gradients(p, plan)
    # A BLAS may cut K among threads; what is native does not.
    native_products = native_gradients.beaten_by_native_products(native_gradients.dz_dtype(dtype, dtype))
    for a, b in zip(two, want, strict=True):
        assert torch.equal(a, b) if native_products else relative(a, b.double()) < 5e-3
    if plan != "precompute":
        out = p.run(plan=plan, workspace_bytes=BIG)
        first, second = (torch.autograd.grad(out.logprob.sum(), p.inputs(), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dz_in_place_drops_rows():
    """Row i of dz is written over exponentials of rows that have been read, for one thread or several."""
    n, vocab = 40, 5000
    kept, maxima = torch.rand(n, vocab).bfloat16(), torch.randn(n, 3)
    position = (torch.arange(n) % 4 > 0).nonzero()[:, 0]
    count = position.shape[0]
    y = torch.randint(0, vocab, (count,))
    b, h, at, m, s = (torch.randn(count) for _ in range(5))
    arguments = (maxima, position, y, b, h, at, m, s, None, 1.0, 0.0, 2048)
    apart = torch.empty(count, vocab, dtype=torch.bfloat16)
    torch.ops.srppo_native.linear_logprob_form_dz(kept, *arguments, apart)
    e = kept[position].double()
    shift = (maxima[position].double() - m[:, None].double() - s[:, None].double()).repeat_interleave(2048, 1)[
        :, :vocab
    ]
    want = e * shift.exp() * (b[:, None] - h[:, None] * (e.clamp_min(2.0**-126).log() + shift))
    want[torch.arange(count), y] = at.double()
    assert ((apart.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * shift.exp()).all()
    for number in (1, 2):
        over = kept.clone()
        with threads(number):
            torch.ops.srppo_native.linear_logprob_form_dz(over, *arguments, over[:count])
        assert torch.equal(over[:count], apart)


@pytest.mark.skipif(not BF16_PRODUCTS, reason="needs AVX-512 BF16")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (257, 700, 70), (1100, 37, 33), (300, 29, 1100), (40, 600, 2100), (0, 4, 5)]
)
def test_a_product_with_an_unrounded_result(shape, transposed):
    """Depth, rows and columns that are multiples of nothing; added or written over; any number of threads and bound."""
    k, m, n = shape
    wide = torch.randn(k, m + 3).bfloat16() if transposed else torch.randn(m, k + 3).bfloat16()
    a = wide[:, :m] if transposed else wide[:, :k]
    b = torch.randn(k, n).bfloat16()
    want = (a.double().T if transposed else a.double()) @ b.double()
    no_numbers = torch.full((k + 1, m) if transposed else (m, k + 1), float("nan")).bfloat16(), torch.ones(k + 1, n)
    outs = []
    for number, bound in ((1, None), (2, None), (2, 0), (16, 4 << 20)):
        room = torch.full((m, n + 2), float("nan"))
        with threads(number):
            # What it leaves in memory that is used again is behind the last of an odd K, which a 0 is multiplied by.
            torch.ops.srppo_native.linear_logprob_product(
                no_numbers[0], no_numbers[1].bfloat16(), transposed, False, torch.empty(m, n), bound
            )
            torch.ops.srppo_native.linear_logprob_product(a, b, transposed, False, room[:, :n], bound)
            once = room.clone()
            torch.ops.srppo_native.linear_logprob_product(a, b, transposed, True, room[:, :n], bound)
        assert relative(once[:, :n], want) < 1e-6
        assert relative(room[:, :n], 2 * want) < 1e-6
        assert room[:, n:].isnan().all()
        outs.append((once[:, :n], room[:, :n]))
        if k == 0:
            continue
        rounded = torch.full((m, n + 2), float("nan"), dtype=torch.bfloat16)
        with threads(number):
            torch.ops.srppo_native.linear_logprob_product(a, b, transposed, False, rounded[:, :n], bound)
        assert torch.equal(rounded[:, :n], once[:, :n].bfloat16())
        assert rounded[:, n:].isnan().all()
    assert all(torch.equal(x, y) for out in outs for x, y in zip(out, outs[0], strict=True))


@pytest.mark.skipif(not BF16_PRODUCTS, reason="needs AVX-512 BF16")
@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_of_a_product_has_its_bits_wherever_it_is(transposed):
    """Tiles of every height; K of several blocks, of which the last is odd."""
    a, b = torch.randn(700, 2061).bfloat16(), torch.randn(2061, 75).bfloat16()

    def product(rows, dtype):
        x = a[rows].T.contiguous() if transposed else a[rows]
        out = torch.empty(len(rows), 75, dtype=dtype)
        torch.ops.srppo_native.linear_logprob_product(x, b, transposed, False, out, None)
        return out

    for dtype in (torch.float32, torch.bfloat16):
        every = product(list(range(700)), dtype)
        for rows in ([3, 698], [697, 1, 2, 350], *(list(range(600, 600 + count)) for count in range(1, 30))):
            assert torch.equal(product(rows, dtype), every[rows])


@pytest.mark.skipif(not BF16_PRODUCTS, reason="needs AVX-512 BF16")
@pytest.mark.parametrize("native_product", [False, True])
def test_bf16_gradients_with_either_product(native_product, monkeypatch):
    """oneDNN's and the native one, whichever this CPU takes: as exact, in one chunk of rows and in several."""
    monkeypatch.setattr(native_gradients, "bf16_product_is_native", lambda: native_product)
    p = make("random", n=1100, d=96, v=3000, dtype=torch.bfloat16)
    twin = p.double()
    want = torch.autograd.grad(twin.oracle()[0].sin().sum(), twin.inputs())
    assert ("beat oneDNN" in explain(p.hidden, p.weight, p.targets).reason) is native_product
    rounded = relative(want[0].bfloat16(), want[0])
    for options in ({"plan": "cache", "workspace_bytes": BIG}, {"plan": "recompute", "workspace_bytes": 0}):
        got = torch.autograd.grad(p.run(**options).logprob.sin().sum(), p.inputs())
        assert all(relative(a, b) < 2.5 * rounded for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_callers_buffer_and_chunks_are_as_exact_as_one(dtype):
    """dweight added to fp32, once or in chunks of rows, against float64: its error is that of dz alone."""
    p = make("random", n=600, d=64, v=6000, dtype=dtype)
    twin = p.double()
    (want,) = torch.autograd.grad(twin.oracle()[0].sum(), twin.inputs()[1:2])

    def loss(logprob, entropy):
        return logprob.sum(), {}

    errors = []
    for workspace_bytes in (BIG, 0):
        buffer = torch.zeros(p.weight.shape)
        total, _ = linear_loss(
            p.hidden, p.weight, p.targets, loss, workspace_bytes=workspace_bytes, grad_weight_out=buffer
        )
        total.backward()
        errors.append(relative(buffer, want))
    assert errors[1] <= 1.01 * errors[0] + 1e-7
    rounded = relative(want.bfloat16(), want)  # as the exponentials of 16-bit inputs are
    assert errors[0] < (3e-6 if dtype == torch.float32 else 0.5 * rounded)  # not rounded on the way


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_rows_add_up_where_blocks_of_them_do(dtype, chunks):
    """And a caller's buffer keeps what is in it."""
    p = make("random", n=600, v=4500, dtype=dtype)

    def dweight(start: float, **options) -> torch.Tensor:
        buffer = torch.full(p.weight.shape, start)
        loss = lambda logprob, entropy: (logprob.sum(), {})  # noqa: E731
        linear_loss(p.hidden, p.weight, p.targets, loss, grad_weight_out=buffer, **options)[0].backward()
        return buffer

    for room, several in ((0, True), (BIG, False)):
        said = explain(p.hidden, p.weight, p.targets, op="linear_loss", workspace_bytes=room)
        assert (said.rows_per_chunk < 600) is several
    some, whole = dweight(0.5, workspace_bytes=0), dweight(0.0, workspace_bytes=BIG)
    torch.testing.assert_close(some - 0.5, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "vocab", "item", "wide", "dz_bytes", "want"),
    [
        (10, 5000, 2, False, 0, (10, 5000)),  # all of it
        (10, 5000, 4, True, 0, (10, 2048)),  # of a widened head no more than a group
        (10, 500, 4, True, 0, (10, 500)),
        (10000, 5000, 4, False, 0, (4096, 2048)),  # 32 MiB
        (10000, 5000, 2, False, 0, (8192, 2048)),
        (1000, 50000, 4, False, 0, (1000, 4 * 2048)),
        (1000, 50000, 4, False, 1 << 18, (32, 2048)),
        (1000, 50000, 4, False, 1, (1, 2048)),
        (0, 5000, 4, False, 0, (0, 5000)),
    ],
)
def test_a_chunk_of_dz_is_no_larger_than_it_is_filled(rows, vocab, item, wide, dz_bytes, want):
    assert native_gradients.Sizes(rows, 64, vocab, item, wide, True, True).chunk(dz_bytes) == want


def test_explain_says_where_gradients_come_from():
    dtype = torch.bfloat16 if BF16_PRODUCTS else torch.float32
    p = make("random", n=16, dtype=torch.float16)
    assert "by a native pass and GEMMs in float32" in explain(p.hidden, p.weight, p.targets).reason
    p = make("random", n=16, dtype=dtype)
    buffer = torch.zeros(p.weight.shape)
    name = str(dtype).removeprefix("torch.")
    assert f"by a native pass and GEMMs in {name}" in explain(p.hidden, p.weight, p.targets).reason
    with _extension.cpu_level("portable"):
        assert "by torch in float32, block by block" in explain(p.hidden, p.weight, p.targets).reason
    assert f"GEMMs in {name}" in explain(p.hidden, p.weight, p.targets, grad_weight_out=buffer).reason
    # All rows' exponentials (160 MB) are no larger than an fp32 dweight: one chunk, unless the caller says less.
    wide = torch.zeros(2 * 1024 // dtype.itemsize, 1024, dtype=dtype, requires_grad=True)
    head = torch.zeros(1, 1024, dtype=dtype).expand(40000, -1).requires_grad_()
    targets = torch.zeros(wide.shape[0], dtype=torch.long)
    whole = explain(wide, head, targets, op="linear_loss")
    assert whole.rows_per_chunk == wide.shape[0]
    assert explain(wide, head, targets, op="linear_loss", workspace_bytes=64 << 20).rows_per_chunk < wide.shape[0]


@pytest.mark.parametrize(
    ("dtype", "wide", "rows", "native_chunks", "torch_chunks"),
    [
        (torch.bfloat16, False, 4 * 250, 1, 1),  # with two chunks it would be half of it and an fp32 dweight
        (torch.bfloat16, False, 4 * 250 + 1, 3, 3),  # of 2 x 250 at most: exponentials as large as an fp32 dweight
        (torch.bfloat16, True, 2 * 250, 1, 1),
        (torch.bfloat16, True, 4 * 250, 3, 3),  # the fp32 one is there in any case
        (torch.float32, False, 250, 1, 1),
        (torch.float32, False, 2 * 250, 3, 4),
    ],
)
def test_a_trainable_head_s_chunks_are_as_large_as_its_dweight(dtype, wide, rows, native_chunks, torch_chunks):
    """Each reads and writes all of it, so small ones are slow. Native code's are even, torch's of 128 rows or more."""
    hidden = torch.zeros(1, 250, dtype=dtype).expand(rows, -1).requires_grad_()
    head = torch.zeros(1, 250, dtype=dtype).expand(50000, -1).requires_grad_()
    targets, out = torch.zeros(rows, dtype=torch.long), torch.zeros(1, 1).expand(50000, 250) if wide else None
    expected = {"torch": torch_chunks}
    if not native.obstacle(hidden.device, (dtype, dtype)):
        expected["native"] = native_chunks
    for backend, chunks in expected.items():
        said = explain(hidden, head, targets, op="linear_loss", backend=backend, grad_weight_out=out)
        assert -(-rows // said.rows_per_chunk) == chunks, backend
        assert f"{chunks} chunk(s)" in said.reason
        for fitting in range(130, rows, 20):
            options = {"op": "linear_loss", "backend": backend, "workspace_bytes": fitting * 50000 * dtype.itemsize}
            assert explain(hidden, head, targets, **options).rows_per_chunk <= fitting


@pytest.mark.parametrize(
    ("width", "rows", "chunks"),
    [(1024, 1024, 1), (1024, 1025, 2), (512, 838, 1), (512, 839, 2)],  # the size of the head; 64 MiB
)
def test_a_frozen_head_s_chunks_are_as_large_as_the_head(width, rows, chunks):
    """Each reads all of it twice."""
    hidden = torch.zeros(1, width, dtype=torch.bfloat16).expand(rows, -1).requires_grad_()
    head, targets = torch.zeros(1, width, dtype=torch.bfloat16).expand(40000, -1), torch.zeros(rows, dtype=torch.long)
    if native.obstacle(hidden.device, (torch.bfloat16, torch.bfloat16)):
        pytest.skip("without the native scan chunks are multiples of 128 rows")
    for op in ("linear_loss", "linear_logprob"):
        said = explain(hidden, head, targets, op=op)
        assert (said.plan, -(-rows // said.rows_per_chunk)) == ("precompute", chunks), op


def test_explain_counts_a_chunk_of_a_loss():
    """Not the scan of all rows; and fp16 gradients wait in fp32, of one chunk too."""

    def said(n, dtype=torch.bfloat16, grad=(True, True), **options):
        p = make("random", n=n, d=512, v=3000, dtype=dtype, grad=grad)
        return explain(p.hidden, p.weight, p.targets, op="linear_ppo_loss", **options).workspace_bytes

    assert said(2048, workspace_bytes=0) - said(1024, workspace_bytes=0) == 1024 * CALL_BYTES
    dweight = 3000 * 512 * 4  # in fp32, where chunks of a bf16 one add up
    assert said(1024, workspace_bytes=0) - said(1024, grad=(True, False), workspace_bytes=0) >= dweight
    # A gradient and its product with the upstream one; dhidden is formed in fp32, too.
    assert said(64, torch.float16) - said(64, torch.float16, (True, False)) >= 2 * dweight
    assert said(64, torch.float16) - said(64, torch.float16, (False, True)) >= 3 * 64 * 512 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_obeys_a_small_workspace(dtype, monkeypatch):
    """dz comes in smaller blocks, explain says so, and the gradients stay what they are."""
    told, original = [], backward.over_groups
    monkeypatch.setattr(backward, "over_groups", lambda *a: (told.append(a[-2:]), original(*a))[1])
    n, d, v, budget = 600, 32, 9000, 8 << 20
    p = make("random", n=n, d=d, v=v, dtype=dtype)
    sizes = set()
    for count in (1, 2, 16, 100):
        with threads(count):
            whole = explain(p.hidden, p.weight, p.targets, plan="recompute")
            small = explain(p.hidden, p.weight, p.targets, plan="recompute", workspace_bytes=budget)
        assert whole.dz_bytes == 0 and budget < whole.workspace_bytes <= 64 << 20
        assert small.dz_bytes > 0 and small.workspace_bytes <= budget
        assert "MiB, for a workspace of 8.0 MiB" in small.reason
        sizes.add(small.dz_bytes)
    assert len(sizes) == 1  # bits depend on it, and not on the number of threads
    gradients = [
        torch.autograd.grad(p.run(plan="recompute", workspace_bytes=size).logprob.sum(), p.inputs(), retain_graph=True)
        for size in (None, budget, 0)
    ]
    least = explain(p.hidden, p.weight, p.targets, plan="recompute", workspace_bytes=0).dz_bytes
    assert told == [(0, None), (small.dz_bytes, budget), (least, 0)]
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert relative(b, a.double()) < bound


@pytest.mark.parametrize("op", ["linear_logprob", "linear_loss"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_of_rows_add_up(dtype, op):
    """Hundreds of them have the target in common: a 16-bit sum stops growing at 256 of its parts."""
    p = make("random", n=20000, d=4, v=70, dtype=dtype, bias=True, grad=(False, True))
    p.targets[:] = 3
    if op == "linear_logprob":
        total = p.run(plan="recompute", workspace_bytes=0).logprob.sum()
    else:
        options = {**p.options, "workspace_bytes": 0}
        total, _ = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}), **options)
    twin = p.double()
    want = torch.autograd.grad(twin.oracle()[0].sum(), twin.inputs())
    for a, b in zip(torch.autograd.grad(total, p.inputs()), want, strict=True):
        assert relative(a, b) < (1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dhidden_of_many_vocabulary_chunks(dtype):
    """They add up unrounded."""
    p = make("random", n=40, d=4, v=40000, dtype=dtype, grad=(True, False))
    (got,) = torch.autograd.grad(p.run(plan="recompute", workspace_bytes=0).logprob.sum(), p.inputs())
    twin = p.double()
    (want,) = torch.autograd.grad(twin.oracle()[0].sum(), twin.inputs())
    assert relative(got, want) < 1.2 * relative(want.to(dtype), want) + 5e-7


def test_no_gradient_is_too_small_for_the_fp16_products_of_a_gpu(monkeypatch):
    """They read dz in fp16, which ends at 6e-8: more than p of most entries over the number of tokens."""
    monkeypatch.setattr(native_gradients, "serves", lambda *arguments: False)
    monkeypatch.setattr(backward, "operand_dtype", lambda hidden, weight: hidden.dtype)
    monkeypatch.setattr(backward, "add_mm", lambda out, a, b: out.add_(a.float() @ b.float()))
    p = make(n=40, dtype=torch.float16, bias=True, softcap=8.0)
    got, _ = linear_loss(
        p.hidden, p.weight, p.targets, lambda lp, h: ((lp + h).sum() / 1e6, {}), backend="torch", **p.options
    )
    twin = p.double()
    logprob, entropy, _ = twin.oracle()
    exact = torch.autograd.grad((logprob + entropy).sum() / 1e6, twin.inputs())
    scaled = torch.autograd.grad(got * 1024, p.inputs())  # as a gradient scaler's: the results are fp16, too
    assert all(relative(a, 1024 * b) < 3e-3 for a, b in zip(scaled, exact, strict=True))
    bad = torch.where(torch.arange(40) == 7, torch.inf, 1e-9)  # one row's gradient is none: the others' stay
    got, _ = linear_loss(
        p.hidden, p.weight, p.targets, lambda lp, h: ((lp + h) @ bad, {}), backend="torch", **p.options
    )
    (dhidden,) = torch.autograd.grad(got * 2**20, p.hidden)
    others = torch.arange(40) != 7
    assert relative(dhidden[others], 1e-3 * 2**20 * exact[0][others]) < 3e-3
    for mask, tiny in ((torch.zeros(40, dtype=torch.bool), 1.0), (None, 1e-38)):  # no row at all; below all of fp16
        got, _ = linear_loss(
            p.hidden, p.weight, p.targets, lambda lp, h, by=tiny: (lp.sum() * by, {}), mask=mask, backend="torch"
        )
        assert all((g == 0).all() for g in torch.autograd.grad(got, p.inputs()[:2]))


@pytest.mark.parametrize("plan", ["auto", "recompute"])
def test_lse_of_flat_rows(plan):
    """Where p is spread over the vocabulary, the head's row at the target is far larger than dL/dlse's dhidden."""
    p = make("random", n=40, d=64, v=5000, dtype=torch.bfloat16, grad=(True, False))
    with torch.no_grad():
        p.hidden *= 0.1
    twin = p.double()
    (want,) = torch.autograd.grad(twin.oracle()[2].sum(), twin.hidden)
    (got,) = torch.autograd.grad(p.run(lse=True, plan=plan).lse.sum(), p.hidden)
    assert relative(got, want) < 5e-3
    plans = [explain(p.hidden, p.weight, p.targets, plan=plan, lse=lse).plan for lse in (False, True)]
    assert plans == (["precompute", "cache"] if plan == "auto" else ["recompute"] * 2)
