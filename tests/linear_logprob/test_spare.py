"""The memory that calls use again: who gets it, when it is free and whose it is then; results know nothing of it."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from linear_logprob.head_problems import make
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from srppo_kernels import _extension, empty_cache, linear_logprob, linear_loss
from srppo_kernels.linear_logprob import spare

LIKE = torch.empty(0)
MIB = 1 << 20

needs_extension = pytest.mark.skipif(not _extension.available(), reason="the extension is not built")


@pytest.fixture(autouse=True)
def _nothing_kept():
    empty_cache()
    yield
    empty_cache()


def block(mib: int) -> torch.Tensor:
    """So many MiB."""
    return spare.empty(LIKE, (mib, MIB // 4))


@needs_extension
def test_memory_is_used_again_once_no_tensor_is_over_it():
    first = spare.empty(LIKE, (3, 5, MIB), torch.bfloat16)
    assert first.shape == (3, 5, MIB)
    assert first.dtype == torch.bfloat16
    assert first.is_contiguous()
    assert first.untyped_storage().nbytes() == 30 * MIB
    place, part = first.data_ptr(), first[2].t()
    del first
    assert block(31).data_ptr() != place  # a view is over it
    del part
    with torch.device("meta"):  # a default device, as torch.set_default_device has it, is not the block's
        smaller = block(20)
    assert smaller.data_ptr() == place
    assert smaller.untyped_storage().nbytes() == 20 * MIB
    del smaller
    assert block(30).data_ptr() == place


@needs_extension
def test_the_smallest_block_that_is_large_enough_is_taken_and_four_are_kept():
    blocks = [block(mib) for mib in (2, 3, 5, 7, 9)]
    places = [b.data_ptr() for b in blocks]
    del blocks  # the fifth that is free sends the smallest away
    assert [block(mib).data_ptr() for mib in (4, 6, 9)] == places[2:]  # each is free again at once
    held = [block(mib) for mib in (1, 6, 8)]
    assert [b.data_ptr() for b in held] == [places[1], places[3], places[4]]
    del held
    grown = block(20)  # in place of the largest, 9 MiB
    assert [block(mib).data_ptr() for mib in (3, 5, 7)] == places[1:4]
    del grown
    assert len({block(mib).data_ptr() for mib in (8, 9, 20)}) == 1


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process's memory")
def test_what_is_free_is_the_systems_to_take():
    def lent() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(re.search(r"LazyFree:\s+(\d+) kB", text)[1]) << 10

    few = MIB  # pages that the system has not counted yet
    before = lent()
    held = block(24).fill_(1)
    assert abs(lent() - before) < few
    del held
    assert abs(lent() - before - 24 * MIB) < few
    again = block(24)
    again[:8] = 1
    assert abs(lent() - before - 16 * MIB) < few
    del again
    empty_cache()
    assert abs(lent() - before) < few


@needs_extension
def test_it_is_a_tensor_like_any_other(tmp_path):
    """Copies, files, NumPy and other processes, which share memory by replacing it."""
    place = block(2).data_ptr()
    tensor = block(2).copy_(torch.arange(MIB // 2).view(2, -1))
    assert tensor.data_ptr() == place
    want = tensor.clone()
    assert torch.equal(copy.deepcopy(tensor), want)
    torch.save(tensor, tmp_path / "tensor")
    assert torch.equal(torch.load(tmp_path / "tensor"), want)
    array = tensor.numpy()
    del tensor
    assert block(2).fill_(-1).data_ptr() != place
    tensor = torch.from_numpy(array)
    assert torch.equal(tensor, want)
    del array
    tensor.share_memory_()
    assert tensor.is_shared()
    assert torch.equal(tensor, want)


def test_a_trace_gets_none_and_what_is_small_is_mallocs():
    with FakeTensorMode() as mode:
        assert isinstance(spare.empty(mode.from_tensor(torch.empty(3)), (MIB, 5)), FakeTensor)
    assert type(spare.empty(torch.nn.Parameter(torch.empty(3)), (MIB,))) is torch.Tensor
    assert spare.empty(LIKE, (spare.LEAST // 4 - 1,)).untyped_storage().resizable()
    assert spare.empty(LIKE.double(), (0, MIB)).dtype == torch.float64


@needs_extension
def test_a_dtype_that_no_gradient_has_is_refused():
    with pytest.raises(RuntimeError, match="empty_spare is for"):
        torch.ops.srppo_native.empty_spare([3], torch.int32)


@pytest.mark.parametrize("frozen", [False, True])
def test_calls_in_a_row_share_it_and_agree(frozen, monkeypatch):
    """What an earlier call left there, NaN included, reaches nobody: the loss, the frozen per-token op."""
    monkeypatch.setattr(spare, "LEAST", 1)
    p = make("random", n=60, v=2300, grad=(True, not frozen), mask=torch.rand(60) > 0.3)

    def gradients():
        if frozen:
            loss = linear_logprob(p.hidden, p.weight, p.targets, **p.options).logprob.sin().sum()
        else:
            loss = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sin().sum(), {}), **p.options)[0]
        return torch.autograd.grad(loss, p.inputs())

    want = [t.clone() for t in gradients()]
    for fill in (torch.nan, torch.inf):
        for left in [spare.empty(LIKE, (MIB,)) for _ in range(4)]:
            left.fill_(fill)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))


@needs_extension
def test_a_gradient_that_is_dropped_makes_room_for_the_next(monkeypatch):
    monkeypatch.setattr(spare, "LEAST", 1)
    p = make("random", n=60, v=2300, grad=(True, True))

    def step():
        linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))[0].backward()
        return p.weight.grad.data_ptr()

    step()
    places = set()
    for _ in range(6):
        p.weight.grad = None
        places.add(step())
    first = p.weight.grad.clone()
    assert len(places) <= 2  # exponentials and dweight may take turns
    step()  # added to a gradient that is there
    assert torch.equal(p.weight.grad, 2 * first)
