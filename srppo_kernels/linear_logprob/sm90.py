"""The CUDA C++ scan for sm_90a (csrc/linear_logprob/sm90_kernel.h): GEMM 1 by TMA and WGMMA, else as triton_scan.scan.

It takes the same row lists and ends in the same merge, so that the Triton backend's gradients follow it; but what it
keeps is around one number a row, its target's logit, and GEMMs 2 and 3 read that as it is (triton_reference.py). Its
vocabulary groups are smaller and it adds up K in blocks, so its bits are its own; what it serves depends on nothing but
dtypes, widths and the head, so that a model is scored and trained by one of the two.

"auto" takes it on compute capability 9.0: on an H100 it is faster than Triton's scan, and its log-probs are closer to
float64 (README.md). tests/linear_logprob/test_linear_logprob_sm90.py proves it there; test_sm90_host.py runs it
anywhere, under an emulator.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _extension, _triton

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual
    from srppo_kernels.linear_logprob.rows import Rows

# 8192 rows over a vocabulary of 151936 are 3168 units of work, of two row blocks and 1536 entries each, for the 66
# clusters of an H100: 48 each. A multiple of the kernel's tiles of 192.
GROUP = 1536
ROWS = 128  # of a block
CLUSTER = 2  # blocks that share the loads of W
TILE = 192  # columns of a tile
NOT_IN_ROWS = "TMA reads rows that are contiguous and start at multiples of 16 bytes, and the weight's do not"
LARGEST = 2**31 - 8 * GROUP  # rows, and vocabulary entries, that the kernel counts in 32 bits


def call_obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """Why backend="sm90" cannot serve such a call; empty if it can, the head's strides aside."""
    return _device_obstacle(device) or _shape_obstacle(dtypes, width)


def obstacle(hidden: Tensor, weight: Tensor) -> str:
    """Why the scan cannot run on these; empty if it can."""
    return _device_obstacle(hidden.device) or operand_obstacle(hidden, weight)


def _shape_obstacle(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    if any(dtype != torch.bfloat16 for dtype in dtypes):
        return f"it multiplies bfloat16, and the inputs are {' and '.join(map(str, dtypes))}"
    if width == 0 or width % 8:
        return f"TMA reads rows at multiples of 16 bytes, and a hidden size of {width} is none of 8 elements"
    return ""


def in_rows(weight: Tensor) -> bool:
    """Whether TMA can read the head, its address aside: contiguous rows at multiples of 16 bytes, none over another."""
    return weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.stride(0) >= weight.shape[1]


def operand_obstacle(hidden: Tensor, weight: Tensor) -> str:
    """What is in the way of TMA, or of the kernel's own limits, whatever the device."""
    reason = _shape_obstacle((hidden.dtype, weight.dtype), weight.shape[1])
    if reason:
        return reason
    if not in_rows(weight) or weight.data_ptr() % 16:
        return NOT_IN_ROWS
    if max(hidden.shape[0], weight.shape[0]) > LARGEST:
        return f"it counts rows and vocabulary entries up to {LARGEST}"
    return ""


@_extension.constant_when_traced  # a compiler that traces the public functions need not look into the extension
def _device_obstacle(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it is for CUDA devices of compute capability 9.0, and the inputs are on {device.type!r}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it is for compute capability 9.0 alone: its instructions (wgmma) are no other's"
    if not _extension.available():
        return _extension.why()
    if not hasattr(torch.ops.srppo_native, "linear_logprob_scan_sm90"):
        return "the extension was built without CUDA: install again where nvcc and a CUDA build of torch are"
    return _extension.driver_obstacle() or _triton.obstacle(device)  # Triton's is the merge


def scan(
    hidden: Tensor,  # [N, D]
    head: "Head",
    y: Tensor,  # [count]
    temperature: Tensor | None,  # [count]
    rows: "Rows",
    entropy: bool,
    residual: "Residual | None",
    kept_rows: Tensor | None,
    *,
    group: int = GROUP,
    cluster: int | None = None,
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``; chunked._scan has the meaning of the arguments.

    t is there whether ``entropy`` asks for it or not: it hides under the other consumer's GEMM. ``cluster``: blocks
    that share the loads of W; by default two, or one where there is one row block.

    Where only the call shows that TMA cannot read the head (its address), Triton's scan runs, and one line says so.
    """
    from srppo_kernels.linear_logprob import triton_scan
    from srppo_kernels.linear_logprob.gpu import PART, maxima
    from srppo_kernels.linear_logprob.triton_reference import references, settle
    from srppo_kernels.linear_logprob.triton_tiles import row_list

    assert rows.live is not None and kept_rows is None, "on this backend rows are compacted on the device"
    reason = operand_obstacle(hidden, head.weight)
    if reason:
        _extension.warn_once(f"sm90:{reason}", f"srppo: running Triton's scan instead of the one for sm_90a: {reason}")
    n, vocab = rows.count, head.weight.shape[0]
    if min(n, vocab) == 0 or (reason and residual is None):
        return triton_scan.scan(hidden, head, y, temperature, rows, entropy, residual, kept_rows)
    listed = row_list(rows.live)
    if reason and residual is not None:  # it has one number a row, and Triton's scan several: all become the largest
        parts = residual._replace(group_max=residual.group_max.new_empty(n, maxima(vocab)))
        out = triton_scan.scan(hidden, head, y, temperature, rows, entropy, parts, kept_rows)
        below, targets = out.new_full((n,), -torch.inf), y.index_select(0, listed.index)
        settle(residual, parts.group_max, PART, below, out, listed, targets, zero_all=rows.dense)
        return out
    inverse = None if temperature is None else temperature.float().reciprocal().index_select(0, listed.index)
    cluster = cluster or (CLUSTER if n > ROWS else 1)
    whole = ROWS * cluster  # blocks of the last cluster read beyond the rows
    x, targets, reference = references(hidden[rows.start : rows.stop], head, y, inverse, listed, -(-n // whole) * whole)
    state = reference.new_empty(3, -(-vocab // group), n)
    target_logits = reference.new_empty(n)
    kept_max = None if residual is None else reference.new_empty(n, -(-vocab // TILE))
    torch.ops.srppo_native.linear_logprob_scan_sm90(
        x,
        head.weight,
        None if head.bias is None else head.bias.float().contiguous(),
        targets,
        inverse,
        reference,
        listed.count,
        head.logit_scale,
        0.0 if head.softcap is None else head.softcap,
        1 / head.temperature,
        group,
        cluster,
        state,
        target_logits,
        None if residual is None else residual.kept[:n],  # of a last chunk, fewer than there is room for
        kept_max,
    )
    out = triton_scan.merge(state, target_logits, targets, listed, rows.live, vocab)
    if residual is not None and kept_max is not None:
        settle(residual, kept_max, TILE, reference, out, listed, targets, zero_all=rows.dense)
    return out
