"""The examples run, small, and show what they say they show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does for a script: its folder is searched first."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "integrations"))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / "integrations" / name), run_name="__main__")
    return capsys.readouterr().out


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself, with fewer steps."""
    source = (EXAMPLES / "plain_loop.py").read_text()
    for long, short in (
        ("range(200)", "range(2)"),
        ("range(1, 61)", "range(1, 11)"),
        ("8, 128, 1.0", "8, 8, 1.0"),
        ("range(8)) / 8", "range(1))"),
    ):
        assert source.count(long) == 1
        source = source.replace(long, short)
    exec(compile(source, "plain_loop.py", "exec"), {"__name__": "__main__"})
    output = capsys.readouterr().out
    assert re.search(r"^10: self-reward -?\d+\.\d+, KL to SFT -?\d+\.\d+, 0\.\d+ of the last ten", output, re.MULTILINE)


def test_hf_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(monkeypatch, capsys, "hf_trainer.py")
    pairs = re.findall(r"loss (\S+) by the model, (\S+) fused", output)
    assert len(pairs) == 4
    for own, fused in pairs:
        assert float(fused) == pytest.approx(float(own), abs=1e-3)  # Adam magnifies what rounding differs by
    assert float(pairs[-1][0]) < float(pairs[0][0]) - 1


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], algorithm: str) -> None:
    pytest.importorskip("trl", reason="needs trl")
    output = run(monkeypatch, capsys, "trl_grpo.py", "--algorithm", algorithm, "--steps", "2", "--sft_steps", "4")
    assert re.findall(r"step +(\d+): self-reward (?!nan)", output) == ["1", "2"]


def test_openrlhf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(monkeypatch, capsys, "openrlhf_reward.py")
    rewards = [float(value) for value in re.findall(r"reward (-?\d+\.\d+) nats", output)]
    assert len(rewards) == 2 and rewards[0] != rewards[1]


def test_verl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl and its requirements", exc_type=ImportError)
    output = run(monkeypatch, capsys, "verl_losses.py")
    vanilla, ours = (re.search(rf"^{name} +(-?\d+\.\d+)", output, re.MULTILINE) for name in ("vanilla", "srppo_ppo"))
    assert vanilla is not None and ours is not None
    assert float(ours[1]) == pytest.approx(float(vanilla[1]), abs=2e-6)
