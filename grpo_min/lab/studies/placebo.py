"""What improves although nothing true is rewarded? GRPO on arithmetic with the true reward and with placebos: for
thinking in the right form, for length, for wrong answers, and by the toss of a coin (Shao et al., 2506.10947).

That paper explains what a random reward does by the clip. With one update per batch the clip does nothing, so the coin
is tossed with 4 minibatches too, with the clip and without. 40 steps of 16 prompts x 8 completions from the same SFT
weights without a KL penalty, 5 seeds, judged on the validation prompts. Writes placebo.csv (a row per run),
-curves.csv (a row per step), .md and .png.
"""
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import tokenizer
from grpo_min.lab.report import smooth
from grpo_min.lab.studies.common import (curve, grouped, load_sft, plot_band, run_jobs, seed_curves, seed_table,
                                         seeds_of, sized, write_study)
from grpo_min.lab.studies.is_rl_needed import GRPO, SFT, G, Q, reached, train_online
from grpo_min.rewards import correct, well_formed
from grpo_min.run.plots import finish, plt

LONGEST = 40      # tokens
LABELS = {"reward": ("setting", "{}")}
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "length (tokens)": ("length", "{:.1f}"), "KL (nats)": ("kl", "{:.2f}"),
           "reward, first ten steps": ("reward_first", "{:.2f}"), "last ten": ("reward_last", "{:.2f}"),
           "tokens clipped": ("clipped", "{:.2%}")}


def length(prompts, completions, **columns):
    """The share of LONGEST that a completion has in tokens, END not counted, at most 1."""
    encode = tokenizer.own().encode_completion
    return [min(len(encode(text, finished=False)) / LONGEST, 1.0) for text in completions]


def wrong(prompts, completions, **columns):
    """1 if the answer is not right, else 0."""
    return [1 - score for score in correct(prompts, completions, **columns)]


def coin(seed):
    """A reward function that tosses a coin for each completion, whatever it says: 0 or 1."""
    rng = np.random.default_rng(seed)

    def reward(prompts, completions, **columns):
        return rng.integers(0, 2, len(completions)).astype(float).tolist()
    return reward


SETTINGS = {      # what is rewarded: the reward, or None for a coin; the settings that differ
    "right answers": (correct, {}), "form": (well_formed, {}), "length": (length, {}), "wrong answers": (wrong, {}),
    "coin": (None, {}), "coin, 4 minibatches": (None, dict(minibatches=4)),
    "coin, 4 minibatches, no clip": (None, dict(minibatches=4, clip_eps=1e6))}


def study(config):
    steps, seeds = config.steps or sized(config, 40, 3), seeds_of(config)
    runs = run_jobs(config, train, [(SFT, 0, 0)] + [(name, seed, steps) for name in SETTINGS for seed in seeds])
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"{steps} steps of {Q} prompts x {G} completions, seeds 1 to {len(seeds)}: mean (lowest to highest). "
              f"Without a KL penalty. {config.eval_prompts} validation prompts, 4 samples each; KL to the SFT model. "
              "Form: 1 for <think>some</think>thing, whatever it says. Length: tokens / "
              f"{LONGEST}; longer completions are cut and then not right. Clipped: tokens whose ratio is outside 0.8 "
              f"to 1.2, mean of the steps; without the clip none counts. {date.today()}."]
    write_study(config, "placebo", lines, rows, curves)
    plot_placebo(curves, rows[0], Path(config.out) / "placebo.png")


def train(config, name, seed, steps):
    """GRPO with this reward -> a row of what was reached, judged by the truth, and rows of how, one per step."""
    if name == SFT:
        return dict(reached(config, name, seed, load_sft(config), 0, 0), reward_first=None, reward_last=None,
                    clipped=None), []
    reward, changes = SETTINGS[name]
    if reward == correct:                     # the run of is_rl_needed
        policy, metrics = train_online(config, GRPO, seed, steps)
    else:
        policy, metrics = train_online(config, name, seed, steps, "placebo", reward=reward or coin(seed), **changes)
    rewards = [row["reward"] for row in metrics]
    row = reached(config, name, seed, policy, steps * Q * G, steps * changes.get("minibatches", 1))
    row.update(reward_first=float(np.mean(rewards[:10])), reward_last=float(np.mean(rewards[-10:])),
               clipped=float(np.mean([row["clip_low"] + row["clip_high"] for row in metrics])))
    names = ["completions", "reward", "accuracy", "thinking", "length", "entropy", "clip_low", "clip_high"]
    return row, curve(metrics, names, setting=name, seed=seed)


def plot_placebo(curves, start, path):
    """Accuracy, thinking and length in training over the completions sampled; grey: the SFT model."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4))
    for axis, (column, label) in zip(axes, [("accuracy", "share of right answers"),
                                            ("thinking", "share of thinking answers"), ("length", "length (tokens)")]):
        axis.axhline(start[column], color="grey", lw=1)
        for setting, in grouped(curves, "setting"):
            y = np.array([smooth(values) for values in seed_curves(curves, setting, column)])  # (seeds, steps)
            plot_band(axis, seed_curves(curves, setting, "completions")[0], y, setting)
        axis.set(xlabel="completions sampled", ylabel=label + ", in training")
    axes[2].legend(frameon=False, fontsize=8, title="rewarded (mean, band: all seeds)", title_fontsize=8,
                   bbox_to_anchor=(1, 1), loc="upper left")
    finish(figure, path)
