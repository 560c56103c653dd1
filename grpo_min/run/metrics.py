"""What a step of GRPO or PPO is measured by (see tutorials/HOWTO.md), and warnings."""
import resource
import sys
import time

import numpy as np
import torch

from grpo_min.rewards import correct
from grpo_min.run.data import columns
from grpo_min.run.ranks import mean_of_rows


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
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    peak = resource.getrusage(who).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10      # bytes on macOS


def thinks(text):
    return text.lstrip().startswith("<think>")


def rollout_metrics(rewards, texts, batch, rollout, group_size, ref_logprobs):
    """rewards (B,), texts, batch (Q rows), ref_logprobs (B, N) or None -> a row's part."""
    groups = rewards.view(-1, group_size)  # (Q, G)
    finished, right, spread, equal, kl = rollout.finished.float(), "", "", "", ""
    if "answer" in batch[0]:
        answers = [row["answer"] for row in batch for _ in range(group_size)]
        right = np.mean(correct(texts, texts, answers, rollout.finished.tolist()))
    if group_size > 1:
        spread = groups.std(dim=1).mean().item()
        equal = (groups == groups[:, :1]).all(dim=1).float().mean().item()
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - rollout.logprobs) * rollout.mask  # (B, N)
        kl = (torch.expm1(log_ratio) - log_ratio).sum(dim=1).mean().item()
    return dict(reward=rewards.mean().item(), reward_std=spread, accuracy=right,
                thinking=np.mean([thinks(text) for text in texts]), equal_groups=equal,
                truncated=1 - finished.mean().item(),
                length=rollout.length.float().mean().item(), kl=kl)


def update_metrics(loss, norm, logprobs, old_logprobs, sampled, entropy, mask, clip_eps):
    """Of one update; sampled: the sampler's log-probabilities (b, N) -> a row's part."""
    tokens = mask.sum().clamp(min=1)
    ratio = (logprobs.detach() - old_logprobs).exp()  # (b, N)
    return dict(loss=loss.item(), grad_norm=norm, entropy=(entropy.sum() / tokens).item(),
                clip_low=((ratio < 1 - clip_eps) & mask).sum().item() / tokens.item(),
                clip_high=((ratio > 1 + clip_eps) & mask).sum().item() / tokens.item(),
                gap=((old_logprobs - sampled) * mask).abs().max().item())


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) of real tokens; of a constant it is 0."""
    variance = returns[mask].var()
    return (1 - (returns - values)[mask].var() / variance).item() if variance > 0 else ""


def average(updates):
    """[{column: number}, ..] -> {column: mean over the updates}; of the gap the largest."""
    row = {name: float(np.mean(values)) for name, values in columns(updates).items()}
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
    samples, lengths = [], rollout.length.tolist()
    for b in range(min(3 * group_size, len(texts))):
        ids = rollout.completion_ids[b, :lengths[b]].tolist()
        sample = dict(prompt=batch[b // group_size]["prompt"], completion=texts[b],
                      reward=round(rewards[b].item(), 4),
                      advantage=round(advantages[b, 0].item(), 4),
                      tokens=[tokenizer.decode([token]) for token in ids])
        if values is not None:
            for name, numbers in ("advantages", advantages), ("values", values):
                sample[name] = [round(x, 4) for x in numbers[b, :lengths[b]].tolist()]
        samples.append(sample)
    return samples


TROUBLE = [     # (column, is it trouble?, what it means)
    ("equal_groups", lambda v: v > 0.9, "nearly all groups have equal rewards and teach "
     "nothing: the task is solved, too hard, or the group too small"),
    ("truncated", lambda v: v > 0.3, "many completions are cut by the length limit: raise "
     "--max-new-tokens, or look at samples.jsonl for rambling"),
    ("kl", lambda v: v > 30, "the policy is far from the reference: read samples.jsonl, "
     "raise --beta or lower --lr"),
    ("entropy", lambda v: 0 < v < 0.005, "the policy is almost certain of every token and "
     "explores no more"),
    ("clip_high", lambda v: v > 0.3, "many ratios are clipped: the updates of a batch are "
     "too many or too large"),
    ("gap", lambda v: v > 0.01, "sampler and trainer disagree about the log-probabilities: "
     "their settings differ"),
    ("critic_share", lambda v: v < 0.1, "the critic explains less than a tenth of what can "
     "be: its baseline is no better than a constant. See grpo_min.critic"),
    ("explained_variance", lambda v: v < -0.5, "the critic predicts worse than a constant"),
]
