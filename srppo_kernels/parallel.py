"""Heads that are DTensors: what to hand to the ops of ``linear_logprob``.

A DTensor whose rows (the vocabulary) are cut over a mesh can mean two things, and the ops cannot tell which:

- *vocabulary-parallel* (tensor parallelism): every rank has the same tokens and its own part of the vocabulary. No
  weight travels; the ops merge four numbers a token over the group::

      head = vocab_parallel_head(lm_head.weight)
      linear_logprob(hidden, head.weight, targets, bias=head.bias, group=head.group)

- *FSDP*: every rank has its own tokens, and the shard is only storage. The weight has to be gathered, and its gradient
  averaged over ranks, as FSDP averages those that it reduces itself::

      weight, bias = full_head(lm_head.weight)
      linear_logprob(hidden, weight, targets, bias=bias)

Gradients flow back into the DTensor in both cases. Plain tensors pass through ``full_head`` unchanged.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

__all__ = ["VocabParallelHead", "full_head", "vocab_parallel_head"]


class VocabParallelHead(NamedTuple):
    """This rank's shard of a head, and the group that it is cut over."""

    weight: Tensor  # [V of this rank, D]
    bias: Tensor | None  # [V of this rank]
    group: Any  # the process group, in the order of the shards


def _is_dtensor(tensor: Tensor | None) -> bool:
    return type(tensor).__name__ == "DTensor"


def vocab_parallel_head(
    weight: Tensor, bias: Tensor | None = None, *, mesh_dim: int | str | None = None
) -> VocabParallelHead:
    """The local shard of a vocabulary-parallel DTensor head, with its process group.

    Args:
        weight: DTensor ``[V, D]`` with placement ``Shard(0)`` on one mesh dimension and ``Replicate()`` on all others.
            Shards may be uneven, as DTensor makes them when the ranks do not divide V.
        bias: DTensor ``[V]`` placed likewise, or None.
        mesh_dim: the mesh dimension, by index or name, over which the vocabulary is cut; by default the one that is.

    Raises:
        TypeError: weight is no DTensor.
        ValueError: weight or bias is placed otherwise, with what was found.
    """
    if not _is_dtensor(weight):
        raise TypeError(
            "vocab_parallel_head: weight is a plain tensor; pass a DTensor, or linear_logprob's group yourself"
        )
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    placements: Any = weight.placements  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    names = mesh.mesh_dim_names or ()
    if isinstance(mesh_dim, str) and mesh_dim not in names:
        raise ValueError(f"vocab_parallel_head: mesh_dim={mesh_dim!r} is no dimension of the mesh, which has {names}")
    wanted = names.index(mesh_dim) if isinstance(mesh_dim, str) else mesh_dim
    if wanted is not None and -mesh.ndim <= wanted < 0:
        wanted += mesh.ndim
    if len(cut) != 1 or type(placements[cut[0]]).__name__ != "Shard" or placements[cut[0]].dim != 0:
        raise ValueError(
            f"vocab_parallel_head: weight has placements {tuple(placements)}; it takes Shard(0) on one mesh dimension "
            f"and Replicate() on the others. For FSDP shards use full_head"
        )
    if wanted is not None and wanted != cut[0]:
        raise ValueError(f"vocab_parallel_head: mesh_dim={mesh_dim!r} but weight is cut over mesh dimension {cut[0]}")
    if bias is not None and not (_is_dtensor(bias) and tuple(bias.placements) == tuple(placements)):  # type: ignore[attr-defined]
        raise ValueError("vocab_parallel_head: bias is not placed as weight is; distribute it with the same placements")
    group: dist.ProcessGroup = mesh.get_group(cut[0])
    lines = mesh.mesh.movedim(cut[0], -1).reshape(-1, mesh.size(cut[0])).tolist()
    own = next(line for line in lines if dist.get_rank() in line)
    if own != dist.get_process_group_ranks(group):
        raise ValueError(
            f"vocab_parallel_head: the shards lie on ranks {own} in this order, and their process group counts them "
            f"upwards: make the mesh with ascending ranks"
        )
    local_bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
    return VocabParallelHead(weight.to_local(), local_bias, group)  # type: ignore[attr-defined]


def full_head(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The whole head, gathered from a DTensor's shards (for FSDP); its gradient is averaged over ranks and scattered.

    Plain tensors come back as they are, so a trainer can call this whatever the head is.
    """
    return _gathered(weight), None if bias is None else _gathered(bias)


def _gathered(tensor: Any) -> Tensor:
    if not _is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    # left out, full_tensor takes the gradient of every rank for the same, and each rank's shard lacks what others saw
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
