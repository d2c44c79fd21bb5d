"""Statistics of the two losses: means over valid tokens that can be merged as if micro-batches had been one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srppo_kernels._arguments import sum_dtype
from srppo_kernels.ppo_loss.reference import explained_variance

__all__ = ["PPOStats", "ValueStats"]


def _columns(stats: Sequence[Sequence[Tensor | None]], kind: str) -> dict[str, Tensor]:
    """Field -> `[len(stats)]` in float64, where the device has it, for fields that are given."""
    if not stats:
        raise ValueError(f"{kind}.merge: stats is empty; pass at least one")
    fields: tuple[str, ...] = type(stats[0])._fields  # type: ignore[attr-defined]
    columns = {}
    for name, column in zip(fields, zip(*stats, strict=True), strict=True):
        given = [value for value in column if value is not None]
        if given and len(given) != len(column):
            raise ValueError(f"{kind}.merge: {name} is None in some of the stats and given in others")
        if given:
            columns[name] = torch.stack(given).to(sum_dtype(given[0].device))
    return columns


def _pooled_variance(weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Chan's formula: the variance of the union from every part's mean and variance.

    Means are taken around the largest part's: where all are equal they differ by exactly 0, and not by a rounding.
    """
    means = means - means.gather(0, weights.argmax(0, keepdim=True))
    mean = (weights * means).sum()
    return (weights * (variances + (means - mean) ** 2)).sum()


class PPOStats(NamedTuple):
    """Of one `ppo_loss`, over valid tokens; float32 0-d tensors on the inputs' device, detached; 0 without tokens."""

    approx_kl: Tensor  # mean of k3 = r - 1 - log r, an estimate of KL(old || new) that is never negative
    approx_kl_k1: Tensor  # mean of -log r, which is kept in [-20, 20]
    clipfrac_low: Tensor  # fraction with A < 0 and r < 1 - clip_low: no gradient
    clipfrac_high: Tensor  # fraction with A > 0 and r > 1 + clip_high: no gradient
    clipfrac_dual: Tensor  # fraction with A < 0 and r > dual_clip: no gradient
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_var: Tensor  # population variance
    entropy: Tensor | None  # mean entropy in nats; None where none was given
    count: Tensor  # type: ignore[assignment]  # valid tokens; shadows tuple.count, which nobody needs here

    @classmethod
    def from_vector(cls, vector: Tensor, has_entropy: bool) -> "PPOStats":
        """From what the kernels return, in the order of `reference.POLICY_STATS`."""
        stats = cls(*vector.detach().unbind())
        return stats if has_entropy else stats._replace(entropy=None)

    @classmethod
    def merge(cls, stats: Sequence["PPOStats"]) -> "PPOStats":
        """The statistics of the union of several batches, on the device, weighted by their token counts.

        Raises:
            ValueError: no stats, or an entropy in some only.
        """
        if len(stats) == 1:  # some forty launches on a GPU
            return stats[0]
        columns = _columns(stats, "PPOStats")
        weights = columns["count"] / columns["count"].sum().clamp(min=1)
        merged = {name: (weights * column).sum() for name, column in columns.items()}
        merged["ratio_max"] = columns["ratio_max"].amax()
        merged["ratio_var"] = _pooled_variance(weights, columns["ratio_mean"], columns["ratio_var"])
        merged["count"] = columns["count"].sum()
        return cls(**{name: merged[name].float() if name in merged else None for name in cls._fields})  # type: ignore[arg-type]


class ValueStats(NamedTuple):
    """Of one `value_loss`, over valid tokens; float32 0-d tensors on the inputs' device, detached; 0 without tokens."""

    clipfrac: Tensor  # fraction where the clipped error is the larger one: no gradient
    error: Tensor  # mean of (V - R)^2, unclipped
    value_mean: Tensor
    return_mean: Tensor
    return_var: Tensor  # population variance of R
    residual_var: Tensor  # population variance of V - R
    explained_variance: Tensor  # 1 - Var(V - R) / Var(R); 0 where Var(R) is 0
    count: Tensor  # type: ignore[assignment]  # valid tokens; shadows tuple.count, which nobody needs here

    @classmethod
    def from_vector(cls, vector: Tensor) -> "ValueStats":
        """From what the kernels return, in the order of `reference.VALUE_STATS`."""
        return cls(*vector.detach().unbind())

    @classmethod
    def merge(cls, stats: Sequence["ValueStats"]) -> "ValueStats":
        """The statistics of the union of several batches, on the device, weighted by their token counts.

        Raises:
            ValueError: no stats.
        """
        if len(stats) == 1:  # some forty launches on a GPU
            return stats[0]
        columns = _columns(stats, "ValueStats")
        weights = columns["count"] / columns["count"].sum().clamp(min=1)
        merged = {name: (weights * column).sum() for name, column in columns.items()}
        residual_means = columns["value_mean"] - columns["return_mean"]
        merged["return_var"] = _pooled_variance(weights, columns["return_mean"], columns["return_var"])
        merged["residual_var"] = _pooled_variance(weights, residual_means, columns["residual_var"])
        merged["explained_variance"] = explained_variance(merged["return_var"], merged["residual_var"])
        merged["count"] = columns["count"].sum()
        return cls(**{name: value.float() for name, value in merged.items()})
