"""The figures of the bug hunts: python -m tutorials.exercises.bugs [numbers of the exercises]

Trains each file ex13 to ex19, as it stands, and the real loop beside it, and writes figures/bugN.csv and bugN.png. What
is committed there was drawn before anybody mended the files. bug2-small is bug hunt 2 with a smaller beta.
"""
import sys
from dataclasses import replace

from grpo_min.run.config import run_command
from grpo_min.run.table import write_csv
from tutorials.exercises import swap
from tutorials.exercises.check import FILES, HERE, load

FIRST, LAST, STEPS = 13, 19, 40


def draw(number, steps=STEPS, folder=HERE / "figures", suffix="", **settings):
    """Two runs, a figure, and the numbers that it was drawn from."""
    name, this = f"bug{number - FIRST + 1}{suffix}", swap.SWAPS[number]
    this = replace(this, settings={**this.settings, **settings})
    runs = {label: swap.run(this, module, steps)[1]
            for label, module in (("the bug", load(FILES[number])), ("reference", None))}
    rows = []
    for label, steps_of_run in runs.items():
        for row in steps_of_run:
            rows.append(dict(run=label, step=row["step"], **{column: row[column] for column in this.panels}))
    write_csv(folder / f"{name}.csv", rows)
    swap.plot(runs["the bug"], runs["reference"], this.panels, folder / f"{name}.png", "the bug", "reference")
    print("\n".join([name] + swap.in_words(runs["the bug"], runs["reference"], this.panels)))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    for number in [int(word) for word in argv] or range(FIRST, LAST + 1):
        draw(number)
        if number == 14:
            draw(number, suffix="-small", beta=0.1)


if __name__ == "__main__":
    run_command(main)
