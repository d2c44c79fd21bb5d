"""Runs a function in several processes of one gloo group, each a rank; an assertion on any rank fails the test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int, int], None]
PATIENCE = timedelta(minutes=3)  # with a rank that never comes: a failure, and not gloo's half an hour of silence


def on_ranks(check: Check, folder: Path, size: int = 2) -> None:
    """``check(rank, size)`` on each of ``size`` processes; ``check`` must be importable, so not a local function."""
    mp.spawn(_rank, args=(check, size, str(folder / "store")), nprocs=size)


def _rank(rank: int, check: Check, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=PATIENCE)
    try:
        check(rank, size)
    finally:
        dist.destroy_process_group()
    # A gloo worker thread may outlive the group (a DTensor's mesh keeps it) and drop a tensor of a finished collective
    # while the interpreter shuts down; Python then ends that thread by unwinding, and C++ calls terminate: seen once as
    # SIGABRT after every check had passed. What is proved here is proved by now, so skip the interpreter's shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
