"""bench/tiles.py on interpreted kernels: what it would do on a device, at a size that means nothing."""

import pytest
import torch

from bench import tiles
from bench.method import Effort
from srppo_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.interpreted(), reason=f"not interpreted here: {_triton.why()}")


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_configurations_are_checked_and_timed(kernel, monkeypatch):
    everything = tiles.variants

    def few(tile, group, band):
        names = [name for name, *_ in everything(tile, group, band)]
        assert len(set(names)) == len(names) > 10
        yield names[0], tile, group, band
        yield "groups of 64", tile, 64, band

    monkeypatch.setattr(tiles, "variants", few)
    rows = list(tiles.measure(kernel, (20, 16, 130), Effort(seconds=0, least=1, samples=1), "cpu"))
    assert [name for name, *_ in rows] == ["as it is", "groups of 64"]
    assert all(float(ratio) > 0 for _, ratio, _ in rows)


def test_a_configuration_that_is_wrong_or_breaks_is_a_row(monkeypatch):
    monkeypatch.setattr(
        tiles, "variants", lambda *there: [("as it is", *there), ("groups of 0", there[0], 0, there[2])]
    )
    rows = list(tiles.measure("scan", (20, 16, 130), Effort(seconds=0, least=1, samples=1), "cpu"))
    assert rows[1][1] == "-"


def test_a_scan_around_the_targets_logits_is_not_wrong():
    """As the kernel for sm_90a has it: its state is another one than Triton's, and means the same."""
    z, state = torch.randn(6, 40).double(), []
    for m in (z.amax(1), z[:, 3] - 2):
        e = (z - m[:, None]).exp().index_fill(1, torch.tensor([3]), 0)
        state.append(torch.stack([m, e.sum(1), (e * (z - m[:, None])).sum(1), z[:, 3]]))
    assert not torch.allclose(*state)
    logprobs = torch.log_softmax(z, 1)
    exact = torch.stack([logprobs[:, 3], z.logsumexp(1), -(logprobs.exp() * logprobs).sum(1)])
    assert all(torch.allclose(tiles.meaning("scan", s), exact) for s in state)


def test_without_a_device(capsys):
    assert tiles.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "text"), [("8192x4096", "three sizes"), ("8192xabc", "is no shape")])
def test_a_shape_that_is_none_is_refused(shape, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        tiles.main(["--shape", shape])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
