"""Heads, rows and float64 oracles for the tests of linear_logprob."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srppo_kernels import linear_logprob
from srppo_kernels.linear_logprob import native
from srppo_kernels.linear_logprob.reference import linear_logprob_reference

BACKENDS = ["torch", *(["native"] if not native.obstacle(torch.device("cpu"), (torch.float32,) * 2) else [])]
KINDS = ["random", "peaked", "negative", "positive", "offset+1e4", "offset-1e4"]


@dataclass
class Problem:
    """Inputs of one call; ``options`` are keyword arguments of linear_logprob."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any]

    def inputs(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        candidates = [self.hidden, self.weight, self.options.get("bias")]
        return [t for t in candidates if t is not None and t.requires_grad]

    def run(self, **more: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """linear_logprob with this problem's options."""
        return linear_logprob(self.hidden, self.weight, self.targets, **{**self.options, **more})

    def double(self) -> "Problem":
        """The same numbers in float64."""
        twins = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in self._floats()}
        options = {k: twins.get(id(v), v) for k, v in self.options.items()}
        return replace(self, hidden=twins[id(self.hidden)], weight=twins[id(self.weight)], options=options)

    def _floats(self) -> list[Tensor]:
        tensors = [self.hidden, self.weight, *self.options.values()]
        return [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]

    def live(self) -> Tensor:
        """Rows that count, flat."""
        live = self.targets.reshape(-1) != self.options.get("ignore_index", -100)
        mask = self.options.get("mask")
        return live if mask is None else live & mask.reshape(-1)

    def oracle(self) -> tuple[Tensor, Tensor, Tensor]:
        """The reference on this problem, in its own dtype, in the targets' shape."""
        temperature = self.options.get("temperature", 1.0)
        outputs = linear_logprob_reference(
            self.hidden.reshape(-1, self.hidden.shape[-1]),
            self.weight,
            self.targets.reshape(-1),
            self.live(),
            bias=self.options.get("bias"),
            temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
            logit_scale=self.options.get("logit_scale", 1.0),
            softcap=self.options.get("softcap"),
        )
        return tuple(t.view(self.targets.shape) for t in outputs)


def make(
    kind: str = "random",
    *,
    n: int = 150,
    d: int = 40,
    v: int = 2500,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    grad: tuple[bool, bool] = (True, True),
    **options: Any,
) -> Problem:
    """``n`` rows (more than one row block) over ``v`` entries (more than one group, a multiple of nothing)."""
    weight = torch.randn(v, d) * 0.3
    targets = torch.randint(0, v, (n,))
    hidden = torch.randn(n, d)
    b = torch.randn(v) if bias else None
    if kind == "peaked":  # p_y from 0.5 to 1 - 1e-7
        w = weight[targets]
        hidden = w / w.square().sum(1, keepdim=True) * torch.linspace(8, 24, n)[:, None]
    if kind in ("negative", "positive"):
        hidden[:, 0], weight[:, 0] = 20.0, (-4.0 if kind == "negative" else 4.0)
    if kind.startswith("offset"):
        b = torch.full((v,), float(kind.removeprefix("offset")))
    if b is not None:
        options["bias"] = b.to(dtype).requires_grad_(grad[1])
    return Problem(hidden.to(dtype).requires_grad_(grad[0]), weight.to(dtype).requires_grad_(grad[1]), targets, options)


def value_bound(problem: Problem) -> float:
    """What fp32 arithmetic may lose: a few ulps of the largest logit, and the rounding of the sums."""
    twin = problem.double()
    z = twin.hidden.reshape(-1, twin.hidden.shape[-1])[problem.live()] @ twin.weight.T
    if "bias" in twin.options:
        z = z + twin.options["bias"]
    largest = float(z.detach().abs().max()) if z.numel() else 0.0
    return 3e-6 + 4e-7 * largest


def relative(a: Tensor, b: Tensor) -> float:
    """Error of ``a`` against ``b``, relative, in the 2-norm."""
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


def naive_gradients(problem: Problem, loss: Callable[..., Tensor]) -> list[Tensor]:
    """Gradients along torch's own path: logits in the inputs' dtype, softmax in fp32."""
    z = problem.hidden @ problem.weight.T
    if "bias" in problem.options:
        z = z + problem.options["bias"]
    logp = torch.log_softmax(z.float(), -1)
    outputs = (
        logp.gather(1, problem.targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        torch.logsumexp(z.float(), -1),
    )
    return list(torch.autograd.grad(loss(*outputs), problem.inputs()))
