"""Generalized advantage estimation and masked whitening."""

from srppo_kernels.gae.op import gae
from srppo_kernels.gae.whiten_op import whiten

__all__ = ["gae", "whiten"]
