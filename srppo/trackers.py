"""Where metrics go besides ``metrics.jsonl``: TensorBoard, wandb, trackio.

wandb and trackio share an interface (``init``, ``log``, ``finish``), and are used by it where they are installed. A run
is known to them by its output folder, so that a resumed run goes on in the same chart. Run with wandb 0.31 offline and
trackio 0.43 on its own database; the tests have a module in their place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from srppo.errors import UserError

if TYPE_CHECKING:
    from srppo.config import SRPPOConfig

SERVICES = ("wandb", "trackio")
TRACKERS = ("tensorboard", *SERVICES, "none")


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``<folder>/tensorboard``.

    Args:
        step: the last one that a resumed run has done: the board forgets what came after it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Service:
    """wandb or trackio, with the settings of the run as its configuration.

    Args:
        place: where the run's files are in the end, which names it; ``folder`` is where they are now.
    """

    def __init__(self, name: str, folder: Path, args: SRPPOConfig, place: Path) -> None:
        self.module = importlib.import_module(name)
        digest = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:8]
        run = f"{place.resolve().name}-{digest}"
        known = re.sub(r"[:;,#?/'\s]", "-", run)  # what wandb refuses in an id, or only at its ends
        options: dict[str, Any] = {"id": known, "dir": str(folder)} if name == "wandb" else {}
        self.module.init(project="srppo", name=run, config=dataclasses.asdict(args), resume="allow", **options)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Stops if a name in ``report_to`` is unknown, or the package of a service is not installed."""
    unknown = sorted(set(names) - set(TRACKERS))
    if unknown:
        raise UserError(f"report_to knows {', '.join(TRACKERS)}; got {unknown}")
    for name in names:
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise UserError(f"report_to={name} needs a package that is not installed: pip install {name}")


def start_trackers(folder: Path, args: SRPPOConfig, step: int, place: Path) -> list[Tracker]:
    """Those that ``args.report_to`` names.

    Args:
        step: the last one that a resumed run has done; 0 where it begins, or begins again.
        place: see :class:`Service`.
    """
    trackers: list[Tracker] = [TensorBoard(folder, step)] if "tensorboard" in args.report_to else []
    return trackers + [Service(name, folder, args, place) for name in args.report_to if name in SERVICES]
