"""The figures of the bug hunts: python -m tutorials.exercises.bugs [numbers of the exercises]

Trains each file ex13 to ex19, as it stands, and the real loop beside it, and writes figures/bugN.csv and bugN.png. What
is committed there was drawn before anybody mended the files.
"""
import sys

from grpo_min.config import run_command
from grpo_min.runs import write_csv
from tutorials.exercises import swap
from tutorials.exercises.check import FILES, HERE, load

FIRST, STEPS = 13, 60


def draw(number, steps=STEPS, folder=HERE / "figures"):
    """Two runs, a figure, and the numbers that it was drawn from."""
    found, name = swap.SWAPS[number], f"bug{number - FIRST + 1}"
    runs = {"the bug": swap.run(found, load(FILES[number]), steps)[1], "reference": swap.run(found, None, steps)[1]}
    write_csv(folder / f"{name}.csv", [dict(run=label, step=row["step"], **{key: row[key] for key in found.panels})
                                       for label, rows in runs.items() for row in rows])
    swap.plot(runs["the bug"], runs["reference"], found.panels, folder / f"{name}.png", "the bug", "reference")
    print("\n".join([name] + swap.in_words(runs["the bug"], runs["reference"], found.panels)))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    for number in [int(word) for word in argv] or [number for number in FILES if number >= FIRST]:
        draw(number)


if __name__ == "__main__":
    run_command(main)
