"""Many processes: each samples and trains on its share of a batch, and all hold the same weights.

With ``N`` ranks (the processes of ``torchrun`` or ``accelerate launch``) an iteration reads, in the notation of
:mod:`srppo.ppo`::

    batch          N times that of one process; rank r samples prompts r B/N ... (r + 1) B/N - 1 of it
    rollouts       gathered: token ids and log-probs are small, so every rank holds the whole batch's
    A_t, R_t       computed by every rank from the whole batch: whitening, moments and metrics are global as they are
    gradients      each rank's backward on its rows, divided by the token count of all ranks' mini-batch, then summed
    clip and step  alike on every rank, from the same sum

So a result depends on the number of ranks by the rounding of a sum, and by which random numbers sample which prompt.

Gradients are summed here, after the backward passes of a mini-batch, over the list of parameters that the optimizer
steps, and not by a ``DistributedDataParallel`` around the model. DDP averages instead of summing, expects a backward
for each forward, and hooks every parameter that requires a gradient when it is made; here several adapters of one model
have a backward each, and a mini-batch has as many backward passes as its tokens need, a number that may differ from
rank to rank. One sum at the end is right whatever they are.

Alone (no process group) every function is the identity.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srppo.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # a rank that is silent for longer ends the run: above any rollout or evaluation
BUCKET = 2**25  # elements in one all-reduce of gradients: 128 MiB in fp32, the memory that the sum takes


def start() -> None:
    """Joins the process group that ``torchrun`` or ``accelerate launch`` prepared, if one did and nobody joined yet.

    Raises:
        UserError: the launcher's environment is incomplete, the other processes cannot be reached, or a group that was
            joined before sends no tensors on a CPU.
    """
    if size() > 1 and "cpu:" not in (backends := dist.get_backend_config()):
        raise UserError(
            f"the process group has the backends {backends} and none for tensors on a CPU, where counts and random "
            "numbers are sent from: init_process_group('cpu:gloo,cuda:nccl'), or leave it to srppo"
        )
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: launch "
                "as many processes as GPUs"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and the processes could not be joined ({reason}): launch with "
            "torchrun or accelerate launch"
        ) from None


def finish() -> None:
    """Leaves the process group once every rank is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process, as the last thing that a program of several ranks does: exit handlers run, output is flushed,
    and the interpreter is not taken down.

    Destroying a group joins gloo's worker threads only where nothing else holds the group, and torch keeps the mesh of
    any ``DTensor``, so of weights that are cut over the ranks, until the process ends. A worker tells that a collective
    is done before it lets go of the collective's tensors. Where it gets to run again only while the interpreter is
    taken down, the tensor asks for the GIL, Python ends the thread by unwinding it, C++ calls ``terminate``, and a run
    whose model is written dies of SIGABRT (torch 2.13, seen under load).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # these two are what Python does while threads may still run
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def seed_apart(seed: int) -> None:
    """Random numbers of its own for every rank, after all have drawn the same ones to make the same weights."""
    if rank() > 0:  # apart in the low 32 bits: torch's generator on a CPU reads no others
        torch.manual_seed(seed + 0x9E3779B1 * rank())


class ToldByMain(UserError):
    """The mistake that rank 0 found and tells, on the other ranks."""


def on_main(function: Callable[[], T]) -> T:
    """``function()`` on rank 0 alone, while the others wait; all return what it returns, which must be small and plain.

    Raises:
        ToldByMain: on the other ranks, where the function ended in a :class:`UserError` or ``OSError``.
    """
    if size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            dist.broadcast_object_list([None, str(error)])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ToldByMain(outcome[1])
    result: T = outcome[0]
    return result


@contextlib.contextmanager
def held_by_main(manager: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Inside of ``manager`` on the first rank; where it refuses, all ranks stop."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(manager))
        yield


def require_alike(values: Callable[[], Mapping[str, Any]]) -> None:
    """Stops every rank where one has other values than the rest of what each was given or read for itself: it would
    take other steps, and the rest wait for it, or all would learn from different data in silence.

    Args:
        values: gives them by name, small and plain; not called alone.
    """
    if size() == 1:
        return
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, values())
    other = [name for name in found[0] if any(of_rank.get(name) != found[0][name] for of_rank in found)]
    if other:
        raise UserError(f"the processes do not have the same {', '.join(other)}: give all of them the same")


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a sequence whose length the ranks divide."""
    count, rest = divmod(len(items), size())
    assert rest == 0, f"{len(items)} items for {size()} ranks"
    return items[rank() * count : (rank() + 1) * count]


def even_share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of any sequence: where the ranks do not divide its length, its first items come again at the
    end. :func:`gathered_rows` of what was made from them, cut to the true length, is in the order of the items."""
    return share([items[i % len(items)] for i in range(-(-len(items) // size()) * size())])


def summed(values: Tensor) -> Tensor:
    """The sum over ranks of a tensor of equal shape on each."""
    if size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on some rank."""
    return bool(summed(torch.tensor(int(condition))))


def gathered(values: Tensor) -> list[Tensor]:
    """Every rank's tensor, of equal shape on each, in the order of the ranks."""
    if size() == 1:
        return [values]
    parts = [torch.empty_like(values) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    return parts


def gathered_rows(values: Tensor) -> Tensor:
    """Every rank's rows, ``[B of this rank, ...]`` to ``[B of all, ...]``, in the order of the ranks; B is the same on
    each."""
    if size() > 1 and values.dtype == torch.bool:  # which not every backend can send
        return torch.cat(gathered(values.to(torch.uint8))).bool()
    return torch.cat(gathered(values))


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all ranks."""
    if size() == 1:
        return list(numbers)
    result = torch.tensor(numbers)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    found: list[int] = result.tolist()
    return found


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over ranks; parameters without one are left out, the same on all ranks, and
    so are those that are cut over the ranks, whose backward has summed them."""
    if size() == 1:
        return
    bucket: list[Tensor] = []
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if type(gradient).__name__ != "DTensor"]
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        last = index + 1 == len(gradients)
        if (
            last
            or sum(g.numel() for g in bucket) + gradients[index + 1].numel() > BUCKET
            or (gradients[index + 1].dtype != gradient.dtype)
        ):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for own, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                own.copy_(total.view_as(own))
            bucket.clear()


@torch.no_grad()
def spread_from_main(parameters: Iterable[torch.Tensor]) -> None:
    """Gives every rank the weights of rank 0, so that all start alike whatever each one drew or loaded."""
    if size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
