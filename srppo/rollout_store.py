"""Rollouts on disk: saved as they were sampled, and replayed into a run that then has the same numbers.

``rollout_00012.safetensors`` holds what the twelfth iteration sampled: token ids, masks, and the sampler's log-probs
where there are some; its metadata says how. A replayed run draws the same prompts, checks that they are the saved ones,
and samples nothing, so that a change in scoring, reward or update can be looked at on equal rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from srppo import checkpoint, distributed
from srppo.engines import Sampling
from srppo.errors import UserError
from srppo.rollout import Rollout

VERSION = "1"
TENSORS = {
    "input_ids": torch.int64,
    "attention_mask": torch.int64,
    "completion_mask": torch.bool,
    "truncated": torch.bool,
}


def path_of(folder: Path, step: int) -> Path:
    """The file of an iteration; each of several processes has one, with its own share of the prompts."""
    share = "" if distributed.size() == 1 else f"_{distributed.rank()}_of_{distributed.size()}"
    return folder / f"rollout_{step:05d}{share}.safetensors"


def save_rollout(folder: Path, rollout: Rollout, *, step: int, sampling: Sampling) -> None:
    """Writes the rollout of iteration ``step``, all at once.

    Args:
        step: of the iteration that sampled, from 1.
    """
    tensors = {name: getattr(rollout, name).contiguous().cpu() for name in TENSORS}
    if rollout.sampler_logprobs is not None:
        tensors["sampler_logprobs"] = rollout.sampler_logprobs.contiguous().cpu()
    metadata = {
        "version": VERSION,
        "step": str(step),
        "prompt_length": str(rollout.prompt_length),
        "stop_token_ids": json.dumps(list(sampling.stop_token_ids)),
        "temperature": repr(sampling.temperature),
        "top_p": repr(sampling.top_p),
    }
    with checkpoint.temporary_folder(folder) as writing, checkpoint.failed_writes(folder):
        target = path_of(folder, step)
        save_file(tensors, writing / target.name, metadata)
        checkpoint.sync(writing / target.name)
        checkpoint.move(writing / target.name, target)


def require_rollouts(folder: Path, steps: Sequence[int]) -> None:
    """Stops before training if the rollout of one of these iterations is not there."""
    missing = next((step for step in steps if not path_of(folder, step).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{path_of(folder, missing)}, the rollout of iteration {missing}, is not there to be replayed: is "
            "from_rollouts the folder that save_rollouts named, and were as many iterations run, by as many processes?"
        )


def require_folders(save: str | Path | None, replay: str | Path | None, steps: Sequence[int]) -> None:
    """Stops before anything is computed if rollouts cannot be saved, or those of these iterations not be replayed."""
    if save is not None and replay is not None:
        raise UserError("save_rollouts is for rollouts that are sampled, and from_rollouts replays them: give one")
    if save is not None:
        distributed.on_main(lambda: checkpoint.require_new_folder(Path(save), "save_rollouts"))
    if replay is not None:
        require_rollouts(Path(replay), steps)


def load_rollout(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    step: int,
    sampling: Sampling,
    vocabulary: int,
    device: torch.device,
) -> Rollout:
    """The saved rollout of iteration ``step``, checked.

    Args:
        prompts: that this run drew for the iteration; the saved ones must be these.
        sampling: of this run; stop tokens, temperature and top-p must be those of the run that sampled.
        vocabulary: size of the model's, for the range of token ids.

    Raises:
        UserError: the file is missing or damaged, or it does not fit this run; the message says in what.
    """
    path = path_of(folder, step)

    def refuse(why: str) -> UserError:
        return UserError(f"rollout {path} cannot be replayed: {why}")

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise refuse(str(error).strip().split("\n", 1)[0]) from None
    if metadata.get("version") != VERSION or not tensors.keys() >= TENSORS.keys():
        raise refuse("it was not written by this version's --save_rollouts")
    expected = {"step": str(step), "temperature": repr(sampling.temperature), "top_p": repr(sampling.top_p),
                "stop_token_ids": json.dumps(list(sampling.stop_token_ids))}  # fmt: skip
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise refuse(f"its {name} is {metadata.get(name)}, and this run's is {value}")
    rollout = Rollout(
        tensors["input_ids"], tensors["attention_mask"], tensors["completion_mask"], tensors["truncated"],
        int(metadata["prompt_length"]), tensors.get("sampler_logprobs"),
    )  # fmt: skip
    why = problem(rollout, vocabulary)
    if why is not None:
        raise refuse(why)
    width = rollout.prompt_length
    saved = [ids[keep.bool()].tolist() for ids, keep in
             zip(rollout.input_ids[:, :width], rollout.attention_mask[:, :width], strict=True)]  # fmt: skip
    if saved != [list(prompt) for prompt in prompts]:
        raise refuse("its prompts are not those that this run drew: data, seed and batch size must be the same")
    return rollout.to(device)


def problem(rollout: Rollout, vocabulary: int) -> str | None:
    """What is wrong with a rollout from outside, if anything."""
    rows, columns = rollout.input_ids.shape
    completions = columns - rollout.prompt_length
    shapes = {"input_ids": (rows, columns), "attention_mask": (rows, columns), "completion_mask": (rows, completions),
              "truncated": (rows,)}  # fmt: skip
    for name, dtype in TENSORS.items():
        tensor = getattr(rollout, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shapes[name]:
            return f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {shapes[name]} of {dtype}"
    if rollout.input_ids.numel() and not (rollout.input_ids.min() >= 0 and rollout.input_ids.max() < vocabulary):
        return f"it has token ids outside the vocabulary of {vocabulary}"
    mask = rollout.completion_mask
    if (mask[:, 1:] & ~mask[:, :-1]).any() or not (
        mask == rollout.attention_mask[:, rollout.prompt_length :].bool()
    ).all():
        return "its masks contradict each other"
    logprobs = rollout.sampler_logprobs
    if logprobs is not None and (logprobs.shape != mask.shape or not logprobs[mask].isfinite().all()):
        return "its sampler_logprobs are not a finite number per completion token"
    return None
