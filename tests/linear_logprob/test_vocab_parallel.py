"""A head cut over two gloo ranks: each check in ranks.py runs on both, and an assertion on either fails the test."""

import pytest
import torch
import torch.multiprocessing as mp
from linear_logprob import ranks

from srppo_kernels import linear_logprob


def test_two_ranks(tmp_path):
    """Uneven shards, a rank without targets, one without vocabulary, a frozen head, the losses, DTensor heads."""
    mp.spawn(ranks.run, args=(2, str(tmp_path / "store")), nprocs=2)


def test_reference_has_no_group():
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no vocabulary-parallel form"):
        linear_logprob(h, w, y, backend="reference", group=object())
