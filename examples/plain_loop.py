"""Self-Rewarding PPO with the ops alone, in the order of execution: half a minute of one core, nothing is downloaded.

A small random Llama is the base. Demonstrations say a prompt backwards and stop; a short SFT learns that by half. PPO
then samples, with reward log pi_sft - log pi_base at the end and a KL penalty of weight BETA towards SFT. No logits are
made but those of sampling: scores and losses come from hidden states [B, T, D] and the head [V, D].
"""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from srppo_kernels import gae, linear_logprob, linear_loss, linear_ppo_loss, log_ratio_reward, value_loss, whiten

V, EOS, PROMPT, T, BATCH, BETA = 24, 0, 4, 8, 128, 1.0
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=V, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None, **shape)
).eval()


def demonstrations() -> Tensor:
    """Prompts, each followed by itself backwards and EOS, [B, 2 PROMPT + 1]."""
    prompts = torch.randint(1, V, (BATCH, PROMPT))
    return torch.cat([prompts, prompts.flip(1), torch.full((BATCH, 1), EOS)], 1)


def hidden(body: nn.Module, ids: Tensor) -> Tensor:
    """The states in which the completion's tokens are taken, [B, T, D]."""
    return body(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]


def sample(model: LlamaForCausalLM) -> tuple[Tensor, Tensor, float]:
    """Ids of prompt and completion, the completion's mask up to and including EOS, and the share that is right."""
    wanted = demonstrations()
    prompts = wanted[:, :PROMPT]
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=T)
    ended = ids[:, PROMPT:] == EOS
    right = (ids[:, : wanted.shape[1]] == wanted).all(-1) if ids.shape[1] >= wanted.shape[1] else torch.zeros(BATCH)
    return ids, ended.cumsum(-1) - ended.long() == 0, right.float().mean().item()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# -- 1. SFT ----------------------------------------------------------------------------------------------------------
sft = copy.deepcopy(base)
optimizer = torch.optim.AdamW(sft.parameters(), lr=3e-3)
for _ in range(200):
    ids = demonstrations()
    loss, _ = linear_loss(
        hidden(sft.model, ids),
        sft.lm_head.weight,
        ids[:, PROMPT:],
        lambda logprob, entropy: (-logprob.sum() / BATCH, {}),
    )
    step(optimizer, loss)
print(f"SFT: {sum(sample(sft)[2] for _ in range(8)) / 8:.2f} of the samples are right")

# -- 2. PPO on the self-reward ---------------------------------------------------------------------------------------
policy, critic, value_head = copy.deepcopy(sft), copy.deepcopy(sft.model), nn.Linear(64, 1)
nn.init.zeros_(value_head.weight)
policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
critic_optimizer = torch.optim.AdamW([*critic.parameters(), *value_head.parameters()], lr=1e-3)
shares = []
for iteration in range(1, 61):
    with torch.no_grad():
        ids, mask, share = sample(policy)
        taken = ids[:, PROMPT:]
        old, logp_sft, logp_base = (
            linear_logprob(hidden(model.model, ids), model.lm_head.weight, taken, mask=mask).logprob
            for model in (policy, sft, base)
        )
        rewards = log_ratio_reward(logp_sft, logp_base, mask, logprobs_policy=old, logprobs_ref=logp_sft, kl_coef=BETA)
        old_values = value_head(hidden(critic, ids)).squeeze(-1)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)
    for _ in range(4):
        loss, stats = linear_ppo_loss(
            hidden(policy.model, ids), policy.lm_head.weight, taken, old, advantages, mask, clip_low=0.2, clip_high=0.2
        )
        step(policy_optimizer, loss)
        values = value_head(hidden(critic, ids)).squeeze(-1)
        step(critic_optimizer, value_loss(values, old_values, returns, mask, clip=None)[0])
    shares.append(share)
    if iteration % 10 == 0:
        score, kl = ((a - b).sum().item() / BATCH for a, b in ((logp_sft, logp_base), (old, logp_sft)))
        right = sum(shares[-10:]) / 10
        print(f"{iteration:2d}: self-reward {score:.2f}, KL to SFT {kl:.2f}, {right:.2f} of the last ten batches right")
