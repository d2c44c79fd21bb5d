"""The training step's largest batch: the line through two peaks, and that it tells a third one."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench import training_step
from bench.core import Case
from bench.method import extra_memory
from bench.training_step import StepProblem, fused, largest_batch, line, materialised, roles_for

MIB = 1 << 20
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WIDE = {**SMALL, "vocab_size": 32768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")


@pytest.fixture(params=[fused, materialised], ids=["srppo", "logits"])
def prepare(request, monkeypatch):
    """A provider with a model whose memory is mostly what it is about: activations, or logits."""
    monkeypatch.setattr(training_step, "ARCHITECTURE", SMALL if request.param is fused else WIDE)
    roles_for.cache_clear()
    yield request.param
    roles_for.cache_clear()


@dataclass(frozen=True)
class Linear:
    """A problem that takes 40 MiB, and 6 more for each sequence, beside 512 that are held."""

    case: Case

    def doubled(self):
        batch, *rest = self.case.shape
        return replace(self, case=replace(self.case, shape=(2 * batch, *rest)))

    def held_bytes(self):
        return 512 * MIB


def allocate(problem, plan):
    def call():
        constant, buffers = torch.ones(40 * MIB // 4), torch.ones(problem.case.shape[0] * 6 * MIB // 4)
        assert constant[0] == buffers[0]
        return {}

    return call


def test_a_line_goes_through_its_two_points():
    assert line(3, (58.0, 76.0)) == (40.0, 6.0)


@on_linux
def test_the_largest_batch_is_what_a_known_memory_leaves_room_for(monkeypatch):
    monkeypatch.setitem(training_step.MEMORY_GIB, "cpu", 2.0)
    problem = Linear(Case("training_step", (4, 1, 1), "float32"))
    allocate(problem, "-")()
    text = largest_batch(allocate)(problem, "-")
    assert text.startswith("6 MiB a sequence: ")
    assert text.endswith(" sequences in 2 GiB (line through 4, 8)")
    fits = int(text.split(": ")[1].split()[0])
    assert fits == pytest.approx((2048 - 512 - 40) / 6, rel=0.05)


@pytest.mark.parametrize(
    ("growth", "told"), [(-4.0, False), (0.0, False), (3 / 256, False), (0.99, False), (1.0, True)]
)
def test_memory_that_grows_by_some_pages_gives_no_estimate(monkeypatch, growth, told):
    """A process touches a page now and then: 4 KiB more at 2 B would fit millions of sequences."""
    monkeypatch.setattr(training_step, "extra_memory", lambda call, device: (0.0, call))
    text = largest_batch(lambda problem, plan: 40.0 + growth * (problem.case.shape[0] == 8))(
        Linear(Case("training_step", (4, 1, 1), "float32")), "-"
    )
    assert bool(text) == told, text


@on_linux
def test_peaks_at_one_and_two_batches_tell_the_one_at_four(prepare):
    """Within a fifth: packing lays more sequences in wider rows, whose attention masks do not grow linearly. The first
    step also makes the optimizers' state, so it is not measured."""
    peaks = {}
    for batch in (16, 32, 64):
        call = prepare(StepProblem.of(Case("training_step", (batch, 8, 16), "float32")), "-")
        call()
        peaks[batch] = extra_memory(call, "cpu")[1]
    constant, per_sequence = line(16, (peaks[16], peaks[32]))
    assert per_sequence > 0.5
    assert constant + 64 * per_sequence == pytest.approx(peaks[64], rel=0.2), peaks
