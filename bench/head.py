"""Inputs of the ops that start from hidden states, and their fp64 oracle.

The oracle works on the very tensors that are timed: their values, widened to fp64, over vocabulary blocks, so that the
logits of 8192 x 151936 need no 10 GB. Log-probs are checked on every live row. Gradients are

    dz_ij = g_i (1_{j = y_i} - p_ij)        dhidden = dz @ weight        dweight = dz.T @ hidden

with g = dL/dlogprob, on ``CHECKED_ROWS`` rows of dhidden (an error of the chunking would hit the first, the last or the
middle ones, which are among them) and on as many rows of dweight plus those of the targets.

Rows: *random* ones have logits of standard deviation 2, as an untrained or uncertain model; *peaked* ones add a push
along the target's weight, so that p_y runs from about 0.3 to 1 - 1e-9, as in a model that was fine-tuned: there
1 - p_y is what the gradient lives on, and what rounding destroys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core import Case, Errors, Floor, Result, relative

LOGIT_STD = 2.0
PEAK = (12.0, 34.0)  # logits of the targets of peaked rows; lse of the other entries is about 13
CLIP = 0.2
BLOCK = 8192  # vocabulary entries of one fp64 block
CHECKED_ROWS = 48
IGNORE = -100


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """The tensors of a case; ``N`` tokens, ``D`` hidden size, ``V`` vocabulary."""

    case: Case
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N] int64, valid everywhere
    mask: Tensor  # [N] bool, exactly round(N * density) live, scattered
    upstream: Tensor  # [N] fp32, dL/dlogprob of the bare autograd op: uneven, first element 0
    log_ratio: Tensor  # [N] fp32, what log pi - log pi_old shall be
    advantages: Tensor  # [N] fp32

    @functools.cached_property
    def live(self) -> int:
        return int(self.mask.sum())

    @functools.cached_property
    def masked_targets(self) -> Tensor:
        """Targets with the ignore index in masked places, the way in which most peers take a mask."""
        return torch.where(self.mask, self.targets, IGNORE)

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle.of(self)

    @functools.cached_property
    def old_logprobs(self) -> Tensor:
        """[N] fp32: exact log-probs less the wanted log-ratio; 0 where masked."""
        old = torch.zeros_like(self.upstream)
        old[self.mask] = (self.oracle.logprob - self.log_ratio[self.mask]).float()
        return old

    def leaves(self, *, frozen: bool) -> tuple[Tensor, Tensor]:
        """hidden and weight as autograd leaves that share their memory."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)


@functools.lru_cache(maxsize=1)
def inputs_for(case: Case) -> HeadInputs:
    """Inputs of a case, whatever its op; the last ones are kept, as several ops share them."""
    n, d, v = case.shape
    device, dtype = torch.device(case.device), case.torch_dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = (normal(v, d) * (LOGIT_STD / d**0.5)).to(dtype)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    hidden = normal(n, d)
    if case.rows == "peaked":
        rows = weight[targets].float()
        wanted = torch.empty(n, device=device).uniform_(*PEAK, generator=generator)
        now = (hidden * rows).sum(-1)
        hidden += rows * ((wanted - now) / rows.square().sum(-1))[:, None]
    live = max(1, round(n * case.mask_density))
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[torch.randperm(n, generator=generator, device=device)[:live]] = True
    upstream = normal(n)
    upstream[0] = 0
    # Ratios well off the clip bounds, where a rounding error of the log-prob would decide whether there is a gradient.
    ratio = torch.empty(n, device=device).uniform_(0.9, 1.1, generator=generator)
    ratio[3::7], ratio[5::11] = 1.5, 0.6
    return HeadInputs(case, hidden.to(dtype), weight, targets, mask, upstream, ratio.log(), normal(n))


def problem_inputs(case: Case) -> HeadInputs:
    """:func:`inputs_for`, shared between the ops of one shape."""
    return inputs_for(replace(case, op=""))


@dataclass(frozen=True, eq=False)
class Oracle:
    """fp64 results on the live rows, in their order."""

    inputs: HeadInputs
    hidden: Tensor  # [live, D] fp64
    targets: Tensor  # [live]
    lse: Tensor  # [live] fp64
    logprob: Tensor  # [live] fp64

    @classmethod
    def of(cls, inputs: HeadInputs) -> Oracle:
        hidden = inputs.hidden[inputs.mask].double()
        targets = inputs.targets[inputs.mask]
        lse = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float64, device=hidden.device)
        for block in inputs.weight.split(BLOCK):
            lse = torch.logaddexp(lse, torch.logsumexp(hidden @ block.double().T, dim=-1))
        target = (hidden * inputs.weight[targets].double()).sum(-1)
        return cls(inputs, hidden, targets, lse, target - lse)

    def check_gradients(self, g: Tensor, result: Result) -> tuple[float, float]:
        """Relative errors of dhidden (its worst row) and of dweight, for g = dL/dlogprob, ``[live]`` fp64."""
        return self._hidden_error(g, result["dhidden"]), self._weight_error(g, result.get("dweight"))

    def _hidden_error(self, g: Tensor, dhidden: Tensor) -> float:
        rows = spaced(self.hidden.shape[0], CHECKED_ROWS, g.device)
        exact = torch.zeros(len(rows), self.hidden.shape[1], dtype=torch.float64, device=g.device)
        for start in range(0, self.inputs.weight.shape[0], BLOCK):
            block = self.inputs.weight[start : start + BLOCK].double()
            columns = torch.arange(start, start + block.shape[0], device=g.device)
            exact += self._dz(g, rows, columns, block) @ block
        norms = exact.norm(dim=-1)
        off = (dhidden[self.inputs.mask][rows].double() - exact).norm(dim=-1)
        moving = norms > 0  # a clipped token has gradient 0, and then it must be 0
        worst = (off / torch.where(moving, norms, 1)).amax().item()
        masked = dhidden[~self.inputs.mask]
        return float("inf") if masked.numel() and bool((masked != 0).any()) else worst

    def _weight_error(self, g: Tensor, dweight: Tensor | None) -> float:
        if dweight is None:
            return float("nan")
        columns = torch.cat((spaced(dweight.shape[0], CHECKED_ROWS, g.device), self.targets)).unique()
        block = self.inputs.weight[columns].double()
        rows = torch.arange(self.hidden.shape[0], device=g.device)
        exact = self._dz(g, rows, columns, block).T @ self.hidden
        return relative(dweight[columns], exact)

    def _dz(self, g: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> Tensor:
        """``[rows, columns]`` of dL/dlogits."""
        log_p = self.hidden[rows] @ block.T - self.lse[rows, None]
        hit = columns == self.targets[rows, None]
        # 1 - p_y through expm1: of p_y = 1 - 1e-8 nothing would be left otherwise, in fp64 too
        return g[rows, None] * torch.where(hit, -torch.expm1(log_p), -log_p.exp())


def spaced(count: int, wanted: int, device: torch.device) -> Tensor:
    """Up to ``wanted`` indices below ``count``, evenly spaced, first and last among them."""
    return torch.linspace(0, count - 1, min(count, wanted), device=device).round().long().unique()


def bare_gemms(inputs: HeadInputs, number: int) -> Floor:
    """The GEMMs alone, on the live rows: logits; dhidden; dweight. Into buffers that exist, in the inputs' dtype."""
    hidden, weight = inputs.hidden[inputs.mask], inputs.weight
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    dhidden = torch.empty_like(hidden) if number >= 2 else None
    dweight = torch.empty_like(weight) if number >= 3 else None

    def call() -> Tensor:
        torch.mm(hidden, weight.T, out=logits)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden)
        if dweight is not None:
            torch.mm(logits.T, hidden, out=dweight)
        return logits

    return Floor(f"{number} x torch.mm", call)


def ppo_of(logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped loss in plain torch, mean over live tokens: what a peer that gives log-probs is completed with."""
    ratio = torch.exp(logprob - old)
    token = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return torch.where(mask, token, 0).sum() / mask.sum()


def naive_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the inputs' dtype, softmax in fp32: what transformers and most trainers do."""
    logits = hidden @ weight.T
    return F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, targets[:, None])[:, 0]


def logprob_errors(inputs: HeadInputs, logprob: Tensor) -> Errors:
    return Errors((logprob[inputs.mask].double() - inputs.oracle.logprob).abs().amax().item())


def loss_errors(inputs: HeadInputs, result: Result, loss: Tensor, g: Tensor) -> Errors:
    """Of a scalar loss with its gradients; ``g`` is dL/dlogprob on the live rows."""
    return Errors((result["loss"].double() - loss).abs().item(), *inputs.oracle.check_gradients(g, result))
