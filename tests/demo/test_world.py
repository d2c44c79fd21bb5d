"""The demo's world: right answers, the three ways, and splits that share no string."""

import random

import pytest

from srppo.demo.world import (
    DEMONSTRATED_TASK,
    FILLER,
    LETTERS,
    MAX_LETTERS,
    TASKS,
    WAYS,
    World,
    answer,
    classify,
    longest_completion,
    make_prompt,
    parse_prompt,
    respond,
)


def letters_of(examples):
    return {parse_prompt(example.prompt)[1] for example in examples}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("copy badge>", "badge"),
        ("upper badge>", "BADGE"),
        ("next badj>", "cbea"),
        ("prev badj>", "ajci"),
        ("swap badge>", "eadgb"),
        ("roll badge>", "adgeb"),
    ],
)
def test_answers(prompt, expected):
    assert answer(prompt) == expected


def test_every_task_has_an_answer_of_the_same_length():
    for task in TASKS:
        assert len(answer(make_prompt(task, "abcd"))) == 4


def test_next_and_prev_undo_each_other():
    for letter in LETTERS:
        word = letter * 4
        assert answer(make_prompt("prev", answer(make_prompt("next", word)))) == word


@pytest.mark.parametrize(
    "prompt", ["copy badge", "turn badge>", "copy >", "copy bad9e>", "copybadge>", "copy BADGE>", ""]
)
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the demo") as caught:
        parse_prompt(prompt)
    assert parse_prompt(str(caught.value).split("'")[-2]) == ("swap", "badge")


def test_each_way_is_recognised_in_every_task():
    rng = random.Random(0)
    for example in World(0).held_out(20):
        for way in WAYS:
            assert classify(example.prompt, respond(example.prompt, way, rng), ended=True) == way


@pytest.mark.parametrize(
    ("completion", "ended", "way"),
    [
        ("adgeb", True, "right"),
        ("adgeb", False, None),  # cut before it could show that it stops
        ("adgeb ", True, None),
        ("adgeb um", True, "ramble"),
        ("adgeb um ok", False, "ramble"),
        ("adgeb um xx", True, None),
        ("adgeB", True, None),
        ("badge um", True, None),  # rambling after a wrong answer
        ("roll badge", True, "echo"),
        ("roll badge>", True, None),
        ("", True, None),
    ],
)
def test_classify(completion, ended, way):
    assert classify("roll badge>", completion, ended=ended) == way


def test_the_corpus_answers_each_way_a_third_of_the_time_in_every_task():
    corpus = World(0).corpus(18_000)
    for task in TASKS:
        rows = [example for example in corpus if example.task == task]
        assert len(rows) == pytest.approx(3000, abs=250)
        for way in WAYS:
            share = sum(classify(row.prompt, row.completion, ended=True) == way for row in rows) / len(rows)
            assert share == pytest.approx(1 / 3, abs=0.04)


def test_demonstrations_show_the_first_way_of_one_task_only():
    demonstrations = World(3).demonstrations(40)
    assert len({example.prompt for example in demonstrations}) == 40
    for example in demonstrations:
        assert parse_prompt(example.prompt)[0] == DEMONSTRATED_TASK
        assert classify(example.prompt, example.completion, ended=True) == "right"


def test_prompts_cover_all_tasks_equally_and_carry_no_completion():
    for examples in (World(0).prompts(120), World(0).held_out(20)):
        assert {task: sum(e.task == task for e in examples) for task in TASKS} == dict.fromkeys(TASKS, 20)
        assert all(example.completion is None for example in examples)
        assert [example.task for example in examples[:6]] != list(TASKS)  # in random order
    assert len({example.prompt.split()[1] for example in World(0).prompts(2000)}) == 2000


@pytest.mark.parametrize("seed", [0, 1])
def test_no_string_is_in_two_splits(seed):
    world = World(seed)
    splits = [world.corpus(8000), world.demonstrations(100), world.prompts(2000), world.held_out(200)]
    seen = [letters_of(split) for split in splits]
    for i, left in enumerate(seen):
        for right in seen[i + 1 :]:
            assert not left & right
    for example in world.held_out_demonstrations(64):
        assert world.split_of(parse_prompt(example.prompt)[1]) == "held_out"
    assert not letters_of(world.held_out_demonstrations(8)) & letters_of(world.held_out(2))  # drawn apart
    assert {World(2).split_of(letters) for letters in seen[0]} == {"corpus", "demonstrations", "prompts", "held_out"}


def test_equal_seeds_give_equal_data_and_other_seeds_other_data():
    def everything(seed):
        world = World(seed)
        return [world.corpus(50), world.demonstrations(8), world.prompts(12), world.held_out(2)]

    assert everything(5) == everything(5)
    assert all(a != b for a, b in zip(everything(5), everything(6), strict=True))


def test_a_longer_corpus_leaves_the_other_parts_as_they_were():
    first, second = World(0), World(0)
    first.corpus(10)
    second.corpus(1000)
    assert first.demonstrations(8) == second.demonstrations(8)


def test_asking_for_more_than_the_world_holds_is_an_error():
    with pytest.raises(ValueError, match="at most"):
        World(0).held_out(10_000)


def test_longest_completion_bounds_the_corpus_and_is_reached():
    longest = max(len(example.completion) for example in World(0).corpus(20_000))
    assert longest <= longest_completion()
    assert longest_completion() == MAX_LETTERS + 3 * (1 + max(map(len, FILLER)))
