"""What the notebooks show things with: coloured tokens, tables, lines of the package, committed results."""
import csv
import inspect
import os
from pathlib import Path

from IPython import get_ipython
from IPython.display import Markdown, display

import grpo_min
from grpo_min.run.plots import plt      # which chooses a backend for files; a notebook wants its own

if get_ipython():
    get_ipython().run_line_magic("matplotlib", "inline")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "figure.constrained_layout.use": True})

FAST = bool(os.environ.get("GRPO_MIN_FAST"))         # the tests set it: the same cells with fewer steps
RESULTS = Path(__file__).parent / "results"
PACKAGE = Path(grpo_min.__file__).parent


def table(rows, headers=None):
    """Rows (dicts, or lists with headers) as a table. Numbers get three significant digits."""
    if headers is None:
        headers, rows = list(rows[0]), [list(row.values()) for row in rows]
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in line]
             for line in lines]
    display(Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells)))


def code(thing, first=None, last=None):
    """The source of a function, class or module with its line numbers: all of it, the first line that contains the text
    `first`, or from there through the next that contains `last`. ValueError if there is no such line."""
    lines, number = inspect.getsourcelines(thing)
    number = max(number, 1)

    def line_with(text, start):
        for place in range(start, len(lines)):
            if text in lines[place]:
                return place
        raise ValueError(f"no line with {text!r} in {thing.__name__}")
    begin, end = 0, len(lines) - 1
    if first is not None:
        begin = line_with(first, 0)
        end = begin if last is None else line_with(last, begin)
    file = Path(inspect.getsourcefile(inspect.unwrap(thing)))
    name = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.name
    text = "".join(f"{number + i:4}  {lines[i].rstrip()}\n" for i in range(begin, end + 1))
    display(Markdown(f"`{name}`, line {number + begin}\n```python\n{text}```"))


def tokens(rows, numbers, limit=None, title="", label="", notes=None, form="{:+.2f}"):
    """Tokens on a ground coloured by a number each: rows of strings, rows of numbers. Blue is positive, red negative.

    limit: the number that gets the full colour (default: the largest). notes: a text behind each row. The numbers
    stand below their tokens in the format `form`; "" leaves them out.
    """
    limit = limit or max((abs(number) for row in numbers for number in row), default=1) or 1
    shown = [[token.replace("\n", "\\n").replace(" ", "\u00b7") for token in row] for row in rows]
    least = len(form.format(-limit)) - 1 if form else 1
    widths = [[max(len(token), least) + 1 for token in row] for row in shown]
    widest, note = max(map(sum, widths)), max((len(text) for text in notes or []), default=0)
    figure, axis = plt.subplots(figsize=(0.085 * (widest + note) + 0.4, 0.42 * len(rows) + (0.5 if label else 0.3)))
    for y, (row, values, wide) in enumerate(zip(shown, numbers, widths)):
        x = 0
        for token, value, w in zip(row, values, wide):
            axis.add_patch(plt.Rectangle((x, y - 0.45), w - 0.3, 0.9, color=plt.cm.RdBu(0.5 + 0.35 * max(-1, min(
                1, value / limit))), lw=0))
            axis.text(x + (w - 0.3) / 2, y - (0.17 if form else 0), token, ha="center", va="center", family="monospace",
                      fontsize=8)
            if form:
                axis.text(x + (w - 0.3) / 2, y + 0.25, form.format(value), ha="center", va="center", fontsize=6)
            x += w
        if notes:
            axis.text(widest + 1, y, notes[y], va="center", fontsize=8)
    axis.set(xlim=(-0.5, widest + note + 1), ylim=(len(rows) - 0.5, -0.5))
    axis.axis("off")
    axis.set_title(title, fontsize=9, loc="left")
    if label:
        figure.supxlabel(label, fontsize=8)
    plt.show()


def result(name):
    """Rows of a committed tutorials/results/NAME.csv; what looks like a number is one."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def published(name):
    """A committed tutorials/results/NAME.md, as it is."""
    display(Markdown((RESULTS / f"{name}.md").read_text(encoding="utf-8")))
