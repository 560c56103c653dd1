"""What is forgotten? The SFT model answers chains and questions about animals; it is trained on arithmetic alone, by RL
and by fine-tuning, and at equal accuracy its answers about animals are judged by the gold score.

RL is said to forget less, and the KL on the new task, KL(old policy || new), to tell how much is forgotten, whatever
the method (Shenfeld et al., 2509.04259). SFT is on the model's own right answers, on the demonstrations that think, and
on these in a shorthand that it has never written: "<think> 9, 4</think> 4". RL: 40 steps of 16 prompts x 8 completions
as in is_rl_needed, watched on the way; SFT: a run for each number of updates. 5 seeds, validation prompts. Writes
forgetting.csv (a row per run), -curves.csv (a row per point), .md and .png.
"""
import re
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min.evaluate import held_out
from grpo_min.lab.studies.common import (answer, grouped, load_sft, measure_animals, measure_arithmetic, run_jobs,
                                         seed_table, seeds_of, sized, write_study)
from grpo_min.lab.studies.is_rl_needed import (GRPO, ONLINE, PPO, fine_tune, right_answers, run_folder,
                                               train_online)
from grpo_min.rewards import well_formed
from grpo_min.rollout import frozen_logprobs
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.plots import finish, plt

OWN, THINKING, SHORTHAND = "SFT, own right answers", "SFT, demonstrations", "SFT, shorthand"
LEVEL = 0.85                                          # an accuracy that all but the shorthand reach
WATCHED = [2, 4, 6, 8, 10, 12, 16, 20, 30, 40]        # steps of RL
UPDATES = [2, 4, 6, 8, 12, 20, 40, 80, 160, 320]      # of fine-tuning
PROMPTS = 200
LABELS = {"": ("setting", "{}")}
NUMBERS = {"step or update": ("at", "{:.0f}"), "KL(SFT model, policy)": ("kl_forward", "{:.2f}"),
           "KL(policy, SFT model)": ("kl", "{:.2f}"), "gold lost on animals": ("lost", "{:.2f}"),
           "KL(policy, SFT model) on animals": ("animals_kl", "{:.2f}"),
           "thinks about animals": ("animals_thinking", "{:.1%}"),
           "accuracy at the end": ("end_accuracy", "{:.1%}"), "gold lost": ("end_lost", "{:.2f}")}


def study(config):
    methods, seeds = [OWN, THINKING, SHORTHAND, GRPO, PPO, ONLINE], seeds_of(config)
    runs = run_jobs(config, follow, [(method, seed) for method in methods for seed in seeds])
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"Where the accuracy on arithmetic is {LEVEL:.0%} for the first time, by interpolation between the "
              f"points that were measured, and at the end. Seeds 1 to {len(seeds)}: mean (lowest to highest). "
              f"{min(config.eval_prompts, PROMPTS)} validation prompts of each kind, 4 samples each; the SFT model's "
              f"gold score is {curves[0]['gold']:.2f}. KL(p, q) in nats, on arithmetic unless told, is estimated on "
              "samples of p. One parabola through the points of all runs explains of the variance of the gold lost "
              f"{explained(curves, 'kl_forward'):.0%} over KL(SFT model, policy) and {explained(curves, 'kl'):.0%} "
              f"over KL(policy, SFT model). No learning rate was tuned. {date.today()}."]
    write_study(config, "forgetting", lines, rows, curves)
    plot_forgetting(rows, curves, Path(config.out) / "forgetting.png")


def follow(config, method, seed):
    """Train on arithmetic -> a row of what there is at LEVEL and at the end, and the points of the run."""
    label = dict(setting=method, seed=seed)
    points = [dict(label, at=0, **measure(config, load_sft(config)))]
    run = watched if method in (GRPO, PPO, ONLINE) else tuned
    points += [dict(label, **point) for point in run(config, method, seed)]
    for point in points:
        point["lost"] = points[0]["gold"] - point["gold"]
    there = at_level(points, LEVEL, [key for key, _ in NUMBERS.values() if not key.startswith("end_")])
    return dict(label, **there, end_accuracy=points[-1]["accuracy"], end_lost=points[-1]["lost"]), points


def watched(config, method, seed):
    """RL, measured after the steps of WATCHED -> points."""
    steps = config.steps or sized(config, 40, 2)

    def watch(policy, step):
        if step + 1 not in (*WATCHED, steps):
            return {}
        return {f"val_{name}": value for name, value in measure(config, policy).items()}
    _, metrics = train_online(config, method, seed, steps, "forgetting", watch=watch)
    points = []
    for row in metrics:
        if row.get("val_gold", "") != "":
            names = [name for name in row if name.startswith("val_")]
            points.append(dict(at=row["step"] + 1, **{name.removeprefix("val_"): row[name] for name in names}))
    return points


def tuned(config, method, seed):
    """Fine-tuning, once for each number of UPDATES -> points."""
    if method == OWN:
        rows = sum(right_answers(load_sft(config), seed, sized(config, 40, 2)), [])
    else:
        rows = [row for row in read_jsonl(DATA / "sft.jsonl", ["prompt", "response"]) if "<think>" in row["response"]]
        rows = rows if method == THINKING else list(map(shorthand, rows))
    points = []
    for updates in sized(config, UPDATES, UPDATES[:2]):
        folder = run_folder(config, "forgetting", method, seed, updates)
        points.append(dict(at=updates, **measure(config, fine_tune(config, folder, rows, seed, updates)[0])))
    return points


def shorthand(row):
    """A demonstration that thinks, with the values of its steps alone."""
    return dict(row, response=re.sub(r"\d+ \w+ \d+ is ", "", row["response"]))


# --- measuring ----------------------------------------------------------------------------------------------------

def measure(config, policy):
    """Of a policy: accuracy, kl, kl_forward and more on arithmetic; gold, animals_kl and animals_thinking."""
    sft = load_sft(config)
    rows, animal_rows = (held_out(domain, "val", min(config.eval_prompts, PROMPTS)) for domain in
                         ("arithmetic", "animals"))
    figures, forward = measure_arithmetic(policy, sft, rows), []
    for _, prompts, rollout in answer(sft, rows, 4):
        log_ratio = (rollout.logprobs - frozen_logprobs(policy, prompts, rollout, 1.0, 1)) * rollout.mask  # (B, N)
        forward += log_ratio.sum(dim=1).tolist()
    animals, _ = measure_animals(policy, sft, well_formed, animal_rows)
    return dict(figures, kl_forward=float(np.mean(forward)), gold=animals["gold"], animals_kl=animals["kl"],
                animals_thinking=animals["proxy"])


def at_level(points, level, names):
    """Columns where the accuracy first rises to the level, on the line between the point below and the one that has
    reached it; None for each if no point has."""
    for before, after in zip(points, points[1:]):
        if before["accuracy"] < level <= after["accuracy"]:
            share = (level - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return {name: before[name] + share * (after[name] - before[name]) for name in names}
    return dict.fromkeys(names)


def explained(points, name):
    """The share of the variance of the gold lost (R^2) that a parabola through the origin explains, of the KL `name`:
    least squares over all points."""
    kl, lost = np.array([(point[name], point["lost"]) for point in points]).T  # (points,) each
    x = np.stack([kl, kl ** 2], axis=1)  # (points, 2)
    left = lost - x @ np.linalg.lstsq(x, lost, rcond=None)[0]
    return float(1 - (left ** 2).sum() / ((lost - lost.mean()) ** 2).sum())


def plot_forgetting(rows, curves, path):
    """Gold lost over both KLs: each point of each run, and, ringed, where the accuracy is LEVEL."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, (name, label) in zip(axes, [("kl_forward", "KL(SFT model, policy)"), ("kl", "KL(policy, SFT model)")]):
        for (setting,), points in grouped(curves, "setting").items():
            dots, = axis.plot([point[name] for point in points], [point["lost"] for point in points], ".", alpha=0.6,
                              label=setting)
            there = [row for row in rows if row["setting"] == setting and row["lost"] is not None]
            axis.plot([row[name] for row in there], [row["lost"] for row in there], "o", ms=9, mfc="none",
                      color=dots.get_color())
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel=label + ", on arithmetic (nats)", ylabel="gold score lost on animals")
    axes[1].legend(frameon=False, fontsize=8, title=f"ringed: accuracy of {LEVEL:.0%}", title_fontsize=8,
                   bbox_to_anchor=(1, 1), loc="upper left")
    finish(figure, path)
