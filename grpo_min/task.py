"""A task of your own in one Python file, for --task. Like those of tutorials/tasks, it has

    prompts(split) -> rows with prompt and what the reward needs; split: train, val, test
    demonstrations() -> rows with prompt and response
    reward(prompts, completions, **columns) -> a number per completion, as in rewards.py

or those that a command asks for: sft wants demonstrations; grpo, ppo and evaluate want
prompts and reward. A row is a dict. Its fields reach the reward as columns, and so does
`finished`. Every call must return the same rows.

The file is a program of yours and is run like one: nothing keeps it from doing harm.
"""
import runpy
import traceback
from contextlib import contextmanager

from grpo_min.run.config import UserError, require
from grpo_min.run.data import checked_rows
from grpo_min.run.files import fingerprint

FIELDS = {"prompts": ["prompt"], "demonstrations": ["prompt", "response"]}  # strings


def load_task(path, *names):
    """Run a task file -> these functions of it, which return lists.

    prompts and demonstrations take at_least, too. Whatever goes wrong in the file, or later
    in a function, is a UserError of one line; so are too few rows.
    """
    fingerprint(path)  # a UserError for a file that cannot be read
    with mistakes_named(path, "as it is run"):
        contents = runpy.run_path(path)

    def function(name):
        require(callable(contents.get(name)), f"{path} defines no function {name}")

        def call(*arguments, **columns):
            with mistakes_named(path, f"{name}()"):
                return list(contents[name](*arguments, **columns))

        def rows(*arguments, at_least=1):  # name[:-1] is what one is called
            rows = enumerate(call(*arguments), start=1)
            return checked_rows(rows, FIELDS[name], path, name[:-1], at_least)
        call.__qualname__ = f"{name}() of {path}"
        return rows if name in FIELDS else call
    return [function(name) for name in names]


@contextmanager
def mistakes_named(path, when):
    """An error becomes a UserError that names the file and, if it is there, the line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        place = f"{path}, line {lines[-1]}" if lines else f"{path}, {when}"
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{place}: {type(error).__name__}: {message}")
