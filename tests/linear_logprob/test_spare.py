"""The block of memory that calls hand on: who gets it, who does not, and that results know nothing of it."""

import pytest
import torch
from linear_logprob.head_problems import make
from torch._subclasses.fake_tensor import FakeTensorMode

from srppo_kernels import linear_logprob, linear_loss
from srppo_kernels.linear_logprob import spare


@pytest.fixture(autouse=True)
def _no_spare(monkeypatch):
    monkeypatch.setattr(spare, "_spare", [])


def test_a_block_is_handed_on_where_it_is_large_enough():
    like = torch.empty(0)
    block = spare.take(like, 10, 100, torch.float32)
    spare.give_back(block)
    smaller = spare.take(like, 7, 200, torch.bfloat16)
    assert smaller.shape == (7, 200)
    assert smaller.dtype == torch.bfloat16
    assert smaller.is_contiguous()
    assert smaller.data_ptr() == block.data_ptr()
    other = spare.take(like, 7, 200, torch.bfloat16)  # while it is out
    assert other.untyped_storage().data_ptr() != smaller.untyped_storage().data_ptr()
    spare.give_back(smaller)
    with torch.device("meta"):  # a default device, as torch.set_default_device has it, is not the block's
        again = spare.take(like, 7, 200, torch.bfloat16)
    assert again.data_ptr() == block.data_ptr()
    spare.give_back(again)
    assert spare.take(like, 10, 101, torch.float32).untyped_storage().nbytes() >= 4040


def test_only_one_block_up_to_the_limit_stays(monkeypatch):
    monkeypatch.setattr(spare, "LIMIT", 4000)
    like = torch.empty(0)
    spare.give_back(spare.take(like, 10, 101, torch.float32))
    assert spare._spare == []
    blocks = [spare.take(like, 10, size, torch.float32) for size in (50, 100)]
    for block in blocks:
        spare.give_back(block)
    assert [storage.data_ptr() for storage in spare._spare] == [blocks[1].data_ptr()]
    spare.give_back(torch.empty(0, 5))
    assert len(spare._spare) == 1


def test_a_trace_neither_gets_nor_leaves_a_block():
    spare.give_back(torch.empty(10, 10))
    with FakeTensorMode() as mode:
        fake = spare.take(mode.from_tensor(torch.empty(3)), 5, 5, torch.float32)
        assert isinstance(fake, torch._subclasses.FakeTensor)
        spare.give_back(fake)
    assert len(spare._spare) == 1
    assert type(spare.take(torch.nn.Parameter(torch.empty(3)), 5, 5, torch.float32)) is torch.Tensor


@pytest.mark.parametrize("frozen", [False, True])
def test_calls_in_a_row_share_it_and_agree(frozen):
    """What an earlier call left there, NaN included, reaches nobody: the loss, the frozen per-token op."""
    p = make("random", n=60, v=2300, grad=(True, not frozen), mask=torch.rand(60) > 0.3)

    def gradients():
        if frozen:
            loss = linear_logprob(p.hidden, p.weight, p.targets, **p.options).logprob.sin().sum()
        else:
            loss = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sin().sum(), {}), **p.options)[0]
        return torch.autograd.grad(loss, p.inputs())

    want = gradients()
    (block,) = spare._spare
    torch.empty(0).set_(block).fill_(torch.nan)
    got = gradients()
    assert [storage.data_ptr() for storage in spare._spare] == [block.data_ptr()]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
