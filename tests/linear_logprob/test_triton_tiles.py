"""What the Triton kernels are launched with on a device, chosen here for one that is made up; and tiles as wide as its,
loaded by TMA, interpreted.
"""

from dataclasses import replace

import pytest
import torch
from linear_logprob.head_problems import make
from linear_logprob.test_linear_logprob_triton import check

from srppo_kernels import _triton
from srppo_kernels.linear_logprob.chunked import Residual

pytestmark = pytest.mark.skipif(not _triton.interpreted(), reason=f"not interpreted here: {_triton.why()}")
DEVICE = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of a block, on the least of each


@pytest.fixture
def capability(monkeypatch):
    return lambda *of: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of)


@pytest.mark.parametrize(
    ("of", "table"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((11, 0), 100), ((12, 0), 80)],
)
def test_each_device_has_a_table(of, table, capability, monkeypatch):
    """Consumer parts and AMD's, which have capabilities of 9.x, too, and no PTX, are given the plainest."""
    from srppo_kernels.linear_logprob.triton_tiles import architecture

    capability(*of)
    assert architecture(DEVICE) == table
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert architecture(DEVICE) == 80


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP16), (FP32, FP32)])
@pytest.mark.parametrize("of", [(8, 0), (9, 0), (10, 0)])
def test_operands_fit_in_shared_memory(of, dtypes, capability):
    from srppo_kernels.linear_logprob import triton_tiles

    capability(*of)
    arch = triton_tiles.architecture(DEVICE)
    for table in (triton_tiles.SCAN_TILES, triton_tiles.BUSY_SCAN_TILES, triton_tiles.PRODUCT_TILES):
        tile = triton_tiles.tile_of(table, DEVICE, dtypes)
        assert tile.stages * tile.bk * (tile.bm * dtypes[0].itemsize + tile.bn * dtypes[1].itemsize) <= SHARED[arch]
        assert tile.tma == (arch >= 90)


@pytest.mark.parametrize(
    ("a", "b", "widen", "precision"),
    [(BF16, BF16, False, "tf32"), (BF16, FP16, True, "tf32"), (BF16, FP32, True, "tf32x3"),
     (FP32, FP16, True, "tf32x3"), (FP32, FP32, False, "tf32x3")],
)  # fmt: skip
def test_factors_are_multiplied_exactly_or_in_three_products(a, b, widen, precision, monkeypatch):
    from srppo_kernels.linear_logprob.triton_tiles import arithmetic

    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    assert arithmetic(DEVICE, a, b) == {"WIDEN": widen, "PRECISION": precision}


@pytest.mark.parametrize(
    ("matrix", "fits"),
    [
        (torch.zeros(16, 64), True),
        (torch.zeros(16, 72)[:, :64], True),
        (torch.zeros(16, 66)[:, :64], False),
        (torch.zeros(16, 66, dtype=BF16)[:, :64], False),
        (torch.zeros(16, 20, dtype=torch.float64)[:, :18], True),
        (torch.zeros(64, 16).T, False),
        (torch.zeros(16, 128)[:, ::2], False),
        (torch.zeros(64).expand(16, 64), False),
        (torch.zeros(16, 64).flatten()[1:-3].view(15, 68)[:, :64], False),
    ],
)
def test_tma_reads_rows_at_multiples_of_16_bytes(matrix, fits):
    from srppo_kernels.linear_logprob.triton_tiles import operand

    assert operand(matrix, 8, 32, False) == (matrix, False)
    descriptor, by_tma = operand(matrix, 8, 32, True)
    assert by_tma == fits
    assert (descriptor.block_shape == [8, 32]) if fits else (descriptor is matrix)


@pytest.mark.parametrize(
    ("kept", "fits"),
    [
        (torch.zeros(4, 64, dtype=BF16), True),
        (torch.zeros(4, 66, dtype=BF16)[:, 2:], True),
        (torch.zeros(4, 63, dtype=BF16), False),
        (torch.zeros(4, 64, dtype=BF16)[:, :63], False),
        (torch.zeros(4, 65, dtype=BF16)[:, :64], False),
        (torch.zeros(4, 66, dtype=BF16)[:, 1:65], False),
        (torch.zeros(4, 128, dtype=BF16)[:, ::2], False),
    ],
)
def test_exponentials_leave_in_pairs_where_each_starts_at_a_multiple_of_its_size(kept, fits, capability):
    from srppo_kernels.linear_logprob.triton_scan import scan_tile
    from srppo_kernels.linear_logprob.triton_tiles import BUSY_SCAN_TILES, SCAN_TILES

    residual, dtypes = Residual(kept, torch.zeros(4, 2)), (BF16, BF16)
    plain = dict.fromkeys(("BIAS", "SOFTCAP"), False)
    for of in (8, 9, 10):
        capability(of, 0)
        least, busy = SCAN_TILES[10 * of], BUSY_SCAN_TILES[10 * of]
        assert scan_tile(plain, DEVICE, dtypes) == least
        assert scan_tile(plain, DEVICE, dtypes, residual) == (least if fits and least.pairs else busy)
        for name in plain:
            assert scan_tile({**plain, name: True}, DEVICE, dtypes) == busy
    capability(9, 0)
    assert scan_tile(plain, DEVICE, dtypes, residual).pairs == fits


@pytest.mark.parametrize("plan", ["cache", "recompute"])
@pytest.mark.parametrize(("columns", "tma"), [(128, True), (256, True), (64, False)])
def test_tiles_of_a_device(plan, columns, tma, monkeypatch):
    """Accumulators taken in 4 and in 8 parts, and operands that TMA reads, or cannot: rows of 300 exponentials; and
    blocks of other sides than the interpreter's, as an sm_80's, through pointers alone."""
    from srppo_kernels.linear_logprob import triton_tiles

    descriptors, operand = [], triton_tiles.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        triton_tiles.TensorDescriptor, "from_tensor", lambda *a: (descriptors.append(1), operand(*a))[1]
    )
    monkeypatch.setattr(triton_tiles, "INTERPRETED", triton_tiles.Tile(32, columns, 16, 4, 1, tma=tma))
    monkeypatch.setattr(triton_tiles, "INTERPRETED_GROUP", 256)
    d, v = (24, 304) if columns == 128 else (22, 302)  # rows of 22 numbers, and of 302, are no multiple of 16 bytes
    check(make(n=20, d=d, v=v, mask=torch.arange(20) % 3 > 0, bias=True), plan)
    assert (len(descriptors) > 4) == (tma and d == 24) and bool(descriptors) == tma


def test_both_operands_choose_tile_and_arithmetic(monkeypatch):
    """An fp32 head under bf16 rows takes 4-byte tiles and three products; dZ times those rows takes neither."""
    from srppo_kernels.linear_logprob import triton_dz, triton_products, triton_scan

    asked = []
    for module, name in (
        (triton_scan, "scan_tile"), (triton_dz, "scan_tile"), (triton_products, "tile_of"),
        *((module, "arithmetic") for module in (triton_scan, triton_dz, triton_products)),
    ):  # fmt: skip
        original = getattr(module, name)

        def noted(*a, of=original, at=(module, name)):
            asked.append((*at, *(a[1:] if at[1] == "arithmetic" else a[2])))
            return of(*a)

        monkeypatch.setattr(module, name, noted)
    p = make(n=20, d=24, v=70)
    check(replace(p, hidden=p.hidden.detach().to(BF16).requires_grad_()), "recompute")
    products = [(triton_products, name) for name in ("tile_of", "arithmetic")]
    scans = [(module, name) for module in (triton_scan, triton_dz) for name in ("scan_tile", "arithmetic")]
    assert set(asked) == {(*at, BF16, FP32) for at in (*scans, *products)} | {(*at, BF16, BF16) for at in products}
