"""The exercises check themselves, and their checks are checked here: every solution passes, every stub and every wrong
answer fails, and hears what is wrong.
"""
import types

import pytest

from grpo_min.config import UserError
from tests.exercise_mutants import ANSWERS, FROM_MUTANTS, NAMES, OWN, TASKS, from_mutants, task_with
from tutorials.exercises import check, checks, swap

NUMBERS = sorted(check.FILES)
WORDS = dict(FROM_MUTANTS)
TEMPLATE = '''"""A file of a reader."""
def group_advantages(rewards, group_size, scale=False):
    {}
'''


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


FOUND = list(from_mutants())


def test_each_mutant_of_these_functions_is_a_wrong_answer():
    assert {line for _, line, _ in FOUND} == WORDS.keys() and len(FOUND) >= len(WORDS)


@pytest.mark.parametrize("number, line, function", FOUND, ids=[f"{number}-{line[:50]}" for number, line, _ in FOUND])
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
