"""The torch backend: GEMMs over a block of rows and a group of the vocabulary, merged online.

Forward, for each vocabulary group (in order) and each row block, with z the block of logits in fp32 and y the target:

    m_c = max_j z_j     s_c = sum_{j != y} exp(z_j - m_c)     t_c = sum_{j != y} exp(z_j - m_c) (z_j - m_c)
    m' = max(m, m_c),   a = e^(m - m'),   c = e^(m_c - m')                              merged, in vocabulary order
    t = a (t + s (m - m')) + c (t_c + s_c (m_c - m'))          s = a s + c s_c

and at the end, with d = z_y - m and S = s + e^d the whole sum,

    log S = log1p(s + expm1(d))      logprob = d - log S      lse = m + log S      H = log S - (t + d e^d) / S

The target stays out of s because of peaked rows: where p_y is 1 - 1e-6, s is what 1 - p_y is made of, and beside a 1 it
would keep no digit of itself. logprob is not taken as ``z_y - lse``: it is near 0 there while lse is tens or, with a
common offset, thousands, and would round it. t is taken around the maximum for the same reason.

Backward, with b = l - g - h H and lp = (z - m) - log S (reference.py has the derivation):

    dz_j = p_j (b - h lp_j)                              j is not the target
    dz_y = g (1 - p_y) + p_y (l - h (logprob + H))       1 - p_y = -expm1(logprob), in fp32, before any rounding

Row bits. A GEMM always sees ``row_block`` rows, padded with zeros, and groups do not depend on the call, so a row's
outputs do not depend on which rows it shares a call with, as far as the BLAS rounds all places of a block alike; the
tests hold that on the one at hand, and README.md has where it does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srppo_kernels.linear_logprob import gpu, native, sm90, vocab_parallel
from srppo_kernels.linear_logprob.rows import Rows

GROUP = 2048  # vocabulary entries a group: fp32 weight copy of 32 MB at D = 4096
BACKWARD_ELEMENTS = 1 << 22  # logits held at once in the backward: 16 MB a buffer


def row_block(device: torch.device) -> int:
    """Rows of one forward GEMM; fixed, because a row's bits may depend on it."""
    return 128 if device.type == "cpu" else 1024


def backward_rows(item: int, dz_bytes: int = 0) -> int:
    """Rows at a time of torch's backward, of a vocabulary group each; ``dz_bytes``: of theirs, 0 for the default."""
    return max(128, (dz_bytes // item if dz_bytes else BACKWARD_ELEMENTS) // GROUP)


@dataclass(frozen=True)
class Head:
    """What turns a hidden state into logits; ``row_temperature`` is per row of the whole call."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    row_temperature: Tensor | None  # [N]
    temperature: float
    logit_scale: float
    softcap: float | None


class Residual(NamedTuple):
    """Exponentials that a forward keeps for its gradients; empty where the plan keeps nothing.

    By row of ``kept``; backends "triton" and "sm90" fill both by position among the live rows. What takes the place of
    a group's maximum: on Triton that of a part of a tile; on AMX tiles a number up to 60 below it
    (csrc/linear_logprob/amx_softmax.h); on sm90 one number a row, and then the target has minus the others' sum
    (triton_reference.py).
    """

    kept: Tensor  # [rows, V], rows kept_columns apart: exp(z - maximum of its vocabulary group)
    group_max: Tensor  # [rows, groups], as many as maxima_of says

    @property
    def around_one(self) -> bool:
        """Whether a row's exponentials are all around one number."""
        return self.group_max.shape[1] == 1


class RowOutputs(NamedTuple):
    """Per computed row, in the accumulation dtype."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    row_max: Tensor  # m and log S apart: their sum, lse, has lost log S's digits where logits share a large offset
    log_sum: Tensor

    @classmethod
    def of(cls, state: Tensor, *, entropy: bool) -> "RowOutputs":
        """Of a scan's state ``(m, s, t, z_y)``, whatever number m is; without ``entropy`` that is 0."""
        m, s, t, zy = state
        d = zy - m
        e_y = d.exp()
        log_s = torch.log1p(s + torch.expm1(d))
        h = log_s - (t + d * e_y) / (s + e_y) if entropy else torch.zeros_like(s)
        return cls(d - log_s, h, m + log_s, m, log_s)


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs (so that gradients can be checked by finite differences)."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def narrow_operands(device: torch.device) -> bool:
    """Whether torch has GEMMs of 16-bit operands that return fp32: on a GPU, but not on Apple's."""
    return device.type not in ("cpu", "mps")


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the GEMMs read: where none takes 16 bit and returns fp32, operands are widened, which is exact."""
    if narrow_operands(hidden.device) and hidden.dtype == weight.dtype:
        return hidden.dtype
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def kept_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Exponentials are kept in bf16 (the range of fp32) for 16-bit inputs, and whole otherwise."""
    narrow = hidden.dtype.itemsize == 2 or weight.dtype.itemsize == 2
    return torch.bfloat16 if narrow else accumulation_dtype(hidden)


def kept_columns(vocab: int, backend: str) -> int:
    """Entries from one row of kept exponentials to the next."""
    return gpu.whole_columns(vocab) if backend in gpu.FAMILY else vocab


def maxima_of(vocab: int, backend: str) -> int:
    """How many numbers a row of kept exponentials is around."""
    if backend in gpu.FAMILY:
        return 1 if backend == "sm90" else gpu.maxima(vocab)
    return -(-vocab // GROUP)


def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` with the accumulators' precision in the result."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, with out in the accumulation dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def groups(vocab: int) -> Iterator[slice]:
    """The fixed vocabulary groups, in the order in which they are merged."""
    return (slice(v, min(v + GROUP, vocab)) for v in range(0, vocab, GROUP))


def weight_group(head: Head, v: slice, dtype: torch.dtype, acc: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight = head.weight[v].to(dtype)
    if weight.stride(0) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    return weight, None if head.bias is None else head.bias[v].to(acc)


def block_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: Tensor | None, acc: torch.dtype
) -> Tensor:
    z = mm(x, weight.T, acc)
    if bias is not None:
        z.add_(bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature is not None:
        z.div_(temperature[:, None])
    elif head.temperature != 1.0:
        z.div_(head.temperature)
    if bias is not None:
        # A bias of -inf rules an entry out. The lowest finite number does the same and makes no NaN of 0 * inf below.
        z.clamp_min_(torch.finfo(acc).min)
    return z


def softcap_slope(z: Tensor, head: Head, temperature: Tensor | None) -> Tensor:
    """1 - tanh^2 of the cap, from the final logits: they are cap * tanh(.) / temperature."""
    assert head.softcap is not None
    u = z * (head.temperature if temperature is None else temperature[:, None]) / head.softcap
    return (1 - u * u).clamp_min_(0)


def target_column(y: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Position of the targets in a group ``[R, 1]`` (clamped), and whether they are in it."""
    local = y - v.start
    width = v.stop - v.start
    return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)


def _pad(values: Tensor, n: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, n - values.shape[0]), value=fill)


def forward(
    hidden: Tensor,  # [N, D]
    head: Head,
    targets: Tensor,  # [N], already local to this rank's shard
    rows: Rows,
    *,
    entropy: bool,
    backend: str = "torch",
    residual: Residual | None = None,
    kept_rows: Tensor | None = None,
    group: str = "",
    bound: int | None = None,
) -> RowOutputs:
    """logprob, entropy and lse of ``rows``, 0 where masked; fills ``residual`` if given, at ``kept_rows`` (default: in
    order).

    ``bound``: on the native scan's workspace, in bytes; None: its default.
    """
    acc = accumulation_dtype(hidden)
    temperature = None if head.row_temperature is None else rows.take(head.row_temperature, 1.0).to(acc)
    if backend in gpu.FAMILY:
        assert rows.live is not None
        y = targets[rows.start : rows.stop].long()  # read in live rows alone
        scan = sm90.scan if backend == "sm90" else gpu.scan
        state = scan(hidden, head, y, temperature, rows, entropy, residual, kept_rows)
        return RowOutputs(*gpu.outputs(vocab_parallel.merge_ranks(state, group), rows.live, entropy))
    y = rows.take(targets).long()
    if backend == "native":
        state = native.scan(hidden, head, y, temperature, rows, entropy, residual, kept_rows, bound)
    else:
        state = _scan(hidden, head, y, temperature, rows, entropy, residual, kept_rows)
    out = RowOutputs.of(vocab_parallel.merge_ranks(state, group), entropy=entropy)
    return out if rows.live is None else RowOutputs(*(torch.where(rows.live, values, 0) for values in out))


def _scan(
    hidden: Tensor,
    head: Head,
    y: Tensor,  # [count]
    temperature: Tensor | None,  # [count]
    rows: Rows,
    entropy: bool,
    residual: Residual | None,
    kept_rows: Tensor | None,
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``."""
    acc, dtype, size = accumulation_dtype(hidden), operand_dtype(hidden, head.weight), row_block(hidden.device)
    n = rows.count
    padded = -(-n // size) * size
    y = _pad(y, padded, 0)
    temperature = None if temperature is None else _pad(temperature, padded, 1.0)
    state = torch.zeros(4, padded, dtype=acc, device=hidden.device)
    state[0] = torch.finfo(acc).min  # an empty shard leaves it so
    for number, v in enumerate(groups(head.weight.shape[0])):
        weight, bias = weight_group(head, v, dtype, acc)
        for a in range(0, padded, size):
            r = slice(a, a + size)
            x = rows.block(hidden, a, a + size, dtype, pad_to=size)
            z = block_logits(x, weight, bias, head, None if temperature is None else temperature[r], acc)
            column, inside = target_column(y[r], v)
            state[3, r] += torch.where(inside, z.gather(1, column)[:, 0], 0)
            m_c = z.amax(1)
            z.sub_(m_c[:, None])
            e = torch.exp(z) if entropy else z.exp_()
            if residual is not None:
                live = min(a + size, n)
                where = slice(a, live) if kept_rows is None else kept_rows[a:live]
                residual.kept[where, v] = e[: live - a].to(residual.kept.dtype)
                residual.group_max[where, number] = m_c[: live - a]
            e.scatter_(1, column, e.gather(1, column).masked_fill_(inside[:, None], 0))
            s_c = e.sum(1)
            t_c = z.mul_(e).sum(1) if entropy else torch.zeros_like(m_c)
            vocab_parallel.merge_(state[:, r], m_c, s_c, t_c)
            del z, e  # or they would be there beside the next block's
        del weight, bias
    return state[:, :n]
