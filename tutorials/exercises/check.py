"""Is an exercise solved? If not, what is wrong, in words.

    python -m tutorials.exercises.check                # all of them: pass, wrong or not begun
    python -m tutorials.exercises.check 3              # one
    python -m tutorials.exercises.check 3 --train      # your function in the real loop, its curves beside a reference
    python -m tutorials.exercises.check 3 --solution   # the file in solutions/ in place of yours
    python -m tutorials.exercises.check 13 --hint      # where to look, in a bug hunt
"""
import argparse
import importlib.util
import sys
import textwrap
import traceback
from pathlib import Path

from grpo_min.run.config import UserError, require, run_command
from tutorials.exercises import checks, swap

HERE = Path(__file__).parent
FILES = {int(path.stem[2:4]): path for path in sorted(HERE.glob("ex*.py"))}


def load(path):
    """A file as a module of its own, read anew each time."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(number, path=None):
    """Check a file, the reader's own unless told -> ("pass", "wrong" or "not begun"; the reason in words)."""
    path = path or FILES[number]
    try:
        getattr(checks, f"check_{number:02d}")(load(path))
    except NotImplementedError:
        return "not begun", f"write {path.name}, and replace `raise NotImplementedError`"
    except Exception as error:
        return "wrong", in_words(error, path)
    return "pass", ""


def in_words(error, path):
    """What an exception says about a reader's file, without the traceback."""
    if isinstance(error, (checks.Wrong, UserError)):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{path.name}, line {error.lineno} is not Python: {error.msg}"
    name = type(error).__name__
    places = [place for place in traceback.extract_tb(error.__traceback__) if Path(place.filename).name == path.name]
    if places:
        return f"{path.name}, line {places[-1].lineno} stops with {name}: {error}\n    {places[-1].line}"
    if isinstance(error, AttributeError) and error.name and path.stem in str(error):
        return f"{path.name} has no `{error.name}`: keep the names that were there"
    return f"what {path.name} gives back or takes does not fit: {name}: {error}"


def overview():
    """A line for each exercise."""
    for number, path in FILES.items():
        verdict, reason = judge(number)
        print(f"{number:3}  {path.stem[5:].replace('_', ' '):<28}  {verdict:<10}"
              + ("  " + textwrap.shorten(reason, 80, placeholder=" ...") if verdict == "wrong" else ""), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", help="the exercise; without it, all are checked")
    parser.add_argument("--solution", action="store_true", help="take the file in solutions/ in place of yours")
    parser.add_argument("--train", action="store_true", help="swap the function into the real loop, draw both curves")
    parser.add_argument("--hint", action="store_true", help="where to look")
    parser.add_argument("--steps", type=int, default=40, help="length of that run (default: 40)")
    parser.add_argument("--out", default="runs/exercises", help="where the curves go (default: runs/exercises)")
    options = parser.parse_args(argv)
    if options.number is None:
        require(not (options.solution or options.train or options.hint), "which exercise? Say its number")
        return overview()
    number = options.number
    require(number in FILES, f"there is no exercise {number}: they are numbered {min(FILES)} to {max(FILES)}")
    require(options.steps > 0, f"--steps must be above 0, not {options.steps}")
    path = FILES[number] if not options.solution else HERE / "solutions" / FILES[number].name
    if options.hint:
        print(checks.HINTS.get(number, f"the hint stands at the top of {path.name}"))
        return
    verdict, reason = judge(number, path)
    print(f"{number} {path.stem[5:].replace('_', ' ')}: {verdict}" + (f"\n{reason}" if reason else ""), flush=True)
    if options.train and verdict != "not begun":
        try:
            print(swap.own_task(path, options.steps, options.out) if number == 12 else
                  swap.beside_reference(number, load(path), options.steps, options.out))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"in the real loop: {in_words(error, path)}", exit_code=1)
    if verdict != "pass":
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
