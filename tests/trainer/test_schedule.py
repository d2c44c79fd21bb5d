"""The learning rate over a run, for each schedule with and without warm-up."""

from __future__ import annotations

import math

import pytest
import torch

from srppo.config import SRPPOConfig
from srppo.learner import lr_schedule


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_rates(kind: str, warmup: float, rates: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_schedule(SRPPOConfig(lr_scheduler_type=kind, warmup_ratio=warmup), optimizer, 4)
    seen = []
    for _ in range(4):
        seen.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates)
