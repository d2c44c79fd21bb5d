"""The SRPPO trainer: a loop over rollouts that reads in the order it runs.

roles = base, SFT, policy, critic          build_roles
for each iteration:
    sample completions from the policy     rollout.generate
    score them under all four roles        ppo.score
    rewards, advantages, returns           ppo.advantages
    clipped updates of policy and critic   ppo.update
    metrics, evaluation, checkpoint
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srppo import checkpoint, distributed, memory, ppo, sharding, startup, training_state
from srppo.config import PipelineConfig, SRPPOConfig
from srppo.console import Bar, Console
from srppo.data import Dataset, Example, Sampler, as_examples, digest, filler_token, stop_tokens
from srppo.engines import Engine, Sampling, importance_weights, make_engine, sampling_metrics
from srppo.errors import UserError
from srppo.evaluation import completion_rows, evaluate_policy, table_rows, write_completions
from srppo.guard import Guard, HeldOut, KLController, look_at
from srppo.metrics import MetricsWriter, iteration_metrics, peak_memory_gib
from srppo.model_card import model_card
from srppo.models import check_prompts, check_tokens, path_as_text, tokenizer_for, vocabulary_size
from srppo.plots import plot_history
from srppo.roles import Roles, build_roles
from srppo.rollout import Rollout, gather
from srppo.rollout_store import load_rollout, require_folders, save_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Callback = Callable[["SRPPOTrainer", int, dict[str, float]], None]

# What a trainer makes its parts of: changed later, some would be ignored, and some would reach half of the parts.
TAKEN_IN = ("max_completion_length", "temperature", "top_p", "stop_token_ids", "num_mini_batches", "kl_coef",
            "kl_target", "learning_rate", "value_learning_rate", "per_device_train_batch_size",
            "gradient_accumulation_steps", "adam_betas", "lr_scheduler_type", "warmup_ratio", "seed", "output_dir",
            "max_steps")  # fmt: skip


class SRPPOTrainer:
    """Tunes an SFT model with PPO on the reward ``log pi_sft - log pi_base``.

    Args:
        model: the SFT model: an adapter folder, a model folder or hub name, or a loaded model.
        base_model: the pretrained base: a folder or hub name, or a loaded model. Loaded models are frozen in place.
        args: every setting; see :class:`srppo.config.SRPPOConfig`. A :class:`srppo.config.PipelineConfig`, as
            ``run_sft`` takes, says of the last four arguments what they do not, and where the vLLM server is.
        train_dataset: prompts, as rows with the columns of :mod:`srppo.data` or as what :func:`srppo.data.prepare`
            gives. Completions in it are not used here.
        eval_dataset: the same, for evaluation; rows with a completion also give the likelihood of held-out
            demonstrations.
        processing_class: the tokenizer; if absent, that of ``model``, else of ``base_model``.
        peft_config: a ``LoraConfig`` for the policy in place of the ``lora_*`` settings, for a full SFT model and
            ``use_peft``.
        callbacks: called after each iteration as ``callback(trainer, step, metrics)``, all of them; may raise
            ``StopIteration`` to end.
        reward_fn: ``(prompt_ids, completion_ids) -> a number per sequence``, added to the self-reward.
        console: where lines and tables go; if absent, the terminal, from the first process alone.
        engine: what samples; if absent, the one that ``args.rollout_engine`` names.
        importance_cap: C of truncated importance weights ``min(pi_old / mu, C)`` on the advantages, where the engine
            gives the log-probs log mu of what it sampled from; absent: none.
        save_rollouts: a folder that every rollout is written to.
        from_rollouts: a folder of saved rollouts to train on in place of sampling.
        fsdp: cut the weights of all roles over the processes, for full fine-tuning; see :mod:`srppo.sharding`.

    Raises:
        UserError: something in the configuration, data or models must change; raised before training where possible.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        base_model: str | Path | PreTrainedModel,
        args: SRPPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Callback] | None = (),
        reward_fn: ppo.RewardFn | None = None,
        console: Console | None = None,
        *,
        engine: Engine | None = None,
        importance_cap: float | None = None,
        save_rollouts: str | Path | None = None,
        from_rollouts: str | Path | None = None,
        fsdp: bool = False,
    ) -> None:
        model, base_model = path_as_text(model), path_as_text(base_model)
        if isinstance(args, PipelineConfig):
            importance_cap, fsdp = importance_cap or args.importance_cap, fsdp or args.fsdp
            save_rollouts, from_rollouts = save_rollouts or args.save_rollouts, from_rollouts or args.from_rollouts
        self.args, self.callbacks, self.reward_fn = args, callbacks or (), reward_fn
        self.taken_in = {name: copy.copy(getattr(args, name)) for name in TAKEN_IN}
        require_functions(self.callbacks, reward_fn)
        distributed.start()
        self.console = console or Console(quiet=not distributed.is_main())
        self.output_dir = Path(args.output_dir)
        self.tokenizer = processing_class or tokenizer_for(model, base_model, args)
        self.sft_model = model if isinstance(model, str) else "a model in memory"
        self.stop_token_ids = stop_tokens(self.tokenizer, args.stop_token_ids)
        self.train_dataset = self.examples(train_dataset, prompts_only=True)
        self.eval_dataset = [] if eval_dataset is None else self.examples(eval_dataset)
        if not self.train_dataset:
            raise UserError("there are no prompts to sample from: the training data is empty")
        examples = [*self.train_dataset, *self.eval_dataset]
        distributed.require_alike(lambda: {**args.of_all_processes(), "fsdp": fsdp, "data": digest(examples)})
        pad = filler_token(self.tokenizer, self.stop_token_ids)
        self.sampling = Sampling.of(args, self.stop_token_ids, pad)
        self.engine = engine or make_engine(args, self.sampling)
        self.importance_cap = importance_cap
        self.save_rollouts = None if save_rollouts is None else Path(save_rollouts)
        self.from_rollouts = None if from_rollouts is None else Path(from_rollouts)
        self.console.note(f"  {memory.expectation(args, base_model, model, examples)}")
        torch.manual_seed(args.seed)
        self.roles: Roles = build_roles(args, base_model, model, peft_config)
        for role in (self.roles.policy, self.roles.critic):
            distributed.spread_from_main(parameter for _, parameter in role.parameters())
        distributed.seed_apart(args.seed)
        distributed.require_alike(lambda: {"weights of base and SFT": self.roles.frozen_bits()})
        if fsdp:
            sharding.shard_roles(self.roles)
            self.console.note(
                f"  memory: of weights, gradients and optimizer each process keeps 1/{distributed.size()}"
            )
        check_prompts(self.roles.policy.causal_lm.config, examples, args)
        check_tokens(self.roles.policy.causal_lm, examples, [*self.stop_token_ids, pad])
        self.policy = ppo.Learner.create(self.roles.policy, args, args.learning_rate, args.max_steps)
        value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        self.critic = ppo.Learner.create(self.roles.critic, args, value_rate, args.max_steps)
        self.sampler = Sampler(self.train_dataset, args.batch_size * distributed.size(), args.seed)
        self.moments = ppo.RunningMoments()
        self.controller = KLController(args)
        self.guard = Guard()
        demonstrations = [example for example in self.eval_dataset if example.completion_ids is not None]
        self.held_out = None
        if demonstrations:
            self.held_out = HeldOut(
                demonstrations, args, self.roles.sft, stop_token_ids=self.stop_token_ids, pad_token_id=pad
            )
        self.generator = torch.Generator().manual_seed(args.seed + 1)  # of the mini-batch partitions, on all ranks
        self.begun = False  # whether the policy may be another than the SFT model
        self.step = self.episodes = self.tokens = 0
        self.history: list[dict[str, Any]] = []

    def examples(self, dataset: Dataset, *, prompts_only: bool = False) -> list[Example]:
        return as_examples(dataset, self.tokenizer, self.stop_token_ids, self.args, prompts_only=prompts_only)

    @functools.cached_property
    def frozen(self) -> int:
        """Of base and SFT as the run began with them: see :meth:`srppo.roles.Roles.frozen_bits`."""
        return self.roles.frozen_bits()

    def train(self) -> dict[str, Any]:
        """Runs all iterations and writes the result to ``args.output_dir``; returns the last metrics."""
        with distributed.held_by_main(checkpoint.claimed(self.output_dir)):
            return self.run()

    def run(self) -> dict[str, Any]:
        """What :meth:`train` does in a folder that is this run's alone."""
        args, frozen = self.args, self.frozen
        self.require_settings()
        self.resume()
        space = 3 * checkpoint.model_bytes(self.roles.policy) + 2**20
        distributed.on_main(lambda: checkpoint.require_space(self.output_dir, space))
        held_out = 0 if self.held_out is None else len(self.held_out.rollout)
        for line in startup.describe(args, self.roles, prompts=len(self.train_dataset), held_out=held_out):
            self.console.note(f"  {line}")
        self.console.note("  " + self.start_sampling())
        with (
            MetricsWriter(self.output_dir if distributed.is_main() else None, args, self.history) as writer,
            self.console.progress("SRPPO", args.max_steps) as progress,
        ):
            progress.advance(0, steps=self.step)
            self.history = writer.history
            while self.step < args.max_steps:
                metrics = self.iterate(progress)
                if self.eval_dataset and args.eval_steps and self.step % args.eval_steps == 0:
                    progress.status("evaluating")
                    metrics.update(self.evaluate())
                writer.write(self.step, metrics)
                if args.save_steps and self.step % args.save_steps == 0:
                    self.save_checkpoint()
                if distributed.any_rank(self.call_back(metrics)):
                    self.console.note(f"a callback ended the run after iteration {self.step}")
                    break
            if self.eval_dataset and "eval/objective/kl" not in (writer.history or [{}])[-1]:
                writer.write(self.step, self.evaluate())  # joins the last iteration's entry
        self.save_model()
        if distributed.any_rank(self.roles.frozen_bits() != frozen):
            raise UserError(
                "the weights of base or SFT changed during the run, in a callback or by another user of the models: "
                "the reward was not what it says, so do not trust the model that was written"
            )
        self.console.note(f"memory: {memory.measured()}")
        last = self.history[-1] if self.history else {}
        self.console.table("evaluation", [{"metric": n, "value": v} for n, v in last.items() if n.startswith("eval/")])
        return last

    def require_settings(self) -> None:
        """Stops if a setting that the trainer was made with is another now."""
        for name, value in self.taken_in.items():
            if getattr(self.args, name) != value:
                raise UserError(
                    f"args.{name} was changed from {value} to {getattr(self.args, name)}, and this trainer was made "
                    "with the former: make a new trainer, which can go on from a checkpoint with "
                    "resume_from_checkpoint=latest"
                )

    def call_back(self, metrics: dict[str, float]) -> bool:
        """Calls the callbacks; whether one of them wants the run to end. Those behind it are called all the same: other
        ranks, where it goes on, call them, and one that evaluates or saves is a collective."""
        ends = False
        for callback in self.callbacks:
            try:
                callback(self, self.step, metrics)
            except StopIteration:
                ends = True
        return ends

    def iterate(self, progress: Bar) -> dict[str, float]:
        """One PPO iteration."""
        args, start = self.args, time.perf_counter()
        self.require_settings()  # callbacks have been called since
        self.begun = True
        progress.status("sampling")
        batch = self.sampler.next()
        rollout = gather(self.rollout(distributed.share(batch)))
        sampled = time.perf_counter()

        progress.status("scoring")
        own = torch.arange(len(rollout)).chunk(distributed.size())[distributed.rank()]  # of the ranks' rows
        mini_batches = ppo.split_rows(own, rollout, args, role=self.roles.policy, generator=self.generator)
        micro_batches = [rows for mini_batch in mini_batches for rows in mini_batch]
        scores = ppo.gather_scores(ppo.score(self.roles, rollout, args, micro_batches))
        if self.step == 0:
            apart = startup.forwards_apart(self.roles.policy)
            self.console.note("  " + startup.check_start(self.roles, args, rollout, scores, micro_batches, apart))
        beta = self.controller.beta
        cap = self.importance_cap
        weights = None if cap is None else importance_weights(rollout, scores.policy, cap)
        targets = ppo.advantages(
            rollout, scores, args, moments=self.moments, reward_fn=self.reward_fn, kl_coef=beta, weights=weights
        )
        watched = self.watch(rollout, scores, targets)
        scored = time.perf_counter()

        progress.status("updating")
        lr = float(self.policy.scheduler.get_last_lr()[0])
        result = ppo.update(
            self.policy, self.critic, rollout, scores, targets, args, mini_batches,
            generator=self.generator, train_policy=self.step >= args.value_warmup_steps,
        )  # fmt: skip
        if self.step == 0:
            self.console.note("  " + startup.check_first_ratio(result, startup.forwards_apart(self.roles.policy)))
        self.policy.scheduler.step()
        self.critic.scheduler.step()
        updated = time.perf_counter()

        self.step += 1
        self.episodes += len(rollout)
        tokens = int(rollout.completion_mask.sum())
        self.tokens += tokens
        metrics = iteration_metrics(rollout, scores, targets, result) | watched
        self.controller.update(metrics["objective/kl"])
        metrics |= {
            "objective/kl_coef": beta,
            "lr": lr,
            "episode": self.episodes,
            "num_tokens": self.tokens,
            "step_time": updated - start,
            "time/rollout": sampled - start,
            "time/score": scored - sampled,
            "time/update": updated - scored,
            "perf/tokens_per_second": tokens / (updated - start),
            "perf/peak_memory_gib": max(map(float, distributed.gathered(torch.tensor(peak_memory_gib())))),
        }
        if result.skipped_steps:
            self.console.warn(
                f"iteration {self.step}: {result.skipped_steps} optimizer steps skipped, gradient not finite"
            )
        if distributed.is_main() and args.log_completions and (self.step == 1 or self.step % args.log_completions == 0):
            self.log_completions(batch, rollout, scores, targets)
        progress.advance(tokens, f"reward {metrics['objective/scores']:.2f} kl {metrics['objective/kl']:.2f} "
                                 f"length {metrics['completions/mean_length']:.0f}")  # fmt: skip
        return metrics

    def start_sampling(self) -> str:
        """Checks that rollouts can be had and kept, before anything is computed; says where they come from."""
        begins = self.args.resume_from_checkpoint is None
        steps = range(self.step + 1, self.args.max_steps + 1)
        require_folders(self.save_rollouts if begins else None, self.from_rollouts, steps)
        if self.from_rollouts is None:
            return self.engine.start(self.roles.policy)
        return f"rollouts: replayed from {self.from_rollouts}"

    def rollout(self, batch: Sequence[Example]) -> Rollout:
        """A completion from the policy for each prompt: sampled, or as it was saved."""
        prompts = [example.prompt_ids for example in batch]
        if self.from_rollouts is not None:
            vocabulary = vocabulary_size(self.roles.policy.causal_lm)
            return load_rollout(
                self.from_rollouts, prompts, step=self.step + 1, sampling=self.sampling, vocabulary=vocabulary,
                device=self.roles.policy.device,
            )  # fmt: skip
        rollout = self.engine.sample(self.roles.policy, prompts, step=self.step)
        if self.save_rollouts is not None:
            save_rollout(self.save_rollouts, rollout, step=self.step + 1, sampling=self.sampling)
        return rollout

    def watch(self, rollout: Rollout, scores: ppo.Scores, targets: ppo.Advantages) -> dict[str, float]:
        """The guard's look at the policy that sampled: warnings, ``best/``, and the likelihood of demonstrations."""
        metrics, gain, error = sampling_metrics(rollout, scores.policy), None, 0.0
        apart = startup.sampler_apart(metrics, self.args.top_p) if self.step == 0 else None
        if apart is not None:
            self.console.warn(apart)
        if self.held_out is not None:
            metrics["guard/demonstrations_logp"], gain, error = self.held_out.look(self.roles.policy)
        seen = look_at(scores, targets, rollout, self.args, gain=gain, gain_error=error)
        verdict = self.guard.look(self.step, seen, beta=self.controller.beta)
        if verdict.best:
            weights = sharding.whole_state(self.roles.policy.model)
            distributed.on_main(lambda: self.write_best(weights))
        for text in verdict.warnings:
            self.console.warn(text)
        for text in verdict.notes:
            self.console.note(text)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics of the policy on the evaluation data, ``eval/*``."""
        if not self.eval_dataset:
            raise UserError("there is no evaluation data: give eval_dataset, or a dataset with a test split")
        metrics, _ = evaluate_policy(
            self.roles.policy, self.roles.sft, self.roles.base, self.eval_dataset, self.args, self.tokenizer,
            stop_token_ids=self.stop_token_ids,
        )  # fmt: skip
        return metrics

    # -- output -------------------------------------------------------------------------------------------------------

    def log_completions(
        self, batch: Sequence[Example], rollout: Rollout, scores: ppo.Scores, targets: ppo.Advantages
    ) -> None:
        """A few samples on the console, all of them in ``completions/completions_<step>.parquet``."""
        kl = (scores.policy - scores.reference).sum(-1)
        rows = completion_rows(batch, rollout, targets.scores, kl, self.tokenizer, skip_special_tokens=False)
        write_completions(self.output_dir / "completions", rows, step=self.step)
        self.console.table(f"iteration {self.step}", table_rows(rows[:4]))

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Writes the policy, tokenizer, configuration, state, plots and model card; returns the folder."""
        target = Path(output_dir or self.output_dir)
        weights = sharding.whole_state(self.roles.policy.model)
        distributed.on_main(lambda: self.write_model(target, weights))
        return target

    def write_model(self, target: Path, weights: dict[str, torch.Tensor] | None) -> None:
        with checkpoint.temporary_folder(target) as folder:
            checkpoint.save_model(self.roles.policy, self.tokenizer, folder, weights)
            checkpoint.write_text(folder / "trainer_state.json", checkpoint.to_json(self.state()))
            card = model_card(self.args, self.roles, self.history, sft=self.sft_model)
            checkpoint.write_text(folder / "README.md", card)
            checkpoint.publish(folder, target)
        plots = plot_history(self.history, target / "plots")
        self.console.note(f"model written to {target}" + (f", plots to {target / 'plots'}" if plots else ""))

    def write_best(self, weights: dict[str, torch.Tensor] | None) -> None:
        """``best/``: the policy that the guard thinks best so far, as a model of its own."""
        with checkpoint.atomic_folder(self.output_dir / "best", replace=True) as folder:
            checkpoint.save_model(self.roles.policy, self.tokenizer, folder, weights)
            checkpoint.write_text(
                folder / "trainer_state.json", checkpoint.to_json({"step": self.step, "guard": self.guard.best})
            )

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "episode": self.episodes, "num_tokens": self.tokens, "log_history": self.history}

    def save_checkpoint(self) -> None:
        """``checkpoint-<step>`` in the output folder, and the oldest removed beyond ``save_total_limit``."""
        tensors = training_state.snapshot(self)
        folder = self.output_dir / f"checkpoint-{self.step}"
        weights = sharding.whole_state(self.roles.policy.model)

        def write() -> None:
            metrics = self.output_dir / "metrics.jsonl"
            if metrics.exists():  # its entry says that the checkpoint is of this run
                checkpoint.sync(metrics)
            checkpoint.save_checkpoint(folder, self.roles.policy, self.tokenizer, tensors, self.state(), weights)
            checkpoint.keep_newest(self.output_dir, self.args.save_total_limit, self.step)

        distributed.on_main(write)

    def resume(self) -> None:
        """Goes on where the checkpoint that is asked for was written, or starts in an output folder of its own."""
        wanted = self.args.resume_from_checkpoint
        held: list[Any] = []  # by the checkpoint: its tensors and its state
        folder = None if wanted is None else distributed.on_main(lambda: self.find(wanted, held))
        if folder is None and self.begun:
            raise UserError(
                "this trainer has begun its run already: make a new one, or where the run has a checkpoint set "
                "args.resume_from_checkpoint to 'latest'"
            )
        if wanted is None:
            distributed.on_main(lambda: checkpoint.require_fresh_output(self.output_dir))
            return
        if folder is None:
            self.console.note(f"no checkpoint in {self.output_dir} yet: starting at the beginning")
            return
        if not distributed.is_main():  # which has read it, to find it whole
            with contextlib.suppress(checkpoint.Damaged):
                held += checkpoint.load_checkpoint(folder)
        if distributed.any_rank(not held):
            raise UserError(
                f"checkpoint {folder} cannot be read by every process: each needs to see the folder that the first does"
            )
        training_state.restore(self, folder, *held)
        if self.guard.best is not None and not distributed.on_main(
            lambda: checkpoint.adopt_best(folder.parent, self.output_dir)
        ):
            self.console.warn(f"{folder.parent / 'best'} is gone: what is best is judged anew from here")
            self.guard.best = None

    def find(self, wanted: str, held: list[Any]) -> Path | None:
        """The checkpoint to go on from, with what is in it in ``held``, and the output folder made ready."""
        if wanted == "latest":
            checkpoint.require_latest(self.output_dir, self.save_rollouts)
        else:
            checkpoint.sweep(self.output_dir, self.save_rollouts)
        found = checkpoint.find_checkpoint(wanted, self.output_dir, self.console.warn)
        if found is None:
            return None
        folder, *held[:] = found
        if folder.resolve().parent != self.output_dir.resolve():
            checkpoint.require_new_folder(self.output_dir)
        return folder


def require_functions(callbacks: Sequence[Any], reward_fn: Any) -> None:
    """Stops before anything is computed if one of them cannot be called, as a list of functions or TRL's objects."""
    functions = [("a callback", callback) for callback in callbacks]
    functions += [] if reward_fn is None else [("reward_fn", reward_fn)]
    for name, given in functions:
        if not callable(given):
            raise UserError(
                f"{name} must be a function, got {type(given).__name__}: see SRPPOTrainer for its arguments"
            )
