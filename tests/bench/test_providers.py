"""Every provider that runs here solves its problem; one that does not becomes a row that says why."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import srppo_kernels
from bench import head, runner
from bench.core import Case, Errors, Floor, Provider, Unavailable
from bench.linear_logprob import OPS as HEAD_OPS
from bench.log_ratio import OPS as RATIO_OPS
from bench.method import Effort, Samples
from bench.peers import require
from bench.run import OPS, main

EFFORT = Effort(seconds=0.0, least=1, samples=1)
FOREVER = runner.Deadline(math.inf)
SMALL = {3: (12, 16, 700), 2: (4, 33)}
TESTED = [op for op in OPS if op.name != "training_step"]


def small_case(op, **changes):
    return Case(op.name, SMALL[len(op.shape_names)], "float32", **changes)


def all_entries(op, case):
    """Every provider but the compiled ones, which take a C++ compiler and its time."""
    names = [provider.name for provider in op.providers if provider.name != "torch-compile"]
    return list(runner.entries(op, case, names, ()))


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("op", TESTED, ids=lambda op: op.name)
def test_every_provider_agrees_with_fp64(op, density):
    case = small_case(op, mask_density=density)
    rows = runner.run_case(op, case, all_entries(op, case), EFFORT, FOREVER).rows
    assert any(row.provider == "srppo" and row.status == "ok" for row in rows)
    for row in rows:
        if row.status == "unavailable":
            assert row.reason
            continue
        assert row.status == "ok", (row.provider, row.reason)
        assert row.max_error < 1e-4, row.provider
        assert not row.grad_error > 1e-3, row.provider
        assert not row.weight_grad_error > 1e-4, row.provider
        assert row.ratio > 0
        assert row.samples == 1


@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_the_oracle_is_autograd_in_fp64(kind):
    case = Case("", (9, 16, 9000), "float32", 0.6, kind)
    inputs = head.problem_inputs(case)
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(-1, inputs.targets[:, None])[:, 0][inputs.mask]
    assert torch.allclose(logprob, inputs.oracle.logprob, rtol=0, atol=1e-12)
    g = torch.randn(len(logprob), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dhidden, dweight = torch.autograd.grad((logprob * g).sum(), (hidden, weight))
    rows, columns = inputs.oracle.check_gradients(g, {"dhidden": dhidden, "dweight": dweight})
    # On peaked rows plain autograd itself loses 1 - p_y, in fp64 too; there it is the less exact of the two.
    assert rows < (1e-12 if kind == "random" else 1e-4)
    assert columns < 1e-10
    off, _ = inputs.oracle.check_gradients(g, {"dhidden": dhidden * 1.01, "dweight": dweight})
    assert off == pytest.approx(0.01, rel=0.01)


def test_a_gradient_in_a_masked_row_is_wrong():
    inputs = head.problem_inputs(Case("", (9, 16, 500), "float32", 0.5))
    dhidden = torch.ones_like(inputs.hidden)
    worst, _ = inputs.oracle.check_gradients(torch.ones(inputs.live, dtype=torch.float64), {"dhidden": dhidden})
    assert worst == math.inf
    assert runner.is_wrong(Errors(0.0, worst), 1.0)


@pytest.mark.parametrize(
    ("errors", "wrong"),
    [((0.9,), False), ((1.1,), True), ((math.nan,), True), ((0.0, math.inf), True), ((0.0, 0.5, math.inf), True)],
)
def test_what_is_wrong_is_not_timed(errors, wrong):
    assert runner.is_wrong(Errors(*errors), 1.0) is wrong


def test_peaked_rows_are_peaked():
    oracle = head.problem_inputs(Case("", (64, 64, 5000), "float32", 1.0, "peaked")).oracle
    p = oracle.logprob.exp()
    assert p.median() > 0.9
    assert (-torch.expm1(oracle.logprob)).min() < 1e-6


def test_the_mask_has_the_density_that_was_asked_for():
    assert head.problem_inputs(Case("", (50, 8, 100), "float32", 0.2)).live == 10


@pytest.mark.parametrize("name", ["srppo", "torch", "torch-compile"])
def test_the_fp64_oracle_is_there_before_a_call_whose_memory_is_measured(name):
    """Inputs of a later visit are made anew: 256 MiB of a PPO loss on an H200 were the oracle's."""
    op = next(op for op in HEAD_OPS if op.name == "linear_ppo_loss")
    head.inputs_for.cache_clear()
    problem = op.make(small_case(op))
    next(provider for provider in op.providers if provider.name == name).prepare(problem, "auto")
    assert "old_logprobs" in vars(problem.inputs)


def op_with(*providers):
    (op,) = (op for op in RATIO_OPS if op.name == "log_ratio_reward")
    return dataclasses.replace(op, providers=(*op.providers[:2], *providers))


def refuses(problem, plan):
    raise Unavailable("its kernel needs a GPU")


def breaks(problem, plan):
    return lambda: 1 / 0


def lies(problem, plan):
    return lambda: {"rewards": torch.zeros_like(problem.sft)}


@pytest.mark.parametrize(
    ("prepare", "status", "reason"),
    [(refuses, "unavailable", "needs a GPU"), (breaks, "failed", "ZeroDivisionError"), (lies, "wrong", "not timed")],
)
def test_a_provider_that_does_not_work_is_a_row_that_says_why_and_stops_no_other(prepare, status, reason):
    op = op_with(Provider("other", "", prepare))
    case = small_case(op)
    rows = runner.run_case(op, case, list(runner.entries(op, case, (), ())), EFFORT, FOREVER).rows
    assert [row.status for row in rows] == ["ok", "ok", status]
    assert reason in rows[-1].reason
    assert rows[-1].samples == 0


def test_what_is_kept_for_later_calls_goes_before_our_own_are_measured_and_not_before_others(monkeypatch):
    """It hid their memory; and handed back by others' measurements it was not there when ours were timed."""
    order = []

    def named(name):
        return Provider(
            name, "", lambda problem, plan: lambda: (order.append(name), op.providers[0].prepare(problem, plan)())[1]
        )

    op = op_with()
    op = dataclasses.replace(op, providers=(op.providers[0], named("srppo-torch"), named("other")))
    monkeypatch.setattr(srppo_kernels, "empty_cache", lambda: order.append("empty"))
    case = small_case(op)
    visited = runner.run_case(op, case, list(runner.entries(op, case, (), ())), EFFORT, FOREVER)
    assert order[:5] == ["empty", "empty", "empty", "srppo-torch", "empty"]
    assert "empty" not in order[5:]
    runner.visit_again(visited, EFFORT, FOREVER)
    assert order.count("empty") == 4 + 2


def test_a_second_visit_adds_samples_on_new_inputs_and_leaves_rows_that_failed():
    made = []

    def prepare(problem, plan):
        made.append(problem)
        if len(made) > 1:
            raise RuntimeError("once was enough")
        return op.providers[0].prepare(problem, plan)

    op = op_with(Provider("other", "", prepare), Provider("third", "", refuses))
    case = small_case(op)
    visited = runner.run_case(op, case, list(runner.entries(op, case, (), ())), EFFORT, FOREVER)
    before = [row.samples for row in visited.rows]
    notes = []
    runner.visit_again(visited, EFFORT, FOREVER, notes.append)
    assert len(made) == 2
    assert made[0] is not made[1]
    assert before == [1, 1, 1, 0]
    assert [row.samples for row in visited.rows] == [2, 2, 1, 0]
    assert [row.status for row in visited.rows] == ["ok", "ok", "ok", "unavailable"]
    assert any("once was enough" in note for note in notes)
    late = [row.samples for row in visited.rows]
    runner.visit_again(visited, EFFORT, runner.Deadline(-1))
    assert [row.samples for row in visited.rows] == late


def test_which_providers_and_plans_run():
    (op,) = (op for op in RATIO_OPS if op.name == "log_ratio_reward")
    made = [Provider("a", "", breaks), Provider("b", "", breaks, default=False),
            Provider("c", "", breaks, applies=lambda case: False),
            Provider("d", "", breaks, plans=("auto",), other_plans=("cache",))]  # fmt: skip
    op = dataclasses.replace(op, providers=tuple(made))

    def chosen(providers=(), plans=()):
        return [(e.provider.name, e.plan) for e in runner.entries(op, small_case(op), providers, plans)]

    assert chosen() == [("a", "-"), ("d", "auto")]
    assert chosen(("b", "c")) == [("b", "-"), ("c", "-")]  # who asks gets what does not apply, too
    assert chosen((), ("cache",)) == [("a", "-"), ("d", "cache")]


def test_a_checked_row_has_each_error_in_its_column_and_the_figures_of_a_warm_call(monkeypatch):
    op, peaks = dataclasses.replace(op_with(), gross_error=1.0), iter((80.0, 20.0))
    monkeypatch.setattr(runner, "extra_memory", lambda call, device, empty: (call(), next(peaks)))
    problem = SimpleNamespace(case=small_case(op), errors=lambda result: Errors(0.1, 0.2, 0.3))
    entry = runner.Entry(Provider("other", "", lambda problem, plan: dict), "-")
    checked = runner.check(op, problem, entry, FOREVER)
    row = checked.row
    assert (row.max_error, row.grad_error, row.weight_grad_error, row.extra_mib) == (0.1, 0.2, 0.3, 20)
    assert checked.warm and checked.call is dict


@pytest.mark.parametrize("warm", [True, False])
def test_the_memory_of_a_first_call_is_left_to_the_next_visit(monkeypatch, warm):
    case = small_case(op := op_with())
    entry = runner.Entry(op.providers[0], "-")
    row = dataclasses.replace(runner.blank(op, case, entry), extra_mib=9.0)
    monkeypatch.setattr(runner, "check", lambda *_: runner.Checked(row, warm=warm))
    assert runner.run_case(op, case, [entry], EFFORT, FOREVER).memory == [[9.0] if warm else []]


def test_memory_is_the_median_of_the_visits_with_their_range():
    visited = runner.Visited(OPS[0], small_case(OPS[0]), [], [runner.blank(OPS[0], small_case(OPS[0]),
                             runner.Entry(OPS[0].providers[0], "-"))], [[]], [[]])  # fmt: skip
    for mib in (5.0, math.nan, 2.0, 1.0):
        visited.remember(0, mib)
    assert (visited.rows[0].extra_mib, visited.rows[0].extra_low, visited.rows[0].extra_high) == (2, 1, 5)


def test_a_row_is_filled_from_the_samples_of_every_visit():
    """Medians over all of them, intervals that span the visits' own, each column from its own samples."""
    visits = [Samples([1.0, 2.0, 4.0], [10.0, 20.0, 40.0], [5.0, 6.0, 7.0], [3.0, 3.5, 4.5]),
              Samples([8.0], [80.0], [9.0], [5.5])]  # fmt: skip
    row = runner.blank(OPS[0], small_case(OPS[0]), runner.Entry(OPS[0].providers[0], "-"))
    runner.fill(row, SimpleNamespace(useful_flops=6e12, useful_bytes=9e9), visits)
    assert (row.median_ms, row.p20_ms, row.p80_ms) == pytest.approx((3000, 1400, 8000))
    assert (row.ratio, row.ratio_p20, row.ratio_p80) == pytest.approx((30, 14, 80))
    assert (row.cold_ms, row.cold_ratio) == pytest.approx((6500, 4))
    assert (row.useful_tflops, row.useful_gbs) == pytest.approx((2, 3))
    assert (row.samples, row.visits, row.noisy) == (4, 2, True)
    calm = [Samples([s], [1.0], [s], [1.0]) for s in (1.0, 2.0, 3.0)]  # a machine that drifts leaves ratios alone
    for number, noisy in ((2, True), (3, False)):  # two samples know no spread
        runner.fill(row, SimpleNamespace(useful_flops=0, useful_bytes=0), calm[:number])
        assert row.noisy is noisy


def test_each_row_gets_the_samples_of_its_own_call_beside_the_median_of_the_floor(monkeypatch):
    op = OPS[0]
    rows = [runner.blank(op, small_case(op), runner.Entry(op.providers[0], "-")) for _ in range(3)]
    visited = runner.Visited(op, small_case(op), [], rows, [[], [], []], [[], [], []])
    known = []

    def interleave(floor, calls, effort, clock, seconds, late):
        known.append(seconds)
        assert late() is False and floor == "the floor"
        return Samples([1.0, 2.0, 4.0]), [Samples([float(call)], [float(call)], [1.0], [1.0]) for call in calls]

    monkeypatch.setattr(runner, "interleave", interleave)
    problem = SimpleNamespace(floor=lambda: Floor("copy", "the floor"), useful_flops=0, useful_bytes=0)
    timed = [(at, runner.Checked(rows[at], call, 0.5 * at)) for at, call in ((0, 5), (2, 7))]
    for _ in range(2):
        runner.measure(problem, visited, timed, EFFORT, None, FOREVER)
    assert [(row.median_ms, row.samples, row.visits) for row in rows[::2]] == [(5000, 2, 2), (7000, 2, 2)]
    assert [(row.floor, row.floor_ms) for row in rows[::2]] == [("copy", 2000)] * 2
    assert rows[1].samples == 0 and known == [[0.0, 1.0]] * 2


def test_what_the_time_does_not_allow_is_a_row_too():
    (op,) = (op for op in OPS if op.name == "gae")
    case = small_case(op)
    rows = runner.run_case(op, case, list(runner.entries(op, case, (), ())), EFFORT, runner.Deadline(-1)).rows
    assert {row.status for row in rows} == {"skipped"}
    assert "--budget 0" in rows[0].reason


def test_a_plan_that_cannot_serve_is_a_row_with_the_ops_own_words():
    (op,) = (op for op in HEAD_OPS if op.name == "linear_logprob_grad")
    case = small_case(op)
    work = list(runner.entries(op, case, ("srppo",), ("precompute",)))
    (row,) = runner.run_case(op, case, work, EFFORT, FOREVER).rows
    assert row.status == "failed"
    assert "precompute" in row.reason


@pytest.mark.parametrize(
    ("package", "module", "name", "text"),
    [
        ("nothing", "no_such_package_here.kernel", "f", "nothing is not installed"),
        ("torch", "torch.no_such_part", "f", "this version of torch has no torch.no_such_part"),
        ("torch", "torch.nn.functional", "no_such_op", "has no no_such_op"),
    ],
)
def test_a_missing_package_says_what_is_missing(package, module, name, text):
    with pytest.raises(Unavailable, match=text):
        require(package, module, name)


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_run_writes_the_cases_that_were_done(after, tmp_path, monkeypatch, capsys):
    done, run_case = [], runner.run_case

    def interrupted(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(arguments[1])
        return run_case(*arguments)

    monkeypatch.setattr(runner, "run_case", interrupted)
    out = tmp_path / "run.csv"
    words = ["--op", "whiten", "--shape", "2x9", "3x9", "--provider", "srppo", "--device", "cpu", "--seconds", "0"]
    assert main([*words, "--out", str(out)]) == 130
    assert [line["shape"] for line in csv.DictReader(out.open())] == ["2x9", "3x9"][:after]
    assert "bench/run.py: interrupted" in capsys.readouterr().err


def test_a_run_writes_a_row_per_op_provider_and_shape_and_draws(tmp_path, capsys):
    out = tmp_path / "run.csv"
    code = main(["--op", "gae", "linear_logprob", "--shape", "2x40", "8x16x300", "--dtype", "float32", "--mask-density",
                 "1", "0.5", "--provider", "srppo", "trl-loop", "torch", "verl", "--device", "cpu", "--seconds", "0",
                 "--out", str(out)])  # fmt: skip
    assert code == 0
    rows = list(csv.DictReader(out.open()))
    assert {(r["op"], r["provider"], r["mask_density"]) for r in rows} == {
        (op, provider, density)
        for op, providers in (("gae", ("srppo", "trl-loop")), ("linear_logprob", ("srppo", "torch", "verl")))
        for provider in providers
        for density in ("1", "0.5")
    }
    assert all(r["max_error"] for r in rows)
    assert all(r["versions"] and r["commit"] and r["machine"] for r in rows)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"run-gae-ratio.png", "run-linear_logprob-error.png"}
    text = " ".join(capsys.readouterr().out.split())
    assert "linear_logprob: log-probs, no gradient" in text
    assert "unmasked" in text
    assert "verl: unavailable: verl is not installed" in text
