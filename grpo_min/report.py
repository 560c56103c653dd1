"""What is written about runs: the tables and the figure of a comparison, the page of answers, the pipeline's seconds.

As a command, `python -m grpo_min.report runs/NAME`: one run as a page for the browser, which page.py makes.
Memory of the model state is not measured but counted: `state_bytes`.
"""
import json
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from grpo_min.config import option, parse, require, run_command
from grpo_min.metrics import peak_memory_mb
from grpo_min.page import run_page
from grpo_min.plots import finish, plt
from grpo_min.ppo import PPOConfig
from grpo_min.runs import make_folder, save_file, write_csv
from grpo_min.sample import ask

QUESTIONS = ["start with 3, times 9, minus 7, plus 8.", "start with 6, plus 8, times 3.",
             "hello! what does a cow eat?", "please tell me, what is a young swan called?"]
PHASES = ["sample", "score", "critic", "update"]        # of a step, each with its seconds
CURVES = ["step", "completions", "reward", "accuracy", "thinking", "kl", "length", "entropy", "explained_variance",
          *(f"seconds_{phase}" for phase in PHASES)]                                     # kept in comparison-*.csv
COLUMNS = {     # reward: [(heading, set, figure, form)]
    "correct": [("accuracy", "arithmetic_test", "accuracy", "{:.1%}"),
                ("greedy", "arithmetic_test", "accuracy_greedy", "{:.1%}"),
                ("pass@4", "arithmetic_test", "pass@4", "{:.1%}"),
                ("thinking", "arithmetic_test", "thinking", "{:.1%}"),
                ("one more operation", "arithmetic_longer", "accuracy", "{:.1%}"),
                ("length (tokens)", "arithmetic_test", "length", "{:.1f}")],
    "learned": [("gold score", "animals_test", "gold", "{:.2f}"),
                ("way to the maximum", "animals_test", "progress", "{:.1%}"),
                ("wins against SFT", "animals_test", "win_rate", "{:.1%}"),
                ("correct", "animals_test", "correct", "{:.1%}"),
                ("length (tokens)", "animals_test", "length", "{:.1f}")],
}


def state_bytes(policy, config):
    """Bytes of what training holds beside activations: weights, gradients and Adam's two moments of what is trained,
    and the reference's weights."""
    one = sum(p.numel() * p.element_size() for p in policy.parameters())
    state = {"policy": one, "reference": one if config.beta > 0 else 0, "gradients": one, "Adam's moments": 2 * one}
    if isinstance(config, PPOConfig):
        critic = one + (policy.config.width + 1) * 4          # the trunk and the scalar head
        state.update({"critic": critic, "gradients": one + critic, "Adam's moments": 2 * (one + critic)})
    return state


# --- tables -------------------------------------------------------------------------------------------------------

def spread(values, form):
    """Mean (lowest to highest) over seeds; of one seed the value alone."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(np.mean(values)) + (f" ({low} to {high})" if len(values) > 1 and low != high else "")


def tables(records):
    """The records as Markdown: a table per reward, of quality and of cost."""
    lines = []
    for reward in dict.fromkeys(record["reward"] for record in records):
        of_reward = [record for record in records if record["reward"] == reward]
        names = list(dict.fromkeys(record["algorithm"] for record in of_reward))
        seeds = len({record["seed"] for record in of_reward if record["algorithm"] != "SFT"})
        title = {"correct": "Arithmetic, rewarded for right answers",
                 "learned": "Animals, rewarded by the reward model"}
        lines += [f"**{title[reward]}** (held out; mean over {seeds} seed{'s' if seeds > 1 else ''}"
                  f"{', lowest to highest' if seeds > 1 else ''})", ""]
        headings = [heading for heading, *_ in COLUMNS[reward]]
        lines += table_row([""] + headings) + table_row(["---"] * (len(headings) + 1))
        for name in names:
            chosen = [record["figures"] for record in of_reward if record["algorithm"] == name]
            lines += table_row([name] + [spread([f[of_set].get(key, [None])[0] for f in chosen], form)
                                         for _, of_set, key, form in COLUMNS[reward]])
        lines += ["", *cost_table([record for record in of_reward if "run" in record]), ""]
    return "\n".join(lines)


def cost_table(records):
    headings = ["", *(f"{phase} (s)" for phase in PHASES), "step (s)", "model state (MB)", "peak memory (MB)"]
    lines = table_row(headings) + table_row(["---"] * len(headings))
    for name in dict.fromkeys(record["algorithm"] for record in records):
        chosen = [record for record in records if record["algorithm"] == name]
        lines += table_row([name, *(spread([r["seconds"][phase] for r in chosen], "{:.2f}") for phase in PHASES),
                            spread([sum(r["seconds"].values()) for r in chosen], "{:.2f}"),
                            f"{sum(chosen[0]['state_bytes'].values()) / 1e6:.1f}",
                            f"{max(r['peak_memory_mb'] for r in chosen):.0f}"])
    return lines


def table_row(cells):
    return ["| " + " | ".join(cells) + " |"]


# --- what studies say and write -----------------------------------------------------------------------------------

def sides(of_label):
    """{label: numbers of its seeds}, the first being compared with -> labels with every seed above its highest, with
    every seed below its lowest, and the rest."""
    (_, first), *others = of_label.items()
    above = [label for label, values in others if min(values) > max(first)]
    below = [label for label, values in others if max(values) < min(first)]
    return above, below, [label for label, _ in others if label not in above + below]


def in_words(accuracy, completions):
    """{setting: accuracy of each seed} and {setting: completions sampled}, the default first -> what that says, in
    plain words."""
    default, text = next(iter(accuracy)), {label: f"`{label}` ({spread(values, '{:.1%}')})"
                                           for label, values in accuracy.items()}
    above, below, rest = sides(accuracy)
    said = [f"Better than {text[default]} with every seed: {', '.join(text[label] for label in above)}." if above else
            f"Nothing was better than {text[default]} with every seed."]
    said += [f"But `{label}` sampled {completions[label] / completions[default]:.1f} times as many completions."
             for label in text if completions[label] > 1.05 * completions[default]]
    said += [f"Worse with every seed: {', '.join(text[label] for label in below)}."] if below else []
    said += [f"The seeds of {', '.join(f'`{label}`' for label in rest)} overlap with those of `{default}`: no "
             "difference shown."] if rest else []
    return " ".join(said) + f" With {len(accuracy[default])} seeds, that is little to go by where settings are close."


def write_study(config, name, lines, rows=(), curves=()):
    """Lines of Markdown -> NAME.md in config.out and onto the screen; rows -> NAME.csv, and NAME-curves.csv."""
    out = Path(config.out)
    make_folder(out)
    for path, of_file in (f"{name}.csv", rows), (f"{name}-curves.csv", curves):
        if of_file:
            write_csv(out / path, of_file)
    save_file(out / f"{name}.md", "\n".join([*lines, ""]).encode())
    print("\n" + "\n".join(lines))


def windows(metrics, name, length=10):
    """Means of a column over each `length` steps in a row; [None] where it was not measured."""
    values = [row[name] for row in metrics if row.get(name, "") != ""]
    length = min(length, len(values))
    return [float(np.mean(values[i:i + length])) for i in range(len(values) - length + 1)] if values else [None]


def first_of(metrics, name):
    return windows(metrics, name)[0]


def last_of(metrics, name):
    return windows(metrics, name)[-1]


def best_of(metrics, name):
    return max(windows(metrics, name), key=lambda value: value if value is not None else 0)


def seconds_of(metrics):
    """What the phases of all steps took."""
    return sum(row[key] for row in metrics for key in row if key.startswith("seconds"))


def smooth(values, window=5):
    """Means of up to `window` neighbours to the left."""
    return [np.mean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def plot_comparison(records, path):
    """Algorithms side by side, from the records that compare.py makes: a line per seed, smoothed over 5 steps."""
    names = list(dict.fromkeys(record["algorithm"] for record in records))
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6))
    arithmetic = records[0]["reward"] == "correct"
    curves = [("reward", "completions", "reward"), ("reward", "seconds", "reward"),
              ("kl", "completions", "KL to the reference\n(nats per completion)"),
              ("length", "completions", "completion length (tokens)"),
              ("thinking", "completions", "share of thinking answers") if arithmetic else
              ("entropy", "completions", "entropy (nats per token)")]
    for axis, (column, against, label) in zip(axes.flat, curves):
        for record in records:
            rows = [row for row in record["rows"] if row[column] != ""]
            seconds = np.cumsum([sum(row.get(f"seconds_{phase}", 0) for phase in record["seconds"]) for row in rows])
            x = seconds if against == "seconds" else [row["completions"] for row in rows]
            axis.plot(x, smooth([row[column] for row in rows]), color=colours[record["algorithm"]], lw=1.2, alpha=0.8)
        axis.set(xlabel="seconds of training" if against == "seconds" else "completions sampled", ylabel=label)
    stacked(axes[1, 1], names, [[np.mean([r["seconds"][phase] for r in records if r["algorithm"] == name])
                                 for name in names] for phase in records[0]["seconds"]],
            list(records[0]["seconds"]), "seconds per step")
    of_name = [next(record["state_bytes"] for record in records if record["algorithm"] == name) for name in names]
    parts = max(of_name, key=len)
    stacked(axes[1, 2], names, [[state.get(part, 0) / 1e6 for state in of_name] for part in parts], list(parts),
            "model state (MB)")
    handles = [plt.Line2D([], [], color=colours[name], label=name) for name in names]
    axes[1, 3].axis("off")
    axes[1, 3].legend(handles=handles, loc="center", frameon=False, title="one line per seed", fontsize=11)
    finish(figure, path)


def stacked(axis, names, parts, labels, ylabel):
    """Stacked bars: parts[i][j] is the height of part i in the bar of names[j]."""
    bottom = np.zeros(len(names))
    for i, (heights, label) in enumerate(zip(parts, labels)):
        axis.bar(names, heights, 0.6, bottom, label=label, color=plt.cm.Greys(0.25 + 0.6 * i / len(labels)))
        bottom += heights
    axis.set(ylabel=ylabel, ylim=(0, bottom.max() * 1.6))
    axis.legend(frameon=False, fontsize=8, ncol=2, loc="upper left")


def write(records, path):
    """Write the records of one reward: their figures, curves, tables and picture."""
    kept = [{name: value for name, value in record.items() if name != "rows"} for record in records]
    save_file(f"{path}.json", json.dumps(kept, indent=1).encode())
    trained = [record for record in records if "run" in record]
    write_csv(f"{path}.csv", [dict(algorithm=run["algorithm"], seed=run["seed"],
                                   **{name: row.get(name, "") for name in CURVES})
                              for run in trained for row in run["rows"]])
    save_file(f"{path}.md", tables(records).encode())
    plot_comparison(trained, f"{path}.png")


# --- the main job -------------------------------------------------------------------------------------------------

def page(models):
    """Real answers of several models to the same questions, as Markdown: {name: policy} -> text."""
    lines = ["Two answers of each model, sampled at temperature 1.", ""]
    for question in QUESTIONS:
        lines += [f"**{question}**", ""]
        for name, policy in models.items():
            lines += [f"* {name}: " + " / ".join(f"`{text.strip()}`" for text in ask(policy, question))]
        lines += [""]
    return "\n".join(lines)


def machine(device):
    cores = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{cores}, torch {torch.__version__}"


def pipeline_table(seconds, device):
    """Seconds of each stage, peak memory and the machine, as Markdown."""
    lines = ["| stage | seconds |", "| --- | --- |", *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
             f"| **all** | **{sum(seconds.values()):.0f}** ({sum(seconds.values()) / 60:.1f} minutes) |", "",
             f"Peak memory of a process {max(peak_memory_mb(device, of) for of in (False, True)):.0f} MB, with up to "
             f"one process to a core; {machine(device)}, {date.today()}.", ""]
    return "\n".join(lines)


# --- a page per run -----------------------------------------------------------------------------------------------

@dataclass
class ReportConfig:
    """Write a run as one HTML page to watch in a browser: python -m grpo_min.report runs/NAME

    The folder of the run comes first. The page has the curves and, from GRPO and PPO, a slider over the steps that
    shows some of the sampled groups, their rewards, and the advantage (PPO: and the value) of each token.
    """
    out: str = option("", "HTML file to write; without it: report.html in the folder of the run")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folders = [argument for argument in argv[:1] if not argument.startswith("-")]
    config = parse(ReportConfig, argv[len(folders):])
    require(folders, "name the folder of a run first: python -m grpo_min.report runs/NAME")
    path = config.out or Path(folders[0]) / "report.html"
    content = run_page(folders[0]).encode()
    save_file(path, content)
    print(f"wrote {path} ({len(content) / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_command(main)
