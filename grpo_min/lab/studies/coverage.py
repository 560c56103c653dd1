"""Does RL add abilities, or sharpen what is there? pass@k for k up to 128, before and after: with many samples a base
model is said to overtake what RL made of it (Yue et al., 2504.13837).

GRPO, PPO and filtered SFT from the same SFT weights, with the runs of is_rl_needed. pass@k of the SFT model is at once
the best of k by the true rule; filtered SFT, offline, is fine-tuned on what that rule keeps of its samples. Asked are
validation prompts of arithmetic, longer chains than were trained on, and Countdown, with the runs of the study
countdown. 5 seeds. Writes coverage.csv (a row per run), -curves.csv, .md and .png.
"""
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min.evaluate import agreement, answers, held_out, pass_at_k
from grpo_min.lab.studies import countdown
from grpo_min.lab.studies.common import (column_by, grouped, load_sft, plot_band, run_jobs, seed_table, seeds_of, sized,
                                         table, write_study)
from grpo_min.lab.studies.is_rl_needed import (GRPO, OFFLINE, ONLINE, PPO, SFT, right_answers, train_offline,
                                               train_online)
from grpo_min.rewards import correct
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import pick_device
from grpo_min.run.data import columns
from grpo_min.run.files import DATA
from grpo_min.run.plots import finish, plt
from grpo_min.task import load_task
from grpo_min.tokenizer import Tokenizer

BASE, AGAIN = "base model", "SFT, sampled again"
KINDS = ARITHMETIC, LONGER, COUNTDOWN = "arithmetic", "longer chains", "Countdown"      # of prompts
PROMPTS, SAMPLES = 150, 128
LABELS = {"prompts": ("asked", "{}"), "": ("setting", "{}")}
NUMBERS = {f"pass@{k}": (f"pass@{k}", "{:.1%}") for k in (1, 4, 16, 64, 128)}


def study(config):
    steps, seeds, samples = config.steps or sized(config, 40, 3), seeds_of(config), sized(config, SAMPLES, 8)
    run_jobs(config, countdown.fine_tune, [()])
    jobs = [("", BASE, 0), ("", SFT, 0), (COUNTDOWN, SFT, 0)]
    jobs += [("", method, seed) for method in [AGAIN, GRPO, PPO, ONLINE, OFFLINE] for seed in seeds]
    jobs += [(COUNTDOWN, method, seed) for method in [AGAIN, GRPO] for seed in seeds]
    counted = sum(run_jobs(config, count_right, [(*job, steps, samples) for job in jobs]), [])
    counted.sort(key=lambda row: KINDS.index(row["asked"]))
    rows, curves = [], []
    for row in counted:
        label = {name: row[name] for name in ("asked", "setting", "seed")}
        points = [dict(label, k=2 ** i, share=pass_at(row["right"], samples, 2 ** i))
                  for i in range(samples.bit_length())]
        rows.append(dict(label, **{f"pass@{point['k']}": point["share"] for point in points}))
        curves += points
    numbers = {heading: number for heading, number in NUMBERS.items() if heading in rows[0]}
    lines = seed_table(LABELS, numbers, rows)
    lines += ["", f"Seeds 1 to {len(seeds)} of training and sampling: mean (lowest to highest). "
              f"{min(config.eval_prompts, PROMPTS)} prompts of a kind, {samples} samples each at temperature 1; pass@k "
              f"is the unbiased estimate (2107.03374). {steps} steps of 16 x 8 without a KL penalty; Countdown: GRPO "
              "as in the study countdown, from its own SFT model. The base model, which knows no chat, goes on with "
              "the prompt as a text, and what it says after its last \"is\" is its answer.", "",
              f"Prompts with no right answer among {samples} before and at least one after in most of the seeds, and "
              "the reverse (Wilson intervals over prompts). What the SFT model gains and loses when it is sampled "
              "again is luck.", "", *change_table(counted), "", f"{date.today()}."]
    write_study(config, "coverage", lines, rows, curves)
    plot_coverage(curves, Path(config.out) / "coverage.png")


def pass_at(right, samples, k):
    """Counts of right answers among the samples of each prompt -> the mean of pass@k over the prompts."""
    return float(np.mean([pass_at_k(samples, count, k) for count in right]))


# --- training and counting ----------------------------------------------------------------------------------------

def trained(config, method, seed, steps):
    """The policy of a method on arithmetic, trained or taken from the run that is there."""
    if method == BASE:
        model = load_model(DATA / "checkpoints/base.pt", pick_device(config.device))
        chats = model.tokenizer      # it has read documents, each after END
        model.tokenizer = Tokenizer(chats.ranks, chats.special, chats.pattern, prompt="<|end|>{}")
        return model
    if method in (SFT, AGAIN):
        return load_sft(config)
    if method == OFFLINE:
        return train_offline(config, method, seed, right_answers(load_sft(config), seed, steps))[0]
    return train_online(config, method, seed, steps)[0]


def count_right(config, task, method, seed, steps, samples):
    """Train, and sample answers -> for each kind of prompts a row with the number of right answers to each prompt."""
    if task == COUNTDOWN:
        prompts, reward = load_task(str(countdown.ROOT / countdown.TASK), "prompts", "reward")
        policy, _ = countdown.train(config, seed if method == GRPO else 0)
        asked, longest = {COUNTDOWN: (prompts, "val")}, countdown.LENGTH["max_new_tokens"]
    else:
        policy, reward, longest = trained(config, method, seed, steps), correct, 40
        asked = {ARITHMETIC: ("arithmetic", "val"), LONGER: ("arithmetic", "longer")}
    rows = []
    for kind, which in asked.items():
        problems = held_out(*which, min(config.eval_prompts, PROMPTS))
        texts, finished, _ = answers(policy, [row["prompt"] for row in problems], samples, 1.0, longest, seed, batch=16)
        if method == BASE:
            texts = list(map(last_value, texts))
        column = columns([row for row in problems for _ in range(samples)])
        scores = np.reshape(reward(column.pop("prompt"), texts, finished=finished, **column), (-1, samples))
        rows.append(dict(asked=kind, setting=method, seed=seed, right=(scores == 1).sum(axis=1).tolist()))
    return rows


def last_value(text):
    """What a text of the base model says the chain comes to: " 3 plus 4 is 7, 7 minus 2 is 5." -> "5"."""
    return text.removesuffix(".").rpartition(" is ")[2]


# --- what was gained and lost -------------------------------------------------------------------------------------

def changes(before, after):
    """Counts of right answers of R prompts before, and of each run after (runs, R) -> whether each prompt is solved by
    none before and by most runs after, and the reverse: two lists of R booleans."""
    solved, most = np.array(before) > 0, (np.array(after) > 0).mean(axis=0) > 0.5  # (R,)
    return (most & ~solved).tolist(), (solved & ~most).tolist()


def change_table(counted):
    lines = []
    for (asked, before), start in grouped(counted, "asked", "setting").items():
        for (there, method), runs in grouped(counted, "asked", "setting").items():
            if before in (BASE, SFT) and there == asked and method not in (BASE, SFT):
                gained, lost = changes(start[0]["right"], [run["right"] for run in runs])
                lines.append([asked, before, method, agreement(gained), agreement(lost)])
    return table(["prompts", "before", "after", "gained", "lost"], lines)


def plot_coverage(curves, path):
    """pass@k over k: a panel for each kind of prompts, the mean of the seeds, a band from lowest to highest."""
    kinds = grouped(curves, "asked")
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4.4))
    settings = dict.fromkeys(row["setting"] for row in curves if row["setting"] != AGAIN)
    colours = dict(zip(settings, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    for axis, ((asked,), points) in zip(axes, kinds.items()):
        for (setting,), line in grouped(points, "setting").items():
            if setting in colours:
                axis.set_prop_cycle(color=[colours[setting]])
                y = np.array(list(column_by(line, "seed", "share").values()))  # (seeds, points)
                plot_band(axis, list(column_by(line, "k", "share")), y, setting)
        axis.set_xscale("log", base=2)
        axis.set(title=asked, xlabel="k, samples", ylabel="pass@k", ylim=(0, 1.02))
    axes[0].legend(frameon=False, fontsize=8, title="mean, band: all seeds", title_fontsize=8)
    finish(figure, path)
