"""The CUDA C++ scan for sm_90a (csrc/linear_logprob/sm90_kernel.h): GEMM 1 by TMA and WGMMA, else as triton_scan.scan.

It takes the same row lists, fills the same residual (maxima of 32 columns, by position among the live rows) and ends in
the same merge, so that the Triton backend's gradients follow it. Its vocabulary groups are smaller, so its bits are its
own: scan and train with one of the two.

It runs where backend="sm90" asks for it. Compiled, and run on the host under an emulator
(tests/linear_logprob/test_sm90_host.py); not yet run on a device, and so not what "auto" takes.
tests/linear_logprob/test_linear_logprob_sm90.py is for a device to run, bench/tiles.py times it beside Triton's.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _extension, _triton

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual
    from srppo_kernels.linear_logprob.rows import Rows

# 8192 rows over a vocabulary of 151936 are 2432 units of work for the 66 clusters of an H100: 36.8 each, and the last
# cluster to finish has 37. With groups of 2048 that would be 18.4 and 19.
GROUP = 1024
CLUSTER = 2  # blocks that share the loads of X; 1 is there to be measured
LARGEST = 2**31 - 8 * GROUP  # rows, and vocabulary entries, that the kernel counts in 32 bits


@_extension.constant_when_traced  # a compiler that traces the public functions need not look into the extension
def call_obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """Why backend="sm90" cannot serve such a call; empty if it can, strides and alignment aside."""
    return _device_obstacle(device) or _dtype_obstacle(*dtypes) or _width_obstacle(width)


def obstacle(hidden: Tensor, weight: Tensor, *, keep: bool = False) -> str:
    """Why the scan cannot run on these; empty if it can. ``keep``: exponentials are kept for the gradients."""
    return _device_obstacle(hidden.device) or operand_obstacle(hidden, weight, keep=keep)


def _dtype_obstacle(hidden: torch.dtype, weight: torch.dtype) -> str:
    if hidden == weight == torch.bfloat16:
        return ""
    return f"it multiplies bfloat16, and the inputs are {hidden} and {weight}"


def _width_obstacle(width: int) -> str:
    if width > 0 and width % 8 == 0:
        return ""
    return f"TMA reads rows at multiples of 16 bytes, and a hidden size of {width} is none of 8 elements"


def operand_obstacle(hidden: Tensor, weight: Tensor, *, keep: bool = False) -> str:
    """What is in the way of TMA, or of the kernel's own limits, whatever the device."""
    reason = _dtype_obstacle(hidden.dtype, weight.dtype) or _width_obstacle(weight.shape[1])
    if reason:
        return reason
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return "TMA reads rows that are contiguous and start at multiples of 16 bytes, and the weight's do not"
    if keep and weight.shape[0] % 2:
        return f"exponentials are stored in pairs, and a vocabulary of {weight.shape[0]} is odd"
    if max(hidden.shape[0], weight.shape[0]) > LARGEST:
        return f"it counts rows and vocabulary entries up to {LARGEST}"
    return ""


def _device_obstacle(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it is for CUDA devices of compute capability 9.0, and the inputs are on {device.type!r}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it is for compute capability 9.0 alone: its instructions (wgmma) are no other's"
    if not _extension.available():
        return _extension.why()
    if not hasattr(torch.ops.srppo_native, "linear_logprob_scan_sm90"):
        return "the extension was built without CUDA: install again where nvcc and a CUDA build of torch are"
    return _triton.obstacle(device)  # the merge


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
    cluster: int = CLUSTER,
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``; chunked._scan has the meaning of the arguments.

    t is there whether ``entropy`` asks for it or not: it hides under the other consumer's GEMM.

    Raises:
        ValueError: operands that TMA or the kernel cannot take, by what is in the way.
    """
    from srppo_kernels.linear_logprob.triton_scan import MERGED_ROWS, merge_kernel
    from srppo_kernels.linear_logprob.triton_tiles import LOWEST, gather_rows, row_list

    assert rows.index is None and kept_rows is None, "on this backend rows are compacted on the device"
    reason = operand_obstacle(hidden, head.weight, keep=residual is not None)
    if reason:
        raise ValueError(f"linear_logprob: backend='sm90' cannot run: {reason}; pass backend='auto'")
    n, vocab = rows.count, head.weight.shape[0]
    hidden = hidden[rows.start : rows.stop]
    out = hidden.new_zeros(4, n, dtype=torch.float32)
    out[0] = LOWEST.value
    if min(n, vocab) == 0:
        return out
    listed = row_list(rows.live if rows.live is not None else y.new_ones(n, dtype=torch.bool))
    groups = -(-vocab // group)
    state = out.new_empty(3, groups, n)
    target_logits = out.new_zeros(n)
    torch.ops.srppo_native.linear_logprob_scan_sm90(
        gather_rows(hidden, listed),
        head.weight,
        None if head.bias is None else head.bias.float().contiguous(),
        y.index_select(0, listed.index),
        None if temperature is None else temperature.float().reciprocal().index_select(0, listed.index),
        listed.count,
        head.logit_scale,
        0.0 if head.softcap is None else head.softcap,
        1 / head.temperature,
        group,
        cluster,
        state,
        target_logits,
        None if residual is None else residual.kept,
        None if residual is None else residual.group_max,
    )
    with _triton.on_device(hidden):
        merge_kernel[(-(-n // MERGED_ROWS),)](
            state, target_logits, listed.index, listed.count, out, n, groups, BM=MERGED_ROWS
        )
    return out
