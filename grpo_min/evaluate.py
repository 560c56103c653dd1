"""Held-out evaluation of a policy: 1,000 prompts, 4 sampled answers each and a greedy one.

Every figure is [mean, low, high], with a 95% bootstrap interval over prompts. Arithmetic is
judged by the answer, animals by the hidden gold score, which no loop sees, a task of your
own by its reward; `full` is the share of ones. maj@4 is the accuracy of what most of the 4
answers to a prompt say.
"""
import json
from collections import Counter
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np

from grpo_min.gold import gold_score, is_correct
from grpo_min.rewards import correct, final_answer, numbers
from grpo_min.rollout import Prompts, sample
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.data import columns, read_jsonl
from grpo_min.run.files import DATA, save_file
from grpo_min.run.metrics import thinks
from grpo_min.run.rng import generator
from grpo_min.task import load_task

FIELDS = {"arithmetic": ["prompt", "answer"], "animals": ["prompt", "animal", "attribute"]}
SPLITS = ["val", "test", "longer"]


def interval(values, resamples=1000):
    """[mean, low, high] of n values: the 95% bootstrap interval (Efron, 1979), seed 0."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]  # of what a reward has judged
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return [values.mean(), *np.percentile(means, [2.5, 97.5])]


def wilson(right):
    """[share, low, high] of n booleans, with the 95% interval of Wilson (1927).

    For few of them: the bootstrap of values that are all equal has no width.
    """
    n, share, z = len(right), float(np.mean(right)), 1.96
    centre = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return [share, max(low, 0.0), min(high, 1.0)]      # rounding must not go beyond


def agreement(right):
    """How many of n booleans are true: 9 of 12, 75% (95% interval 47% to 91%)."""
    shares = "{:.0%} (95% interval {:.0%} to {:.0%})".format(*wilson(right))
    return f"{sum(right)} of {len(right)}, {shares}"


def held_out(domain, split, count=1000, data=DATA):
    """`count` rows (or all there are), evenly spread over DOMAIN_SPLIT.jsonl in `data`.

    domain: arithmetic, animals, or the prompts function of a task. split: val for all
    tuning, test, longer for results.
    """
    if callable(domain):
        rows = domain(split)
    else:
        files = {name: Path(data) / f"{domain}_{name}.jsonl" for name in SPLITS}
        there = [name for name, path in files.items() if path.exists()]
        require(split in there or not there,
                f"--split {split}: {domain} has only {' and '.join(there)}")
        rows = read_jsonl(files[split], FIELDS[domain])
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def answers(policy, prompts, samples, temperature, max_new_tokens=40, seed=0, batch=250):
    """Sample completions for each prompt -> their texts, whether each ended, lengths."""
    device, texts, finished, lengths = next(policy.parameters()).device, [], [], []
    for i in range(0, len(prompts), batch):
        part = Prompts.from_texts(prompts[i:i + batch], policy.tokenizer, device)
        rollout = sample(policy, part, samples, max_new_tokens, temperature,
                         generator(seed, i))
        texts += rollout.texts(policy.tokenizer)
        finished += rollout.finished.tolist()
        lengths += rollout.length.tolist()
    return texts, finished, lengths


def pass_at_k(n, right, k):
    """P(at least one of k samples is right), unbiased, from n (2107.03374, eq. 1)."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(answers):
    """The most frequent of k final answers, of a tie the first seen (2203.11171: voting).

    One that is empty ("") has no vote, nor one that is malformed or was cut (None). None if
    there is no vote at all.
    """
    votes = Counter(filter(None, answers))
    return max(votes, key=votes.get, default=None)


def evaluate(policy, domain, rows, opponent=None, samples=4, temperature=1.0,
             max_new_tokens=40):
    """Measure a policy on held-out rows -> {figure: [mean, low, high]}.

    domain: arithmetic, animals, or the reward function of a task, whose full reward is 1.
    opponent: a second policy; with it, win_rate says how often the gold score prefers this
    policy's answer to the opponent's (a tie counts half).
    """
    judge = {"arithmetic": correct, "animals": gold_score}.get(domain, domain)

    def mean(scores):
        return np.ma.masked_invalid(scores).mean(1).filled(np.nan)  # (prompts,)

    def per_prompt(values):
        return np.array(values, dtype=float).reshape(len(rows), -1)

    def judged(texts, finished):
        repeats = len(texts) // len(rows)
        column = columns([row for row in rows for _ in range(repeats)])
        prompt = column.pop("prompt")
        return per_prompt(numbers(judge, prompt, texts, finished=finished, **column))

    prompts = [row["prompt"] for row in rows]
    texts, finished, lengths = answers(policy, prompts, samples, temperature,
                                       max_new_tokens)
    scores = judged(texts, finished)  # (prompts, samples)
    greedy = judged(*answers(policy, prompts, 1, 0, max_new_tokens)[:2])  # (prompts, 1)
    name = {"arithmetic": "accuracy", "animals": "gold"}.get(domain, "reward")
    figures = {name: mean(scores), f"{name}_greedy": mean(greedy)}
    if domain == "animals":
        facts = [(row["animal"], row["attribute"]) for row in rows for _ in range(samples)]
        right = [is_correct(text, *fact) for text, fact in zip(texts, facts)]
        figures["correct"] = per_prompt(right).mean(1)
        if opponent is not None:
            theirs, ended, _ = answers(opponent, prompts, samples, temperature,
                                       max_new_tokens, seed=1)
            others = judged(theirs, ended)  # (prompts, samples)
            figures["win_rate"] = np.where(scores == others, 0.5, scores > others).mean(1)
    else:
        full = scores > 1 - 1e-6  # (prompts, samples)
        if domain != "arithmetic":
            figures["full"] = full.mean(1)
        for k in 2, 4:
            figures[f"pass@{k}"] = [pass_at_k(samples, int(row.sum()), k) for row in full]
        if domain == "arithmetic":
            votes = [final_answer(text) if end else None
                     for text, end in zip(texts, finished)]
            figures[f"maj@{samples}"] = [
                majority(votes[i * samples:(i + 1) * samples]) == row["answer"]
                for i, row in enumerate(rows)]
        figures["thinking"] = per_prompt([thinks(text) for text in texts]).mean(1)
    figures["length"] = per_prompt(lengths).mean(1)
    figures["truncated"] = 1 - per_prompt(finished).mean(1)
    return {name: interval(values) for name, values in figures.items()}


def show(figures):
    return "\n".join(f"  {name:17} {mean:7.3f}   ({low:.3f} to {high:.3f})"
                     for name, (mean, low, high) in figures.items())


@dataclass
class EvaluateConfig:
    """Measure a checkpoint on held-out prompts, with 95% intervals."""
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the policy")
    opponent: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the policy it "
                           "has to win against (animals)")
    domain: str = option("arithmetic", "what to ask about", ["arithmetic", "animals"])
    task: str = option("", "Python file with prompts and reward of your own, see task.py; "
                       "its code is executed")
    split: str = option("test", "which prompts: val (all tuning looks here), test, or "
                        "longer (arithmetic with one operation more than was trained on)",
                        SPLITS)
    prompts: int = option(1000, "number of prompts")
    samples: int = option(4, "answers sampled per prompt")
    temperature: float = option(1.0, "sampling temperature")
    max_new_tokens: int = option(40, "longest answer, in tokens")
    data: str = option(str(DATA), "folder of the prompts")
    out: str = option("", "JSON file to write the figures to")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def main(argv=None):
    config = parse(EvaluateConfig, argv)
    device = pick_device(config.device)
    require_positive(config, "prompts", "temperature", "max_new_tokens")
    require(config.samples >= 4, "pass@4 needs --samples of at least 4")
    policy, opponent = load_model(config.checkpoint, device), None
    prompts = judge = config.domain
    if config.task:
        prompts, judge = load_task(config.task, "prompts", "reward")
    elif config.domain == "animals":
        opponent = load_model(config.opponent, device)
    rows = held_out(prompts, config.split, config.prompts, config.data)
    figures = evaluate(policy, judge, rows, opponent, config.samples, config.temperature,
                       config.max_new_tokens)
    print(f"{config.checkpoint} on {len(rows)} {config.task or config.domain} "
          f"{config.split} prompts:\n{show(figures)}")
    if config.out:
        save_file(config.out, json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    run_command(main)
