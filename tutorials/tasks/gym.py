"""A task of the package reasoning-gym (pip install reasoning-gym). The environment variable GYM says which, such as
GYM=chain_sum; the package has about a hundred. Its own scorer is the reward, from 0 to 1, and judges what stands after
the thinking.

Read the scorer before you trust it. That of chain_sum gives part of the reward to a text that only contains the right
answer, the more the shorter the text. Some scorers evaluate what a model wrote: these tasks are refused. --resume does
not notice another GYM.
"""
import functools
import inspect
import os
import re

from grpo_min.rewards import final_answer
from grpo_min.run.config import UserError, require

SIZE = 2000        # questions; a tenth of the distinct ones is val, another tenth test
EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")      # sympy's parser evaluates, too


@functools.cache
def dataset():
    name = os.environ.get("GYM")
    require(name, "GYM is not set: it has to name a task of reasoning-gym, such as GYM=chain_sum")
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"GYM={name} needs a package: pip install reasoning-gym ({error})")
    made = reasoning_gym.create_dataset(name, size=SIZE, seed=1)
    found = EVALUATES.search(inspect.getsource(type(made)))
    require(not found, f"GYM={name} is refused: its code has {found and found[0]}..), so it may run what a model wrote")
    return made


@functools.cache
def entries():
    """The distinct questions with all that the scorer needs: a question that comes again must not be in two splits."""
    return list({entry["question"]: entry for entry in dataset()}.values())


def indices(split):
    tenth = len(entries()) // 10
    parts = dict(val=range(tenth), test=range(tenth, 2 * tenth), train=range(2 * tenth, len(entries())))
    return parts[split]


def score(answer, index):
    try:
        return float(dataset().score_answer(answer, entries()[index]))
    except Exception:       # some scorers trip over a text that is no answer, and a run must not end of it
        return 0.0


# --- the task -----------------------------------------------------------------------------------------------------

def prompts(split):
    return [dict(prompt=entries()[i]["question"], index=i) for i in indices(split)]


def demonstrations():
    """The answer alone, without a way to it."""
    return [dict(prompt=entries()[i]["question"], response=entries()[i]["answer"]) for i in indices("train")]


def reward(prompts, completions, index, finished, **columns):
    answers = [final_answer(completion) if end else None for completion, end in zip(completions, finished)]
    return [0.0 if answer is None else score(answer, i) for answer, i in zip(answers, index)]
