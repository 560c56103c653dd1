"""What the studies share: settings, runs beside each other, tables, figures, and how a policy is measured.

A study trains every setting with every seed, judges the policies on the validation prompts, which nothing else uses,
and writes NAME.csv (a row per run), for most NAME-curves.csv (a row per step) and NAME.png, and NAME.md (the tables,
and how they were measured). Runs that are there with the same settings are used again.
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grpo_min import grpo, ppo, reward_model
from grpo_min.evaluate import held_out
from grpo_min.gold import gold_score
from grpo_min.lab.compare import PER_REWARD
from grpo_min.lab.processes import beside_each_other, train_or_reuse
from grpo_min.lab.report import RESULTS, spread, table_row
from grpo_min.rewards import correct, learned, score
from grpo_min.rollout import Prompts, frozen_logprobs, sample
from grpo_min.run.config import option, pick_device
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import columns
from grpo_min.run.files import DATA, make_folder, save_file
from grpo_min.run.metrics import Clock, thinks
from grpo_min.run.rng import generator
from grpo_min.run.table import write_csv


@dataclass
class StudyConfig:
    """Run a study and write its results: python -m grpo_min.lab.studies NAME [options]

    tuning              which learning rate and critic suit each algorithm
    baselines           which baseline learns best
    group_size          how many completions in a group
    recipes             are the newer recipes better
    length              by what to divide the sum over a completion's tokens
    gradients           how noisy the gradient is under each baseline
    recipes_one_update  do the recipes differ at all, with one update per batch
    is_rl_needed        is RL needed, or does fine-tuning on right answers do
    critic              what kind of critic PPO needs
    credit              when does a critic pay
    noise               what noisy annotators cost
    overoptimisation    is a learned reward over-optimised
    kl                  how much KL penalty, and charged where
    countdown           does the loop learn a task of one's own
    coverage            does RL add abilities, or sharpen what is there
    placebo             what improves although nothing true is rewarded
    forgetting          what is forgotten of the animals while learning arithmetic
    all                 those from baselines to forgetting, and the minutes of each
    luck                the main job with other seeds in every stage
    threads             the main job where other processes use the cores
    real                what RL makes of a real model, SmolLM2
    """
    run: str = option("runs/study", "folder for the runs")
    out: str = option(str(RESULTS), "folder for the results")
    seeds: int = option(0, "seeds of each setting; 0: 1 for tuning, 3 for countdown and real, else 5")
    steps: int = option(0, "batches per run; 0: the study's")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint that all start from")
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint of the reward model, for kl")
    eval_prompts: int = option(1000, "validation prompts per evaluation")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])
    quick: bool = option(False, "a smoke test: few settings, steps and prompts, in the folder quick of --run")


def sized(config, full, quick):
    """A size of the study, or that of its smoke test."""
    return quick if config.quick else full


def seeds_of(config, default=5):
    return range(1, (config.seeds or sized(config, default, 1)) + 1)


def run_jobs(config, function, jobs):
    """function(config, *job) of each job, beside each other -> the results, in the order of the jobs."""
    with beside_each_other(pick_device(config.device)) as begin:
        futures = [begin(function, config, *job) for job in jobs]
        return [future.result() for future in futures]


def load_sft(config):
    return load_model(config.sft, pick_device(config.device))


def validation(config, domain):
    """Rows of the validation prompts of arithmetic or animals."""
    return held_out(domain, "val", config.eval_prompts)


# --- rows ---------------------------------------------------------------------------------------------------------

def grouped(rows, *keys):
    """Rows -> {values of these keys, a tuple: its rows}, in the order in which they come."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def column_by(rows, key, column):
    """Rows -> {value of key: [column of each of its rows]}."""
    columns = {}
    for row in rows:
        columns.setdefault(row[key], []).append(row[column])
    return columns


def seed_curves(curves, setting, column):
    """Rows of curves -> the column of each seed of this setting: [[.., along the run], ..]."""
    return list(column_by([row for row in curves if row["setting"] == setting], "seed", column).values())


def curve(metrics, names, **labels):
    """Rows of metrics -> rows for NAME-curves.csv: the labels, and the columns of these names ("" if it has none)."""
    points = []
    for row in metrics:
        points.append({**labels, **{name: row.get(name, "") for name in names}})
    return points


def sides(values):
    """{label: numbers of its seeds}, the first being compared with -> labels with every seed above its highest, with
    every seed below its lowest, and all others."""
    (_, first), *others = values.items()
    above = [label for label, numbers in others if min(numbers) > max(first)]
    below = [label for label, numbers in others if max(numbers) < min(first)]
    return above, below, [label for label, _ in others if label not in above + below]


def first_of(metrics, name):
    """Mean of the first ten numbers of a column; None where it was not measured."""
    values = [row[name] for row in metrics if row.get(name, "") != ""][:10]
    return float(np.mean(values)) if values else None


def last_of(metrics, name):
    return first_of(metrics[::-1], name)


def seconds_of(metrics):
    """What the phases of all steps took."""
    return sum(row[key] for row in metrics for key in row if key.startswith("seconds"))


# --- tables and figures -------------------------------------------------------------------------------------------

def table(headings, rows):
    """Headings and rows of cells -> lines of Markdown."""
    lines = table_row(headings) + table_row(["---"] * len(headings))
    for cells in rows:
        lines += table_row(cells)
    return lines


def seed_table(labels, numbers, rows):
    """Rows of runs -> a table with a line for each setting: mean (lowest to highest) of its seeds.

    labels, numbers: {heading: (key, form)}. Runs with the same labels are the seeds of a setting.
    """
    lines = []
    for group in grouped(rows, *(key for key, _ in labels.values())).values():
        cells = [form.format(group[0][key]) for key, form in labels.values()]
        for key, form in numbers.values():
            cells.append(spread([row[key] for row in group], form))
        lines.append(cells)
    return table([*labels, *numbers], lines)


def write_study(config, name, lines, rows=(), curves=()):
    """Lines of Markdown -> NAME.md in config.out and onto the screen; rows -> NAME.csv, and NAME-curves.csv."""
    out = Path(config.out)
    make_folder(out)
    if rows:
        write_csv(out / f"{name}.csv", rows)
    if curves:
        write_csv(out / f"{name}-curves.csv", curves)
    save_file(out / f"{name}.md", "\n".join([*lines, ""]).encode())
    print("\n" + "\n".join(lines))


def plot_band(axis, x, y, label, style="-"):
    """Curves of the seeds, y (seeds, points), as their mean and a band from lowest to highest -> the colour."""
    line, = axis.plot(x, y.mean(0), style, label=label)
    axis.fill_between(x, y.min(0), y.max(0), alpha=0.15, color=line.get_color(), lw=0)
    return line.get_color()


def plot_seeds(axis, numbers, colours):
    """{setting: a number of each seed} as dots, the settings below each other."""
    for position, (setting, values) in enumerate(numbers.items()):
        axis.plot(values, [position] * len(values), "o", color=colours[setting])
    axis.set(yticks=range(len(numbers)), yticklabels=list(numbers))
    axis.invert_yaxis()


# --- what a policy does -------------------------------------------------------------------------------------------

def collect(policy, rows, Q, G, seed, step):
    """What GRPO samples in a step, rewarded for right answers -> batch, prompts, rollout, rewards (B,), texts."""
    settings = grpo.GRPOConfig(prompts_per_step=Q, group_size=G, seed=seed)
    return grpo.collect(settings, policy, correct, rows, step, Clock(next(policy.parameters()).device))


def answer(policy, rows, samples, batch=250):
    """Sample answers to the rows, always with the same random numbers -> (rows, prompts, rollout) of each batch."""
    device = next(policy.parameters()).device
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        prompts = Prompts.from_texts([row["prompt"] for row in part], policy.tokenizer, device)
        yield part, prompts, sample(policy, prompts, samples, 40, 1.0, generator(0, start))


def measure_arithmetic(policy, reference, rows, samples=4):
    """Answer each of the rows `samples` times -> accuracy, share of thinking, length (tokens), and KL(policy ||
    reference) in nats per completion, estimated by k3."""
    figures = []
    for part, prompts, rollout in answer(policy, rows, samples):
        rewards, texts = score(correct, part, rollout, samples, policy.tokenizer)  # (B,)
        reference_logprobs = frozen_logprobs(reference, prompts, rollout, 1.0, 1)  # (B, N)
        kl = grpo.kl_estimate(rollout.logprobs, reference_logprobs, "k3") * rollout.mask  # (B, N)
        figures += zip(rewards.tolist(), map(thinks, texts), rollout.length.tolist(), kl.sum(dim=1).tolist())
    return dict(zip(["accuracy", "thinking", "length", "kl"], map(float, np.mean(figures, axis=0))))


def measure_animals(policy, sft, reward, rows, samples=4, batch=250):
    """Answer each of R rows `samples` times -> a dict of figures, and the answers [(prompt, text, proxy, gold)].

    proxy is the reward model's score, gold the gold score, gold_even and gold_odd that of every second prompt. kl is
    KL(policy || SFT model) in nats per completion: the mean of k1, log pi - log pi_sft summed over the tokens, which is
    unbiased.
    """
    texts, finished, kl = [], [], []
    for _, prompts, rollout in answer(policy, rows, samples, batch):
        k1 = (rollout.logprobs - frozen_logprobs(sft, prompts, rollout, 1.0, 1)) * rollout.mask  # (B, N)
        kl += k1.sum(dim=1).tolist()
        texts += rollout.texts(policy.tokenizer)
        finished += rollout.finished.tolist()
    column = columns([row for row in rows for _ in range(samples)])
    proxy = reward(column["prompt"], texts, finished=finished)
    gold = gold_score(column["prompt"], texts, column["animal"], column["attribute"])
    prompt_gold = np.reshape(gold, (len(rows), samples)).mean(axis=1)  # (R,)
    figures = dict(kl=float(np.mean(kl)), proxy=float(np.mean(proxy)), gold=float(np.mean(gold)),
                   gold_even=float(prompt_gold[::2].mean()), gold_odd=float(prompt_gold[1::2].mean()))
    return figures, list(zip(column["prompt"], texts, proxy, gold))


# --- learned rewards on the animals -------------------------------------------------------------------------------

def shuffled(rows, seed):
    order = torch.randperm(len(rows), generator=generator(seed, "pairs", rank=0)).tolist()
    return [rows[i] for i in order]


def heldout_pairs():
    return reward_model.read_heldout(DATA / "preferences_heldout.jsonl")


def margins(reward, pairs):
    """The score of the chosen answer minus that of the rejected one: (pairs,)."""
    column = columns(pairs)
    facts = dict(animal=column["animal"], attribute=column["attribute"])
    return np.subtract(reward(column["prompt"], column["chosen"], **facts),
                       reward(column["prompt"], column["rejected"], **facts))


def gold_agreement(reward, pairs):
    """The share of pairs that a reward puts into the order of their gold scores; ties of gold are left out."""
    gold = margins(gold_score, pairs)  # (pairs,)
    return float(np.mean((margins(reward, pairs) * gold > 0)[gold != 0]))


def train_reward_model(config, name, pairs, updates, seed):
    """Train a reward model on these pairs, or take the one that is there -> its checkpoint and its reward function."""
    run = Path(config.run) / name
    make_folder(run.parent)
    save_file(f"{run}.jsonl", "".join(json.dumps(row) + "\n" for row in pairs).encode())
    model, _ = train_or_reuse(reward_model.train, reward_model.RewardModelConfig(
        run=str(run), sft=config.sft, preferences=f"{run}.jsonl", steps=updates, warmup=min(100, updates // 4 + 1),
        seed=seed, device=config.device))
    return run / "checkpoint.pt", learned(model)


def train_policy(config, name, checkpoint, steps, seed, watch=None, **changes):
    """GRPO on a reward model, 16 prompts x 8 completions, or the run that is there -> the policy, its metrics. With a
    critic among the changes it is PPO."""
    train, kind = (ppo.train, ppo.PPOConfig) if "critic" in changes else (grpo.train, grpo.GRPOConfig)
    settings = dict(PER_REWARD["learned"], run=str(Path(config.run) / name), sft=config.sft, reward="learned",
                    reward_model=str(checkpoint), seed=seed, steps=config.steps or steps, prompts_per_step=16,
                    group_size=8, device=config.device)
    return train_or_reuse(functools.partial(train, evaluate=watch), kind(**{**settings, **changes}))
