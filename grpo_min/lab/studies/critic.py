"""What kind of critic does PPO need? PPO with the critic started and trained in several ways, and GRPO, which has none.

40 steps of 16 prompts x 8 completions of the arithmetic task from the same SFT weights, 5 seeds, judged on the
validation prompts. Writes critic.csv (a row per run), critic-curves.csv (a row per step), critic.md and critic.png.
"""
import functools
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import grpo, ppo
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import smooth, state_bytes
from grpo_min.lab.studies.common import (best_of, curve, first_of, grouped, last_of, load_sft, measure_arithmetic,
                                         plot_band, run_jobs, seconds_of, seed_curves, seed_table, seeds_of, sized,
                                         validation, write_study)
from grpo_min.model import ScalarGPT
from grpo_min.run.plots import finish, plt

SEPARATE, SHARED_TRUNK, NO_CRITIC = "separate", "shared trunk", "no critic (GRPO)"
CRITICS = {               # label: settings of PPO
    SEPARATE: {},
    NO_CRITIC: {},
    "separate, warmed up 10 steps": dict(critic_warmup=10),
    "separate, from the reward model": dict(critic="reward_model"),
    "separate, lambda 1": dict(lam=1.0),
    SHARED_TRUNK: dict(critic_lr=grpo.GRPOConfig.lr),      # the trunk is the policy, and learns at its rate
}
LABELS = {"critic": ("setting", "{}")}
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "KL (nats)": ("kl", "{:.2f}"), "explained variance, first 10 steps": ("ev_first", "{:.2f}"),
           "best 10": ("ev_best", "{:.2f}"), "last 10": ("ev_last", "{:.2f}"), "all": ("ev_mean", "{:.2f}"),
           "model state (MB)": ("megabytes", "{:.1f}"), "seconds": ("seconds", "{:.0f}")}


def study(config):
    steps, seeds = config.steps or sized(config, 40, 3), seeds_of(config)
    labels = sized(config, list(CRITICS), [SEPARATE, NO_CRITIC, SHARED_TRUNK])
    runs = run_jobs(config, train_critic, [(label, seed, steps) for label in labels for seed in seeds])
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    pairs = [(row["ev_mean"], row["accuracy"]) for row in rows if row["ev_mean"] is not None]
    related = "{:.2f} (95% bootstrap interval {:.2f} to {:.2f})".format(*correlation(pairs))
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"{steps} steps of 16 prompts x 8 completions, seeds 1 to {len(seeds)}: mean (lowest to highest). "
              "Explained variance: of the actual returns, 1 is perfect, 0 as good as a constant. Its mean over all "
              f"steps and the accuracy have a correlation of {related} over the {len(pairs)} runs with a critic. "
              f"{config.eval_prompts} validation prompts, 4 samples each; KL to the SFT model. Model state: weights, "
              "gradients and Adam's moments, counted; with a shared trunk, each of the two optimizers has moments of "
              f"the trunk. The reward model has learned from the animals alone. {date.today()}."]
    write_study(config, "critic", lines, rows, curves)
    plot_critics(rows, curves, Path(config.out) / "critic.png")


def shared_trunk(config, policy, device):
    """In place of ppo.start_critic: a critic whose trunk is the policy itself. Only the scalar head is its own.

    Policy and critic then take turns in moving the trunk, each with its own optimizer.
    """
    critic = ScalarGPT(policy.config, policy.tokenizer).to(device)
    critic.trunk = policy
    return critic


def train_critic(config, label, seed, steps):
    """Train PPO with this critic (or GRPO) -> what it reached, and rows of how, one per step."""
    run = str(Path(config.run) / f"critic-{label}-{seed}".replace(", ", "-").replace(" ", "_"))
    settings = dict(run=run, sft=config.sft, device=config.device, seed=seed, steps=steps, prompts_per_step=16,
                    group_size=8)
    if label == NO_CRITIC:
        train, settings = grpo.train, grpo.GRPOConfig(**settings)
    else:
        start_critic = shared_trunk if label == SHARED_TRUNK else ppo.start_critic
        train, settings = functools.partial(ppo.train, start_critic=start_critic), ppo.PPOConfig(
            **settings, **CRITICS[label])
    policy, metrics = train_or_reuse(train, settings)
    explained = [row["explained_variance"] for row in metrics if row.get("explained_variance", "") != ""]
    reached = dict(setting=label, seed=seed,
                   **measure_arithmetic(policy, load_sft(config), validation(config, "arithmetic")),
                   ev_first=first_of(metrics, "explained_variance"), ev_best=best_of(metrics, "explained_variance"),
                   ev_last=last_of(metrics, "explained_variance"),
                   ev_mean=float(np.mean(explained)) if explained else None,
                   megabytes=model_state(policy, settings, label) / 1e6, seconds=seconds_of(metrics))
    return reached, curve(metrics, ["step", "completions", "accuracy", "explained_variance"], setting=label, seed=seed)


def model_state(policy, settings, label):
    """Bytes of the model state, as report.state_bytes counts them, but a shared trunk and its gradients once."""
    state = sum(state_bytes(policy, settings).values())
    trunk = sum(p.numel() * p.element_size() for p in policy.parameters())
    return state - (2 * trunk if label == SHARED_TRUNK else 0)


def correlation(pairs, resamples=1000):
    """[correlation, low, high] of n pairs of numbers, with the 95% bootstrap interval over pairs."""
    pairs, rng = np.array(pairs), np.random.default_rng(0)

    def pearson(drawn):
        x, y = (drawn - drawn.mean(0)).T  # (n,) each
        return (x * y).sum() / max(np.sqrt((x ** 2).sum() * (y ** 2).sum()), 1e-12)
    resampled = [pearson(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(resamples)]
    return [pearson(pairs), *np.percentile(resampled, [2.5, 97.5])]


def plot_critics(rows, curves, path):
    """Explained variance along the runs, and with it, run by run, the accuracy at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for (label,), group in grouped(rows, "setting").items():
        if label == NO_CRITIC:
            for row in group:
                right.axhline(row["accuracy"], color="grey", lw=1, label=label if row is group[0] else None)
            continue
        explained = np.array(seed_curves(curves, label, "explained_variance"))  # (seeds, steps)
        y = np.array([smooth(values) for values in np.where(explained == "", 0, explained).astype(float)])
        colour = plot_band(left, seed_curves(curves, label, "completions")[0], y, label)
        right.plot([row["ev_mean"] for row in group], [row["accuracy"] for row in group], "o", color=colour,
                   label=label)
    left.axhline(0, color="grey", lw=1)
    left.set(xlabel="completions sampled", ylabel="explained variance (mean of 5 steps; band: all seeds)")
    right.set(xlabel="explained variance, mean of the run", ylabel="validation accuracy after training, each seed")
    right.legend(frameon=False, fontsize=8)
    finish(figure, path)
