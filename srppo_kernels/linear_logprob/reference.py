"""Per-token log-probability, entropy and lse with the logits in full: the maths, and the oracle of the tests.

    z_ij = softcap(logit_scale * (hidden_i . weight_j + bias_j)) / temperature_i      softcap(x) = c tanh(x / c)
    lse_i = log sum_j exp z_ij            logprob_i = z_i,y_i - lse_i
    p_ij = exp(z_ij - lse_i)              H_i = lse_i - sum_j p_ij z_ij

Gradients come from autograd; the fused backends use what it amounts to, with g = dL/dlogprob, h = dL/dentropy and
l = dL/dlse, and 1_y the one-hot row of the target:

    dz = [g (1_y - p) - h p (log p + H) + l p] / temperature * logit_scale * (1 - tanh^2)
    dhidden = dz @ weight          dweight = dz.T @ hidden          dbias = sum_i dz_i

Everything runs in the inputs' own dtype, so float64 inputs give the oracle and bfloat16 inputs give the error that
torch's plain path makes.
"""

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    temperature: float | Tensor,  # [N] if a tensor
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """z, ``[N, V]``: scale, then cap, then temperature."""
    with torch.autocast(hidden.device.type, enabled=False):  # the GEMM is in the inputs' own dtype there too
        z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def linear_logprob_reference(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N], integers in [0, V) wherever live
    live: Tensor,  # [N] bool: the rows that count
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [N] if a tensor
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprob, entropy, lse)``, each ``[N]`` in the inputs' dtype, 0 where not live."""
    # A masked row is replaced before the first operation, not after the last: 0 times NaN is NaN, in gradients too.
    hidden = torch.where(live[:, None], hidden, 0)
    y = torch.where(live, targets, 0).long()
    if isinstance(temperature, Tensor):
        temperature = torch.where(live, temperature, 1).to(hidden.dtype)
    z = logits(hidden, weight, bias, temperature, logit_scale, softcap)
    logp = torch.log_softmax(z, dim=-1)
    # A vocabulary entry that a bias of -inf rules out has p = 0 and log p = -inf; it adds nothing to the entropy. The
    # bound, whose p is 0 too, is multiplied by dL/dentropy in the gradient and must not overflow there.
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    outputs = (logp.gather(1, y[:, None])[:, 0], entropy, torch.logsumexp(z, dim=-1))
    return tuple(torch.where(live, t, 0) for t in outputs)  # type: ignore[return-value]
