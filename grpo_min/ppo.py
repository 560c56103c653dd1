"""Stage 4: reinforcement learning on the policy's own completions, in seven steps.

PPO, Proximal Policy Optimization (1707.06347): the baseline is a critic's value of each
state, the advantage how much better it went after a token than the critic expected. The
critic learns, too. grpo.py is the same file without one: read the two side by side.

1. sample prompts; 2. sample a group of completions for each; 3. score them; 4. the
baseline; 5. the advantages; 6. update the policy on a clipped surrogate with a KL penalty
to the reference; 7. repeat.

Shapes: Q prompts, G completions each, B = Q * G rows, row b belongs to prompt b // G;
N padded completion length. Column t is the pair (state, action): the prompt and the
completion tokens before t, and completion token t.
"""
from dataclasses import dataclass

import torch

from grpo_min.critic import Critic, critic_metrics, explainable_variance
from grpo_min.rewards import correct, load_reward, score
from grpo_min.rollout import Prompts, frozen_logprobs, sample, split, token_logprobs
from grpo_min.run import metrics
from grpo_min.run.checkpoint import frozen_copy, load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.data import batch_rows
from grpo_min.run.files import DATA
from grpo_min.run.log import Run
from grpo_min.run.optim import optimizer_for, update
from grpo_min.run.ranks import RANKS
from grpo_min.run.rng import generator


@dataclass
class PPOConfig:
    """Stage 4: train the SFT model by PPO. By default: arithmetic, rewarded if right."""
    run: str = option("runs/ppo", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    sft: str = option(str(DATA / "checkpoints/sft.pt"),
                      "checkpoint of the SFT model: policy and reference start there")
    task: str = option("", "Python file (executed) with prompts and reward: see task.py")
    reward: str = option("correct", "right answers, well-formed thinking, both (1 and 0.2) "
                         "or a reward model", ["correct", "well_formed", "both", "learned"])
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "its checkpoint, "
                               "or several with commas between them: their mean score")
    prompts: str = option("", "JSONL with fields prompt and, for rules, answer; default: "
                          "data/animals_train.jsonl if learned, else arithmetic_train")
    steps: int = option(80, "batches: sample, score, update")
    prompts_per_step: int = option(32, "prompts per batch, Q")
    group_size: int = option(8, "completions per prompt, G")
    epochs: int = option(1, "passes over each batch (DeepSeekMath's mu)")
    minibatches: int = option(1, "updates per pass: the batch is split by prompts")
    microbatches: int = option(1, "parts that an update is computed in: the same gradient, "
                               "in less memory (SmolLM2, 1 to 8 parts: 7.1 to 3.5 GB)")
    lora: int = option(0, "train adapters of this rank, not the weights (real/lora.py)")
    lr: float = option(3e-4, "learning rate of the policy (AdamW)")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    clip_eps: float = option(0.2, "the ratio counts between 1 - clip_eps and 1 + clip_eps")
    beta: float = option(0.01, "weight of the KL penalty, reward per nat; 0: no reference")
    kl: str = option("k3", "estimator of the KL (Schulman, 2020)", ["k1", "k2", "k3"])
    kl_in: str = option("loss", "where it is charged (k1 in a reward)", ["loss", "reward"])
    whiten: bool = option(False, "scale the advantages to mean 0 and deviation 1 per batch")
    critic: str = option(str(DATA / "checkpoints/critic.pt"), "checkpoint of a critic that "
                         "grpo_min.critic trained, or sft: the SFT weights, all values 0")
    critic_lr: float = option(1e-4, "learning rate of the critic (AdamW)")
    critic_epochs: int = option(1, "the critic's passes over each batch; 0: it stays")
    critic_minibatches: int = option(4, "the critic's updates per pass")
    gamma: float = option(1.0, "discount per token")
    lam: float = option(0.95, "GAE's lambda: 1 trusts rewards alone, 0 the critic alone")
    value_clip: float = option(0.0, "how far values may move per batch; 0: anywhere")
    temperature: float = option(1.0, "sampling temperature; models are read at it, too")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    seed: int = option(1, "seed of the prompts' order and of the sampling")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16): (B, N) -> advantages, returns.

    rewards stand on the token they were given for, the completion's score on its last real
    token. The value after that token is 0, whether it is END or the length limit cut the
    completion there. returns = advantages + values are the critic's targets.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)  # (B, N)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]  # (B,)
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def whiten(advantages, mask):
    """Mean 0 and standard deviation 1 over the batch's real tokens: (B, N) -> (B, N)."""
    real = advantages[mask]
    return (advantages - real.mean()) / (real.std() + 1e-4) * mask


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, summed over tokens, averaged over rows: (B, N) -> scalar.

    With clip > 0 the larger of two: with values as they are, or within clip of the old.
    """
    near = old_values + (values - old_values).clamp(-clip, clip) if clip > 0 else values
    error = torch.max((values - returns) ** 2, (near - returns) ** 2)  # (B, N)
    return 0.5 * (error * mask).sum(dim=1).mean()


def start_critic(config, policy, device):
    """The critic of a checkpoint, or one from the SFT weights whose values are 0."""
    return (policy.with_head(Critic) if config.critic == "sft" else
            load_model(config.critic, device, Critic, like=policy))


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty=0.0):
    """PPO's clipped surrogate (1707.06347, eq. 7) less a penalty, negated: -> scalar.

    (B, N) each; penalty: what a token is charged, beta times its KL (2402.03300, eq. 3).
    Summed over tokens, averaged over rows: minus its gradient is the expected reward's.
    """
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B, N)
    return -((surrogate - penalty) * mask).sum(dim=1).mean()


def kl_estimate(logprobs, ref_logprobs, kind):
    """Estimates of KL(policy || reference) from the policy's own samples: (B, N) -> (B, N).

    Schulman (2020): k1 is unbiased and noisy, k2 biased and positive, k3 unbiased and
    positive. k1 in a loss has no gradient on average; in a reward only k1's is right.
    """
    log_ratio = ref_logprobs - logprobs  # (B, N)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio ** 2 / 2
    return torch.expm1(log_ratio) - log_ratio


def check(config):
    """A UserError for settings that cannot work."""
    require_positive(config, "steps", "prompts_per_step", "group_size", "epochs", "lr",
                     "minibatches", "microbatches", "max_grad_norm", "clip_eps",
                     "temperature", "max_new_tokens")
    require_positive(config, "critic_lr", "critic_minibatches")
    require(config.critic_epochs >= 0, "--critic-epochs must be at least 0")
    require(config.prompts_per_step % (config.critic_minibatches * RANKS) == 0,
            "--critic-minibatches must divide the prompts of a step (and rank)")
    require(0 <= config.gamma <= 1 and 0 <= config.lam <= 1,
            "--gamma and --lam must be from 0 to 1")
    require(config.beta >= 0, f"--beta must be at least 0, not {config.beta}")
    parts = config.minibatches * config.microbatches * RANKS
    require(config.prompts_per_step % parts == 0,
            f"{config.prompts_per_step} prompts do not divide into {parts} parts: "
            "minibatches x microbatches x ranks")
    require(config.kl_in == "loss" or config.kl == "k1", "--kl-in reward needs --kl k1: k2 "
            "and k3 in the reward have wrong gradients")


def collect(config, policy, reward, rows, step, clock):
    """A batch of experience -> rows of data (Q), prompts, rollout, rewards (B,), texts."""
    # --- 1. sample prompts
    numbers = batch_rows(len(rows), config.prompts_per_step, config.seed, step)
    batch = [rows[number] for number in numbers]
    prompts = Prompts.from_texts([row["prompt"] for row in batch], policy.tokenizer,
                                 clock.device)  # Q rows

    # --- 2. sample a group of completions for each
    rollout = sample(policy, prompts, config.group_size, config.max_new_tokens,
                     config.temperature, generator(config.seed, step))  # B = Q * G rows
    clock.lap("sample")

    # --- 3. score them
    rewards, texts = score(reward, batch, rollout, config.group_size, policy.tokenizer)
    clock.lap("score")
    return batch, prompts, rollout, rewards, texts


def train(config, reward=None, collect=collect, loss=policy_loss, kl=kl_estimate,
          model=None, evaluate=None, advantage=gae, start_critic=start_critic):
    """Steps 1 to 7, again and again -> the trained policy and one row of metrics per step.

    reward(prompts, completions, **columns) -> list[float] replaces config.reward, the other
    functions those of this file, model config.sft (with adapters of its own, if any);
    evaluate(policy, step) -> dict joins the step's row.
    """
    check(config)
    device = pick_device(config.device)
    policy = model or load_model(config.sft, device, lora=config.lora)
    reference = frozen_copy(policy) if config.beta > 0 else None
    optimizer = optimizer_for(policy, config.lr)
    reward, rows, files = load_reward(config, reward, policy, device)
    inputs = files if model is not None else [config.sft, *files]
    parts = dict(policy=policy, optimizer=optimizer)
    require(reward is correct or config.critic != PPOConfig.critic, "the default critic "
            "knows arithmetic alone: train one by grpo_min.critic, or say --critic sft")
    critic = start_critic(config, policy, device)
    critic_optimizer = optimizer_for(critic, config.critic_lr)
    parts.update(critic=critic, critic_optimizer=critic_optimizer)
    inputs = inputs if config.critic == "sft" else [*inputs, config.critic]
    with Run(config, inputs, parts) as run:
        for step in range(run.first_step, config.steps):
            clock = metrics.Clock(device)
            batch, prompts, rollout, rewards, texts = collect(
                config, policy, reward, rows, step, clock)
            n = config.minibatches * config.microbatches  # parts that are read at a time
            old_logprobs, ref_logprobs = None, None  # (B, N) where they are needed
            charge = torch.zeros_like(rollout.logprobs)  # (B, N)
            if config.beta > 0:
                ref_logprobs = frozen_logprobs(reference, prompts, rollout,
                                               config.temperature, n)
            if config.epochs * config.minibatches > 1 or config.kl_in == "reward":
                old_logprobs = frozen_logprobs(policy, prompts, rollout,
                                               config.temperature, n)
            if config.beta > 0 and config.kl_in == "reward":
                charge = config.beta * kl(old_logprobs, ref_logprobs, config.kl)
                charge = charge * rollout.mask
            clock.lap("score")

            # --- 4. the baseline is the critic's value of each state
            with torch.no_grad():
                old_values = critic.values(prompts, rollout.completion_ids, rollout.mask)
            clock.lap("critic")
            explainable = "" if (step + 1) % 20 else explainable_variance(
                config, policy, reward, batch, prompts, rollout, rewards, step)
            clock.lap("ruler")
            # --- 5. the advantage is how much better it went than the critic expected
            charged = rollout.at_last_token(rewards) - charge  # (B, N)
            advantages, returns = advantage(charged, old_values, rollout.mask, config.gamma,
                                            config.lam)  # (B, N) each
            if config.whiten:
                advantages = whiten(advantages, rollout.mask)  # (B, N)

            # --- 6. update
            updates = []
            for _ in range(config.epochs):
                for i, (part, b) in enumerate(split(prompts, rollout, n)):  # b: rows of B
                    mask, penalty = rollout.mask[b], 0.0  # (b, N)
                    logprobs, entropy = token_logprobs(policy, *part, config.temperature)
                    # With one update per batch the old policy is this one: a ratio of 1.
                    old = logprobs.detach() if old_logprobs is None else old_logprobs[b]
                    if config.beta > 0 and config.kl_in == "loss":
                        penalty = config.beta * kl(logprobs, ref_logprobs[b], config.kl)
                    objective = loss(logprobs, old, advantages[b], mask, config.clip_eps,
                                     penalty)
                    norm = update(run, policy, optimizer, objective, config.max_grad_norm,
                                  i, config.microbatches)
                    updates.append(metrics.update_metrics(
                        objective, norm, logprobs, old, rollout.logprobs[b], entropy, mask,
                        config.clip_eps))
                    clock.lap("update")
            # The critic's updates are its own: it has more to learn than the policy.
            for _ in range(config.critic_epochs):
                for part, b in split(prompts, rollout, config.critic_minibatches):
                    error = value_loss(critic.values(*part), old_values[b], returns[b],
                                       rollout.mask[b], config.value_clip)
                    update(run, critic, critic_optimizer, error, config.max_grad_norm)
            clock.lap("critic")

            # --- 7. repeat
            row = metrics.rollout_metrics(rewards, texts, batch, rollout, config.group_size,
                                          ref_logprobs)
            row.update(metrics.average(updates))
            row.update(evaluate(policy, step) if evaluate else {})
            samples = metrics.shown_samples(texts, rewards, advantages, batch, rollout,
                                            config.group_size, policy.tokenizer, old_values)
            actual, _ = gae(charged, 0 * old_values, rollout.mask, config.gamma, 1.0)
            row.update(critic_metrics(old_values, actual, rollout.mask, explainable))
            metrics.record(run, step, row, clock, samples)
    return policy, run.rows


def main(argv=None):
    train(parse(PPOConfig, argv))


if __name__ == "__main__":
    run_command(main)
