"""Prints, a JSON line a case, what explain says that a call takes and what it does take, for any number of threads.

``python allocated.py LIBRARY LEVEL-DTYPE-PLAN[-WIDTHxVOCABULARY]...`` in a process that preloads what allocations.c is
compiled to, which counts malloc's bytes and what is mapped. LIBRARY is as in amx_process.py, "" for the installed
extension. Each case says whether its results have the bits of those of 2 threads. With "torch" for LEVEL it is the
torch backend, on 2 threads.
"""

import ctypes
import json
import sys
from typing import Any

import torch
from torch import Tensor

ROWS, WIDTH, VOCABULARY = 600, 96, 9000
THREADS = (2, 16, 100)
BOUNDS = (None, 5 << 20, 12 << 20)  # in 5 MiB one thread can do all of it
FOR_EXPONENTIALS = (64 << 20,)  # which plan cache keeps


def measure(host: ctypes.CDLL, level: str, dtype: torch.dtype, plan: str, width: int, vocabulary: int) -> None:
    """All bounds and numbers of threads."""
    from srppo_kernels import _extension, empty_cache, explain, linear_logprob

    torch.manual_seed(0)
    hidden = torch.randn(ROWS, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).div_(width**0.5).to(dtype).requires_grad_()
    bias = torch.zeros(vocabulary, dtype=dtype, requires_grad=True)
    targets, upstream = torch.randint(0, vocabulary, (ROWS,)), torch.randn(ROWS)

    def call(bound: int | None) -> list[Tensor]:
        out = linear_logprob(hidden, weight, targets, bias=bias, plan=plan, workspace_bytes=bound, backend="native")
        if plan == "score":
            return [out.logprob]
        gradients = torch.autograd.grad(out.logprob, [hidden, weight, bias], upstream)
        return [out.logprob.detach(), *gradients]

    for bound in FOR_EXPONENTIALS if plan == "cache" else BOUNDS:
        want: list[Tensor] = []
        for count in THREADS:
            torch.set_num_threads(count)
            with _extension.cpu_level(level):
                said = explain(hidden, weight, targets, bias=bias, plan=plan, workspace_bytes=bound, backend="native")
                call(bound)  # what libraries allocate once
                empty_cache()
                before = host.mark_allocated()
                got = call(bound)
                took = host.most_allocated() - before
            want = want or got
            result = {
                "case": f"{level}, {dtype}, {plan}",
                "bound": bound,
                "threads": count,
                "said": said.workspace_bytes,
                "took": took - sum(t.numel() * t.element_size() for t in got),
                "same_bits": all(torch.equal(a, b) for a, b in zip(got, want, strict=True)),
            }
            print(json.dumps(result))


def measure_torch(host: ctypes.CDLL, dtype: torch.dtype, plan: str) -> None:
    """What torch's blocks take, the first of them and the next."""
    from srppo_kernels import empty_cache, explain, linear_logprob

    torch.manual_seed(0)
    torch.set_num_threads(2)
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).div_(WIDTH**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS,))

    for bound in (None, 8 << 20, 1 << 30):
        for softcap in (None, 20.0):
            options = {"plan": plan, "workspace_bytes": bound, "softcap": softcap, "entropy": True, "backend": "torch"}
            if plan == "cache" and bound != 1 << 30:
                continue

            def call(options: dict[str, Any] = options) -> tuple[Tensor, ...]:
                out = linear_logprob(hidden, weight, targets, **options)
                if plan == "score":
                    return ()
                return torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [hidden, weight])

            said = explain(hidden, weight, targets, **options)
            call()
            empty_cache()
            before = host.mark_allocated()
            got = call()
            took = host.most_allocated() - before - sum(t.numel() * t.element_size() for t in got)
            case = {"case": f"torch, {dtype}, {plan}, {softcap}", "bound": bound}
            print(json.dumps({**case, "said": said.workspace_bytes, "took": took}))


def main() -> None:
    """Every case that is asked for."""
    library, *cases = sys.argv[1:]
    if library:
        import amx_process

        amx_process.take_the_place(library)
    host = ctypes.CDLL(None)
    host.mark_allocated.restype = host.most_allocated.restype = ctypes.c_long
    for case in cases:
        level, dtype, plan, *size = case.split("-")
        if level == "torch":
            measure_torch(host, getattr(torch, dtype), plan)
            continue
        width, vocabulary = map(int, size[0].split("x")) if size else (WIDTH, VOCABULARY)
        measure(host, level, getattr(torch, dtype), plan, width, vocabulary)


if __name__ == "__main__":
    main()
