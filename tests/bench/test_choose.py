"""Names on the command line: unknown ones are errors that list the known ones."""

import pytest

from bench.choose import Selection, choose, device_of, parse_shape
from bench.core import SelectionError
from bench.run import OPS, in_order, main


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ({"ops": ("gea",)}, "unknown op 'gea'; known: linear_logprob, .*gae"),
        ({"providers": ("ligre",)}, "unknown provider 'ligre'; known: srppo, .*liger-selective"),
        ({"ops": ("gae",), "providers": ("cce",)}, "unknown provider 'cce'; known: srppo, trl-loop, verl-loop"),
        ({"dtypes": ("bf16",)}, "unknown dtype 'bf16'; known: bfloat16, float16, float32"),
        ({"plans": ("cached",)}, "unknown plan 'cached'; known: auto, score, precompute, cache, recompute"),
        ({"rows": ("flat",)}, "unknown rows 'flat'; known: random, peaked"),
        ({"device": "tpu"}, "unknown device 'tpu'; known: auto, cpu, cuda"),
        ({"densities": (0.0,)}, r"in \(0, 1\], got 0"),
        ({"ops": ("gae",), "shapes": ("8x8x8",)}, r"fits none of the ops chosen; they take BxT \(gae\)"),
        ({"shapes": ("1024xllama9",)}, "is no shape; .*llama3-8b"),
        ({"ops": ("gae",), "plans": ("cache",)}, "nothing to run"),
        ({"ops": ("gae",), "rows": ("peaked",)}, "nothing to run"),
    ],
)
def test_what_does_not_exist_is_an_error_that_lists_what_does(selection, text):
    with pytest.raises(SelectionError, match=text):
        choose(Selection(**{"device": "cpu", **selection}), OPS)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("64x4096", (64, 4096)), ("1024x2048x128256", (1024, 2048, 128256)), ("8192xllama3-8b", (8192, 4096, 128256)),
     ("512xqwen2.5-0.5b", (512, 896, 151936))],
)  # fmt: skip
def test_shapes_are_numbers_or_a_heads_name(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "x", "4x", "0x3", "-1x3", "3.5x2"])
def test_other_shapes_are_refused(text):
    with pytest.raises(SelectionError, match="is no shape"):
        parse_shape(text)


def test_axes_that_were_chosen_multiply_and_the_others_keep_their_first_default():
    ((_, cases),) = choose(
        Selection(ops=("linear_logprob",), shapes=("8x8x100", "4x8x100"), densities=(1.0, 0.5), device="cpu"), OPS
    )
    assert [(case.shape, case.mask_density) for case in cases] == [
        ((8, 8, 100), 1.0), ((8, 8, 100), 0.5), ((4, 8, 100), 1.0), ((4, 8, 100), 0.5)
    ]  # fmt: skip
    assert {(case.dtype, case.rows) for case in cases} == {("bfloat16", "random")}


def test_a_shape_goes_to_ops_of_its_kind_unless_others_are_named():
    """Three numbers are tokens, hidden size and vocabulary: a training step would take them for 12 million tokens."""
    shape = ("256x576x49152",)
    chosen = [op.name for op, _ in choose(Selection(shapes=shape, device="cpu"), OPS)]
    assert "linear_logprob" in chosen and "linear_log_ratio" in chosen and "training_step" not in chosen
    ((op, (case,)),) = choose(Selection(ops=("training_step",), shapes=("1x2x3",), device="cpu"), OPS)
    assert (op.name, case.shape) == ("training_step", (1, 2, 3))


def test_quick_takes_one_case_an_op():
    assert all(len(cases) == 1 for _, cases in choose(Selection(quick=True, device="cpu"), OPS))


def test_every_op_runs_once_before_variants_do():
    order = in_order(choose(Selection(device="cpu"), OPS))
    first = [op.name for op, _ in order[: len(OPS) - 1]]
    assert len(set(first)) == len(OPS) - 1
    assert order[-1][0].name == "training_step"


def test_auto_is_a_device_that_is_there():
    assert device_of("auto") in ("cpu", "cuda")


def test_the_command_line_says_it_and_ends_with_2(capsys):
    assert main(["--op", "gea"]) == 2
    assert "unknown op 'gea'; known:" in capsys.readouterr().err


def test_files_that_cannot_be_written_end_it_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    for option, place in (("--out", tmp_path), ("--plot", tmp_path / "file")):
        arguments = ["--op", "whiten", "--quick", "--out", str(tmp_path / "a.csv"), option, str(place)]
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert "bench/run.py: cannot write" in said.err and "checking" not in said.err


def test_numbers_that_make_no_sense_end_it_too(capsys):
    for option, number in (("--threads", "0"), ("--budget", "-5")):
        assert main(["--op", "whiten", option, number]) == 2
        assert f"{option} {number}: at least" in capsys.readouterr().err


def test_list_shows_every_op_and_provider(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(op.name in text and all(provider.name in text for provider in op.providers) for op in OPS)
