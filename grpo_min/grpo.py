"""Stage 4, critic-free: Group Relative Policy Optimization (DeepSeekMath, Shao et al., 2402.03300, section 4.1).

1. sample prompts; 2. sample a group of completions for each; 3. score them; 4. the group's mean reward is the
baseline; 5. the advantage is reward minus baseline; 6. update the policy on a clipped surrogate with a KL penalty to
the reference; 7. repeat. There is no critic. ppo.py is the same file with one: read the two side by side.

Shapes: Q prompts, G completions each, B = Q * G rows, row b belongs to prompt b // G; N padded completion length.
Column t is the pair (state, action): the prompt and the completion tokens before t, and completion token t.
"""
import copy
from dataclasses import dataclass, replace

import torch

from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.metrics import Clock, average, record, rollout_metrics, shown_samples, update_metrics
from grpo_min.plots import plot_curves
from grpo_min.ranks import RANKS
from grpo_min.rewards import load_reward, score
from grpo_min.rollout import Prompts, frozen_logprobs, sample, split, token_logprobs
from grpo_min.runs import DATA, Run, batch_rows, generator, load_model, optimizer_for, update
from grpo_min.variants import ADVANTAGES, AGGREGATIONS, RATIOS, RECIPES, make_loss

REFILLS = 10      # rounds of dynamic sampling, at most


@dataclass
class GRPOConfig:
    """Stage 4: train the SFT model by GRPO. Without options: arithmetic, rewarded for right answers alone."""
    run: str = option("runs/grpo", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the SFT model: policy and reference start there")
    task: str = option("", "Python file with prompts and reward of your own, see task.py; its code is executed")
    reward: str = option("correct", "what is rewarded: right answers, well-formed thinking, both (1 and 0.2), or what "
                         "a reward model likes", ["correct", "well_formed", "both", "learned"])
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint of the reward model")
    prompts: str = option("", "JSONL with the field prompt, and answer where the reward needs it; default: data/"
                          "animals_train.jsonl for the learned reward, else data/arithmetic_train.jsonl")
    steps: int = option(80, "batches: sample, score, update")
    prompts_per_step: int = option(32, "prompts per batch, Q")
    group_size: int = option(8, "completions per prompt, G")
    epochs: int = option(1, "passes over each batch (DeepSeekMath's mu)")
    minibatches: int = option(1, "updates per pass: the batch is split by prompts into so many parts")
    lr: float = option(3e-4, "learning rate of the policy (AdamW)")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    clip_eps: float = option(0.2, "the ratio counts between 1 - clip_eps and 1 + clip_eps")
    beta: float = option(0.01, "weight of the KL penalty to the reference, reward per nat; 0: no reference at all")
    kl: str = option("k3", "estimator of the KL (Schulman, 2020)", ["k1", "k2", "k3"])
    kl_in: str = option("loss", "where the KL is charged: in the loss, or in the reward (k1 only)", ["loss", "reward"])
    scale_advantages: bool = option(False, "divide the advantages by the group's standard deviation")
    advantage: str = option("mean", "what a reward is compared with, and divided by", ["mean", *ADVANTAGES])
    ratio: str = option("token", "what is clipped: a token's ratio, a sequence's, or CISPO's weight", list(RATIOS))
    clip_eps_high: float = option(0.0, "the ratio counts up to 1 + clip_eps_high; 0: up to 1 + clip_eps")
    aggregation: str = option("sum", "what a completion's sum over its tokens is divided by, in surrogate and KL: "
                              "nothing, its length, the batch's mean length, the longest", list(AGGREGATIONS))
    dynamic_sampling: bool = option(False, "groups of equal rewards make room for groups of other prompts, in at most "
                                    f"{REFILLS} rounds")
    temperature: float = option(1.0, "sampling temperature; policy and reference are read at the same")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    seed: int = option(1, "seed of the prompts' order and of the sampling")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def group_advantages(rewards, group_size, scale=False):
    """Reward minus the mean reward of its group (2402.03300, section 4.1.2): (B,) -> (B,).

    In float64 on the CPU, so that equal float32 rewards give exactly 0. With scale, divided by the group's standard
    deviation (n - 1) + 1e-4, as published. ValueError if the groups have fewer than 2 members or do not fit.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    groups = rewards.double().cpu().view(-1, group_size)                                      # (Q, G)
    baseline = groups.mean(dim=1, keepdim=True)                                               # (Q, 1)
    advantages = groups - baseline                                                            # (Q, G)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten().to(rewards)                                                   # (B,)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's clipped surrogate (1707.06347, eq. 7), negated: (B, N) each -> scalar.

    Summed over a completion's tokens and averaged over the completions, which is the gradient of the expected reward.
    """
    ratio = (logprobs - old_logprobs).exp()                                                   # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)                                         # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)                           # (B, N)
    return -(surrogate * mask).sum(dim=1).mean()


def kl_estimate(logprobs, ref_logprobs, kind):
    """Estimates of KL(policy || reference) from the policy's own samples (Schulman, 2020): (B, N), (B, N) -> (B, N).

    k1 is unbiased and noisy; k2 is biased, small and positive; k3 is unbiased and positive. As a loss, k1 has an
    expected gradient of zero; in the reward, only k1 has the right one.
    """
    log_ratio = ref_logprobs - logprobs                                                       # (B, N)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio ** 2 / 2
    return torch.expm1(log_ratio) - log_ratio


def check(config):
    """A UserError for settings that cannot work."""
    require_positive(config, "steps", "prompts_per_step", "group_size", "epochs", "minibatches", "lr", "max_grad_norm",
                     "clip_eps", "temperature", "max_new_tokens")
    require(config.clip_eps_high >= 0, f"--clip-eps-high must be at least 0, not {config.clip_eps_high}")
    require(not config.scale_advantages or config.advantage in ("mean", "mean_std"),
            f"--scale-advantages does not go with --advantage {config.advantage}: it is --advantage mean_std")
    require(config.group_size >= 2, f"--group-size {config.group_size}: a group needs at least 2 completions, since "
            "their mean is the baseline")
    require(config.beta >= 0, f"--beta must be at least 0, not {config.beta}")
    require(config.prompts_per_step % (config.minibatches * RANKS) == 0, f"{config.prompts_per_step} prompts do not "
            f"divide into {config.minibatches} minibatches" + (f" on each of {RANKS} ranks" if RANKS > 1 else ""))
    require(config.kl_in == "loss" or config.kl == "k1", "--kl-in reward needs --kl k1: k2 and k3 in the reward have "
            "wrong gradients")


def refill(config, policy, reward, rows, step, batch, rollout, rewards, clock):
    """Dynamic sampling (DAPO 2503.14476, section 3.2): groups of equal rewards make room for groups of other prompts.

    All of them in each round, until there is none, or REFILLS rounds are over, or every prompt has had its turn; what
    is still equal then stays. What is drawn depends on seed, step and round alone.
    -> batch, prompts, rollout, rewards and texts as they are now, and how many groups were dropped.
    """
    G, batch, dropped = config.group_size, list(batch), 0
    had = set(batch_rows(len(rows), config.prompts_per_step, config.seed, step))
    order = torch.randperm(len(rows), generator=generator(f"{config.seed} refill", step)).tolist()
    others = [rows[i] for i in order if i not in had]
    for number in range(REFILLS):
        groups = rewards.view(-1, G)                                                          # (Q, G)
        equal = (groups == groups[:, :1]).all(dim=1).nonzero().flatten().tolist()[:len(others)]   # n of the Q
        if not equal:
            break
        fresh, others, dropped = others[:len(equal)], others[len(equal):], dropped + len(equal)
        clock.lap("score")
        new = sample(policy, Prompts.from_texts([row["prompt"] for row in fresh], rewards.device), G,
                     config.max_new_tokens, config.temperature, generator(f"{config.seed} refill {number}", step))
        clock.lap("sample")
        at = torch.tensor([q * G + g for q in equal for g in range(G)], device=rewards.device)    # (n * G,)
        rewards = rewards.index_copy(0, at, score(reward, fresh, new, G)[0])                  # (B,)
        rollout = rollout.with_rows(at, new)
        for q, row in zip(equal, fresh):
            batch[q] = row
    prompts = Prompts.from_texts([row["prompt"] for row in batch], rewards.device)
    return batch, prompts, rollout, rewards, rollout.texts(), dropped


def train(config, reward=None, advantage=None, loss=None, kl=kl_estimate, model=None, evaluate=None):
    """GRPO -> the trained policy and one row of metrics per step.

    reward(prompts, completions, **columns) -> list[float] replaces config.reward; advantage, loss and kl replace the
    functions of this file; model is trained in place of config.sft; evaluate(policy, step) -> dict joins its row.
    Where advantage or loss is not given, config says whether it is this file's or one of variants.py.
    """
    check(config)
    device = pick_device(config.device)
    policy = model if model is not None else load_model(config.sft, "GPT", device)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None      # stays as it is
    optimizer = optimizer_for(policy, config.lr)
    reward, rows, files = load_reward(config, reward, policy.config.context, device)
    inputs = files if model is not None else [config.sft, *files]
    advantage = advantage or {"mean": group_advantages, **ADVANTAGES}[config.advantage]
    divisor, parts = AGGREGATIONS[config.aggregation], (config.ratio, config.aggregation, config.clip_eps_high)
    loss = loss or (policy_loss if parts == ("token", "sum", 0) else make_loss(*parts, config.max_new_tokens))
    with Run(config, inputs, dict(policy=policy, optimizer=optimizer)) as run:
        for step in range(run.first_step, config.steps):
            clock = Clock(device)

            # --- 1. sample prompts ---------------------------------------------------------------------------------
            batch = [rows[i] for i in batch_rows(len(rows), config.prompts_per_step, config.seed, step)]
            prompts = Prompts.from_texts([row["prompt"] for row in batch], device)            # Q rows

            # --- 2. sample a group of completions for each ---------------------------------------------------------
            rollout = sample(policy, prompts, config.group_size, config.max_new_tokens, config.temperature,
                             generator(config.seed, step))                                    # B = Q * G rows
            clock.lap("sample")

            # --- 3. score them -------------------------------------------------------------------------------------
            rewards, texts = score(reward, batch, rollout, config.group_size)                 # (B,)
            if config.dynamic_sampling:
                batch, prompts, rollout, rewards, texts, dropped = refill(
                    config, policy, reward, rows, step, batch, rollout, rewards, clock)
            old_logprobs, ref_logprobs = None, None
            if config.beta > 0:
                ref_logprobs = frozen_logprobs(reference, prompts, rollout, config.temperature, config.minibatches)
            if config.epochs * config.minibatches > 1 or config.kl_in == "reward":
                old_logprobs = frozen_logprobs(policy, prompts, rollout, config.temperature, config.minibatches)
            clock.lap("score")

            # --- 4. the baseline is the mean reward of the group ---------------------------------------------------
            # --- 5. the advantage is what a completion has above it ------------------------------------------------
            charged = rewards                                                                 # (B,)
            if config.beta > 0 and config.kl_in == "reward":
                charge = kl(old_logprobs, ref_logprobs, config.kl)                            # (B, N)
                charged = rewards - config.beta * (charge * rollout.mask).sum(dim=1)          # (B,)
            advantages = advantage(charged, config.group_size, config.scale_advantages)       # (B,)
            advantages = advantages[:, None].expand_as(rollout.mask)                          # (B, N)
            # Without a KL penalty, a completion whose advantage is 0 has no gradient: groups of equals are left out.
            trained = rollout if config.beta > 0 else replace(rollout, mask=rollout.mask & (advantages != 0))

            # --- 6. move the policy --------------------------------------------------------------------------------
            updates = []
            for _ in range(config.epochs):
                for part, b in split(prompts, trained, config.minibatches):                   # b: the rows of the part
                    mask = rollout.mask[b]                                                    # (b, N)
                    logprobs, entropy = token_logprobs(policy, *part, config.temperature)     # (b, N) each
                    # With one update per batch the old policy is this very policy, and the ratio is exactly 1.
                    old = logprobs.detach() if old_logprobs is None else old_logprobs[b]      # (b, N)
                    objective = loss(logprobs, old, advantages[b], mask, config.clip_eps)
                    if config.beta > 0 and config.kl_in == "loss":
                        penalty = kl(logprobs, ref_logprobs[b], config.kl)                    # (b, N)
                        penalty = penalty / divisor(mask, config.max_new_tokens)              # (b, N)
                        objective = objective + config.beta * (penalty * mask).sum(dim=1).mean()
                    norm = update(run, policy, optimizer, objective, config.max_grad_norm)
                    updates.append(update_metrics(objective, norm, logprobs, old, rollout.logprobs[b], entropy,
                                                  part[2], config.clip_eps, config.clip_eps_high, config.ratio))
                    clock.lap("update")

            # --- 7. repeat -----------------------------------------------------------------------------------------
            drift = None if ref_logprobs is None else kl_estimate(rollout.logprobs, ref_logprobs, "k3")   # (B, N)
            row = rollout_metrics(rewards, texts, batch, rollout, config.group_size, drift)
            row.update(dict(dropped=dropped * RANKS) if config.dynamic_sampling else {})      # record means over ranks
            row.update(**average(updates), **(evaluate(policy, step) if evaluate else {}))
            samples = shown_samples(texts, rewards, advantages, batch, rollout, config.group_size)
            record(run, step, row, clock, samples)
        if run.folder:
            plot_curves(run.rows, run.folder / "curves.png")
    return policy, run.rows


def main(argv=None):
    train(parse(GRPOConfig, argv, RECIPES))


if __name__ == "__main__":
    run_command(main)
