"""Tables and figures of the comparison and of the main job.

Memory of the model state is not measured but counted: `state_bytes`.
"""
import csv
import json
from datetime import date

import numpy as np
import torch

from grpo_min.ppo import PPOConfig
from grpo_min.run.checkpoint import load_model
from grpo_min.run.cores import cores
from grpo_min.run.files import DATA, save_file
from grpo_min.run.metrics import peak_memory_mb
from grpo_min.run.plots import finish, plt
from grpo_min.run.table import write_csv
from grpo_min.sample import ask

RESULTS = DATA.parent / "tutorials" / "results"        # what is committed
QUESTIONS = ["start with 3, times 9, minus 7, plus 8.", "start with 6, plus 8, times 3.",
             "hello! what does a cow eat?", "please tell me, what is a young swan called?"]
ORACLE = "PPO oracle"
PHASES = ["sample", "score", "critic", "update"]        # of a step, each with its seconds
CURVES = ["step", "completions", "reward", "accuracy", "thinking", "kl", "length", "entropy", "explained_variance",
          "explainable_variance", *(f"seconds_{phase}" for phase in PHASES)]             # kept in comparison-*.csv
TASKS = {"correct": "arithmetic", "learned": "animals"}
TITLES = {"correct": "Arithmetic, rewarded for right answers", "learned": "Animals, rewarded by the reward model"}
GOALS = {"correct": 0.9, "learned": 3.5}                # a reward that all reach, and it is counted when
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
    and the reference's weights. Of frozen weights (real/lora.py) reference and critic have no copy."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    sizes = {name: p.numel() * p.element_size() for name, p in policy.named_parameters() if p.requires_grad}
    trained = sum(sizes.values())
    state = {"policy": weights, "reference": trained if config.beta > 0 else 0}
    if isinstance(config, PPOConfig):
        heads = (policy.config.width + 1) * (policy.config.width + 1) * 4        # what makes values of states
        state["critic"] = trained - sizes.get("unembed.weight", 0) + heads
        trained += state["critic"]
    return {**state, "gradients": trained, "Adam's moments": 2 * trained}


def machine(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores()} CPU cores"
    return f"{name}, torch {torch.__version__}"


# --- tables -------------------------------------------------------------------------------------------------------

def table_row(cells):
    return ["| " + " | ".join(cells) + " |"]


def spread(values, form):
    """Mean (lowest to highest) over seeds; of one seed the value alone."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(np.mean(values)) + (f" ({low} to {high})" if len(values) > 1 and low != high else "")


def by_algorithm(records):
    """{algorithm: its records}, in the order in which they come."""
    groups = {}
    for record in records:
        groups.setdefault(record["algorithm"], []).append(record)
    return groups


def tables(records):
    """The records as Markdown: a table per reward, of quality and of cost."""
    lines = []
    for reward in dict.fromkeys(record["reward"] for record in records):
        records_here = [record for record in records if record["reward"] == reward]
        runs = [record for record in records_here if "run" in record]
        seeds = len({run["seed"] for run in runs})
        lines += [f"**{TITLES[reward]}** (held out; mean over {seeds} seed{'s' if seeds > 1 else ''}"
                  f"{', lowest to highest' if seeds > 1 else ''})", ""]
        headings = ["", *(heading for heading, *_ in COLUMNS[reward])]
        lines += table_row(headings) + table_row(["---"] * len(headings))
        for algorithm, group in by_algorithm(records_here).items():
            cells = [algorithm]
            for _, prompts, figure, form in COLUMNS[reward]:
                cells.append(spread([record["figures"][prompts].get(figure, [None])[0] for record in group], form))
            lines += table_row(cells)
        lines += ["", *cost_table(runs), "", *goal_table(runs), ""]
    return "\n".join(lines)


def cost_table(runs):
    headings = ["", *(f"{phase} (s)" for phase in PHASES), "step (s)", "model state (MB)", "peak memory (MB)"]
    lines = table_row(headings) + table_row(["---"] * len(headings))
    for algorithm, group in by_algorithm(runs).items():
        cells = [algorithm]
        for phase in PHASES:
            cells.append(spread([run["seconds"].get(phase) for run in group], "{:.2f}"))
        lines += table_row([*cells, spread([sum(run["seconds"].values()) or None for run in group], "{:.2f}"),
                            f"{sum(group[0]['state_bytes'].values()) / 1e6:.1f}",
                            spread([max(run["peak_memory_mb"] or 0 for run in group) or None], "{:.0f}")])
    return lines


def goal_table(runs):
    """What it took to reach a reward: by RL, and before that by the training of the critic."""
    goal = f"to a reward of {GOALS[runs[0]['reward']]}: completions"
    headings = ["", goal, "seconds", "for the critic before: completions", "seconds", "it explains", "of at most"]
    lines = table_row(headings) + table_row(["---"] * len(headings))
    for algorithm, group in by_algorithm(runs).items():
        warm, before = group[0]["warm_start"], ["-"] * 4
        if warm:
            before = [f"{warm['completions']}", f"{warm['seconds_sample'] + warm['seconds_update']:.0f}",
                      f"{warm['explained']:.2f}", f"{warm['explainable']:.2f}"]
        lines += table_row([algorithm, spread([run["goal_completions"] for run in group], "{:.0f}"),
                            spread([run["goal_seconds"] for run in group], "{:.0f}"), *before])
    return lines


def before_after(models, records, device):
    """Answers to the same questions as Markdown: of models {name: policy}, and of every run of the comparison."""
    models = dict(models)
    for run in records:
        if "run" in run:
            models[f"{run['algorithm']}, {TASKS[run['reward']]}"] = load_model(f"{run['run']}/checkpoint.pt", device)
    lines = ["Two answers of each model, sampled at temperature 1.", ""]
    for question in QUESTIONS:
        lines += [f"**{question}**", ""]
        for name, policy in models.items():
            lines += [f"* {name}: " + " / ".join(f"`{text.strip()}`" for text in ask(policy, question)[0])]
        lines += [""]
    return "\n".join(lines)


def pipeline_table(starts, device):
    """Seconds of each stage, peak memory and the machine, as Markdown. starts {stage: when it began}: the last of them
    is only where the one before it ends."""
    times = list(starts.values())
    memory = max(peak_memory_mb(device, of_children) or 0 for of_children in (False, True))
    memory, total = f"{memory:.0f} MB" if memory else "not measured", times[-1] - times[0]
    lines = table_row(["stage", "seconds"]) + table_row(["---"] * 2)
    for stage, start, end in zip(starts, times, times[1:]):
        lines += table_row([stage, f"{end - start:.0f}"])
    lines += table_row(["**all**", f"**{total:.0f}** ({total / 60:.1f} minutes)"])
    return "\n".join([*lines, "", f"Peak memory of a process: {memory}, with up to one process to a core; "
                      f"{machine(device)}, {date.today()}.", ""])


# --- the comparison -----------------------------------------------------------------------------------------------

def write_comparison(records, path):
    """Write the records of one reward: their figures (.json), curves (.csv), tables (.md) and picture (.png)."""
    runs = [record for record in records if "run" in record]
    figures, curves = [], []
    for record in records:
        figures.append({name: value for name, value in record.items() if name != "rows"})
    for run in runs:
        for row in run["rows"]:
            curves.append(dict(algorithm=run["algorithm"], seed=run["seed"],
                               **{name: row.get(name, "") for name in CURVES}))
    save_file(f"{path}.json", json.dumps(figures, indent=1).encode())
    write_csv(f"{path}.csv", curves)
    save_file(f"{path}.md", tables(records).encode())
    plot_comparison(runs, f"{path}.png")


def step_seconds(row):
    """What all phases of a step took, from its row of metrics."""
    return sum(row.get(f"seconds_{phase}", 0.0) for phase in PHASES)


def smooth(values, window=5):
    """Means of up to `window` neighbours to the left."""
    return [np.mean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def to_goal(rows, reward):
    """Completions and seconds of training until the reward, mean of 5 steps, is that of GOALS. None if it never is."""
    rewards = [row["reward"] for row in rows]
    reached = [mean >= GOALS[reward] for mean in smooth(rewards)]
    if not any(reached):
        return dict(goal_completions=None, goal_seconds=None)
    rows = rows[:reached.index(True) + 1]
    return dict(goal_completions=rows[-1]["completions"], goal_seconds=sum(map(step_seconds, rows)))


def plot_comparison(runs, path):
    """Algorithms side by side: a line per seed, smoothed over 5 steps; seconds per step, and model state."""
    groups = by_algorithm(runs)
    quick = [run for run in runs if run["algorithm"] != ORACLE] or runs       # its seconds would hide the others'
    colours = dict(zip(groups, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6))
    curves = [("reward", "completions", "reward"), ("reward", "seconds", "reward"),
              ("kl", "completions", "KL to the reference\n(nats per completion)"),
              ("length", "completions", "completion length (tokens)"),
              ("explained_variance", "completions", "share of the returns' variance\nthat the critic explains")]
    for axis, (column, against, label) in zip(axes.flat, curves):
        for run in quick if against == "seconds" else runs:
            rows = [row for row in run["rows"] if row.get(column, "") != ""]
            if not rows:                    # no critic
                continue
            x = [row["completions"] for row in rows]
            if against == "seconds":
                x = np.cumsum([step_seconds(row) for row in rows])
            axis.plot(x, smooth([row[column] for row in rows]), color=colours[run["algorithm"]], lw=1.2, alpha=0.8)
        axis.set(xlabel="seconds of training" if against == "seconds" else "completions sampled", ylabel=label)
    seconds, state = {}, {}
    bars = by_algorithm(quick)
    for group in bars.values():
        for phase in PHASES:
            seconds.setdefault(phase, []).append(np.mean([run["seconds"].get(phase, 0.0) for run in group]))
    for part in max((group[0]["state_bytes"] for group in bars.values()), key=len):
        state[part] = [group[0]["state_bytes"].get(part, 0) / 1e6 for group in bars.values()]
    stacked(axes[1, 1], list(bars), seconds, "seconds per step")
    stacked(axes[1, 2], list(bars), state, "model state (MB)")
    handles = [plt.Line2D([], [], color=colour, label=algorithm) for algorithm, colour in colours.items()]
    axes[1, 3].axis("off")
    axes[1, 3].legend(handles=handles, loc="center", frameon=False, title="one line per seed", fontsize=11)
    finish(figure, path)


def stacked(axis, names, parts, ylabel):
    """Stacked bars: parts {label: its height in the bar of each name}."""
    bottom = np.zeros(len(names))
    for i, (label, heights) in enumerate(parts.items()):
        axis.bar(names, heights, 0.6, bottom, label=label, color=plt.cm.Greys(0.25 + 0.6 * i / len(parts)))
        bottom += heights
    axis.set(ylabel=ylabel, ylim=(0, bottom.max() * 1.6 or 1))
    axis.legend(frameon=False, fontsize=8, ncol=2, loc="upper left")


def plot_learning(curves, path):
    """What RL does to the answers, from the file comparison-correct.csv: GRPO and PPO, a line per seed, smoothed over 3
    steps."""
    with open(curves, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    styles = {"GRPO": dict(color="tab:blue", lw=2.4, alpha=0.45), "PPO": dict(color="orangered", lw=0.9)}
    for axis, (column, label) in zip(axes, [("accuracy", "share of right answers"),
                                            ("thinking", "share of thinking answers")]):
        for algorithm, style in styles.items():
            runs = {}
            for row in rows:
                if row["algorithm"] == algorithm:
                    runs.setdefault(row["seed"], []).append((int(row["step"]) + 1, float(row[column])))
            for number, points in enumerate(runs.values()):
                steps, shares = zip(*points)
                axis.plot(steps, smooth(shares, 3), **style, label="" if number else algorithm)
        axis.set(xlabel="step of RL", ylabel=label)
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes[1].legend(frameon=False, loc="lower right", title="one line per seed")
    finish(figure, path)
