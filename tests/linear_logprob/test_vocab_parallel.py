"""A head cut over two gloo ranks: each check in ranks.py runs on both, and an assertion on either fails the test."""

import pytest
import torch
from linear_logprob import ranks
from on_ranks import on_ranks

from srppo_kernels import explain, linear_logprob


def test_two_ranks(tmp_path):
    """Uneven and empty shards, a rank without targets, a frozen head, losses, chunks, caches, DTensor heads."""
    on_ranks(ranks.run, tmp_path)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 4096), (torch.float32, 2048)])
def test_by_default_as_many_rows_fit_whatever_the_shard(dtype, rows):
    """On a GPU, where ranks do not ask each other; they cut chunks, each a collective, alike."""
    hidden = torch.empty(9000, 2048, dtype=dtype, device="meta", requires_grad=True)
    targets = torch.empty(9000, dtype=torch.int64, device="meta")
    plans = [
        explain(hidden, torch.empty(v, 2048, dtype=dtype, device="meta"), targets, op="linear_loss", backend="torch")
        for v in (0, 1, 700, 151936)
    ]
    assert {plan.rows_per_chunk for plan in plans} == {rows}


def test_a_group_that_is_none():
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no vocabulary-parallel form"):
        linear_logprob(h, w, y, backend="reference", group=object())
    with pytest.raises(TypeError, match="group='tp' is a str; pass a process group"):
        linear_logprob(h, w, y, group="tp")
