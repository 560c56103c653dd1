"""What a step of GRPO or PPO is measured by, and what its numbers warn of.

| column of metrics.csv | meaning |
|---|---|
| reward, reward_std | mean reward, and its standard deviation within a group (mean over groups) |
| accuracy, thinking | share of right answers (where the prompts have one) and of completions that begin by thinking |
| equal_groups | share of groups whose rewards are all equal: they teach nothing |
| truncated, length | share of completions that the length limit cut; mean length in tokens, END included |
| kl | KL(policy || reference), nats per completion, estimated by k3 |
| entropy | of the next-token distribution, nats per token (GRPO with beta 0: where there is an advantage; 0: nowhere) |
| loss, grad_norm | of the policy, mean over the updates of the step; the norm is the one before clipping |
| clip_low, clip_high | share of tokens whose ratio is below 1 - clip_eps or above 1 + clip_eps (or clip_eps_high) |
| gap | largest difference between the sampler's and the trainer's log-probability of a token |
| explained_variance | PPO: share of the variance of the actual returns that the critic's values explain |
| completions | completions sampled since the start |
| dropped | with dynamic sampling: groups of this step that others replaced; all else in a row is of those kept |
| seconds_* | wall-clock by phase; memory_mb: peak memory (CUDA: allocated; else: of the process) |
"""
import resource
import sys
import time

import numpy as np
import torch

from grpo_min.ranks import mean_of_rows
from grpo_min.rewards import correct
from grpo_min.tokenizer import decode
from grpo_min.variants import log_ratio


class Clock:
    """Seconds by phase. On CUDA a lap waits for the device, so that the phase that caused the work is charged."""

    def __init__(self, device):
        self.device, self.laps = device, {}
        self.last = time.perf_counter()

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[f"seconds_{phase}"] = self.laps.get(f"seconds_{phase}", 0.0) + now - self.last
        self.last = now


def peak_memory_mb(device, of_children=False):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10      # macOS counts bytes, Linux kilobytes


def thinks(text):
    return text.lstrip().startswith("<think>")


def rollout_metrics(rewards, texts, batch, rollout, group_size, kl):
    """rewards (B,), texts (B), batch (Q rows), kl (B, N) or None -> {column: number}."""
    groups = rewards.view(-1, group_size)                                                     # (Q, G)
    finished, grouped = rollout.finished.float(), group_size > 1
    right = ""
    if "answer" in batch[0]:
        answers = [row["answer"] for row in batch for _ in range(group_size)]
        right = np.mean(correct(texts, texts, answer=answers, finished=rollout.finished.tolist()))
    return dict(reward=rewards.mean().item(), reward_std=groups.std(dim=1).mean().item() if grouped else "",
                accuracy=right, thinking=np.mean([thinks(text) for text in texts]),
                equal_groups=(groups == groups[:, :1]).all(dim=1).float().mean().item() if grouped else "",
                truncated=1 - finished.mean().item(), length=rollout.length.float().mean().item(),
                kl=kl.sum(dim=1).mean().item() if kl is not None else "")


def update_metrics(loss, norm, logprobs, old_logprobs, sampled, entropy, mask, clip_eps, clip_eps_high=0.0,
                   ratio="token"):
    """Of one update: logprobs, old_logprobs, the sampler's, entropy, mask (b, N) -> {column: number}."""
    tokens = mask.sum().clamp(min=1)
    ratio = log_ratio(logprobs.detach(), old_logprobs, mask, ratio).exp()                     # (b, N) or (b, 1)
    return dict(loss=loss.item(), grad_norm=norm, entropy=(entropy.sum() / tokens).item(),
                clip_low=((ratio < 1 - clip_eps) & mask).sum().item() / tokens.item(),
                clip_high=((ratio > 1 + (clip_eps_high or clip_eps)) & mask).sum().item() / tokens.item(),
                gap=((old_logprobs - sampled) * mask).abs().max().item())


def average(updates):
    """[{column: number}, ..] -> {column: mean over the updates}; of the gap the largest."""
    row = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    return dict(row, gap=max(update["gap"] for update in updates))


def record(run, step, row, clock, samples):
    """Complete a row with seconds, memory and completions, warn of trouble, and hand it to the run."""
    row = mean_of_rows(dict(row, **clock.laps, memory_mb=peak_memory_mb(clock.device)), clock.device)
    dropped = sum(each.get("dropped", 0) for each in [*run.rows, row])
    row.update(completions=((step + 1) * run.config.prompts_per_step + int(dropped)) * run.config.group_size)
    for name, is_trouble, meaning in TROUBLE:
        if name not in run.warned and row.get(name, "") != "" and is_trouble(row[name]):
            run.warned.add(name)
            print(f"{run.name}note: {name} is {row[name]:.3g} in step {step + 1}: {meaning}")
    run.step_done(step, row, log_line(row), samples)


def log_line(row):
    """The part of the log line that says how learning goes."""
    shown = [("reward", "{:.3f}"), ("accuracy", "{:.1%}"), ("thinking", "{:.0%}"), ("kl", "KL {:.3f}"),
             ("length", "length {:.1f}")]
    return " | ".join(form.format(row[name]) if " " in form else f"{name} {form.format(row[name])}"
                      for name, form in shown if row[name] != "")


def shown_samples(texts, rewards, advantages, batch, rollout, group_size, values=None, groups=3):
    """The first groups of a step for samples.jsonl, a dict per completion: prompt, completion, reward, advantage of its
    first token, its tokens as strings; with PPO's values (B, N) also the advantages and values of all its tokens.
    """
    lengths = rollout.length.tolist()

    def rounded(numbers, b):
        return [round(number, 4) for number in numbers[b, :lengths[b]].tolist()]
    samples = []
    for b in range(min(groups * group_size, len(texts))):
        sample = dict(prompt=batch[b // group_size]["prompt"], completion=texts[b], reward=round(rewards[b].item(), 4),
                      advantage=round(advantages[b, 0].item(), 4),
                      tokens=[decode([token]) for token in rollout.completion_ids[b, :lengths[b]].tolist()])
        if values is not None:
            sample.update(advantages=rounded(advantages, b), values=rounded(values, b))
        samples.append(sample)
    return samples


TROUBLE = [     # (column, is it trouble?, what it means)
    ("equal_groups", lambda v: v > 0.9, "nearly all groups have equal rewards and teach nothing: the task is solved, "
     "too hard, or the group too small"),
    ("truncated", lambda v: v > 0.3, "many completions are cut by the length limit: raise --max-new-tokens, or look at "
     "samples.jsonl for rambling"),
    ("kl", lambda v: v > 30, "the policy is far from the reference: read samples.jsonl, raise --beta or lower --lr"),
    ("entropy", lambda v: 0 < v < 0.005, "the policy is almost certain of every token and explores no more"),
    ("clip_high", lambda v: v > 0.3, "many ratios are clipped: the updates of a batch are too many or too large"),
    ("gap", lambda v: v > 0.01, "sampler and trainer disagree about the log-probabilities: their settings differ"),
    ("explained_variance", lambda v: v < -0.5, "the critic predicts worse than a constant: its baseline adds noise"),
]


def interval(values, resamples=1000):
    """[mean, low, high]: the mean of n values and its 95% bootstrap interval (Efron, 1979), resampled with seed 0."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return [values.mean(), *np.percentile(means, [2.5, 97.5])]


def wilson(right):
    """[share, low, high]: the share of n booleans that are true and its 95% interval (Wilson, 1927). For few of them:
    the bootstrap of values that are all equal has no width."""
    n, share, z = len(right), float(np.mean(right)), 1.96
    centre, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, *((centre + side * half) / (1 + z * z / n) for side in (-1, 1))]


def agreement(right):
    """n booleans in words: 9 of 12, 75% (95% interval 47% to 91%)."""
    return "{} of {}, {:.0%} (95% interval {:.0%} to {:.0%})".format(sum(right), len(right), *wilson(right))
