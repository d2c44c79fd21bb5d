"""Gradients, in torch where native_gradients.py has nothing faster; chunked.py has the maths and the forward.

Vocabulary groups are the outer loop: a group's dweight is then complete before the next begins, so that it is formed
with K = all rows in the accumulation dtype and written once, in whatever dtype it is wanted; only dhidden accumulates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srppo_kernels.linear_logprob import gpu, native_gradients, vocab_parallel
from srppo_kernels.linear_logprob.chunked import (
    Head,
    Residual,
    RowOutputs,
    accumulation_dtype,
    add_mm,
    backward_rows,
    block_logits,
    groups,
    operand_dtype,
    softcap_slope,
    target_column,
    weight_group,
)
from srppo_kernels.linear_logprob.rows import Rows


@dataclass(frozen=True)
class Upstream:
    """dL/dlogprob, dL/dentropy, dL/dlse and the forward's outputs, each per row of the whole call."""

    g: Tensor | None
    h: Tensor | None
    dlse: Tensor | None
    logprob: Tensor
    entropy: Tensor
    row_max: Tensor  # m
    log_sum: Tensor  # log S: lse is their sum

    def nonzero(self, rows: Rows) -> Tensor:
        """Where, among ``rows``, any gradient comes in."""
        parts = [rows.take(u) != 0 for u in (self.g, self.h, self.dlse) if u is not None]
        return (
            torch.stack(parts).any(0)
            if parts
            else torch.zeros(rows.count, dtype=torch.bool, device=self.logprob.device)
        )


@dataclass(frozen=True)
class RowScalars:
    """What a row's gradient is made of, in the accumulation dtype, per computed row.

    ``dz_j = p_j (b - h log p_j)`` off the target, before scale, cap and temperature, and ``dz_y = at_target``, before
    scale and temperature: the cap's slope at the target is in it, from z_y itself, as e^z_y may have underflowed.
    """

    b: Tensor
    h: Tensor | None
    at_target: Tensor
    row_max: Tensor
    log_sum: Tensor

    @staticmethod
    def of(rows: Rows, upstream: Upstream, acc: torch.dtype, head: Head) -> "RowScalars":
        """From the gradients that come in."""

        def take(values: Tensor, fill: float = 0.0) -> Tensor:
            return rows.take(values, fill).to(acc)

        logprob = take(upstream.logprob)
        # A masked row that is computed has p = 0, and not an exponential of whatever the bias is.
        norm = take(upstream.row_max, 1e30), take(upstream.log_sum)
        p = logprob.exp()
        b, at_target = torch.zeros_like(p), torch.zeros_like(p)
        if upstream.dlse is not None:
            dlse = take(upstream.dlse)
            b, at_target = b + dlse, at_target + p * dlse
        if upstream.g is not None:
            g = take(upstream.g)
            b, at_target = b - g, at_target - g * torch.expm1(logprob)
        slope = _target_slope(logprob, *norm, rows, head)
        if upstream.h is None:
            return RowScalars(b, None, at_target * slope, *norm)
        h, entropy = take(upstream.h), take(upstream.entropy)
        return RowScalars(b - h * entropy, h, (at_target - p * h * (logprob + entropy)) * slope, *norm)

    def scaled(self, chain: "Tensor | float") -> "RowScalars":
        """With ``d logit / d (hidden . weight)``, the cap's slope aside, multiplied in."""
        h = None if self.h is None else self.h * chain
        return RowScalars(self.b * chain, h, self.at_target * chain, self.row_max, self.log_sum)


def _target_slope(logprob: Tensor, row_max: Tensor, log_sum: Tensor, rows: Rows, head: Head) -> Tensor | float:
    """The cap's slope at the rows' targets: z_y = logprob + (m + log S)."""
    if head.softcap is None:
        return 1.0
    temperature, _ = _temperature_and_chain(rows, head, logprob.dtype)
    return softcap_slope((logprob + (row_max + log_sum))[:, None], head, temperature)[:, 0]


@dataclass(frozen=True)
class Destination:
    """Where dweight and dbias go (None: not wanted), and whether dhidden is wanted."""

    hidden: bool
    weight: Tensor | None  # [V, D], any float dtype
    bias: Tensor | None  # [V]
    accumulate_weight: bool = False  # add to them, rather than overwrite
    accumulate_bias: bool = False


def gradients(
    hidden: Tensor,  # [N, D]
    head: Head,
    targets: Tensor,  # [N], local to this rank's shard
    rows: Rows,
    upstream: Upstream,
    into: Destination,
    *,
    residual: Residual | None = None,
    kept_rows: Tensor | None = None,
    consume: bool = False,
    group: str = "",
    backend: str = "torch",
    dz_bytes: int = 0,
    bound: int | None = None,
) -> tuple[Rows, Tensor | None]:
    """Writes dweight and dbias; returns the rows that have a gradient and their dhidden, ``[count, D]``.

    With a ``residual`` (which holds ``rows`` in order, or at ``kept_rows``) p is read from it, else it is recomputed;
    ``consume`` allows it to be overwritten. ``dz_bytes``: of a dz that has no exponentials to be formed in, 0 for the
    default. ``bound``: on the workspace of native code without a residual, in bytes; None: the default.
    """
    acc = accumulation_dtype(hidden)
    if backend in gpu.FAMILY:
        assert rows.live is not None  # compaction is left to the kernels
        every = replace(rows, live=None)  # with zeros where there is none
        of_logprob = upstream.g is not None and upstream.h is None and upstream.dlse is None
        if of_logprob and not group and _reads_exponentials(hidden, head, into, residual):
            assert upstream.g is not None and residual is not None
            g, log_sum = (t[rows.start : rows.stop].to(acc) for t in (upstream.g, upstream.log_sum))
            return every, gpu.from_exponentials(hidden, head, rows, g, log_sum, into, residual, consume)
        nonzero = upstream.nonzero(rows) & rows.live
        scalars = RowScalars.of(rows, upstream, acc, head)
        dhidden = _on_triton(hidden, head, targets, rows, nonzero, scalars, into, residual, consume, dz_bytes)
        return every, _sum_over_ranks(dhidden, acc, group)
    wanted, position = rows.keep(upstream.nonzero(rows))
    if position is not None:
        kept_rows = position if kept_rows is None else kept_rows[position]
    scalars = RowScalars.of(wanted, upstream, acc, head)
    dhidden = over_groups(hidden, head, targets, wanted, scalars, into, residual, kept_rows, consume, dz_bytes, bound)
    return wanted, _sum_over_ranks(dhidden, acc, group)


def _reads_exponentials(hidden: Tensor, head: Head, into: Destination, residual: Residual | None) -> bool:
    """Whether GEMMs 2 and 3 of a log-prob's gradients on a GPU can read the exponentials as they are."""
    if residual is None or not residual.around_one or head.softcap is not None or into.bias is not None:
        return False
    return min(hidden.shape[0], head.weight.shape[0]) > 0


def _sum_over_ranks(dhidden: Tensor | None, acc: torch.dtype, group: str) -> Tensor | None:
    if dhidden is None or not group:
        return dhidden
    return vocab_parallel.sum_over_ranks(dhidden.to(acc), group)  # ranks add up unrounded sums


def _on_triton(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Rows,
    wanted: Tensor,
    scalars: "RowScalars",
    into: "Destination",
    residual: Residual | None,
    consume: bool,
    dz_bytes: int = 0,
) -> Tensor | None:
    temperature, chain = _temperature_and_chain(rows, head, accumulation_dtype(hidden))
    return gpu.over_vocabulary(
        hidden, head, targets, rows, wanted, scalars.scaled(chain), temperature, into, residual, consume, dz_bytes
    )


def _temperature_and_chain(rows: Rows, head: Head, acc: torch.dtype) -> tuple[Tensor | None, Tensor | float]:
    """Row temperatures, and dz / d(logit before scale), the cap's slope aside."""
    if head.row_temperature is None:
        return None, head.logit_scale / head.temperature
    temperature = rows.take(head.row_temperature, 1.0).to(acc)
    return temperature, head.logit_scale / temperature


def over_groups(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Rows,
    scalars: RowScalars,
    into: Destination,
    residual: Residual | None,
    kept_rows: Tensor | None,
    consume: bool = False,
    dz_bytes: int = 0,
    bound: int | None = None,
) -> Tensor | None:
    """The loop over vocabulary groups; dhidden is this shard's part, rounded only where it is one GEMM's result."""
    acc, dtype = accumulation_dtype(hidden), operand_dtype(hidden, head.weight)
    temperature, chain = _temperature_and_chain(rows, head, acc)
    scaled = scalars.scaled(chain)
    lift = _lift(scaled) if dtype == torch.float16 and rows.count > 0 else None
    if lift is not None:
        scaled = scaled.scaled(lift)
    y = rows.take(targets).long()
    n, width, device = rows.count, hidden.shape[1], hidden.device
    # Rows that cannot be dropped may hold anything, which GEMMs over all rows would spread.
    droppable = rows.live is None and min(n, head.weight.shape[0]) > 0
    if droppable and native_gradients.serves(device, hidden.dtype, head.weight.dtype):
        source = native_gradients.Dz(hidden, head, y, rows, scaled, temperature, residual, kept_rows)
        return native_gradients.over_vocabulary(source, into, consume=consume, dz_bytes=dz_bytes, bound=bound)
    b, h, at_target, row_max, log_sum = scaled.b, scaled.h, scaled.at_target, scaled.row_max, scaled.log_sum
    dhidden = torch.zeros(n, width, dtype=acc, device=device) if into.hidden else None
    step = backward_rows(acc.itemsize, dz_bytes)
    for number, v in enumerate(groups(head.weight.shape[0])):
        weight, bias = weight_group(head, v, dtype, acc)
        size = v.stop - v.start
        dweight = None if into.weight is None else torch.zeros(size, width, dtype=acc, device=device)
        dbias = None if into.bias is None else torch.zeros(size, dtype=acc, device=device)
        for i in range(0, n, step):
            r = slice(i, min(i + step, n))
            row_temperature = None if temperature is None else temperature[r]
            x = rows.block(hidden, r.start, r.stop, dtype)
            lp: Tensor | None  # log p of the block; kept exponentials give it only where something reads it
            if residual is not None:
                where = r if kept_rows is None else kept_rows[r]
                shift = (residual.group_max[where, number].to(acc) - row_max[r]) - log_sum[r]
                e = residual.kept[where, v].to(acc, copy=True)
                reads_lp = h is not None or head.softcap is not None
                lp = e.log().add_(shift[:, None]) if reads_lp else None  # -inf where p is 0, whose factor is bounded
                dz = e.mul_(shift.exp()[:, None])
            else:
                lp = block_logits(x, weight, bias, head, row_temperature, acc)
                lp.sub_(row_max[r, None]).sub_(log_sum[r, None])
                dz = lp.exp()
            if h is None:
                dz.mul_(b[r, None])
            else:
                assert lp is not None
                # A ruled-out entry (bias -inf): p is 0, and h * log p must not overflow to make 0 * inf.
                lp.clamp_min_(-1e4)
                dz.mul_(b[r, None] - h[r, None] * lp)
            if head.softcap is not None:
                assert lp is not None
                dz.mul_(softcap_slope(lp.add_(log_sum[r, None]).add_(row_max[r, None]), head, row_temperature))
            column, inside = target_column(y[r], v)
            dz.scatter_(1, column, torch.where(inside[:, None], at_target[r, None], dz.gather(1, column)))
            if dbias is not None:
                dbias += dz.sum(0)
            dz = dz.to(dtype)
            if dhidden is not None:
                add_mm(dhidden[r], dz, weight)
            if dweight is not None:
                add_mm(dweight, dz.T, x)
            del x, lp, dz  # or they would be there beside the next block's
        for part in (dweight, dbias):
            if lift is not None and part is not None:
                part /= lift
        if into.weight is not None and dweight is not None:
            native_gradients.write(into.weight[v], dweight, into.accumulate_weight)
        if into.bias is not None and dbias is not None:
            native_gradients.write(into.bias[v], dbias, into.accumulate_bias)
        del weight, bias, dweight, dbias
    return dhidden if dhidden is None or lift is None else dhidden.div_(lift)


def _lift(scalars: RowScalars) -> Tensor:
    """A power of 2 that dz is multiplied by where it is rounded to fp16: its largest entry then is about 2^13.

    Below 6e-8 fp16 is 0, which is more than most entries of dz where a loss is divided by its number of tokens.
    """
    parts = torch.stack([t for t in (scalars.b, scalars.h, scalars.at_target) if t is not None])
    _, exponent = torch.frexp(parts.abs().nan_to_num(0.0, posinf=0.0).amax())
    return torch.exp2((13 - exponent).clamp(max=126).to(parts.dtype))


def context(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Rows,
    outputs: RowOutputs,
    residual: Residual,
    backend: str = "torch",
    group: str = "",
) -> Tensor:
    """``A = sum_j p_j slope_j W_j - slope_y W_y``, chain included, ``[count, D]``: minus a log-prob's dhidden.

    The target's two terms are one, ``p_y - 1``, formed without cancellation.
    """
    logprob, norm = outputs.logprob, (outputs.row_max, outputs.log_sum)
    into = Destination(True, None, None)
    if backend in gpu.FAMILY and not group and _reads_exponentials(hidden, head, into, residual):
        minus = torch.full_like(logprob, -1)
        result = gpu.from_exponentials(hidden, head, rows, minus, outputs.log_sum, into, residual, True)
        assert result is not None
        return result
    at_target = torch.expm1(logprob) * _target_slope(logprob, *norm, rows, head)
    scalars = RowScalars(torch.ones_like(logprob), None, at_target, *norm)
    if backend in gpu.FAMILY:
        assert rows.live is not None
        result = _on_triton(hidden, head, targets, rows, rows.live, scalars, into, residual, True)
    else:
        result = over_groups(hidden, head, targets, rows, scalars, into, residual, None, True)
    assert result is not None
    return result


def from_context(
    head: Head, targets: Tensor, rows: Rows, upstream: Upstream, kept: Tensor, group: str
) -> tuple[Rows, Tensor]:
    """``dhidden = b A + dlse slope_y chain W_y`` from ``A`` of every row of the call: no GEMM at all.

    With dlse the row of the target cancels, down to what ``A`` was rounded to: plan.py leaves it to other plans.
    """
    acc = upstream.logprob.dtype
    rows, _ = rows.keep(upstream.nonzero(rows))
    scalars = RowScalars.of(rows, upstream, acc, head)
    _, chain = _temperature_and_chain(rows, head, acc)
    out = rows.block(kept, 0, rows.count, acc) * scalars.b[:, None]  # not in place: it may be the saved tensor itself
    vocab = head.weight.shape[0]
    if upstream.dlse is not None and vocab > 0:
        column, inside = target_column(rows.take(targets).long(), slice(0, vocab))
        column = column[:, 0]
        slope = _target_slope(rows.take(upstream.logprob).to(acc), scalars.row_max, scalars.log_sum, rows, head)
        factor = torch.where(inside, rows.take(upstream.dlse).to(acc) * chain * slope, 0)
        out.addcmul_(factor[:, None], head.weight[column].to(acc))
    return rows, vocab_parallel.sum_over_ranks(out, group)
