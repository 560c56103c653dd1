"""What the studies baselines, group_size, recipes and length share: they compare a part of GRPO by how it learns.

Every setting trains on the arithmetic task from the same SFT weights, for 40 steps of 128 completions, with 5 seeds,
and is judged on the validation prompts. Written: NAME.csv (a row per run), NAME-curves.csv (a row per step), NAME.md
and NAME.png.
"""
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import variants
from grpo_min.evaluate import answers
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import smooth
from grpo_min.lab.studies.common import (column_by, curve, last_of, plot_band, plot_seeds, run_jobs,
                                         seconds_of, seed_curves, seed_table, seeds_of, sized, validation,
                                         write_study)
from grpo_min.rewards import correct
from grpo_min.run.metrics import thinks
from grpo_min.run.plots import finish, plt

SHARED = dict(prompts_per_step=16, group_size=8)      # 128 completions per step
CURVES = ["step", "completions", "reward", "accuracy", "thinking", "kl", "length", "equal_groups", "clip_high"]
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "KL (nats)": ("kl", "{:.2f}"), "length (tokens)": ("length", "{:.1f}"),
           "length of wrong answers": ("length_wrong", "{:.1f}"), "gradient norm": ("grad_norm", "{:.2f}"),
           "completions": ("completions", "{:.0f}"), "seconds": ("seconds", "{:.0f}")}


def compare_settings(config, name, part, settings, note=""):
    """Train each of {label: settings of variants.VariantConfig} with each seed, and write what they reached and how.

    part: what is compared; note: what else must be known to read the table.
    """
    labels = list(settings)[:sized(config, len(settings), 2)]
    jobs = [(name, label, settings[label], seed) for label in labels for seed in seeds_of(config)]
    runs = run_jobs(config, train_setting, jobs)
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table({part: ("setting", "{}")}, NUMBERS, rows)
    lines += ["", f"{len(runs[0][1])} steps, seeds 1 to {len(seeds_of(config))}: mean (lowest to highest). KL, length "
              f"and gradient norm are means of the last ten steps. {config.eval_prompts} validation prompts, 4 samples "
              f"each. {note}{date.today()}."]
    write_study(config, name, lines, rows, curves)
    plot_learning(part, rows, curves, Path(config.out) / f"{name}.png")


def train_setting(config, study, label, changes, seed):
    """Train with these settings -> a row of what was reached, and rows of how, one per step."""
    settings = dict(SHARED, run=str(Path(config.run) / f"{study}-{label}-{seed}".replace(" ", "")), sft=config.sft,
                    seed=seed, device=config.device, steps=config.steps or sized(config, 40, 3))
    policy, metrics = train_or_reuse(variants.train, variants.VariantConfig(**{**settings, **changes}))
    rows = validation(config, "arithmetic")
    texts, finished, lengths = answers(policy, [row["prompt"] for row in rows], 4, 1.0)      # as evaluate() does
    right = correct(texts, texts, [row["answer"] for row in rows for _ in range(4)], finished)
    wrong_lengths = [length for length, is_right in zip(lengths, right) if not is_right]
    reached = dict(setting=label, seed=seed, accuracy=float(np.mean(right)),
                   thinking=float(np.mean([thinks(text) for text in texts])), kl=last_of(metrics, "kl"),
                   length=last_of(metrics, "length"),
                   length_wrong=float(np.mean(wrong_lengths)) if wrong_lengths else None,
                   grad_norm=last_of(metrics, "grad_norm"), completions=metrics[-1]["completions"],
                   seconds=seconds_of(metrics))
    return reached, curve(metrics, CURVES, setting=label, seed=seed)


def plot_learning(part, rows, curves, path):
    """Accuracy along the runs, mean of the seeds, smoothed over five steps, and what each seed reached at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[3, 2])
    accuracy, colours = column_by(rows, "setting", "accuracy"), {}
    for setting in accuracy:
        y = np.array([smooth(values) for values in seed_curves(curves, setting, "accuracy")])  # (seeds, steps)
        x = np.mean(seed_curves(curves, setting, "completions"), axis=0)
        colours[setting] = plot_band(left, x, y, setting)
    left.set(xlabel="completions sampled", ylabel="accuracy in training")
    left.legend(frameon=False, title=f"{part} (mean, band: all seeds)", fontsize=8, title_fontsize=8)
    plot_seeds(right, accuracy, colours)
    right.set(xlabel="validation accuracy after training, each seed")
    right.locator_params(axis="x", nbins=4)
    finish(figure, path)
