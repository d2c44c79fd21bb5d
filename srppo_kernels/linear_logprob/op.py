"""Per-token log-probability, entropy and lse from hidden states and the LM head, a vocabulary chunk at a time.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature        [N, V], never held
    lse = log sum_j exp z_j      logprob = z_y - lse      H = lse - sum_j p_j z_j,   p = exp(z - lse)

    dz = [g (1_y - p) - h p (log p + H) + l p]      g = dL/dlogprob, h = dL/dentropy, l = dL/dlse
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 128  # a GEMM always sees this many rows, padded with zeros: then a row's bits do not depend on its batch
VOCAB = 2048  # fixed vocabulary groups, merged in order


class LinearLogprob(NamedTuple):
    """Per-token results, fp32, of the shape of ``targets``; 0 where masked."""

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor | None


@dataclass(frozen=True)
class _Spec:
    scale: float
    softcap: float | None
    temperature: float | Tensor


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, spec: _Spec, temp: float | Tensor) -> Tensor:
    z = x @ weight.T
    if bias is not None:
        z += bias
        z.clamp_min_(torch.finfo(z.dtype).min)
    if spec.scale != 1.0:
        z *= spec.scale
    if spec.softcap is not None:
        z = torch.tanh_(z / spec.softcap) * spec.softcap
    if isinstance(temp, Tensor):
        z /= temp[:, None]
    elif temp != 1.0:
        z /= temp
    return z


def _blocks(n: int) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, n, ROWS)]


def _forward(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, spec: _Spec, temp: float | Tensor):  # noqa: ANN202
    n = x.shape[0]
    m, s, t, zy = x.new_zeros(4, n)
    for v0 in range(0, weight.shape[0], VOCAB):
        w = weight[v0 : v0 + VOCAB].to(x.dtype)
        b = None if bias is None else bias[v0 : v0 + VOCAB].to(x.dtype)
        for r in _blocks(n):
            z = _logits(x[r], w, b, spec, temp[r] if isinstance(temp, Tensor) else temp)
            here = (y[r] >= v0) & (y[r] < v0 + w.shape[0])
            zy[r] += torch.where(here, z.gather(1, (y[r] - v0).clamp(0, w.shape[0] - 1)[:, None])[:, 0], 0)
            mc = z.amax(1)
            z -= mc[:, None]
            e = torch.exp(z)
            sc, tc = e.sum(1), (e * z).sum(1)
            if v0 == 0:
                m[r], s[r], t[r] = mc, sc, tc
                continue
            mn = torch.maximum(m[r], mc)
            da, db = m[r] - mn, mc - mn
            a, c = da.exp(), db.exp()
            t[r] = (t[r] + s[r] * da) * a + (tc + sc * db) * c
            s[r] = s[r] * a + sc * c
            m[r] = mn
    log_s = s.log()
    return (zy - m) - log_s, log_s - t / s, m + log_s


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, rows: Tensor, spec: _Spec):  # noqa: ANN205
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        n = rows.numel()
        pad = -n % ROWS
        x = torch.zeros(n + pad, hidden.shape[1], dtype=dtype, device=hidden.device)
        x[:n] = hidden[rows]
        yp = torch.nn.functional.pad(y[rows].long(), (0, pad))
        temp = spec.temperature
        if isinstance(temp, Tensor):
            temp = torch.nn.functional.pad(temp[rows].to(dtype), (0, pad), value=1.0)
        with torch.autocast(hidden.device.type, enabled=False):
            packed = _forward(x, weight, yp, bias, spec, temp)
        full = [torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device).index_copy_(0, rows, p[:n]) for p in packed]
        ctx.save_for_backward(hidden, weight, bias, y, rows, *full)
        ctx.spec, ctx.dtype = spec, dtype
        return tuple(full)

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor, dl: Tensor):  # noqa: ANN205
        hidden, weight, bias, y, rows, logp, ent, lse = ctx.saved_tensors
        spec, dtype = ctx.spec, ctx.dtype
        rows = rows[((g != 0) | (h != 0) | (dl != 0))[rows]]
        x, y, g, h, dl, logp, ent, lse = (t[rows] for t in (hidden, y.long(), g, h, dl, logp, ent, lse))
        x = x.to(dtype)
        temp = spec.temperature[rows].to(dtype) if isinstance(spec.temperature, Tensor) else spec.temperature
        chain = spec.scale / temp
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx = torch.zeros_like(x) if need_x else None
        dw = torch.zeros_like(weight) if need_w else None
        db = torch.zeros_like(bias) if need_b else None
        step = 2048
        with torch.autocast(hidden.device.type, enabled=False):
            for v0 in range(0, weight.shape[0], VOCAB):
                v = slice(v0, min(v0 + VOCAB, weight.shape[0]))
                w = weight[v].to(dtype)
                dwc = torch.zeros_like(w) if need_w else None
                dbc = torch.zeros(w.shape[0], dtype=dtype, device=w.device) if need_b else None
                for r in (slice(i, i + step) for i in range(0, x.shape[0], step)):
                    tr = temp[r] if isinstance(temp, Tensor) else temp
                    z = _logits(x[r], w, None if bias is None else bias[v].to(dtype), spec, tr)
                    lp = z - lse[r, None]
                    dz = lp.exp() * ((dl[r] - g[r] - h[r] * ent[r])[:, None] - h[r, None] * lp)
                    at = (g[r] * -torch.expm1(logp[r]) + logp[r].exp() * (dl[r] - h[r] * (logp[r] + ent[r])))[:, None]
                    col = (y[r] - v0)[:, None]
                    inside = (col >= 0) & (col < w.shape[0])
                    col = col.clamp(0, w.shape[0] - 1)
                    dz.scatter_(1, col, torch.where(inside, at, dz.gather(1, col)))
                    if spec.softcap is not None:
                        capped = z * (tr[:, None] if isinstance(tr, Tensor) else tr) / spec.softcap
                        dz *= 1 - capped * capped
                    dz *= chain[r, None] if isinstance(chain, Tensor) else chain
                    if dx is not None:
                        dx[r] += dz @ w
                    if dwc is not None:
                        dwc += dz.T @ x[r]
                    if dbc is not None:
                        dbc += dz.sum(0)
                if dw is not None:
                    dw[v] = dwc
                if db is not None:
                    db[v] = dbc
        if dx is not None:
            dx = torch.zeros_like(hidden).index_copy_(0, rows, dx.to(hidden.dtype))
        return dx, dw, db, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    lse: bool = False,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: Any = None,
) -> LinearLogprob:
    """log softmax(z)[target] a token, with entropy (nats) and lse on request; masked tokens give 0 and cost nothing."""
    if group is not None:
        raise NotImplementedError("group: vocabulary parallelism is not there yet")
    shape = targets.shape
    flat = targets.reshape(-1)
    live = flat != ignore_index
    if mask is not None:
        live = live & mask.reshape(-1).bool()
    rows = live.nonzero()[:, 0]
    bad = (flat[rows] < 0) | (flat[rows] >= weight.shape[0])
    if bad.any():
        i = int(rows[bad][0])
        raise ValueError(f"targets: element {i} is {int(flat[i])}, outside [0, {weight.shape[0]}) and not ignore_index")
    temp = temperature.reshape(-1) if isinstance(temperature, Tensor) else float(temperature)
    spec = _Spec(logit_scale, softcap, temp)
    lp, ent, ls = _LinearLogprob.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, rows, spec)
    return LinearLogprob(lp.view(shape), ent.view(shape) if entropy else None, ls.view(shape) if lse else None)


def linear_log_ratio(
    hidden_sft: Tensor,
    weight_sft: Tensor,
    hidden_base: Tensor,
    weight_base: Tensor,
    targets: Tensor,
    *,
    bias_sft: Tensor | None = None,
    bias_base: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """log pi_sft - log pi_base a token, exactly 0 for equal models and where masked."""
    sft = linear_logprob(hidden_sft, weight_sft, targets, bias=bias_sft, mask=mask, **options).logprob
    base = linear_logprob(hidden_base, weight_base, targets, bias=bias_base, mask=mask, **options).logprob
    return sft - base


@dataclass(frozen=True)
class Explanation:
    """What an op would do for given arguments."""

    backend: str
    plan: str
    gemms: int
    workspace_bytes: int
    reason: str


def explain(hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any, op: str = "linear_logprob", **kw: Any) -> Explanation:
    """Backend, plan, GEMM count and workspace of a call, without running it."""
    grad = hidden.requires_grad or weight.requires_grad
    return Explanation("torch", "recompute" if grad else "score", 4 if grad else 1, 8 * ROWS * VOCAB, "chunked torch")
