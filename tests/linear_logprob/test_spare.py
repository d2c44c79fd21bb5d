"""The memory that calls use again: who gets it, when it is free and whose it is then; results know nothing of it."""

import copy
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from linear_logprob.head_problems import make
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from srppo_kernels import _extension, empty_cache, linear_logprob, linear_loss
from srppo_kernels.linear_logprob import spare

LIKE = torch.empty(0)
MIB = 1 << 20
WITHOUT_ROOM = """
import re, resource, torch
from pathlib import Path
from srppo_kernels.linear_logprob import spare
like = torch.empty(0)
blocks = [spare.empty(like, (100, 1 << 18)) for _ in range(4)]
now = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (100 << 20), resource.RLIM_INFINITY))
del blocks
spare.empty(like, (450, 1 << 18)).fill_(1)
try:
    spare.empty(like, (900, 1 << 18))
except RuntimeError as error:
    print(error)
"""

needs_extension = pytest.mark.skipif(not _extension.available(), reason="the extension is not built")


@pytest.fixture(autouse=True)
def _nothing_kept():
    empty_cache()
    yield
    empty_cache()


def block(mib: int) -> torch.Tensor:
    """So many MiB."""
    return spare.empty(LIKE, (mib, MIB // 4))


def mapped() -> int:
    """MiB of addresses that this process has."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmSize:\s+(\d+) kB", text)[1]) >> 10


@needs_extension
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_of_a_fork_can_use_and_drop_what_its_parent_kept():
    """Whatever other threads did at that moment: a lock that one of them held would stay so in the child."""
    ending = threading.Event()

    def churn() -> None:
        while not ending.is_set():
            block(2)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            child = os.fork()
            if not child:
                signal.alarm(20)  # ends a child that waits for ever
                empty_cache()
                place = block(3).data_ptr()
                os._exit(0 if block(3).data_ptr() == place else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ending.set()
        for thread in threads:
            thread.join()


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
def test_the_smallest_block_that_is_large_enough_is_taken_and_none_for_less_than_half_of_it():
    blocks = [block(mib) for mib in (3, 5, 8, 20)]
    three, five, eight, twenty = (b.data_ptr() for b in blocks)
    del blocks
    assert [block(mib).data_ptr() for mib in (2, 3, 4, 5, 6, 8)] == [three, three, five, five, eight, eight]
    held = [block(mib) for mib in (9, 3, 5)]
    assert twenty not in [b.data_ptr() for b in held]
    assert block(10).data_ptr() == twenty


@needs_extension
def test_four_free_blocks_are_kept_and_the_oldest_go():
    blocks = [block(3) for _ in range(6)]
    places = [b.data_ptr() for b in blocks]
    while blocks:
        del blocks[0]
    again = [block(3) for _ in range(4)]
    assert sorted(b.data_ptr() for b in again) == sorted(places[2:])


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux keeps")
def test_free_blocks_go_where_there_is_no_room_beside_them():
    """In a process of its own: what a limit on its addresses leaves."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_ROOM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no memory for a tensor of" in done.stdout


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process's memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_as_large_as_its_tensor(dtype):
    before = mapped()
    tensor = spare.empty(LIKE, (600, MIB // dtype.itemsize), dtype)
    assert tensor.nbytes == 600 * MIB
    assert 600 <= mapped() - before < 664


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process's memory")
def test_free_blocks_are_of_4_gib_in_all_and_the_oldest_go():
    """Of addresses alone: a page that nobody writes to takes no memory."""
    try:
        before, blocks = mapped(), [block(mib) for mib in (1100, 1500, 1400)]
    except RuntimeError as error:
        pytest.skip(f"this machine promises no 4 GiB to a process: {error}")
    few = 64  # what other threads may map meanwhile
    while blocks:
        del blocks[0]
    assert abs(mapped() - before - 4000) < few
    block(200)
    assert abs(mapped() - before - 3100) < few
    block(4097)  # which is more than is kept
    assert abs(mapped() - before - 3100) < few
    block(4096)  # which is all that is
    assert abs(mapped() - before - 4096) < few


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
def test_what_no_gradient_is_is_refused():
    with pytest.raises(RuntimeError, match="empty_spare is for"):
        torch.ops.srppo_native.empty_spare([3], torch.int32)
    for sizes in ([1 << 32, 1 << 32], [1 << 61], [1 << 59], [3, -1]):
        with pytest.raises(RuntimeError, match="empty_spare needs sizes"):
            torch.ops.srppo_native.empty_spare(sizes, torch.float64)
    assert torch.ops.srppo_native.empty_spare([0, 3], torch.float64).shape == (0, 3)  # as torch.empty has it


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
