"""The command line: ``srppo train | sft | score | eval | demo | env``.

Flags are the fields of :class:`srppo.config.PipelineConfig`; ``--config FILE`` reads them from YAML first, flags win.
A mistake of the user's ends in one message that says what to do and exit code 2; Ctrl-C in 130; a full disk in 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from srppo.config import PipelineConfig, fields_and_types, read_yaml
from srppo.errors import UserError

MODEL = ("base_model_name_or_path", "dtype", "attn_implementation", "trust_remote_code")
LORA = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
DATA = ("dataset_name", "dataset_train_split", "max_prompt_length", "max_completion_length", "stop_token_ids")
OPTIMISATION = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_micro_batch",
                "max_grad_norm", "adam_betas", "lr_scheduler_type", "warmup_ratio", "gradient_checkpointing",
                "seed")  # fmt: skip
SFT = ("dataset_test_split", "sft_learning_rate", "sft_num_train_epochs", "output_dir", "report_to", "fsdp")
COMMANDS = {
    "train": ("SFT where no SFT model is given, then self-rewarding PPO", None),
    "sft": ("fine-tune the base model on demonstrations",
            (*MODEL, *LORA, *DATA, *OPTIMISATION, *SFT)),
    "score": ("the self-reward of given completions, per token and per sequence, as JSON lines",
              (*MODEL, "sft_model_name_or_path", *DATA, "score_temperature", "per_device_train_batch_size")),
    "eval": ("sample from a model and measure reward, KL, length, and likelihood of held-out demonstrations",
             (*MODEL, "sft_model_name_or_path", *DATA, "dataset_test_split", "temperature", "top_p",
              "score_temperature", "per_device_train_batch_size", "max_tokens_per_micro_batch", "seed")),
    "demo": ("the whole method on a small generated world, in a few minutes", ()),
    "env": ("versions, and which backends are on or off and why", ()),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are :class:`UserError`, and that takes no abbreviated flags."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; '{self.prog} --help' lists the options")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="srppo", description="Self-Rewarding PPO: alignment from demonstrations alone.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"srppo {installed_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, (doc, fields) in COMMANDS.items():
        command = commands.add_parser(name, help=doc, description=doc[0].upper() + doc[1:] + ".", allow_abbrev=False)
        if fields != ():
            command.add_argument(
                "--config", metavar="FILE", type=os.path.expanduser, help="YAML file of settings; flags win"
            )
            add_config_flags(command, fields)
        if name in ("score", "eval"):
            command.add_argument(
                "--output_file",
                metavar="FILE",
                type=os.path.expanduser,
                help="write here instead of to standard output",
            )
        if name == "eval":
            command.add_argument(
                "--model_name_or_path",
                metavar="MODEL",
                type=os.path.expanduser,
                help="the model to judge; absent: the SFT model",
            )
            command.add_argument(
                "--extrapolate",
                type=float,
                metavar="BETA",
                help="sample from (1 + 1/BETA) log pi - 1/BETA log pi_base, which needs no training",
            )
        if name == "demo":
            command.add_argument(
                "--output_dir",
                default="srppo-demo",
                type=os.path.expanduser,
                help="new or empty folder (default: %(default)s)",
            )
            command.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
            command.add_argument(
                "--quick", action="store_true", help="seconds instead of minutes: shows that it runs, not that it works"
            )
    return parser


def installed_version() -> str:
    try:
        return importlib.metadata.version("srppo")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "(not installed)"


def add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None) -> None:
    for field, hint in fields_and_types(PipelineConfig):
        if names is not None and field.name not in names:
            continue
        kind = (
            next((part for part in get_args(hint) if part is not type(None)), hint)
            if type(None) in get_args(hint)
            else hint
        )
        if kind is bool:
            extra: dict[str, Any] = {"nargs": "?", "const": True, "metavar": "true|false"}
        elif get_origin(kind) is list:
            extra = {"nargs": "+"}
        else:
            extra = {"metavar": "|".join(get_args(kind)) or kind.__name__.upper()}
        default = "" if field.default is None else f" (default: {field.default})"
        text = (field.metadata["help"] + default).replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **extra)


def config_from(options: argparse.Namespace) -> PipelineConfig:
    names = {field.name for field in dataclasses.fields(PipelineConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    flags = {name: ",".join(value) if isinstance(value, list) else value for name, value in flags.items()}
    settings = read_yaml(options.config) if options.config else {}
    args = PipelineConfig.from_dict({**settings, **flags}, source=options.config or "the flags")
    idle = [name for name in LORA if getattr(args, name) != getattr(PipelineConfig, name)]
    if idle and not args.use_peft:  # or all weights would be trained, at the memory and learning rate of an adapter
        raise UserError(f"{idle[0]} is for adapters: add --use_peft, or leave it out to train all weights")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        options, unknown = build_parser().parse_known_args(arguments)
        if unknown:
            Parser(prog=f"srppo {options.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
        from srppo import commands

        run = getattr(commands, options.command)
        if options.command in ("demo", "env"):
            run(options)
        else:
            args = config_from(options)
            commands.quiet_libraries()
            run(args, options)
        return 0
    except UserError as error:
        told = type(error).__name__ == "ToldByMain"  # by the first of several processes; see srppo.distributed
        return 2 if told else complain(str(error), 2)
    except KeyboardInterrupt:
        return complain("interrupted; what was complete stays, nothing is half-written", 130)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return complain(
                f"the disk is full ({error.strerror}): make room or choose another output folder; nothing is "
                "half-written",
                1,
            )
        if error.filename is not None:
            return complain(f"cannot use {error.filename}: {error.strerror}", 1)
        raise


def entry() -> NoReturn:
    """Runs the command of this process and ends it with the exit code."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    from srppo.distributed import leave

    leave(code)


def complain(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # of several processes, those after the first say who they are
    print(f"srppo: {text}" if rank == "0" else f"srppo: (process {rank}) {text}", file=sys.stderr)
    return code


@contextmanager
def lines_to(path: str | None) -> Iterator[Callable[[Any], None]]:
    """Takes rows one by one, as JSON lines in a file that is there all at once at the end, or on standard output then.

    They wait on the disk: as objects and then one text, 100,000 scored completions of 100 tokens would take 4 GiB.
    """
    from srppo.checkpoint import move, sync, temporary_folder

    with temporary_folder(Path(tempfile.gettempdir()) if path is None else Path(path).parent) as folder:
        waiting = folder / "lines.jsonl"
        with waiting.open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
        if path is not None:
            sync(waiting)
            move(waiting, Path(path))
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # what JSON is, in a locale of fewer characters too
        with waiting.open(encoding="utf-8") as file:
            shutil.copyfileobj(file, sys.stdout)


if __name__ == "__main__":
    entry()
