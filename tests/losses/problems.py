"""Batches that losses break on, and sums of hand-written scalar formulas to hold them against.

An oracle is a function of plain floats that returns a term and its derivatives by hand, in Python's float64 and without
autograd: nothing of it is shared with the code that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 0, 0],  # gaps
        [0, 0, 0, 0, 0, 0, 0],  # nothing
        [1, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
    ]
).bool()


def batch(names: Sequence[str], *, spread: float = 0.3, seed: int = 0, mask: Tensor = MASK) -> dict[str, Tensor]:
    """Float32 tensors by name: log-probs near each other, of any sign where they may be; NaN and inf where masked.

    ``spread`` is the standard deviation of log-ratios. One valid token's probability is 1 - 1e-6, another's e^-40.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(mask.shape, generator=generator)

    logprob = -2.5 * normal().abs() - 0.01
    valid = mask.nonzero()
    logprob[tuple(valid[0])], logprob[tuple(valid[-1])] = -1e-6, -40.0
    result = {"logprob": logprob, "entropy": 2 * normal().abs()}
    for name in names:
        if name.endswith("logprobs"):
            result[name] = (logprob + spread * normal()).clamp(max=-1e-6)
        else:
            result[name] = normal().abs() if name == "weights" else normal()
    fillers = (float("nan"), float("inf"), -float("inf"))
    for number, value in enumerate(result.values()):
        value[~mask] = fillers[number % 3]
    return result


def judge(
    loss: Callable[..., Any],
    given: dict[str, Tensor],
    names: Sequence[str],
    term: Callable[..., tuple[float, float, float, dict[str, float]]],
    *,
    normalizer: float,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    mask: Tensor = MASK,
) -> dict[str, Tensor]:
    """Value, gradients and aux of a token-level loss, against the sum of ``term(logprob, entropy, *tensors)``.

    ``term`` returns the token's loss, its derivatives in logprob and entropy, and its part of each sum in aux.
    """
    inputs = {name: value.to(dtype).requires_grad_() for name, value in deepcopy(given).items()}
    logprob, entropy, *tensors = (inputs[name] for name in ("logprob", "entropy", *names))
    result, aux = loss(logprob, entropy, mask, *tensors, normalizer=normalizer)
    assert result.dim() == 0
    assert result.dtype == dtype
    assert not any(value.requires_grad for value in aux.values())
    grads = torch.autograd.grad(result, [logprob, entropy, *tensors], allow_unused=True)
    d_logprob, d_entropy = (torch.zeros(mask.shape) if g is None else g for g in grads[:2])
    assert grads[2:] == (None,) * len(tensors)  # constants, whatever they come from

    want, scale = 0.0, 0.0
    parts: list[dict[str, float]] = []
    for place in map(tuple, mask.nonzero().tolist()):
        value, dl, dh, sums = term(*(inputs[name][place].item() for name in ("logprob", "entropy", *names)))
        want, scale = want + value / normalizer, scale + abs(value) / normalizer
        parts.append({"tokens": 1.0, **sums})
        for got, by_hand in ((d_logprob[place], dl / normalizer), (d_entropy[place], dh / normalizer)):
            assert math.isclose(float(got), by_hand, rel_tol=tolerance, abs_tol=1e-30), (place, float(got), by_hand)
    result = float(result.detach())
    assert abs(result - want) <= tolerance * scale, (result, want)
    assert d_logprob[~mask].abs().sum() == 0
    assert d_entropy[~mask].abs().sum() == 0
    check_sums(aux, parts, tolerance)
    return aux


def check_sums(aux: dict[str, Tensor], parts: Sequence[dict[str, float]], tolerance: float) -> None:
    """That aux holds the sums of ``parts``, and nothing else; they are fp32 whatever the loss is."""
    assert aux.keys() == parts[0].keys()
    for name, got in aux.items():
        numbers = [float(part[name]) for part in parts]
        error = max(tolerance, 1e-6) * sum(map(abs, numbers)) + 1e-8  # k3 of ratios near 1 is made of cancellation
        assert abs(float(got) - sum(numbers)) <= error, (name, float(got), sum(numbers))


def judge_sequences(
    loss: Callable[..., Any],
    given: dict[str, Tensor],
    tensors: Sequence[Any],
    whole: Callable[[list[list[float]]], tuple[float, list[float], list[dict[str, float]]]],
    *,
    mask: Tensor = MASK,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    **options: Any,
) -> dict[str, Tensor]:
    """Value, gradient and aux of a sequence- or pair-level loss.

    ``whole`` gets each row's valid log-probs and returns the loss; for each row dloss/dlogprob, which is the same for
    all tokens of a row in every loss here; and what each sequence or pair adds to the sums in aux.
    """
    logprob = given["logprob"].to(dtype).clone().requires_grad_()
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result, aux = loss(logprob, None, mask, *tensors, **options)
    grad, *others = torch.autograd.grad(result, [logprob, *tensors], allow_unused=True)
    assert others == [None] * len(tensors)  # constants, whatever they come from
    rows = [logprob[i][mask[i]].tolist() for i in range(mask.shape[0])]
    want, by_row, parts = whole(rows)
    check_sums(aux, parts, tolerance)
    assert math.isclose(float(result.detach()), want, rel_tol=tolerance, abs_tol=1e-30), (result, want)
    for i in range(mask.shape[0]):
        for got in grad[i][mask[i]].tolist():
            assert math.isclose(got, by_row[i], rel_tol=tolerance, abs_tol=1e-30), (i, got, by_row[i])
    assert grad[~mask].abs().sum() == 0
    assert not any(value.requires_grad for value in aux.values())
    return aux


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
