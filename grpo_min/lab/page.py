"""One run as one HTML page to watch in a browser: python -m grpo_min.lab.page runs/NAME

The page needs no network: it holds the run's curves, and a slider over what was sampled in each step. page.html is the
page without a run: its text, its colours and the script that draws. What is made here is the data that it draws: read
from the run folder, checked, and made small enough to be opened and sent around.
"""
import csv
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo_min.run.config import UserError, option, parse, require, run_command
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import save_file
from grpo_min.run.plots import PANELS
from grpo_min.run.table import number

LIMIT = 1_700_000       # bytes of samples and curves; with the page around them it stays below 2 MB
MOST_POINTS = 500       # of a curve
ASIDE = ("step", "completions", "memory_mb", "lr")      # columns that say nothing about learning; seconds_* neither


@dataclass
class PageConfig:
    """Write a run as one HTML page to watch in a browser: python -m grpo_min.lab.page runs/NAME

    The folder of the run comes first. The page has the curves and, from GRPO and PPO, a slider over the steps that
    shows some of the sampled groups, their rewards, and the advantage (PPO: and the value) of each token.
    """
    out: str = option("", "HTML file to write; without it: report.html in the folder of the run")


def run_page(folder):
    """The page of a run folder, as text. UserError if there is no run, or a file of it is not what it should be."""
    data = compact(run_data(Path(folder)))
    title = html.escape(Path(folder).resolve().name.encode(errors="replace").decode())
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", title).replace("{{data}}", data)


def run_data(folder):
    """What page.html draws, as a dict: the algorithm and its settings, curves, groups of completions per step."""
    settings = read_settings(folder / "config.json")
    rows = read_metrics(folder / "metrics.csv")
    is_rl = "group_size" in settings
    samples = read_samples(folder / "samples.jsonl") if is_rl else []
    algorithm = ("PPO" if "critic" in settings else "GRPO") if is_rl else ""
    curve_every = math.ceil(len(rows) / MOST_POINTS)
    shown_rows = thin(rows, curve_every)
    data = dict(algorithm=algorithm, settings=settings, steps=len(rows), curve_every=curve_every,
                curve_steps=[row["step"] for row in shown_rows], panels=panels(shown_rows, is_rl),
                scales=scales(samples))
    steps, every = grouped(samples, settings.get("group_size")), 1
    # Every k-th step, with the smallest k that fits, so that what is shown is spread evenly over the run.
    while every < len(steps) and len(compact(data)) + len(compact(thin(steps, every))) > LIMIT:
        every += 1
    return dict(data, shown=thin(steps, every), shown_every=every)


def compact(data):
    """As JSON that can stand in a script element: without "<", nothing in it can end that element early."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def thin(items, k):
    """Every k-th item, and the last one."""
    return [item for i, item in enumerate(items) if i % k == 0 or i == len(items) - 1]


# --- what is read, and checked ------------------------------------------------------------------------------------

def read_settings(path):
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path.parent} is not a run folder: cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})")
    require(isinstance(settings, dict), f"{path}: not a JSON object")
    size = settings.get("group_size", 1)
    require(type(size) is int and size > 0, f"{path}: group_size must be a whole number above 0, not {size!r:.50}")
    return settings


def read_metrics(path):
    """The rows of metrics.csv; a number that is not finite is "", as one that was not measured."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for cells in reader:
                row = {}
                for name, text in cells.items():
                    value = number(text)
                    row[name] = value if value == "" or math.isfinite(value) else ""
                row["step"] + 0
                rows.append(row)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    # A cell that is no number, a row with too few cells or too many, no column named step, bytes that are not UTF-8.
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, csv.Error):
        raise UserError(f"{path}, line {reader.line_num}: not a number for each column, the step among them")
    require(rows, f"{path} has no steps yet")
    return rows


def read_samples(path):
    """The rows of samples.jsonl. Those that an older version wrote have no tokens: then the completion is one token."""
    if path.exists() and path.stat().st_size == 0:
        return []
    samples = []
    for line, row in enumerate(read_jsonl(path, ["prompt", "completion"]), start=1):
        row = {name: value for name, value in row.items() if value is not None}
        if "reward" not in row:                                           # not judged: none of its tokens was trained
            row = {name: row[name] for name in ("step", "prompt", "completion", "advantage") if name in row}
        row.setdefault("tokens", [row["completion"]])
        require(is_sample(row), f"{path}, line {line}: not a sample (numbers step, reward, advantage; the list tokens; "
                "and where there are lists advantages and values, a number for each token)")
        samples.append(row)
    return samples


def is_sample(row):
    """Whether page.html can draw a row of samples.jsonl."""
    tokens, numbers = row["tokens"], [row.get("reward", 0), row.get("advantage")]
    if type(row.get("step")) is not int or not isinstance(tokens, list):
        return False
    for name in "advantages", "values":
        if name in row:
            if not isinstance(row[name], list) or len(row[name]) != len(tokens):
                return False
            numbers += row[name]
    return (all(isinstance(token, str) for token in tokens)
            and all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers))


# --- what is drawn ------------------------------------------------------------------------------------------------

def panels(rows, is_rl):
    """[{label, main, lines: {column: numbers, null where not measured}}]: the panels of curves.png first."""
    listed = [name for names, _ in PANELS for name in names]
    others = [name for name in rows[0] if name not in [*listed, *ASIDE] and not name.startswith("seconds_")]
    panels = []
    for names, label in [*PANELS, *(([name], name.replace("_", " ")) for name in others)]:
        lines = {}
        for name in names:
            values = [row.get(name, "") for row in rows]
            if any(value != "" for value in values):
                lines[name] = [None if value == "" else float(f"{value:.4g}") for value in values]
        if lines:
            label = label if len(lines) == len(names) else " and ".join(lines)
            panels.append(dict(label=label, main=not is_rl or names[0] in listed, lines=lines))
    return panels


def scales(samples):
    """What the strongest colours stand for in every step: the largest advantage but for 2%, and the lowest and highest
    value but for 1% each."""
    advantages, values = [], []
    for row in samples:
        advantages += [abs(x) for x in row.get("advantages", [row["advantage"]])]
        values += row.get("values", [])
    return dict(advantage=quantile(advantages, 0.98), low=quantile(values, 0.01), high=quantile(values, 0.99))


def quantile(numbers, share):
    return sorted(numbers)[round(share * (len(numbers) - 1))] if numbers else 0


def grouped(samples, group_size):
    """[{step, groups: [{prompt, completions: [{completion, reward, advantage, tokens, ..}]}]}] in the order read."""
    steps = {}
    for row in samples:
        groups = steps.setdefault(row["step"], [])
        if not groups or len(groups[-1]["completions"]) == group_size:
            groups.append(dict(prompt=row["prompt"], completions=[]))
        groups[-1]["completions"].append({name: value for name, value in row.items() if name not in ("step", "prompt")})
    return [dict(step=step, groups=groups) for step, groups in steps.items()]


# --- the command --------------------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folders = [argument for argument in argv[:1] if not argument.startswith("-")]
    config = parse(PageConfig, argv[len(folders):])
    require(folders, "name the folder of a run first: python -m grpo_min.lab.page runs/NAME")
    path = config.out or Path(folders[0]) / "report.html"
    content = run_page(folders[0]).encode()
    save_file(path, content)
    print(f"wrote {path} ({len(content) / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_command(main)
