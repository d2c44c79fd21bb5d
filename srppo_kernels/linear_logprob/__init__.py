"""Log-probabilities of targets under ``softmax(hidden @ weight.T)``, and losses over them, without the logits.

reference.py        the maths, with the logits in full
op.py               linear_logprob: schema, fake, autograd
loss.py  ppo.py     losses whose gradients are formed in the forward (fused.py)
ratio.py            linear_log_ratio, the self-reward's term
plan.py explanation.py  which plan serves a call, what it costs, and why
chunked.py backward.py rows.py    the torch backend
native.py           the C++ scan
spare.py            memory that later calls use again, on a CPU
vocab_parallel.py   a head cut over the ranks of a group
"""

from srppo_kernels.linear_logprob.explanation import Plan, explain
from srppo_kernels.linear_logprob.loss import linear_loss
from srppo_kernels.linear_logprob.op import LinearLogprob, linear_logprob
from srppo_kernels.linear_logprob.ppo import linear_ppo_loss
from srppo_kernels.linear_logprob.ratio import linear_log_ratio
from srppo_kernels.linear_logprob.spare import empty_cache

__all__ = [
    "LinearLogprob",
    "Plan",
    "empty_cache",
    "explain",
    "linear_log_ratio",
    "linear_logprob",
    "linear_loss",
    "linear_ppo_loss",
]
