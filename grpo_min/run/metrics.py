"""What a step of GRPO or PPO is measured by (see tutorials/HOWTO.md), and warnings."""
import re
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import numpy as np
import torch

from grpo_min.rewards import correct
from grpo_min.run.data import columns
from grpo_min.run.ranks import RANKS, mean_of_rows


STATUS = Path("/proc/self/status")  # on Linux


class Clock:
    """Seconds by phase. On CUDA a lap waits for the device: the right phase pays."""

    def __init__(self, device):
        self.device, self.laps = device, {}
        self.last = time.perf_counter()

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, name = time.perf_counter(), f"seconds_{phase}"
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now


def peak_memory_mb(device, of_children=False):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return ""
    status = STATUS.read_text(encoding="utf-8") if STATUS.exists() else ""
    own = re.search(r"VmHWM:\s+(\d+) kB", status)
    if own and not of_children:  # ru_maxrss begins with the peak of who started the process
        return int(own[1]) / 2**10
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    peak = resource.getrusage(who).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10      # bytes on macOS


def thinks(text):
    return text.lstrip().startswith("<think>")


def rollout_metrics(rewards, texts, batch, rollout, group_size, ref_logprobs):
    """rewards (B,), texts, batch (Q rows), ref_logprobs (B, N) or None -> a row's part."""
    kl, right, spread, equal = torch.zeros_like(rewards), "", "", ""
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - rollout.logprobs) * rollout.mask  # (B, N)
        kl = (torch.expm1(log_ratio) - log_ratio).sum(dim=1)  # (B,)
    # All at once to the CPU, which waits for a card each time.
    rewards, kl, length, finished = torch.stack(
        [rewards, kl, rollout.length, rollout.finished]).cpu()  # (B,) each
    judged, groups = length > 0, rewards.view(-1, group_size)  # (B,), (Q, G)

    def mean(values):
        """Of the completions that were judged: (B,) -> a number."""
        return values[judged].mean().item() if judged.any() else ""
    if "answer" in batch[0]:
        answers = [row["answer"] for row in batch for _ in range(group_size)]
        right = np.mean(correct(texts, texts, answers, finished.tolist()))
    if group_size > 1:
        spread = groups.std(dim=1).mean().item()
        equal = (groups == groups[:, :1]).all(dim=1).float().mean().item()
    more = {}
    if RANKS > 1 or not judged.all():  # all ranks need the same columns
        more = dict(unjudged=1 - judged.float().mean().item())
    return dict(reward=mean(rewards), reward_std=spread, accuracy=right,
                thinking=np.mean([thinks(text) for text in texts]), equal_groups=equal,
                truncated=1 - finished.mean().item(),
                length=mean(length), kl="" if ref_logprobs is None else mean(kl), **more)


def update_metrics(loss, norm, logprobs, old_logprobs, sampled, entropy, mask, clip_eps):
    """Of one update; sampled: the sampler's log-probabilities (b, N) -> a row's part."""
    tokens = mask.sum().clamp(min=1)
    ratio = (logprobs.detach() - old_logprobs).exp()  # (b, N)
    low = ((ratio < 1 - clip_eps) & mask).sum()
    high = ((ratio > 1 + clip_eps) & mask).sum()
    gap = ((old_logprobs - sampled) * mask).abs().max()
    loss, entropy, low, high, gap, tokens = torch.stack(
        [loss.detach(), entropy.sum() / tokens, low, high, gap, tokens]).tolist()
    return dict(loss=loss, grad_norm=norm, entropy=entropy, clip_low=low / tokens,
                clip_high=high / tokens, gap=gap)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) of real tokens; of a constant it is 0."""
    values, returns, mask = torch.stack([values, returns, mask]).cpu()  # (B, N) each
    mask = mask > 0
    if mask.sum() < 2:
        return ""
    variance = returns[mask].var()
    return (1 - (returns - values)[mask].var() / variance).item() if variance > 0 else ""


def average(updates):
    """[{column: number or ""}, ..] -> {column: mean over them}; of the gap the largest."""
    def mean(values):
        return float(np.mean([value for value in values if value != ""]))
    row = {name: mean(values) for name, values in columns(updates).items()}
    return dict(row, gap=max(columns(updates)["gap"]))


def record(run, step, row, clock, samples):
    """Add seconds, memory and completions to a row, warn of trouble, hand it to the run."""
    row = dict(row, **clock.laps, memory_mb=peak_memory_mb(clock.device))
    row = mean_of_rows(row, clock.device)
    dropped = sum(each.get("dropped", 0) for each in [*run.rows, row])
    groups = (step + 1) * run.config.prompts_per_step + int(dropped)
    row["completions"] = groups * run.config.group_size
    for name, is_trouble, meaning in TROUBLE:
        if name not in run.warned and row.get(name, "") != "" and is_trouble(row[name]):
            run.warned.add(name)
            value = f"{name} is {row[name]:.3g} in step {step + 1}"
            begin = "\n" if sys.stdout.isatty() else ""         # not behind the log line
            print(f"{begin}{run.name}note: {value}: {meaning}")
    run.step_done(step, row, log_line(row), samples)
    if run.folder and step + 1 == run.config.steps:
        from grpo_min.run.plots import plot_curves     # matplotlib takes a second to import
        plot_curves(run.rows, run.folder / "curves.png")


def log_line(row):
    """The part of the log line that says how learning goes."""
    forms = dict(reward="reward {:.3f}", accuracy="accuracy {:.1%}",
                 thinking="thinking {:.0%}", kl="KL {:.3f}", length="length {:.1f}")
    return " | ".join(form.format(row[n]) for n, form in forms.items() if row[n] != "")


def shown_samples(texts, rewards, advantages, batch, rollout, group_size, tokenizer,
                  values=None):
    """The first three groups of a step for samples.jsonl, a dict per completion; with PPO's
    values (B, N) also the advantages and values of all its tokens."""
    samples, first = [], slice(3 * group_size)
    lengths, rewards, advantages, ids = (x[first].tolist() for x in (
        rollout.length, rewards, advantages, rollout.completion_ids))
    values = values if values is None else values[first].tolist()
    for b, length in enumerate(lengths):
        reward = round(rewards[b], 4) if length else None       # not judged
        sample = dict(prompt=batch[b // group_size]["prompt"], completion=texts[b],
                      reward=reward,
                      advantage=round(advantages[b][0], 4),
                      tokens=[tokenizer.decode([token]) for token in ids[b][:length]])
        if values is not None:
            for name, numbers in ("advantages", advantages), ("values", values):
                sample[name] = [round(x, 4) for x in numbers[b][:length]]
        samples.append(sample)
    return samples


TROUBLE = [     # (column, is it trouble?, what it means)
    ("equal_groups", lambda v: v > 0.9, "nearly all groups have equal rewards and teach "
     "nothing: the task is solved, too hard, or the group too small"),
    ("truncated", lambda v: v > 0.3, "many completions are cut by the length limit: raise "
     "--max-new-tokens, or look at samples.jsonl for rambling"),
    ("kl", lambda v: v > 20, "the policy is far from the reference: read samples.jsonl, "
     "raise --beta or lower --lr"),
    ("entropy", lambda v: 0 < v < 0.005, "the policy is almost certain of every token and "
     "explores no more"),
    ("clip_high", lambda v: v > 0.03, "many ratios are clipped: the updates of a batch are "
     "too many or too large"),
    ("gap", lambda v: v > 0.01, "sampler and trainer disagree about the log-probabilities: "
     "their settings differ"),
    ("critic_share", lambda v: v < 0.1, "the critic explains less than a tenth of what can "
     "be: its baseline is no better than a constant. See grpo_min.critic"),
    ("explained_variance", lambda v: v < -0.5, "the critic predicts worse than a constant"),
]
