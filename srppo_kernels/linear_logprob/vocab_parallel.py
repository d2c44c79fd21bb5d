"""A head whose vocabulary is cut over the ranks of a process group, in rank order.

Each rank scans its own shard. What it sends is four numbers a row (m, s, t, z_y; a rank that does not hold the target
sends z_y = 0); every rank merges all of them in rank order, so all ranks hold the same bits. In the backward a rank has
its shard's dweight and its part of dhidden, which is summed over the ranks in the accumulation dtype.

Groups travel by name, because a custom op's schema has no place for a process group.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from srppo_kernels.linear_logprob.checks import cache_does_not_fit

VANISHED = -1e4  # e to this is 0 in float64 too


def _resolve(name: str) -> "dist.ProcessGroup":
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def shard_range(vocab: int, group: str, device: torch.device) -> tuple[Tensor | int, Tensor | int]:
    """First vocabulary entry of this rank's shard and the size of the whole vocabulary; tensors, so nothing waits."""
    if not group:
        return 0, vocab
    process_group = _resolve(group)
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    parts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(parts, torch.full((1,), vocab, dtype=torch.int64, device=device), group=process_group)
    sizes = torch.cat(parts)
    return sizes[:rank].sum(), sizes.sum()


def merge_(state: Tensor, m_c: Tensor, s_c: Tensor, t_c: Tensor) -> None:
    """Takes a further vocabulary group, or rank, into ``(m, s, t, z_y)``, in place."""
    m, s, t, _ = state
    m_new = torch.maximum(m, m_c)
    # Bounded below: where all of one side was ruled out its m is the lowest number, and s times that is no number.
    old, new = (m - m_new).clamp_min_(VANISHED), (m_c - m_new).clamp_min_(VANISHED)
    a_old, a_new = old.exp(), new.exp()
    t.copy_((t + s * old) * a_old + (t_c + s_c * new) * a_new)
    s.copy_(s * a_old + s_c * a_new)
    m.copy_(m_new)


def merge_ranks(state: Tensor, group: str) -> Tensor:
    """``(m, s, t, z_y)`` of the whole vocabulary from the shard's, ``[4, n]``; the same bits on every rank."""
    if not group:
        return state
    process_group = _resolve(group)
    size = dist.get_world_size(process_group)
    state = state.contiguous()
    parts = [torch.empty_like(state) for _ in range(size)]
    dist.all_gather(parts, state, group=process_group)
    merged = parts[0]
    for m_c, s_c, t_c, zy_c in parts[1:]:
        merge_(merged, m_c, s_c, t_c)
        merged[3] += zy_c
    return merged


def fewest_rows(chunk: int, bound: int | None, group: str, device: torch.device) -> int:
    """Rows at a time that fit on every rank: each chunk is a collective, and how many rows fit depends on the shard.

    On a GPU it waits, but only for a caller's ``bound``: by default the same number fits there whatever the shard.
    """
    if not group or (bound is None and device.type != "cpu"):
        return chunk
    fewest = torch.full((1,), chunk, dtype=torch.int64, device=device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=_resolve(group))
    return int(fewest)


def require_cache(kept: int, bound: int, group: str, device: torch.device) -> None:
    """Exponentials of ``kept`` bytes fit in a caller's ``bound`` on every rank; on a GPU it waits.

    Raises:
        ValueError: on all ranks, as one that stopped alone would leave the others waiting.
    """
    found = torch.tensor([kept, -bound], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_resolve(group))
    most, least = found.tolist()
    if most > -least:
        raise cache_does_not_fit("linear_logprob", most, -least)


def sum_over_ranks(values: Tensor, group: str) -> Tensor:
    """``values`` summed over the group, in place."""
    if group:
        dist.all_reduce(values, group=_resolve(group))
    return values
