"""How far fp32 rounding moves the policy loss's statistics, for tests that compare them with float64."""

from torch import Tensor

U = 2.0**-24  # half of fp32's spacing at 1


def absolute_errors(d: Tensor) -> dict[str, float]:
    """Of the statistics whose terms cancel, from the valid tokens' clamped log-ratios in float64.

    The op forms `d = new - old` in fp32, off by `U |d|`. A mean of terms of one sign keeps that as a relative error, of
    20 U at most; what is left where terms cancel has no bound of its own size:

        approx_kl_k1 = -mean(d)    is off by mean(U |d|)
        ratio_var = var(r)         by 2 sd(r) rms(e) + rms(e)^2, where r is off by e <= U (|d| r + 4 r + max(r, 1)): the
                                   error of d, that of exp (2.5e-7, see test_terms) and the rounding of r - 1;
                                   and by 1e-13 of mean((r - 1)^2), below which it counts as 0 (csrc/ppo_loss/moments.h)
    """
    if d.numel() == 0:
        return {"approx_kl_k1": 0.0, "ratio_var": 0.0}
    r = d.exp()
    e = (U * (d.abs() * r + 4 * r + r.clamp(min=1))).square().mean().sqrt()
    spread, nothing = r.var(correction=0).sqrt(), 1e-13 * (r - 1).square().mean()
    return {"approx_kl_k1": float(U * d.abs().mean()), "ratio_var": float(2 * spread * e + e**2 + nothing)}
