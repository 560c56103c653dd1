"""How noisy is the gradient of a batch under each baseline, and how near does it come to that of a large batch?

Measured at three moments of a PPO run, which has a policy and a critic, on the gradient of the surrogate alone, without
a KL penalty. Writes baselines-gradients.csv, .md and .png.

d is the number of the policy's weights, M that of batches, Q prompts with G completions each.
"""
import functools
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min import grpo, ppo, variants
from grpo_min.critic import Critic
from grpo_min.evaluate import interval
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.studies.common import collect, grouped, load_sft, run_jobs, sized, table, write_study
from grpo_min.rollout import token_logprobs
from grpo_min.run.checkpoint import load_checkpoint, load_weights
from grpo_min.run.config import pick_device
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.metrics import explained_variance
from grpo_min.run.plots import finish, plt

GROUP_MEAN = "group mean, leave-one-out"
BASELINES = {             # rewards (B,), group_size -> advantages (B,)
    GROUP_MEAN: grpo.group_advantages,
    "none": variants.no_baseline,
    "batch mean": lambda rewards, group_size: rewards - rewards.mean(),
    "mean and std": functools.partial(grpo.group_advantages, scale=True),
}
BEST, CRITIC = "best constant", "critic"
SCORED = 8                # batches in which the score of every completion is looked at by itself


def study(config):
    last = config.steps or sized(config, 80, 2)
    moments = list(dict.fromkeys([0, max(1, last * 15 // 80), last]))      # steps trained
    M, Q, G = sized(config, (64, 8, 8), (3, 4, 4))
    jobs = [(steps, M, Q, G) for steps in reversed(moments)]               # the longest first
    rows = [row for rows_then in reversed(run_jobs(config, measure_moment, jobs)) for row in rows_then]
    lines = [*noise_table(rows, moments), "", *moments_table(rows, M), ""]
    lines += [f"Noise-to-signal: trace of the gradient's covariance over the squared norm of its mean, in batches of "
              f"{Q} prompts x {G} completions; so many times as many completions bring the noise down to the signal. "
              "Cosine: of a batch's gradient to that of a large batch, the mean leave-one-out gradient of "
              f"{M} other batches. Means over {M} batches with 95% intervals over batches (jackknife, bootstrap). The "
              "CSV file has the differences to the first row, batch by batch. One training run of PPO with its "
              "defaults, seed 1. Leave-one-out is the group mean times G / (G - 1), so that one row serves both. No "
              "baseline, a constant and a mean leave the expected gradient's direction as it is; the standard "
              "deviation, and a critic at lambda below 1, need not. The cosine to the true gradient is about "
              f"1 / sqrt(1 + noise-to-signal / {M}). Best constant: the constant baseline of least variance, the mean "
              "of the rewards weighted with the squared score, the gradient of a completion's log-probability (Weaver "
              f"and Tao, 2001), from {min(SCORED, M)} of the other batches. {date.today()}."]
    write_study(config, "baselines-gradients", lines, [flat(row) for row in rows])
    plot_gradients(rows, moments, Path(config.out) / "baselines-gradients.png")


# --- measuring ----------------------------------------------------------------------------------------------------

def measure_moment(config, steps, M, Q, G):
    """Train PPO for so many steps, and measure the gradient of M batches under every baseline -> a row for each.

    Runs of the same seed are the same as far as they go, so that a run of 15 steps is the beginning of one of 80.
    """
    policy, critic = policy_and_critic(config, steps)
    rows = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q)
    large, best = large_batch(policy, rows, M, Q, G)
    gradients = {name: [] for name in [*BASELINES, BEST, CRITIC]}
    accuracy, explained = [], []
    for step in range(M, 2 * M):                                           # batches that large_batch has not seen
        _, prompts, rollout, rewards, _ = collect(policy, rows, Q, G, "gradients", step)
        logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        with torch.no_grad():
            values = critic.values(prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        charged = rollout.at_last_token(rewards)  # (B, N)
        advantages = {name: baseline(rewards, G)[:, None] for name, baseline in BASELINES.items()}  # (B, 1) each
        advantages[BEST] = (rewards - best["best"][0])[:, None]  # (B, 1)
        advantages[CRITIC], _ = ppo.gae(charged, values, rollout.mask, ppo.PPOConfig.gamma, ppo.PPOConfig.lam)
        for name in gradients:
            gradients[name].append(first_gradient(logprobs, advantages[name], rollout.mask, policy).cpu())
        accuracy.append(rewards.mean().item())
        returns, _ = ppo.gae(charged, torch.zeros_like(values), rollout.mask, 1.0, 1.0)  # (B, N)
        explained.append(explained_variance(values, returns, rollout.mask))
    explained = [value for value in explained if value != ""]              # "": all rewards of a batch were equal
    measured = dict(steps=steps, accuracy=np.mean(accuracy), explained_variance=np.mean(explained or [0]), **best)
    stacked = {name: torch.stack(batches) for name, batches in gradients.items()}  # (M, d) each
    return [dict(measured, **row) for row in noise_and_cosine(stacked, large)]


def large_batch(policy, rows, M, Q, G):
    """The mean leave-one-out gradient of M batches (d,), and the best constant baseline of the first of them."""
    large, rewards_seen, scores = 0, [], []
    for step in range(M):
        _, prompts, rollout, rewards, _ = collect(policy, rows, Q, G, "gradients", step)
        logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        large = large + first_gradient(logprobs, variants.leave_one_out(rewards, G)[:, None], rollout.mask, policy) / M
        if step < SCORED:
            rewards_seen += rewards.tolist()
            scores += squared_scores(policy, prompts, rollout, G)
    return large.cpu(), best_constant(rewards_seen, scores)


def policy_and_critic(config, steps):
    """The policy and the critic of PPO after so many steps."""
    device = pick_device(config.device)
    settings = ppo.PPOConfig(run=str(Path(config.run) / f"gradients-{steps}"), sft=config.sft, device=config.device,
                             steps=steps)
    if steps == 0:
        policy = load_sft(config)
        return policy, ppo.start_critic(settings, policy, device)
    policy, _ = train_or_reuse(ppo.train, settings)
    critic, path = Critic(policy.config, policy.tokenizer), Path(settings.run) / "checkpoint.pt"
    load_weights(critic, load_checkpoint(path)["critic"], path)
    return policy, critic.to(device)


def gradient(loss, model):
    """d loss / d weights as one vector (d,). The graph is kept: one forward serves every loss."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])  # (d,)


def first_gradient(logprobs, advantages, mask, policy):
    """The gradient of the clipped surrogate at the first update of a batch: logprobs, mask (B, N), advantages (B, N) or
    (B, 1) -> (d,)."""
    return gradient(grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2), policy)


def squared_scores(policy, prompts, rollout, G):
    """|d log pi(completion) / d weights|^2 of each of the B completions, as a list."""
    scores = []
    for b in range(len(rollout.mask)):
        prompt = prompts.rows(b // G, b // G + 1)
        logprobs, _ = token_logprobs(policy, prompt, rollout.completion_ids[b:b + 1], rollout.mask[b:b + 1])  # (1, N)
        scores.append(gradient(logprobs.sum(), policy).square().sum().item())
    return scores


# --- estimating ---------------------------------------------------------------------------------------------------

def best_constant(rewards, scores):
    """Rewards and squared scores of n completions -> the constant baseline of least variance, E[R s^2] / E[s^2] (Weaver
    and Tao, 2001), with its interval, the mean reward, and the mean squared score of right and of wrong completions."""
    rewards, scores = np.array(rewards), np.array(scores)  # (n,) each
    best = jackknife(lambda kept: (rewards * scores)[kept].sum() / scores[kept].sum(), len(rewards))
    return dict(best=best, mean_reward=rewards.mean(),
                score_right=scores[rewards > 0].mean() if rewards.any() else None,
                score_wrong=scores[rewards == 0].mean() if not rewards.all() else None)


def noise_and_cosine(gradients, large):
    """{advantage: gradients (M, d)}, the first being compared with, and the large-batch gradient (d,) -> a row for each
    advantage, every figure with its 95% interval [value, low, high]. more_*: by how much above the first."""
    grams, cosines = {}, {}
    for name, rows in gradients.items():
        grams[name] = (rows @ rows.T).double().numpy()  # (M, M)
        cosines[name] = F.cosine_similarity(rows, large[None]).double().numpy()  # (M,)
    first, measured = next(iter(gradients)), []
    for name, gram in grams.items():
        signal = jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)]), len(gram))
        more = jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)])
                         - signal_to_noise(grams[first][np.ix_(kept, kept)]), len(gram))
        measured.append(dict(advantage=name, noise=noise_to_signal(signal), more_signal=more,
                             cosine=interval(cosines[name]), more_cosine=interval(cosines[name] - cosines[first])))
    return measured


def signal_to_noise(gram):
    """Dot products (M, M) of M independent gradients -> |mean|^2 / trace of their covariance.

    Both parts unbiased: the product of two different gradients is |mean|^2 on average, the square of one is that and
    the trace. (The square of the mean of M would be too large by trace / M.)
    """
    M, squares = len(gram), np.trace(gram)
    signal = (gram.sum() - squares) / (M * (M - 1))
    noise = squares / M - signal
    return signal / noise if noise > 0 else 0.0                            # no noise: all of them are 0


def noise_to_signal(signal):
    """[signal-to-noise, low, high] -> [noise-to-signal, low, high]; infinite where no signal has been told from 0."""
    value, low, high = (1 / x if x > 0 else np.inf for x in signal)
    return [value, high, low]


def jackknife(statistic, M):
    """[value, low, high] with the 95% interval of the jackknife (Tukey, 1958): the statistic of all M, and of all but
    one. statistic: of an array of indices below M -> number. The bootstrap would draw a batch twice, and the product
    of a gradient with itself is not one of two."""
    everything = np.arange(M)
    without = np.array([statistic(np.delete(everything, i)) for i in everything])  # (M,)
    half = 1.96 * np.sqrt((M - 1) / M * ((without - without.mean()) ** 2).sum())
    value = statistic(everything)
    return [value, value - half, value + half]


# --- writing ------------------------------------------------------------------------------------------------------

def noise_table(rows, moments):
    headings, lines = ["advantage"], []
    for steps in moments:
        headings += [f"noise-to-signal, {moment_name(steps)}", f"cosine, {moment_name(steps)}"]
    for (advantage,), group in grouped(rows, "advantage").items():
        lines.append([advantage])
        for row in group:
            lines[-1] += [noise_cell(row["noise"]), interval_cell(row["cosine"])]
    return table(headings, lines)


def moments_table(rows, M):
    """What there is to know about the run at each moment, from its first row, that of the group mean."""
    lines = []
    for group in grouped(rows, "steps").values():
        row = group[0]
        right, wrong = row["score_right"], row["score_wrong"]
        lines.append([moment_name(row["steps"]), f"{row['accuracy']:.0%}", f"{row['explained_variance']:.2f}",
                      f"{1 / np.sqrt(1 + row['noise'][0] / M):.2f}", interval_cell(row["best"]),
                      f"{row['mean_reward']:.2f}", f"{wrong / right:.1f}" if right and wrong else "-"])
    return table(["moment", "accuracy", "explained variance of the critic", "cosine of the large-batch gradient to the "
                  "true one", "best constant baseline", "mean reward beside it", "squared score, wrong / right"], lines)


def moment_name(steps):
    return f"after {steps} step{'s' if steps > 1 else ''}" if steps else "at the start"


def interval_cell(figure):
    return "{:.2f} ({:.2f} to {:.2f})".format(*figure)


def noise_cell(noise):
    if not np.isfinite(noise[0]):
        return "no signal shown"
    value, low, high = (f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in noise)
    return f"{value} ({low} to {high})" if np.isfinite(noise[2]) else f"{value} ({low} or more)"


def flat(row):
    """Figures as three columns of a CSV: {noise: [value, low, high]} -> {noise, noise_low, noise_high}."""
    cells = {}
    for name, value in row.items():
        cells.update(dict(zip([name, f"{name}_low", f"{name}_high"], value)) if isinstance(value, list) else
                     {name: value})
    return cells


def plot_gradients(rows, moments, path):
    """Noise-to-signal and cosine of every advantage at every moment, with their intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    groups = grouped(rows, "advantage")
    for axis, key, label in zip(axes, ["noise", "cosine"], ["noise-to-signal of the gradient of a batch",
                                                            "cosine to the gradient of a large batch"]):
        for i, ((advantage,), group) in enumerate(groups.items()):
            shown = [row for row in group if np.isfinite(row[key][0])]
            x = [moments.index(row["steps"]) + (i - (len(groups) - 1) / 2) * 0.13 for row in shown]
            y, low, high = np.array([row[key] for row in shown] or [[]] * 3).reshape(-1, 3).T
            high = np.where(np.isfinite(high), high, y)                    # no upper bound: no line upwards
            axis.errorbar(x, y, [y - low, high - y], fmt="o", ms=4, label=advantage)
        axis.set(xticks=range(len(moments)), xticklabels=[moment_name(steps) for steps in moments], ylabel=label,
                 xlim=(-0.5, len(moments) - 0.5))
    axes[0].set_yscale("log")
    axes[1].legend(frameon=False, fontsize=8, title="advantage (95% intervals; no line up: no bound)", title_fontsize=8)
    finish(figure, path)
