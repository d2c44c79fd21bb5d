"""The ops of bench/run.py through pytest-benchmark, for people who compare commits with its tools.

    pytest --benchmark-only bench
    pytest --benchmark-only bench --benchmark-save before     and later    --benchmark-compare

Each op on its first default case; the floor is timed like a provider. bench/run.py is the one that prints errors,
memory and ratios; here a result is only refused where it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.choose import device_of
from bench.core import Case, Op, Problem, Unavailable
from bench.run import OPS
from bench.runner import Entry, entries, is_ours, is_wrong

DEVICE = device_of("auto")
SINGLE = [op for op in OPS if op.name != "training_step"]  # seconds a call: bench/run.py has it
FLOOR = "floor"

pytestmark = pytest.mark.benchmark(min_rounds=3, max_time=0.5, warmup=False)


def first_case(op: Op) -> Case:
    return op.defaults(DEVICE)[0]


def parameters() -> list[Any]:
    found = []
    for op in SINGLE:
        found.append(pytest.param(op, None, id=f"{op.name}-{FLOOR}"))
        for entry in entries(op, first_case(op), (), ()):
            plan = "" if entry.plan in ("-", "auto") else f"-{entry.plan}"
            found.append(pytest.param(op, entry, id=f"{op.name}-{entry.provider.name}{plan}"))
    return found


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    """The last op's problem: its inputs are large, and the parameters are ordered by op."""
    return {}


def problem_of(op: Op, problems: dict[str, Problem]) -> Problem:
    if op.name not in problems:
        problems.clear()
        problems[op.name] = op.make(first_case(op))
    return problems[op.name]


def waited_for(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that ends when the device has done its work."""
    if DEVICE != "cuda":
        return call

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize()

    return call_and_wait


@pytest.mark.parametrize(("op", "entry"), parameters())
def test_speed(benchmark: Any, problems: dict[str, Problem], op: Op, entry: Entry | None) -> None:
    problem = problem_of(op, problems)
    benchmark.group = f"{op.name} {problem.case}"
    if entry is None:
        benchmark(waited_for(problem.floor().call))
        return
    try:
        call = entry.provider.prepare(problem, entry.plan)
        errors = problem.errors(call())
    except Unavailable as reason:
        pytest.skip(str(reason))
    wrong = is_wrong(errors, op.gross_error)
    if wrong and not is_ours(op, entry.provider):
        pytest.skip(f"wrong: its {op.error_of} is {errors.value:.2g}")
    assert not wrong
    benchmark.extra_info.update(error=errors.value, error_of=op.error_of, gradient_error=errors.grad)
    benchmark(waited_for(call))
