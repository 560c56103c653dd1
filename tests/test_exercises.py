"""The exercises check themselves, and their checks are checked here: every solution passes, every stub and every wrong
answer fails, and hears what is wrong.
"""
import csv
import re
import sys
import types
from collections import Counter

import pytest

from grpo_min.run.config import UserError
from tests.exercise_mutants import (ANSWERS, FROM_MUTANTS, NAMES, OWN, REPAIRS, TASKS, from_mutants, repaired,
                                    task_with)
from tutorials.exercises import bugs, check, checks, swap

NUMBERS, BUGS = sorted(check.FILES), range(bugs.FIRST, bugs.LAST + 1)
WORDS = dict(FROM_MUTANTS)


def solution_path(number):
    return check.HERE / "solutions" / check.FILES[number].name


def message(number, module):
    """What a check says of a module; "" if it passes."""
    try:
        getattr(checks, f"check_{number:02d}")(module)
    except Exception as error:
        return check.in_words(error, check.FILES[number])
    return ""


def with_function(number, function):
    return types.SimpleNamespace(**{NAMES[number]: function})


# --- solutions, stubs, wrong answers ------------------------------------------------------------------------------

@pytest.mark.parametrize("number", NUMBERS)
def test_solution_passes_and_stub_fails(number):
    assert check.judge(number, solution_path(number)) == ("pass", "")
    verdict, reason = check.judge(number)
    assert verdict in ("not begun", "wrong") and reason


MUTATED = list(from_mutants())


def test_each_mutant_of_these_functions_is_a_wrong_answer():
    assert {line for _, line, _ in MUTATED} == WORDS.keys() and len(MUTATED) >= len(WORDS)


@pytest.mark.parametrize("number, line, function", MUTATED,
                         ids=[f"{number}-{line[:50]}" for number, line, _ in MUTATED])
def test_wrong_line_is_named(number, line, function):
    assert WORDS[line] in message(number, with_function(number, function))


@pytest.mark.parametrize("number, word, function", ANSWERS, ids=[f"{number}-{word}" for number, word, _ in ANSWERS])
def test_wrong_answer_is_named(number, word, function):
    assert word in message(number, with_function(number, function))


@pytest.mark.parametrize("reward, pairs, word", OWN, ids=[word for _, _, word in OWN])
def test_reward_that_is_none_is_named(reward, pairs, word):
    assert word in message(11, types.SimpleNamespace(reward=reward, PAIRS=pairs))


@pytest.mark.parametrize("word, changes", TASKS, ids=[word for word, _ in TASKS])
def test_task_that_is_none_is_named(word, changes):
    assert word in message(12, task_with(**changes))


@pytest.mark.parametrize("number, word, kind, line, instead", REPAIRS, ids=[f"{row[0]}-{row[1]}" for row in REPAIRS])
def test_repair_that_is_none_is_named(number, word, kind, line, instead):
    assert word in message(number, repaired(number, kind, line, instead))


def test_every_exercise_has_wrong_answers():
    counted = Counter(number for number, *_ in [*ANSWERS, *MUTATED, *REPAIRS])
    counted.update({11: len(OWN), 12: len(TASKS)})
    assert NUMBERS == list(range(1, 22)) and min(counted[number] for number in NUMBERS) >= 3


# --- what the reader sees -----------------------------------------------------------------------------------------

@pytest.fixture
def reader(tmp_path, monkeypatch):
    """reader(lines) -> the answer to exercise 1 of somebody who writes these lines after def."""
    def reader(body, head="def group_advantages(rewards, group_size, scale=False):"):
        path = tmp_path / check.FILES[1].name
        path.write_text(f"{head}\n    {body}\n")
        monkeypatch.setitem(check.FILES, 1, path)
    return reader


def command(capsys, *argv):
    """Run the command -> its exit status and what it printed."""
    try:
        check.main(list(argv))
        status = 0
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out


def test_command_says_pass_wrong_or_not_begun(capsys, reader):
    status, out = command(capsys, "1", "--solution")
    assert status == 0 and "pass" in out
    reader("raise NotImplementedError")
    assert command(capsys, "1") == (1, "1 group advantages: not begun\nwrite ex01_group_advantages.py, and replace "
                                    "`raise NotImplementedError`\n")
    reader("return rewards - rewards.mean()")
    status, out = command(capsys, "1")
    assert status == 1 and "do not sum to zero within group 1: did you average over the whole batch?" in out


@pytest.mark.parametrize("body, words", [
    ("return rewards.view(-1, 7)", ["line 2", "RuntimeError", "return rewards.view(-1, 7)"]),
    ("return nothing", ["line 2", "NameError", "nothing"]),
    ("return (rewards", ["line 2 is not Python"]),
    ("import no_such_module", ["line 2", "no_such_module"]),
    pytest.param("return group_advantages(rewards, group_size)", ["line 2", "RecursionError"], marks=pytest.mark.skipif(
        sys.version_info[:3] == (3, 13, 0), reason="Python 3.13.0 itself takes all memory")),
])
def test_a_crash_names_the_readers_line_and_shows_no_traceback(capsys, reader, body, words):
    reader(body)
    status, out = command(capsys, "1")
    assert status == 1 and all(word in out for word in words) and "Traceback" not in out and len(out) < 400


def test_missing_names_and_other_arguments_are_told(capsys, reader):
    reader("return rewards", head="def advantages(rewards, group_size):")
    assert "has no `group_advantages`" in command(capsys, "1")[1]
    reader("return rewards", head="def group_advantages(rewards):")
    assert "takes 1 positional argument" in command(capsys, "1")[1]


def test_overview_has_a_line_for_each(capsys):
    status, out = command(capsys)
    lines = out.splitlines()
    assert status == 0 and [int(line.split()[0]) for line in lines] == NUMBERS
    assert all("not begun" in line or "wrong" in line for line in lines), "none is solved in what is committed"


@pytest.mark.parametrize("argv, words", [(["99"], "no exercise 99"), (["--train"], "which exercise"),
                                         (["1", "--steps", "0"], "--steps")])
def test_mistakes_on_the_command_line(argv, words):
    with pytest.raises(UserError, match=words):
        check.main(argv)


def test_hints(capsys):
    for number in NUMBERS:
        text = command(capsys, str(number), "--hint")[1]
        assert ("top of" in text) == (number not in BUGS) and len(text) > 20
    assert checks.HINTS.keys() == set(BUGS)


# --- in the real loop ---------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(swap, "SHORT", dict(prompts_per_step=4, group_size=4, max_new_tokens=40))


@pytest.mark.parametrize("number", [number for number in swap.SWAPS if number not in swap.REFERENCE])
def test_a_solution_in_the_loop_is_the_reference(small, number):
    mine, reference = (swap.run(swap.SWAPS[number], module, 2)[1]
                       for module in (check.load(solution_path(number)), None))
    for name in swap.SWAPS[number].panels:
        assert swap.measured(mine, name) == pytest.approx(swap.measured(reference, name), rel=1e-3, abs=1e-4)
        assert len(swap.measured(mine, name)) >= 2


def test_every_exercise_but_the_task_is_swapped_and_its_part_is_used(small):
    assert swap.SWAPS.keys() | {12} == set(NUMBERS)

    class Called(Exception):
        pass

    def call(*arguments, **keywords):
        raise Called
    for number, exercise in swap.SWAPS.items():
        names = {name: call for name, thing in vars(check.load(solution_path(number))).items() if callable(thing)}
        with pytest.raises(Called):
            swap.run(exercise, types.SimpleNamespace(**names), 2)


def test_train_draws_both_curves(capsys, small, tmp_path):
    status, out = command(capsys, "1", "--solution", "--train", "--steps", "2", "--out", str(tmp_path))
    assert status == 0 and "coincide" in out and (tmp_path / "ex01.png").stat().st_size > 5000


def test_a_wrong_answer_is_trained_all_the_same(capsys, small, reader, tmp_path):
    reader("return -rewards")
    status, out = command(capsys, "1", "--train", "--steps", "2", "--out", str(tmp_path))
    assert status == 1 and "Mean of the last 2 steps" in out and (tmp_path / "ex01.png").exists()


def test_a_crash_in_the_loop_names_the_readers_line(small, reader, tmp_path):
    reader("return rewards / 0 if len(rewards) < 16 else rewards.view(7)")
    with pytest.raises(UserError, match="in the real loop: ex01_group_advantages.py, line 2"):
        check.main(["1", "--train", "--steps", "2", "--out", str(tmp_path)])


def test_own_reward_and_own_task_are_trained(capsys, small, tmp_path):
    status, out = command(capsys, "11", "--solution", "--train", "--steps", "1", "--out", str(tmp_path))
    assert status == 0 and "What the trained policy says" in out and (tmp_path / "ex11.png").exists()
    status, out = command(capsys, "12", "--solution", "--train", "--steps", "1", "--out", str(tmp_path))
    assert status == 0 and "after fine-tuning" in out and (tmp_path / "ex12.png").exists()


# --- the files ----------------------------------------------------------------------------------------------------

def runs_in(path):
    with open(path, newline="") as file:
        return [row["run"] for row in csv.DictReader(file)]


def test_figures_of_the_bugs_stand_beside_their_numbers(small, tmp_path):
    for number, suffix in [(number, "") for number in BUGS] + [(14, "-small")]:
        name = f"bug{number - bugs.FIRST + 1}{suffix}"
        assert runs_in(check.HERE / "figures" / f"{name}.csv") == ["the bug"] * bugs.STEPS + ["reference"] * bugs.STEPS
        assert (check.HERE / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in check.FILES[number].read_text(encoding="utf-8")
    bugs.draw(13, steps=2, folder=tmp_path)
    assert runs_in(tmp_path / "bug1.csv") == ["the bug"] * 2 + ["reference"] * 2 and (tmp_path / "bug1.png").exists()


def column_of(name, run, column):
    """Numbers of a figure, step by step."""
    with open(check.HERE / "figures" / f"{name}.csv", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row["run"] == run]


def test_figures_of_the_critics_show_what_their_files_say():
    def mean(name, run, column):
        return sum(column_of(name, run, column)[5:]) / (bugs.STEPS - 5)
    for name in "bug4", "bug7":
        assert mean(name, "reference", "explained_variance") > 0.15
        assert abs(mean(name, "the bug", "explained_variance")) < 0.05
        assert abs(mean(name, "the bug", "accuracy") - mean(name, "reference", "accuracy")) < 0.05
        assert max(column_of(name, "reference", "value")) < 1.1
    assert column_of("bug4", "the bug", "value")[-1] > 5 and set(column_of("bug7", "the bug", "value")) == {0}


@pytest.mark.parametrize("number", NUMBERS)
def test_each_file_says_what_and_why_and_where_to_look(number):
    text = check.FILES[number].read_text(encoding="utf-8")
    words = ["What ", "Why ", "Hint ", "Real one "] if number not in BUGS else ["Seen ", "Ask ", "Mend "]
    assert all(f"\n{word}" in text for word in words) and f"exercises.check {number}" in text
    assert not re.search(r"[Tt]rap \d|# (wrong|bug)", text), "a planted bug is not marked"
    readme = (check.HERE / "README.md").read_text(encoding="utf-8")
    assert f"[{check.FILES[number].name}]" in readme


def test_lines_are_at_most_120_characters_long():
    long = [f"{path.name}:{i}" for path in check.HERE.glob("**/*.py")
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1) if len(line) > 120]
    assert not long, long
