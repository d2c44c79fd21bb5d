"""A head cut over two gloo ranks: each check in ranks.py runs on both, and an assertion on either fails the test."""

import pytest
import torch
from linear_logprob import ranks
from on_ranks import on_ranks

from srppo_kernels import linear_logprob


def test_two_ranks(tmp_path):
    """Uneven shards, a rank without targets, one without vocabulary, a frozen head, losses, chunks, DTensor heads."""
    on_ranks(ranks.run, tmp_path)


def test_reference_has_no_group():
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no vocabulary-parallel form"):
        linear_logprob(h, w, y, backend="reference", group=object())
