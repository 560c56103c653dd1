"""Countdown: make a target from three numbers. The worked example of a task of your own; grpo_min/task.py says what the
three functions at the end are for.

    use 3, 5 and 2 to make 16.
        (3+5)*2
        <think> 3 times 5 is 15, 15 plus 2 is 17. 3 plus 5 is 8, 8 times 2 is 16</think> (3+5)*2

An answer is an expression of whole numbers, + - * and parentheses in which each of the given numbers stands exactly
once. It may come after thinking, which nobody judges. Any such expression with the right value gets a reward of 1, with
another value 0.1; anything else gets 0.
"""
import ast
import functools
import itertools
import operator
import random
import re

from grpo_min.rewards import final_answer

NUMBERS = range(1, 13)
LARGEST = 49         # values on the way to a target stay in 0..LARGEST, as in the text that the base model has read
HELD_OUT = 500       # problems in val, and in test
TRIES = [1, 2, 3]    # of a demonstration that thinks: all but the last fail
WORDS = {"+": "plus", "-": "minus", "*": "times"}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}          # all that an answer may do


# --- problems and their solutions ---------------------------------------------------------------------------------

def join(left, sign, right):
    """Two terms (value, expression, the sign that joins it or "") -> the step in words, and the term they make."""
    (a, x, x_sign), (b, y, y_sign) = left, right
    x = f"({x})" if x_sign in ("+", "-") and sign == "*" else x
    y = f"({y})" if y_sign in ("+", "-") and sign != "+" else y
    value = OPERATIONS[sign](a, b)
    return f"{a} {WORDS[sign]} {b} is {value}", (value, f"{x}{sign}{y}", sign)


@functools.cache
def combinations(numbers):
    """Every way to make one number of three -> a list of (value, the way in words, expression)."""
    made = []
    for a, b, c in itertools.permutations((number, str(number), "") for number in numbers):
        for first, second in itertools.product(OPERATIONS, repeat=2):
            words, ab = join(a, first, b)
            for left, right in [(ab, c), (c, ab)] if second == "-" else [(ab, c)]:
                more, (value, expression, _) = join(left, second, right)
                if 0 <= ab[0] <= LARGEST and 0 < value <= LARGEST:
                    made.append((value, f" {words}, {more}", f" {expression}"))
    return made


def question(numbers, target):
    return "use {}, {} and {} to make {}.".format(*numbers, target)


@functools.cache
def problems():
    """{split: rows}, shuffled. A problem is in one split only, whatever the order of its numbers."""
    rng, rows = random.Random(1), []
    for numbers in itertools.combinations_with_replacement(NUMBERS, 3):
        for target in sorted({value for value, _, _ in combinations(numbers)}):
            shown = rng.sample(numbers, 3)
            rows.append(dict(prompt=question(shown, target), numbers=shown, target=target))
    rng.shuffle(rows)
    return dict(val=rows[:HELD_OUT], test=rows[HELD_OUT:2 * HELD_OUT], train=rows[2 * HELD_OUT:])


# --- answers ------------------------------------------------------------------------------------------------------

def value_of(node, used):
    """The value of a syntax tree of whole numbers, + - and *; `used` gets the numbers. ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        return OPERATIONS[SIGNS[type(node.op)]](value_of(node.left, used), value_of(node.right, used))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    raise ValueError


def judge(answer, numbers, target):
    """The reward of an answer. It is parsed, and its tree is walked; nothing that it says is run."""
    if answer is None or not re.fullmatch(r"[0-9+*() -]{1,40}", answer):     # so a tree has few nodes, and is not deep
        return 0.0
    used = []
    try:
        value = value_of(ast.parse(answer, mode="eval").body, used)
    except (SyntaxError, ValueError):
        return 0.0
    if sorted(used) != sorted(numbers):
        return 0.0
    return 1.0 if value == target else 0.1


# --- the task -----------------------------------------------------------------------------------------------------

def prompts(split):
    return problems()[split]


def demonstrations():
    """Four for each problem of train, its numbers in any order: half answer directly, half try until they succeed."""
    rng, rows = random.Random(2), []
    for problem in problems()["train"] * 4:
        options = combinations(tuple(sorted(problem["numbers"])))
        prompt = question(rng.sample(problem["numbers"], 3), problem["target"])
        right = [option for option in options if option[0] == problem["target"]]
        wrong = [option for option in options if option[0] != problem["target"]]
        _, words, expression = rng.choice(right)
        failures = rng.sample(wrong, rng.choice(TRIES) - 1)
        tries = [option[1] for option in failures] + [words]
        thinking = f"<think>{'.'.join(tries)}</think>" if rng.random() < 0.5 else ""
        rows.append(dict(prompt=prompt, response=thinking + expression))
    return rows


def reward(prompts, completions, numbers, target, finished, **columns):
    return [judge(final_answer(completion), *problem) if end else 0.0
            for completion, end, *problem in zip(completions, finished, numbers, target)]
