"""Is RL needed, or does fine-tuning on right answers do? GRPO against filtered SFT (STaR, Zelikman et al., 2203.14465;
RAFT, 2304.06767), at equally many completions.

Online, each step learns from its own right completions; offline, all completions are sampled from the SFT model before
it is fine-tuned on the right ones. The control is fine-tuned as long on the demonstrations again. 40 steps of 16
prompts x 8 completions of the arithmetic task from the same SFT weights, 5 seeds, judged on the validation prompts.
Writes is_rl_needed.csv (a row per run), -curves.csv, .md and .png.
"""
import functools
import json
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import grpo, ppo, sft, variants
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import smooth
from grpo_min.lab.studies.common import (collect, column_by, curve, load_sft, measure_arithmetic, plot_band,
                                         plot_seeds, run_jobs, seed_curves, seed_table, seeds_of, sized, validation,
                                         write_study)
from grpo_min.run.config import require
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA, make_folder, save_file
from grpo_min.run.plots import finish, plt

SFT, GRPO, ONLINE, OFFLINE, LONGER = ("SFT", "GRPO", "filtered SFT, online", "filtered SFT, offline", "SFT for longer")
PPO = "PPO"                          # for other studies
Q, G = 16, 8                         # prompts per step, completions per prompt
EPOCHS, BATCH, LR = 4, 32, 1e-3      # of the offline fine-tuning
SHARES = [0.25, 0.5, 1]              # of the completions: what the offline curve is made of
LABELS = {"": ("setting", "{}")}
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "KL (nats)": ("kl", "{:.2f}"), "length (tokens)": ("length", "{:.1f}"),
           "completions": ("completions", "{:.0f}"), "updates": ("updates", "{:.0f}")}


def study(config):
    steps, seeds = config.steps or sized(config, 40, 3), seeds_of(config)
    jobs = [(method, seed, steps) for method in [GRPO, ONLINE, OFFLINE, LONGER] for seed in seeds]
    runs = run_jobs(config, train, [(SFT, 0, 0), *jobs])
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"{steps} steps of {Q} prompts x {G} completions, seeds 1 to {len(seeds)}: mean (lowest to highest). "
              f"Without a KL penalty. {config.eval_prompts} validation prompts, 4 samples each; KL to the SFT model. "
              f"Offline: {EPOCHS} epochs over the right completions; {LONGER}: as many updates of the same size on the "
              "demonstrations. No learning rate was tuned. Filtered SFT, online, is `python -m grpo_min.variants "
              "--advantage none`: cross-entropy on the right completions is REINFORCE with rewards of 0 and 1 and no "
              f"baseline. {date.today()}."]
    write_study(config, "is_rl_needed", lines, rows, curves)
    plot_methods(rows, curves, Path(config.out) / "is_rl_needed.png")


def train(config, method, seed, steps):
    """Train by this method -> what it reached, and the rows of its curve: accuracy against completions."""
    if method == SFT:
        return reached(config, method, seed, load_sft(config), 0, 0), []
    return (offline if method in (OFFLINE, LONGER) else online)(config, method, seed, steps)


def reached(config, method, seed, policy, completions, updates):
    return dict(setting=method, seed=seed, completions=completions, updates=updates,
                **measure_arithmetic(policy, load_sft(config), validation(config, "arithmetic")))


def run_folder(config, *parts):
    return Path(config.run) / "-".join(map(str, parts)).replace(" ", "_")


def online(config, method, seed, steps):
    """GRPO, or filtered SFT online. The curve is of the accuracy in training."""
    policy, metrics = train_online(config, method, seed, steps)
    points = curve(metrics, ["completions", "accuracy"], setting=method, seed=seed)
    return reached(config, method, seed, policy, steps * Q * G, steps), points


def train_online(config, method, seed, steps, study="is_rl_needed", reward=None, watch=None, **changes):
    """By filtered SFT, PPO, or else GRPO; or the run that is there -> the policy, its metrics.

    study and method name the run; reward and watch are the functions that train takes, changes are of its settings.
    """
    settings = dict(run=str(run_folder(config, study, method, seed)), sft=config.sft, seed=seed, device=config.device,
                    steps=steps, prompts_per_step=Q, group_size=G, beta=0.0, **changes)
    if method == ONLINE:
        train, settings = variants.train, variants.VariantConfig(**settings, advantage="none")
    elif method == PPO:
        train, settings = ppo.train, ppo.PPOConfig(**settings)
    else:
        train, settings = grpo.train, grpo.GRPOConfig(**settings)
    return train_or_reuse(functools.partial(train, reward=reward, evaluate=watch), settings)


def offline(config, method, seed, steps):
    """Fine-tuning on the right completions of the SFT model, or as long on the demonstrations. The curve is of the
    validation accuracy with the first quarter of the completions, the first half, and all."""
    right, points = right_answers(load_sft(config), seed, steps), []
    for share in SHARES if method == OFFLINE else [1]:
        sampled = max(1, int(share * steps))      # steps
        policy, metrics = train_offline(config, method, seed, right[:sampled], share)
        row = reached(config, method, seed, policy, sampled * Q * G if method == OFFLINE else 0, len(metrics))
        points += curve([row], ["completions", "accuracy"], setting=method, seed=seed)
    return row, points


def train_offline(config, method, seed, right, share=1):
    """Fine-tune on right completions, a list for each step, or as long on the demonstrations -> the policy, its
    metrics."""
    kept = [row for rows in right for row in rows]
    require(len(kept) >= BATCH, f"only {len(kept)} of {len(right) * Q * G} answers are right: too few for batches of "
            f"{BATCH}")
    return fine_tune(config, run_folder(config, "is_rl_needed", method, share, seed),
                     kept if method == OFFLINE else None, seed, EPOCHS * len(kept) // BATCH)


def fine_tune(config, folder, rows, seed, updates):
    """SFT of the SFT model on {prompt, response}, or None for the demonstrations -> the policy, its metrics."""
    file = DATA / "sft.jsonl"
    if rows:
        make_folder(folder.parent)
        file = Path(f"{folder}.jsonl")
        save_file(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return train_or_reuse(sft.train, sft.SFTConfig(
        run=str(folder), base=config.sft, demonstrations=str(file), steps=updates, batch_size=BATCH, lr=LR, warmup=10,
        seed=seed, device=config.device))


def right_answers(policy, seed, steps):
    """What GRPO would sample in so many steps if the policy stayed as it is, and of it the right completions: for each
    step a list of {prompt, response}."""
    rows, right = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q), []
    for step in range(steps):
        batch, _, _, rewards, texts = collect(policy, rows, Q, G, seed, step)
        right.append([dict(prompt=batch[b // G]["prompt"], response=texts[b]) for b in range(Q * G) if rewards[b] > 0])
    return right


def plot_methods(rows, curves, path):
    """Accuracy against completions: in training where it is online, of validation prompts where it is not."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[3, 2])
    accuracy, colours = column_by(rows, "setting", "accuracy"), {}
    start, = accuracy.pop(SFT)
    right.axvline(start, color="grey", lw=1)
    left.axhline(start, color="grey", lw=1, label=SFT)
    for method in accuracy:
        window, style = (1, "o-") if method in (OFFLINE, LONGER) else (5, "-")
        y = np.array([smooth(values, window) for values in seed_curves(curves, method, "accuracy")])  # (seeds, points)
        colours[method] = plot_band(left, seed_curves(curves, method, "completions")[0], y, method, style)
    left.set(xlabel="completions sampled", ylabel="accuracy (lines: in training; dots: validation)")
    left.legend(frameon=False, fontsize=8, title="mean, band: all seeds", title_fontsize=8)
    plot_seeds(right, accuracy, colours)
    right.set(xlabel="validation accuracy after training (grey: SFT)")
    finish(figure, path)
