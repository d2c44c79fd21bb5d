"""Prints the peak memory, in bytes, that a call and its backward take beyond inputs, outputs and gradients.

Run in a process of its own: what counts is the growth of the resident set's high-water mark, which sees everything, the
BLAS's own buffers included. Inputs are made in place, so that making them leaves no higher mark behind.
"""

import argparse
import resource

import torch

from srppo_kernels import linear_logprob, linear_ppo_loss


def resident() -> int:
    """Bytes resident now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The high-water mark. Not getrusage's, which an exec inherits from the process that forked: pytest's is high."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """One measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 576, 49152))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--op", default="linear_logprob")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--workspace", type=int)
    arguments = parser.parse_args()
    n, d, v = arguments.shape
    dtype = getattr(torch, arguments.dtype)
    hidden = torch.empty(n, d, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(v, d, dtype=dtype).normal_(0, 0.1).requires_grad_(not arguments.frozen)
    targets = torch.randint(0, v, (n,))
    options = {"workspace_bytes": arguments.workspace, "backend": arguments.backend}

    def call(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
        if arguments.op == "linear_logprob":
            linear_logprob(h, w, y, **options).logprob.sum().backward()
        else:
            ones = torch.ones(y.shape[0])
            linear_ppo_loss(h, w, y, -ones, ones, ones.bool(), **options)[0].backward()

    # What the libraries allocate once is not this call's: run a small one first.
    small = weight.detach()[:4096].clone().requires_grad_(weight.requires_grad)
    call(hidden.detach()[:256].clone().requires_grad_(), small, targets[:256] % 4096)
    del small
    before = max(resident(), peak())
    call(hidden, weight, targets)
    after = peak()
    kept = sum(t.grad.numel() * t.grad.element_size() for t in (hidden, weight) if t.grad is not None)
    print(after - before - kept - 8 * n)


main()
