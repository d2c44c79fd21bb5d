"""The self-reward as a function for any trainer: token ids or text in, one number a completion out.

    r(x, y) = sum_t [log pi_sft(y_t | x, y_<t) - log pi_base(y_t | x, y_<t)]           (arXiv 2510.21090)

t runs over the completion's tokens up to and including its first stop token; what follows a stop token is filler and
counts for nothing. A completion without a stop token was cut: the sum is then over what is there, less
``missing_eos_penalty`` if one is given. Nothing is ever cut here: a sequence longer than the model's positions is an
error. Both models are read at their last hidden states, so no logits exist at any time.

Where SFT is an adapter folder, both models are one base with that adapter on and off, and cost the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srppo.config import SRPPOConfig
from srppo.data import filler_token, stop_tokens, tokenize_row, whole_numbers
from srppo.errors import UserError
from srppo.models import (
    check_positions,
    check_same_tokenizer,
    check_same_vocabulary,
    load_tokenizer,
    path_as_text,
    require_no_float64,
    tokenizer_for,
)
from srppo.packing import check_padding, neighbours
from srppo.ppo import RunningMoments
from srppo.roles import Role, check_head, evaluating, frozen_roles, laid_out_alike, require_one_device
from srppo.rollout import Rollout, collate, until_stop
from srppo_kernels import linear_log_ratio, log_ratio_reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SelfReward"]

Ids = Sequence[Sequence[int]]


class SelfReward:
    """``log pi_sft - log pi_base`` of completions, as a reward function.

    ::

        reward = SelfReward("my-base", "my-sft-adapter")
        reward.reward(prompt_ids, completion_ids)              # [B] fp32, by token ids: exact
        reward(prompts=["2+2="], completions=["4"])            # [float], text or message lists
        GRPOTrainer(..., reward_funcs=reward)                  # the shape that TRL calls

    It reads the heads' weights whole: models whose parameters are sharded over ranks (ZeRO-3, FSDP) are not for it.
    """

    __name__ = "self_reward"  # what trainers log it as

    def __init__(
        self,
        base: str | Path | PreTrainedModel | Role,
        sft: str | Path | PreTrainedModel | Role,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        normalize: str = "none",
        scale: float = 1.0,
        clip: float | None = None,
        missing_eos_penalty: float | None = None,
        temperature: float = 1.0,
        stop_token_ids: Sequence[int] | None = None,
        append_eos: bool = True,
        batch_size: int = 8,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            base: the pretrained model: a folder, a hub name, a model in memory, or a role (a model with one of its
                adapters). A model in memory is frozen and loses its dropout; a role is left as it was after each call,
                so it may lie in the model that a trainer is training.
            sft: the fine-tuned model, likewise; an adapter folder is loaded onto ``base``, also onto one in memory,
                which then holds that adapter and serves no other.
            tokenizer: for text, stop tokens and the check of the vocabulary; absent: that of the SFT folder, else of
                the base folder; with models in memory it is needed for text only.
            normalize: ``"none"``, ``"length"`` (mean per token) or ``"running"`` (divided by the running standard
                deviation of this object's scores; each process has its own).
            scale: factor on the score, after normalisation.
            clip: bound on the scaled score, in nats; off, as a summed log-ratio often passes the usual 10.
            missing_eos_penalty: subtracted, in nats, from the score of a completion without a stop token.
            temperature: at which the two models are compared.
            stop_token_ids: tokens that end a completion, all of them where a model has several; absent: the tokenizer's
                EOS, else the base model's.
            append_eos: whether text that holds no stop token was finished and gets one, as where a trainer decodes
                without special tokens; False: it was cut. A message list was always finished.
            batch_size: sequences in one forward.
            dtype, attn_implementation, trust_remote_code: of models that are loaded here; ``"auto"`` is bfloat16 on a
                GPU, float32 elsewhere. Log-probs are fp32 either way.

        Raises:
            UserError: models or tokenizers with different vocabularies, an architecture whose logits the fused head
                does not reproduce or whose states padding changes, an option out of range, base and SFT that are the
                same.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {batch_size}")
        base, sft, tokenizer = path_as_text(base), path_as_text(sft), path_as_text(tokenizer)
        args = SRPPOConfig(
            dtype=dtype,  # type: ignore[arg-type]
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            base_model_name_or_path=base if isinstance(base, str) else None,
            use_peft=True,  # nothing is trained here, so 16 bit will do where the device likes it
            missing_eos_penalty=missing_eos_penalty,
            reward_normalization=normalize,  # type: ignore[arg-type]
            reward_scale=scale,
            reward_clip=clip,
            score_temperature=temperature,
        )
        self.args, self.batch_size, self.append_eos = args, batch_size, append_eos
        self.base, self.sft = _roles(args, base, sft)
        _check_heads_agree(self.base, self.sft)
        self.tokenizer = _tokenizer(args, base, sft, tokenizer)
        if self.tokenizer is not None:
            self._check_size(self.tokenizer)
        self.stop_token_ids = self._stops(stop_token_ids)
        self.moments = RunningMoments() if normalize == "running" else None

    @classmethod
    def from_peft(
        cls, model: nn.Module, adapter: str, tokenizer: PreTrainedTokenizerBase | str | None = None, **options: Any
    ) -> SelfReward:
        """Over a peft model in memory: the base is ``model`` with its adapters off, SFT is ``adapter``.

        The model may be one in training with further adapters, such as a trainer's policy: which adapter is active,
        what needs a gradient and which modules are in training mode are as before after every call.
        """
        if adapter not in getattr(model, "peft_config", {}):
            known = ", ".join(map(repr, getattr(model, "peft_config", {}))) or "none: it is no peft model"
            raise UserError(f"the model has no adapter {adapter!r}; it has {known}")
        return cls(*laid_out_alike(Role("base", model), Role("sft", model, adapter)), tokenizer, **options)

    # -- by token ids -------------------------------------------------------------------------------------------------

    def reward(self, prompt_ids: Ids, completion_ids: Ids) -> Tensor:
        """The reward of each completion, ``[B]`` fp32 on the models' device; 0 for an empty completion.

        Args:
            prompt_ids, completion_ids: token ids without padding, a list for each sequence; a completion keeps its stop
                token.

        Raises:
            UserError: an empty prompt, a token that the models do not have, a sequence longer than their positions.
        """
        return self.token_rewards(prompt_ids, completion_ids, placement="eos")[0].sum(-1)

    def token_rewards(self, prompt_ids: Ids, completion_ids: Ids, *, placement: str = "token") -> tuple[Tensor, Tensor]:
        """The same per token: ``(rewards [B, T] fp32, mask [B, T] bool)``.

        ``placement="token"`` gives each token its own log-ratio, ``"eos"`` the last token the sum, as in
        ``srppo_kernels.log_ratio_reward``. Tokens after a stop token are masked.
        """
        if placement == "token" and self.moments is not None:
            raise UserError("normalize='running' tracks the scores of sequences: it goes with placement='eos'")
        ratios, rollout = self.log_ratios(prompt_ids, completion_ids)
        return self._shaped(ratios, rollout, placement), rollout.completion_mask

    def _shaped(self, ratios: Tensor, rollout: Rollout, placement: str) -> Tensor:
        if self.moments is not None and len(rollout):
            self.moments.update(ratios.sum(-1))
        return log_ratio_reward(
            ratios,
            torch.zeros_like(ratios),
            rollout.completion_mask,
            placement=placement,
            normalize=self.args.reward_normalization,
            running_std=None if self.moments is None else self.moments.std,
            scale=self.args.reward_scale,
            clip=self.args.reward_clip,
            truncated=rollout.truncated,
            missing_eos_penalty=self.args.missing_eos_penalty,
        )

    @torch.no_grad()
    def log_ratios(self, prompt_ids: Ids, completion_ids: Ids) -> tuple[Tensor, Rollout]:
        """``log pi_sft - log pi_base`` of every token, ``[B, T]`` fp32 and 0 where masked, before normalisation, scale,
        clip and penalty; with the rollout that holds mask and truncation."""
        rollout = self._collate(prompt_ids, completion_ids)
        ratios = torch.zeros(rollout.completion_mask.shape, device=rollout.input_ids.device)
        order = neighbours(rollout, self.sft.layout)
        with evaluating(self.sft.model), evaluating(self.base.model):
            for rows in order.split(self.batch_size):
                part = rollout.select(rows)
                if part.completion_mask.any():
                    values = self._ratio(part)
                    ratios[rows, : values.shape[1]] = values
        return ratios, rollout

    def _ratio(self, part: Rollout) -> Tensor:
        with self.sft.active():
            hidden_sft, head_sft = self.sft.hidden(part), self.sft.head
        with self.base.active():
            hidden_base, head_base = self.base.hidden(part), self.base.head
        ratio = linear_log_ratio(
            hidden_sft, head_sft.weight, hidden_base, head_base.weight, part.tokens,
            bias_sft=head_sft.bias, bias_base=head_base.bias, temperature=self.args.score_temperature,
            logit_scale=head_sft.logit_scale, softcap=head_sft.softcap,
        )  # fmt: skip
        return part.in_place(ratio)

    def _collate(self, prompt_ids: Ids, completion_ids: Ids) -> Rollout:
        prompts = _checked(prompt_ids, "prompt_ids", self.vocabulary_size)
        completions = _checked(completion_ids, "completion_ids", self.vocabulary_size)
        empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise UserError(
                f"prompt_ids[{empty}] is empty: the first completion token needs a token before it, such as BOS"
            )
        stops = torch.tensor(self.stop_token_ids)
        completions = [until_stop(torch.tensor(completion, dtype=torch.int64), stops) for completion in completions]
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=False)]
        for role in (self.base, self.sft):
            check_positions(role.causal_lm.config, lengths)
        filler = self.stop_token_ids[0] if self.tokenizer is None else filler_token(self.tokenizer, self.stop_token_ids)
        return collate(
            prompts, completions, pad_token_id=filler, stop_token_ids=self.stop_token_ids, device=self.base.device
        )

    # -- as a reward function -----------------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Ids | None = None,
        prompt_ids: Ids | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """One number a completion. Token ids are preferred where both are given: text, tokenised again, may be other
        tokens than those that were sampled, and does not tell whether the completion was cut.

        Args:
            prompts: text or message lists, as given to the trainer.
            completions: text or message lists, likewise.
            completion_ids, prompt_ids: token ids without padding, a completion with its stop token.
            kwargs: what else the trainer passes to reward functions. A ``log_metric(name, value)`` among it is told the
                mean log-ratio per token, which length cannot move, and the share of completions that were cut.

        Raises:
            UserError: neither text nor ids for prompts or completions; text without a tokenizer, or with a penalty for
                cut completions that it cannot tell; as in :meth:`reward`.
        """
        for name, given in (("prompts", prompts), ("completions", completions)):
            if isinstance(given, str):
                raise UserError(f"{name} must be a list, got the text {given[:40]!r}: put it in a list of one")
        if prompts is None and prompt_ids is None:
            raise UserError("the self-reward needs prompts: pass prompt_ids, or prompts as text or message lists")
        if completions is None and completion_ids is None:
            raise UserError(
                "the self-reward needs completions: pass completion_ids, or completions as text or message lists"
            )
        if prompt_ids is None or completion_ids is None:
            texts = [self._tokenize(i, *pair) for i, pair in enumerate(_pairs(prompts, completions, completion_ids))]
            prompt_ids = [prompt for prompt, _ in texts] if prompt_ids is None else prompt_ids
            completion_ids = [c for _, c in texts] if completion_ids is None else completion_ids
        ratios, rollout = self.log_ratios(prompt_ids, completion_ids)
        log_metric = kwargs.get("log_metric")
        if callable(log_metric) and len(rollout):
            tokens = rollout.completion_mask.sum().clamp(min=1)
            log_metric("self_reward/per_token", (ratios.sum() / tokens).item())
            log_metric("self_reward/truncated", rollout.truncated.float().mean().item())
        return self._shaped(ratios, rollout, "eos").sum(-1).tolist()

    def _tokenize(self, row: int, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and, where it is not None, a completion."""
        if self.tokenizer is None:
            raise UserError("the self-reward has no tokenizer for text: pass tokenizer, or call it with token ids")
        where = f"completion {row}"
        keeps_stop = not self.append_eos and isinstance(prompt, str) and isinstance(completion, str)
        if completion is not None and not keeps_stop and self.args.missing_eos_penalty is not None:
            raise UserError(
                "missing_eos_penalty needs to know which completions were cut, and this text does not tell: pass "
                "completion_ids, or set append_eos=False where text keeps its stop token"
            )
        if keeps_stop:
            ids, _ = tokenize_row(where, {"prompt": prompt}, self.tokenizer, self.stop_token_ids)
            return ids, self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        fields = {"prompt": prompt} if completion is None else {"prompt": prompt, "completion": completion}
        ids, answer = tokenize_row(where, fields, self.tokenizer, self.stop_token_ids)
        return ids, answer or []

    # -- checks -------------------------------------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """Rows of the heads; at least the number of tokens."""
        return self.base.head.weight.shape[0]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Stops where a trainer's tokenizer numbers tokens otherwise than base and SFT do.

        Raises:
            UserError: with the first token that differs.
        """
        self._check_size(tokenizer)
        if self.tokenizer is not None:
            check_same_tokenizer(
                self.tokenizer,
                tokenizer,
                what="the policy's tokenizer is not that of base and SFT",
                why="their log-probs would be of other tokens than those that were sampled; use models of one family",
            )

    def _check_size(self, tokenizer: PreTrainedTokenizerBase) -> None:
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer has token {highest}, and base and SFT give probabilities to {self.vocabulary_size} "
                "tokens: it is another model's tokenizer"
            )

    def _stops(self, asked: Sequence[int] | None) -> list[int]:
        if self.tokenizer is not None:
            return stop_tokens(self.tokenizer, asked)
        found = asked if asked is not None else self.base.causal_lm.config.get_text_config().eos_token_id
        stops = [found] if isinstance(found, int) else list(found or ())
        if not stops:
            raise UserError("neither a tokenizer nor the base model says what ends a completion: set stop_token_ids")
        _checked([stops], "stop_token_ids", self.vocabulary_size)
        return stops


def _roles(
    args: SRPPOConfig, base: str | PreTrainedModel | Role, sft: str | PreTrainedModel | Role
) -> tuple[Role, Role]:
    if isinstance(base, Role) != isinstance(sft, Role):
        raise UserError("base and sft must both be roles, or neither: a role is a model with one of its adapters")
    if isinstance(base, Role) and isinstance(sft, Role):
        for name, role in (("base", base), ("SFT model", sft)):
            require_no_float64(f"the {name}", role.model)
        check_same_vocabulary(args, base.causal_lm, sft.causal_lm, None, None)
        with ExitStack() as stack:
            for role in (base, sft):
                stack.enter_context(evaluating(role.model))
            for role in (base, sft):
                check_head(role)
                check_padding(role)
    else:
        assert not isinstance(base, Role) and not isinstance(sft, Role)
        if base is sft or (
            isinstance(base, str) and isinstance(sft, str) and Path(base).resolve() == Path(sft).resolve()
        ):
            named = f" ({base})" if isinstance(base, str) else ""
            raise UserError(f"base and sft are the same model{named}, so every reward would be 0")
        base, sft = frozen_roles(args, base, sft)
    if base.model is sft.model and base.adapter == sft.adapter:
        raise UserError("base and sft are the same model with the same adapter, so every reward would be 0")
    require_one_device(base, sft)
    return base, sft


def _check_heads_agree(base: Role, sft: Role) -> None:
    a, b = base.head, sft.head
    if (a.logit_scale, a.softcap) != (b.logit_scale, b.softcap):
        raise UserError(
            f"base and SFT transform their logits differently (scale {a.logit_scale} and {b.logit_scale}, softcap "
            f"{a.softcap} and {b.softcap}): they are no base and its fine-tuned model"
        )


def _tokenizer(
    args: SRPPOConfig, base: Any, sft: Any, tokenizer: PreTrainedTokenizerBase | str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, held against those in the models' folders; else theirs; None for models in memory."""
    folders = [path for path in (sft, base) if isinstance(path, str)]
    if tokenizer is None:
        return tokenizer_for(sft, base, args) if folders else None
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, args)
    for folder in folders:
        if (Path(folder) / "tokenizer_config.json").is_file():
            check_same_tokenizer(
                load_tokenizer(folder, args),
                tokenizer,
                what=f"the tokenizer is not that of the model in {folder}",
                why="its log-probs would be of other tokens; leave tokenizer out to take the model's own",
            )
    return tokenizer


def _checked(rows: Ids, name: str, vocabulary: int) -> list[list[int]]:
    """Token ids as lists, each in range."""
    if isinstance(rows, Tensor):
        raise UserError(f"{name} is a tensor, which hides what is padding: pass a list of token ids for each sequence")
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise UserError(f"{name} must hold a list of token ids for each sequence, got {str(rows)[:40]!r}")
    lists: list[list[int]] = []
    for number, row in enumerate(rows):
        try:
            lists.append(whole_numbers(row.tolist() if isinstance(row, Tensor) else row))
        except TypeError:
            raise UserError(
                f"{name}[{number}] must be a list of token ids, which are whole numbers; got {str(row)[:40]!r}"
            ) from None
        bad = next((token for token in lists[-1] if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise UserError(
                f"{name}[{number}] has token {bad}, and base and SFT have {vocabulary}: it comes from another tokenizer"
            )
    return lists


def _pairs(
    prompts: Sequence[Any] | None, completions: Sequence[Any] | None, completion_ids: Ids | None
) -> list[tuple[Any, Any]]:
    """What has to be tokenised: pairs of prompt and completion, the latter None where its ids are given."""
    if prompts is None:
        raise UserError("completions as text need prompts as text: the chat template renders the two together")
    if completion_ids is not None:
        return [(prompt, None) for prompt in prompts]
    assert completions is not None
    if len(prompts) != len(completions):
        raise UserError(f"there are {len(prompts)} prompts and {len(completions)} completions: each prompt needs one")
    return list(zip(prompts, completions, strict=True))
