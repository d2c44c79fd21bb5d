"""Drop-in losses over per-token log-probs: PPO and its relatives, SFT and its relatives, preferences, distillation.

Each is ``loss(logprob, entropy, mask, *tensors, normalizer=n, **options) -> (scalar, aux)``; ``contract.py`` has the
rules that they share. Three ways to call one:

    loss, aux = losses.dapo(logprob, entropy, mask, old, advantages, normalizer=n)              # on log-probs you have

    fn = functools.partial(losses.dapo, normalizer=n)
    loss, aux = losses.linear(fn, hidden, lm_head.weight, targets, mask, old, advantages)       # with no logits
    loss, aux = linear_loss(hidden, lm_head.weight, targets, fn, mask, old, advantages, mask=mask)

    token level     ppo dppo apa cispo reinforce kl_penalty entropy_bonus grpo dr_grpo dapo exopd
                    sft dft idft implicit_reward
    sequence level  gspo poft
    pair level      dpo spin orpo asft
    tensors         group_advantages mean_weights tis_weights icepop_weights exopd_advantages dense_path_rewards
                    dense_path_returns sequence_means sequence_sums
    components      srppo.losses.sapo  srppo.losses.sgpo

A docstring's tags: [paper] from the paper, [paper's code] from its authors' code, [code] from others' implementations,
[second-hand] from summaries, [derived] worked out here. What is a reconstruction says so.
"""

from srppo.losses.contract import level_of, sequence_means, sequence_sums
from srppo.losses.distillation import dense_path_returns, dense_path_rewards, exopd, exopd_advantages
from srppo.losses.group import dapo, dr_grpo, group_advantages, grpo, gspo, mean_weights
from srppo.losses.importance import icepop_weights, tis_weights
from srppo.losses.linear import linear, whole_sequences
from srppo.losses.policy import apa, cispo, dppo, entropy_bonus, kl_penalty, ppo, reinforce
from srppo.losses.preference import asft, dpo, orpo, spin
from srppo.losses.supervised import dft, idft, implicit_reward, poft, sft

__all__ = [
    "apa",
    "asft",
    "cispo",
    "dapo",
    "dense_path_returns",
    "dense_path_rewards",
    "dft",
    "dpo",
    "dppo",
    "dr_grpo",
    "entropy_bonus",
    "exopd",
    "exopd_advantages",
    "group_advantages",
    "grpo",
    "gspo",
    "icepop_weights",
    "idft",
    "implicit_reward",
    "kl_penalty",
    "level_of",
    "linear",
    "mean_weights",
    "orpo",
    "poft",
    "ppo",
    "reinforce",
    "sequence_means",
    "sequence_sums",
    "sft",
    "spin",
    "tis_weights",
    "whole_sequences",
]
