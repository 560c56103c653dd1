"""Stage 4, with a critic: Proximal Policy Optimization (Schulman et al., 1707.06347) on completions.

1. sample prompts; 2. sample completions for each; 3. score them; 4. the critic's values are the baseline; 5. the
advantages are GAE's: what came after each token, as far as it was better than the critic expected; 6. update the
policy on a clipped surrogate with a KL penalty to the reference, and the critic towards the returns; 7. repeat.
grpo.py is the same file without a critic: read the two side by side.

Shapes: Q prompts, G completions each, B = Q * G rows, row b belongs to prompt b // G; N padded completion length.
Column t is the pair (state, action): the prompt and the completion tokens before t, and completion token t.
"""
import copy
from dataclasses import dataclass

import torch

from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.metrics import Clock, average, record, rollout_metrics, shown_samples, update_metrics
from grpo_min.model import ScalarGPT
from grpo_min.plots import plot_curves
from grpo_min.ranks import RANKS
from grpo_min.rewards import load_reward, score
from grpo_min.rollout import Prompts, frozen_logprobs, sample, split, token_logprobs
from grpo_min.runs import DATA, Run, batch_rows, generator, load_model, optimizer_for, update


@dataclass
class PPOConfig:
    """Stage 4: train the SFT model by PPO. Without options: arithmetic, rewarded for right answers alone."""
    run: str = option("runs/ppo", "folder to write into")
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
    scale_advantages: bool = option(False, "whiten the advantages: mean 0, standard deviation 1 over all tokens")
    critic: str = option("sft", "what the value network starts from", ["sft", "reward_model"])
    critic_lr: float = option(5e-3, "learning rate of the critic (AdamW)")
    critic_warmup: int = option(0, "first steps in which only the critic learns")
    gamma: float = option(1.0, "discount per token")
    lam: float = option(0.95, "GAE's lambda: 1 trusts the rewards alone, 0 the critic alone")
    value_coef: float = option(1.0, "weight of the value loss (with AdamW it matters only where gradients are clipped)")
    value_clip: float = option(0.0, "values may move so far per batch before their loss is clipped; 0: no clipping")
    temperature: float = option(1.0, "sampling temperature; policy and reference are read at the same")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    seed: int = option(1, "seed of the prompts' order and of the sampling")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16): (B, N) each -> advantages, returns (B, N).

    rewards stand on the token they were given for, the completion's score on its last real token. The value after
    that token is 0, whether it is END or the length limit cut the completion there. returns = advantages + values
    are the critic's targets.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)                                                    # (B, N)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])                             # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                             # (B,)
        next_advantage = advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def at_last_token(scores, mask):
    """Put each completion's score on its last real token: (B,), (B, N) -> (B, N)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return scores[:, None] * (columns == mask.sum(dim=1, keepdim=True) - 1)


def whiten(advantages, mask):
    """Mean 0 and standard deviation 1 over the real tokens of the batch: (B, N), (B, N) -> (B, N)."""
    real = advantages[mask]
    return (advantages - real.mean()) / (real.std() + 1e-4) * mask


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, summed over a completion's tokens and averaged over completions: (B, N) each -> scalar.

    With clip > 0 the larger of two errors: of the values, and of the values kept within clip of the old ones.
    """
    error = (values - returns) ** 2                                                           # (B, N)
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)                          # (B, N)
        error = torch.max(error, (near - returns) ** 2)                                       # (B, N)
    return 0.5 * (error * mask).sum(dim=1).mean()


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the real tokens: 1 is perfect, 0 as good as a constant."""
    variance = returns[mask].var()
    return (1 - (returns - values)[mask].var() / variance).item() if variance > 0 else ""


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
    require_positive(config, "critic_lr", "value_coef")
    require(0 <= config.gamma <= 1 and 0 <= config.lam <= 1, "--gamma and --lam must be from 0 to 1")
    require(config.beta >= 0, f"--beta must be at least 0, not {config.beta}")
    require(config.prompts_per_step % (config.minibatches * RANKS) == 0, f"{config.prompts_per_step} prompts do not "
            f"divide into {config.minibatches} minibatches" + (f" on each of {RANKS} ranks" if RANKS > 1 else ""))
    require(config.kl_in == "loss" or config.kl == "k1", "--kl-in reward needs --kl k1: k2 and k3 in the reward have "
            "wrong gradients")


def start_critic(config, policy, device):
    """The value network: a GPT of its own with a scalar head, from the SFT weights or from the reward model."""
    if config.critic == "reward_model":
        return load_model(config.reward_model, "ScalarGPT", device)
    critic = ScalarGPT(policy.config).to(device)
    critic.trunk.load_state_dict(policy.state_dict())
    return critic


def train(config, reward=None, advantage=gae, loss=policy_loss, kl=kl_estimate, model=None, evaluate=None):
    """PPO -> the trained policy and one row of metrics per step.

    reward(prompts, completions, **columns) -> list[float] replaces config.reward; advantage, loss and kl replace the
    functions of this file; model is trained in place of config.sft; evaluate(policy, step) -> dict joins its row.
    """
    check(config)
    device = pick_device(config.device)
    policy = model if model is not None else load_model(config.sft, "GPT", device)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None      # stays as it is
    optimizer = optimizer_for(policy, config.lr)
    critic = start_critic(config, policy, device)
    critic_optimizer = optimizer_for(critic, config.critic_lr)
    reward, rows, files = load_reward(config, reward, policy.config.context, device)
    inputs = files if model is not None else [config.sft, *files]
    inputs = [*inputs, config.reward_model] if config.critic == "reward_model" else inputs
    parts = dict(policy=policy, optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer)
    with Run(config, inputs, parts) as run:
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
            old_logprobs, ref_logprobs = None, None
            if config.beta > 0:
                ref_logprobs = frozen_logprobs(reference, prompts, rollout, config.temperature, config.minibatches)
            if config.epochs * config.minibatches > 1 or config.kl_in == "reward":
                old_logprobs = frozen_logprobs(policy, prompts, rollout, config.temperature, config.minibatches)
            clock.lap("score")

            # --- 4. the baseline is the critic's value of each state -----------------------------------------------
            with torch.no_grad():
                old_values = critic.values(prompts, rollout.completion_ids, rollout.mask)     # (B, N)
            clock.lap("critic")

            # --- 5. the advantage is what came after a token and the critic had not expected -----------------------
            charged = at_last_token(rewards, rollout.mask)                                    # (B, N)
            if config.beta > 0 and config.kl_in == "reward":
                charge = kl(old_logprobs, ref_logprobs, config.kl)                            # (B, N)
                charged = charged - config.beta * charge * rollout.mask                       # (B, N)
            advantages, returns = advantage(charged, old_values, rollout.mask, config.gamma, config.lam)   # (B, N)
            if config.scale_advantages:
                advantages = whiten(advantages, rollout.mask)                                 # (B, N)

            # --- 6. move the policy and the critic -----------------------------------------------------------------
            updates = []
            for _ in range(config.epochs):
                for part, b in split(prompts, rollout, config.minibatches):                   # b: the rows of the part
                    mask = rollout.mask[b]                                                    # (b, N)
                    logprobs, entropy = token_logprobs(policy, *part, config.temperature)     # (b, N) each
                    # With one update per batch the old policy is this very policy, and the ratio is exactly 1.
                    old = logprobs.detach() if old_logprobs is None else old_logprobs[b]      # (b, N)
                    objective = loss(logprobs, old, advantages[b], mask, config.clip_eps)
                    if config.beta > 0 and config.kl_in == "loss":
                        penalty = kl(logprobs, ref_logprobs[b], config.kl)                    # (b, N)
                        objective = objective + config.beta * (penalty * mask).sum(dim=1).mean()
                    norm = 0.0
                    if step >= config.critic_warmup:
                        norm = update(run, policy, optimizer, objective, config.max_grad_norm)
                    updates.append(update_metrics(objective, norm, logprobs, old, rollout.logprobs[b], entropy,
                                                  part[2], config.clip_eps))
                    clock.lap("update")
                    values = critic.values(*part)                                             # (b, N)
                    error = value_loss(values, old_values[b], returns[b], mask, config.value_clip)
                    update(run, critic, critic_optimizer, config.value_coef * error, config.max_grad_norm)
                    clock.lap("critic")

            # --- 7. repeat -----------------------------------------------------------------------------------------
            drift = None if ref_logprobs is None else kl_estimate(rollout.logprobs, ref_logprobs, "k3")   # (B, N)
            row = rollout_metrics(rewards, texts, batch, rollout, config.group_size, drift)
            actual, _ = gae(charged, torch.zeros_like(old_values), rollout.mask, config.gamma, 1.0)   # (B, N)
            row.update(explained_variance=explained_variance(old_values, actual, rollout.mask))
            row.update(**average(updates), **(evaluate(policy, step) if evaluate else {}))
            samples = shown_samples(texts, rewards, advantages, batch, rollout, config.group_size, old_values)
            record(run, step, row, clock, samples)
        if run.folder:
            plot_curves(run.rows, run.folder / "curves.png")
    return policy, run.rows


def main(argv=None):
    train(parse(PPOConfig, argv))


if __name__ == "__main__":
    run_command(main)
