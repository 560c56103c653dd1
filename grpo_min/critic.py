"""Values of states: PPO's critic, its training before RL, and how much there is to explain.

While RL runs there is little time to learn values from nothing. So the critic is trained
before, on completions of the SFT model that are sampled once: the squared error of its
values, each state's against the reward that its completion got. (The KL penalty is 0
there: the policy is the reference yet. Rewards are not discounted.)

The ruler: of two completions that go on from one state independently of each other, the
rewards have the variance of the states' true values for a covariance. No critic can explain
more of the variance of the rewards than that.
"""
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from grpo_min.model import ScalarGPT
from grpo_min.rewards import load_reward, score
from grpo_min.rollout import Prompts, Rollout, pad, sample
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.data import batch_rows
from grpo_min.run.files import DATA, save_file
from grpo_min.run.fit import fit
from grpo_min.run.metrics import Clock, explained_variance
from grpo_min.run.ranks import RANK
from grpo_min.run.rng import generator


@dataclass
class CriticConfig:
    """Train a critic for PPO on completions of the SFT model, for one reward."""
    run: str = option("runs/critic", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the SFT model: it "
                      "is sampled, and the critic starts from it")
    task: str = option("", "Python file (executed) with prompts and reward: see task.py")
    reward: str = option("correct", "as for ppo", ["correct", "well_formed", "both",
                                                   "learned"])
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "its checkpoint, "
                               "or several with commas between them: their mean score")
    prompts: str = option("", "as for ppo: JSONL with fields prompt and, for rules, answer")
    batches: int = option(200, "batches of completions to sample")
    prompts_per_step: int = option(64, "prompts per batch and update, a completion each")
    steps: int = option(600, "updates")
    lr: float = option(3e-3, "peak learning rate")
    weight_decay: float = option(0.5, "AdamW's weight decay")
    warmup: int = option(100, "updates over which the learning rate rises")
    temperature: float = option(1.0, "sampling temperature")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    seed: int = option(1, "seed of the prompts' order and of the sampling")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


class Critic(ScalarGPT):
    """A GPT with values of states: the prompt's, and what each token has added to it.

    A token leads from its state to one other, so the difference of their values is the
    token's advantage (cf. the dueling networks of 1511.06581). It is read where the model
    knows what would be right, before the token: (gain of state t) . embedding of token t.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, tokenizer)
        self.gain = nn.Linear(config.width, config.width)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def values(self, prompts, completion_ids, mask):
        """The value of each column's state: (B, N). No state has read the last token."""
        before = completion_ids[:, :-1]  # (B, N - 1)
        states = self.trunk.states(prompts, before, mask[:, 1:])  # (B, N, D)
        taken = self.trunk.tokens(before)  # (B, N - 1, D)
        gains = (self.gain(states[:, :-1]) * taken).sum(dim=-1)  # (B, N - 1)
        return torch.cat([self.scalar(states[:, 0]), gains], dim=1).cumsum(dim=1)


def sampled_values(config, policy, reward, batch, prompts, rollout, copies, name):
    """Values by sampling: the mean reward of new continuations of each state (B, N).

    copies of them, as in VinePPO (2410.01679). 0 in columns after a completion's end, NaN
    where none was judged. name: of the random numbers. All states of a column are sampled
    together.
    """
    values = torch.zeros_like(rollout.logprobs)  # (B, N)
    group_size = len(values) // len(batch)
    for column in range(values.shape[1]):
        rows = rollout.mask[:, column].nonzero().squeeze(1)  # (n,)
        of = (rows // group_size).tolist()  # their prompts
        before = rollout.completion_ids[rows, :column]  # (n, column)
        read = [prompts.ids[q, :prompts.length[q]].tolist() + ids
                for q, ids in zip(of, before.tolist())]
        states = Prompts(*pad(read, policy.tokenizer.pad, before.device), [])
        new = sample(policy, states, copies, config.max_new_tokens - column,
                     config.temperature, generator(config.seed, f"{name} {column}"))
        before = before.repeat_interleave(copies, dim=0)  # (n * copies, column)
        whole = Rollout(torch.cat([before, new.completion_ids], dim=1),
                        torch.cat([before >= 0, new.mask], dim=1), None, new.finished)
        scores, _ = score(reward, [batch[q] for q in of], whole, copies, policy.tokenizer)
        judged = whole.mask.view(-1, copies * whole.mask.shape[1]).any(dim=1)  # (n,)
        values[rows, column] = scores.view(-1, copies).mean(dim=1).where(judged, math.nan)
    return values


class Oracle(nn.Module):
    """In place of a critic: values by sampling, which bound what any critic could give.

    ppo.train(config, reward, start_critic=Oracle) with critic "sft" and 0 critic_epochs.
    """

    def __init__(self, config, policy, device, reward=None, copies=4):
        super().__init__()
        reward, rows, _ = load_reward(config, reward, policy, device)
        self.settings, self.copies = (config, policy, reward), copies
        self.rows = {row["prompt"]: row for row in rows}
        self.unused = nn.Parameter(torch.zeros(1))  # an optimizer wants one

    def values(self, prompts, completion_ids, mask):
        """As a critic's (B, N)."""
        batch = [self.rows[text] for text in prompts.texts]
        rollout = Rollout(completion_ids, mask, mask * 0.0, None)
        values = sampled_values(*self.settings, batch, prompts, rollout, self.copies,
                                f"oracle {completion_ids.sum()}")
        return values.nan_to_num()


def explainable_variance(config, policy, reward, batch, prompts, rollout, rewards, step):
    """The share of the rewards' variance over all states that true values would explain.

    Unbiased above and below the line, from a second completion of each state. "" if all
    rewards are equal.
    """
    second = sampled_values(config, policy, reward, batch, prompts, rollout, 1,
                            f"ruler {step}")  # (B, N)
    first, known = rewards[:, None].expand_as(second), second.isfinite()  # (B, N) each
    return explainable_share(first[rollout.mask & known], second[rollout.mask & known])


def explainable_share(first, second):
    """Covariance of two independent rewards of each state (n,), over their variance."""
    first, second = first - first.mean(), second - second.mean()
    variance = (first.square().mean() + second.square().mean()) / 2
    return ((first * second).mean() / variance).item() if variance > 0 else ""


def critic_metrics(values, returns, mask, explainable):
    """What the critic explains, and the share of what it could -> PPO's part of a row."""
    explained = explained_variance(values, returns, mask)
    measured = "" not in (explained, explainable) and explainable > 0.02  # or all is noise
    return dict(explained_variance=explained, explainable_variance=explainable,
                critic_share=explained / explainable if measured else "")


def experience(config, policy, reward, rows, group_size, name):
    """Completions of the SFT model -> rows of data, prompts, rollout, rewards (B,)."""
    device, random = policy.tokens.weight.device, generator(config.seed, f"critic {name}")
    texts = [row["prompt"] for row in rows]
    prompts = Prompts.from_texts(texts, policy.tokenizer, device)
    rollout = sample(policy, prompts, group_size, config.max_new_tokens,
                     config.temperature, random)
    rewards, _ = score(reward, rows, rollout, group_size, policy.tokenizer)
    return rows, prompts, rollout, rewards


def train(config, reward=None, kind=Critic, beside=None):
    """Train -> the critic, what it explains of held-out prompts, and one row per step.

    reward(prompts, completions, **columns) -> list[float] replaces config.reward, kind the
    class of the critic; beside(critic, prompts, rollout) is a loss beside the values'.
    """
    require_positive(config, "batches", "prompts_per_step", "steps", "lr", "warmup",
                     "temperature", "max_new_tokens")
    require(config.weight_decay >= 0,
            f"--weight-decay must be at least 0, not {config.weight_decay}")
    device = pick_device(config.device)
    policy = load_model(config.sft, device)
    reward, rows, files = load_reward(config, reward, policy, device)
    order = torch.randperm(len(rows), generator=generator(config.seed, "kept", rank=0))
    rows, held = [rows[i] for i in order.tolist()], max(1, min(len(rows) // 10, 250))
    kept, rows = rows[:held], rows[held:]  # prompts that the critic is judged on
    critic, clock = policy.with_head(kind), Clock(device)

    @functools.cache
    def sampled(number):
        numbers = batch_rows(len(rows), config.prompts_per_step, config.seed, number)
        return experience(config, policy, reward, [rows[i] for i in numbers], 1, number)

    def loss_at(step):
        clock.lap("update")  # of the step before
        epoch, index = divmod(step, config.batches)
        shuffle = generator(config.seed, epoch, rank=0)
        order = torch.randperm(config.batches, generator=shuffle)
        _, prompts, rollout, rewards = sampled(order[index].item())
        clock.lap("sample")
        values = critic.values(prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        error = (values - rewards[:, None])[rollout.mask]  # (n,)
        loss = error.square().mean() + (beside(critic, prompts, rollout) if beside else 0)
        seconds, clock.laps = clock.laps, {}
        return loss, seconds

    metrics = fit(config, critic, [config.sft, *files], loss_at, config.weight_decay)
    kept = kept[:4 * config.steps]  # after a smoke test a few will do
    return critic, judge(config, policy, critic, reward, kept), metrics


@torch.no_grad()
def judge(config, policy, critic, reward, rows):
    """What a critic explains of four completions of each prompt, and what could be."""
    batch, prompts, rollout, rewards = experience(config, policy, reward, rows, 4, "held")
    values = critic.values(prompts, rollout.completion_ids, rollout.mask)  # (B, N)
    returns = rewards[:, None].expand_as(values)  # (B, N)
    explained = explained_variance(values, returns, rollout.mask) or 0
    explainable = explainable_variance(config, policy, reward, batch, prompts, rollout,
                                       rewards, 0) or 0
    share = explained / explainable if explainable > 0 else ""
    return dict(explained=explained, explainable=explainable, share=share)


def costs(config, rows):
    """What a training has cost: completions, and seconds of each phase."""
    return dict(completions=min(config.batches, config.steps) * config.prompts_per_step,
                seconds_sample=sum(row["seconds_sample"] for row in rows),
                seconds_update=sum(row["seconds_update"] for row in rows))


def main(argv=None):
    config = parse(CriticConfig, argv)
    _, figures, rows = train(config)
    figures.update(costs(config, rows))
    if RANK > 0:
        return
    print("\nof the variance of the rewards of held-out prompts the critic explains "
          f"{figures['explained']:.3f}, and {figures['explainable']:.3f} can be explained\n"
          f"{figures['completions']} completions in {figures['seconds_sample']:.0f} s, "
          f"{config.steps} updates in {figures['seconds_update']:.0f} s")
    save_file(Path(config.run) / "evaluation.json", json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    run_command(main)
