"""A loss over per-token log-probs whose gradients are formed in the forward: plan ``precompute``.

For a chunk of rows, GEMM 1 gives logprob and entropy and keeps exp(z); the loss gives g = dL/dlogprob and h =
dL/dentropy on these small vectors; GEMMs 2 and 3 then give dhidden and dweight from the kept exponentials. The logits
are computed once, a chunk at a time, and the backward only scales what is there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob import backward as grads
from srppo_kernels.linear_logprob import gpu, spare, vocab_parallel
from srppo_kernels.linear_logprob.chunked import Head, accumulation_dtype, forward
from srppo_kernels.linear_logprob.op import new_residual
from srppo_kernels.linear_logprob.rows import Rows

# (first row, one past the last, logprob, entropy) -> (dL/dlogprob, dL/dentropy), each [rows] or None
ChunkLoss = Callable[[int, int, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


class Wanted(NamedTuple):
    """Which inputs need a gradient, and whether dweight goes to a caller's fp32 buffer."""

    hidden: bool
    weight: bool
    bias: bool
    wide_weight: bool = False

    @property
    def any(self) -> bool:
        """Whether there is a gradient to form."""
        return self.hidden or self.weight or self.bias


class Formed(NamedTuple):
    """Gradients of the loss, for an upstream gradient of 1; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients wait in fp32: before a loss scale is multiplied in they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def formed_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> Formed:
    """Uninitialised gradients of the right shapes."""

    def like(tensor: Tensor | None, on: bool, wide: bool = False) -> Tensor:
        if tensor is None or not on:
            return hidden.new_empty(0)
        return spare.empty(tensor, tensor.shape, accumulation_dtype(tensor) if wide else stored_dtype(tensor.dtype))

    return Formed(like(hidden, wanted.hidden), like(weight, wanted.weight, wanted.wide_weight), like(bias, wanted.bias))


def chunks_of(rows: Rows, total: int, chunk: int) -> list[tuple[int, int, Rows]]:
    """``(first row, one past the last, the computed rows among them)``: ``chunk`` computed rows each, at least one
    chunk."""
    parts = [rows.part(a, a + chunk) for a in range(0, rows.count, chunk)] or [rows]
    if rows.index is None:
        return [(p.start, p.stop, p) for p in parts]
    starts = [0] + [int(p.index[0]) for p in parts[1:] if p.index is not None]
    return list(zip(starts, [*starts[1:], total], parts, strict=True))


def run(
    hidden: Tensor,  # [N, D]
    head: Head,
    targets: Tensor,  # [N], local to this rank's shard
    live: Tensor,  # [N]
    loss: ChunkLoss,
    wanted: Wanted,
    *,
    chunk: int,
    backend: str,
    group: str,
    dense: bool = False,
    bound: int | None = None,
) -> Formed:
    """Calls ``loss`` on chunk after chunk, in row order, and returns the gradients; ``bound`` as in ``forward``, to a
    score."""
    acc = accumulation_dtype(hidden)
    rows = Rows.of(live, backend=backend, dense=dense)
    formed = formed_like(hidden, head.weight, head.bias, wanted)
    if backend not in gpu.FAMILY:  # whose dhidden has every row
        formed.hidden.zero_()
    chunk = vocab_parallel.fewest_rows(max(1, chunk), bound, group, hidden.device)
    parts = chunks_of(rows, hidden.shape[0], chunk)
    residual = new_residual(hidden, head.weight, max(p.count for _, _, p in parts), backend) if wanted.any else None
    # Chunks add up in the accumulation dtype; one chunk is written once, in whatever dtype it is wanted.
    several = len(parts) > 1
    sums = [spare.empty(t, t.shape, acc) if several and t.dtype != acc else t for t in (formed.weight, formed.bias)]
    with torch.autocast(hidden.device.type, enabled=False):
        for number, (start, stop, part) in enumerate(parts):
            out = forward(
                hidden, head, targets, part, entropy=True, backend=backend, residual=residual, group=group,
                bound=None if wanted.any else bound,
            )  # fmt: skip
            whole = [part.whole(values, hidden.shape[0]) for values in out]
            g, h = loss(start, stop, whole[0][start:stop], whole[1][start:stop])
            if not wanted.any:
                continue
            g, h = (None if t is None else _at(t, start, hidden.shape[0]) for t in (g, h))
            into = grads.Destination(
                hidden=wanted.hidden,
                weight=sums[0] if wanted.weight else None,
                bias=sums[1] if wanted.bias else None,
                accumulate_weight=number > 0,
                accumulate_bias=number > 0,
            )
            upstream = grads.Upstream(g, h, None, whole[0], whole[1], whole[3], whole[4])
            rows_with_gradient, dhidden = grads.gradients(
                hidden, head, targets, part, upstream, into, residual=residual, consume=True, group=group,
                backend=backend,
            )  # fmt: skip
            if dhidden is None:
                continue
            if rows_with_gradient.all_of(formed.hidden, dhidden):
                formed = formed._replace(hidden=dhidden)
            else:
                rows_with_gradient.put(formed.hidden, dhidden)
    for destination, total in zip((formed.weight, formed.bias), sums, strict=True):
        if destination is not total:
            destination.copy_(total)
    return formed


def _at(values: Tensor, start: int, total: int) -> Tensor:
    """A chunk's vector at its place in one of the whole call."""
    if values.shape[0] == total:
        return values
    whole = values.new_zeros(total)
    whole[start : start + values.shape[0]] = values
    return whole


def scale(formed: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """An upstream scalar times a gradient that was formed for 1.

    Where nobody needs ``formed`` again the product is in its memory, and with a factor of 1, as ``loss.backward()`` has
    it, ``formed`` itself: on a CPU a second dweight cost a sixth to a quarter of a training step at 128 to 256 rows, on
    an H100 the multiplication of one of 1.2 GB a twentieth at 8192. There the factor is on the device, which looks by
    itself.
    """
    given_away = _given_away()
    if given_away and _are_there(formed, upstream):
        scaled = formed if upstream.item() == 1 else formed.mul_(upstream)
        return scaled if scaled.dtype == dtype else spare.empty(scaled, scaled.shape, dtype).copy_(scaled)
    if _on_device(formed, upstream):
        from srppo_kernels.linear_logprob import triton_passes

        return triton_passes.scale(formed, upstream, dtype, in_place=given_away)
    return (formed * upstream).to(dtype)


def _given_away() -> bool:
    """Whether the backward that runs frees what was saved for it, so that a result may be that memory."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _are_there(formed: Tensor, upstream: Tensor) -> bool:
    """Whether both are plain CPU tensors: to look at the factor waits for no device."""
    return type(formed) is Tensor and _is_plain(upstream) and upstream.device.type == formed.device.type == "cpu"


def _on_device(formed: Tensor, upstream: Tensor) -> bool:
    """Whether a Triton kernel may scale: on plain CUDA tensors."""
    return (
        type(formed) is Tensor
        and _is_plain(upstream)
        and formed.device.type == "cuda"
        and formed.is_contiguous()
        and not _triton.obstacle(formed.device)
    )


def _is_plain(upstream: Tensor) -> bool:
    """Neither traced, which makes it a subclass, nor batched, by vmap or by autograd's ``is_grads_batched``."""
    kinds = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
    return type(upstream) is Tensor and not any(of_kind(upstream) for of_kind in kinds)
