"""How much KL penalty, and charged where? GRPO on the committed reward model with the KL charged by k3 in the loss, or
by k1 in the reward.

On the animals, from the SFT model, 5 seeds, judged on the validation prompts. Writes kl.csv (a row per run),
kl-curves.csv (a row per step), kl.md and kl.png.
"""
from datetime import date
from pathlib import Path

from grpo_min.lab.studies.common import (curve, last_of, load_sft, measure_animals, run_jobs, seconds_of, seed_table,
                                         seeds_of, sized, train_policy, validation, write_study)
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import pick_device
from grpo_min.run.plots import finish, plt

BETAS = [0.01, 0.03, 0.1, 0.3]
MARKERS = {"nowhere": "D", "loss": "o", "reward": "^"}
LABELS = {"beta": ("beta", "{:g}"), "KL charged in": ("charged_in", "{}")}
NUMBERS = {"reward model's score": ("proxy", "{:.2f}"), "KL (nats)": ("kl", "{:.2f}"), "gold score": ("gold", "{:.2f}"),
           "length (tokens)": ("length", "{:.1f}"), "seconds": ("seconds", "{:.0f}")}


def study(config):
    settings = [(0.0, "nowhere")]
    for beta in sized(config, BETAS, BETAS[-1:]):
        settings += [(beta, "loss"), (beta, "reward")]
    jobs = [(beta, charged_in, seed) for beta, charged_in in settings for seed in seeds_of(config)]
    runs = run_jobs(config, train_with_penalty, jobs)
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"{rows[0]['steps']} steps of 16 x 8, seeds 1 to {len(seeds_of(config))}: mean (lowest to highest), "
              f"on {config.eval_prompts} validation prompts with 4 samples each; KL by k1, which is unbiased. Length: "
              f"of the last ten steps. {date.today()}."]
    write_study(config, "kl", lines, rows, curves)
    plot_kl(rows, Path(config.out) / "kl.png")


def train_with_penalty(config, beta, charged_in, seed):
    """GRPO on the committed reward model -> a row of the table, and a row per step."""
    changes = dict(kl="k1", kl_in="reward") if charged_in == "reward" else {}
    policy, metrics = train_policy(config, f"kl-{beta}-{charged_in}-{seed}", config.reward_model, sized(config, 60, 2),
                                   seed, beta=beta, **changes)
    reward = learned(load_model(config.reward_model, pick_device(config.device), ScalarGPT))
    figures, _ = measure_animals(policy, load_sft(config), reward, validation(config, "animals"))
    label = dict(beta=beta, charged_in=charged_in, seed=seed)
    row = dict(label, steps=len(metrics), **{name: figures[name] for name in ("proxy", "kl", "gold")},
               length=last_of(metrics, "length"), seconds=seconds_of(metrics))
    return row, curve(metrics, ["step", "reward", "kl", "length", "entropy"], **label)


def plot_kl(rows, path):
    """Gold and proxy of each run against its KL: a colour for each beta, a marker for where the KL is charged."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    betas = list(dict.fromkeys(row["beta"] for row in rows))
    for axis, name, label in zip(axes, ["gold", "proxy"], ["gold score", "reward model's score"]):
        for row in rows:
            axis.plot(row["kl"], row[name], MARKERS[row["charged_in"]], color=f"C{betas.index(row['beta'])}", ms=6,
                      alpha=0.75, mew=0)
        axis.set(xlabel="KL to the SFT model (nats per completion)", ylabel=label)
    for i, beta in enumerate(betas):
        axes[1].plot([], [], "s", color=f"C{i}", mew=0, label=f"beta {beta:g}")
    for charged_in in "loss", "reward":
        axes[1].plot([], [], MARKERS[charged_in], color="grey", mew=0, label=f"charged in the {charged_in}")
    axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    finish(figure, path)
