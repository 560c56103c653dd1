"""What makes a critic live? First its training before RL, with several heads and remedies, on the arithmetic task, the
animals and digits (see credit.py); then PPO with critics that start in several ways, and GRPO, which has none.

Writes critic-training.csv (a row per training), critic.csv (a row per run), critic-curves.csv (a row per step),
critic.md and critic.png.
"""
import functools
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import grpo, ppo
from grpo_min.critic import Critic, CriticConfig, costs, train
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import smooth, state_bytes
from grpo_min.lab.studies import credit
from grpo_min.lab.studies.common import (curve, first_of, grouped, last_of, load_sft, measure_arithmetic, plot_band,
                                         run_jobs, seconds_of, seed_curves, seed_table, seeds_of, sized, validation,
                                         write_study)
from grpo_min.model import ScalarGPT
from grpo_min.rollout import token_logprobs
from grpo_min.run.plots import finish, plt
from grpo_min.run.table import write_csv

HEADS = {                 # label: (class, weight of the language model's loss beside, weight decay)
    "a number per state": (ScalarGPT, 0.0, 0.0),
    "a number per state, and the language model's loss": (ScalarGPT, 0.3, 0.0),
    "sum over tokens": (Critic, 0.0, 0.0),
    "sum over tokens, weight decay 0.5": (Critic, 0.0, 0.5),
}
TASKS = ["arithmetic", "animals", "4 digits", "8 digits", "16 digits"]
UPDATES = [100, 400]
TRAINED, FRESH, NO_CRITIC, HEAD_ALONE = "trained before", "values of 0", "no critic (GRPO)", "shared trunk, head alone"
PLAIN = "a number per state, values of 0, critic_lr 0.001"
STARTS = {                # label: settings of PPO
    TRAINED: {},
    NO_CRITIC: {},
    FRESH: dict(critic="sft"),
    "values of 0, critic_lr 0.003": dict(critic="sft", critic_lr=3e-3),
    PLAIN: dict(critic="sft", critic_lr=1e-3),
    **{f"shared trunk, critic_lr {lr:g}": dict(critic="sft", critic_lr=lr) for lr in (1e-5, 3e-5, 1e-4, 3e-4)},
    HEAD_ALONE: dict(critic="sft", critic_lr=3e-3),
}
TRAININGS = {"task": ("task", "{}"), "critic": ("head", "{}"), "updates": ("updates", "{}")}
LABELS = {"critic": ("setting", "{}")}
LEARNED = {"share of the explainable": ("share", "{:.2f}"), "explained": ("explained", "{:.2f}"),
           "explainable": ("explainable", "{:.2f}"), "seconds": ("seconds", "{:.0f}")}
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "KL (nats)": ("kl", "{:.2f}"), "explained variance, first 10 steps": ("ev_first", "{:.2f}"),
           "last 10": ("ev_last", "{:.2f}"), "all": ("ev_mean", "{:.2f}"),
           "model state (MB)": ("megabytes", "{:.1f}"), "seconds": ("seconds", "{:.0f}")}


def study(config):
    steps, seeds = config.steps or sized(config, 40, 3), seeds_of(config)
    tasks, updates = sized(config, TASKS, TASKS[:1]), sized(config, UPDATES, [4])
    starts = sized(config, list(STARTS), [FRESH, NO_CRITIC, "shared trunk, critic_lr 0.0001"])
    trainings = [(task, head, count, seed) for task in tasks for head in sized(config, list(HEADS), list(HEADS)[1:3])
                 for count in updates for seed in seeds[:1]]
    digits = [task for task in tasks if "digits" in task]
    models = dict(zip(digits, run_jobs(config, credit.fine_tuned, [(int(task.split()[0]),) for task in digits])))
    learned = run_jobs(config, train_head, [(*each, models.get(each[0], config.sft)) for each in trainings])
    runs = run_jobs(config, train_with, [(label, seed, steps) for label in starts for seed in seeds])
    rows, curves = [row for row, _ in runs], [point for _, points in runs for point in points]
    lines = seed_table(TRAININGS, LEARNED, learned)
    lines += ["", "And in PPO on arithmetic:", ""] + seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"Training: batches of 64 completions of the SFT model, at most {sized(config, 250, 4)} of them, one "
              f"seed; judged on four completions of held-out prompts. PPO: {steps} steps of 16 prompts x 8 "
              f"completions, seeds 1 to {len(seeds)}: mean (lowest to highest). Explained variance: of the actual "
              f"returns, 1 is perfect, 0 as good as a constant. {config.eval_prompts} validation prompts, 4 samples "
              "each; KL to the SFT model. Model state: weights, gradients and Adam's moments, counted; with a shared "
              "trunk, each of the two optimizers has moments of the trunk, unless the head alone learns. "
              f"{date.today()}."]
    write_study(config, "critic", lines, rows, curves)
    write_csv(Path(config.out) / "critic-training.csv", learned)
    plot_critics(learned, rows, curves, Path(config.out) / "critic.png")


# --- the training before RL ---------------------------------------------------------------------------------------

def train_head(config, task, head, updates, seed, model):
    """Train a critic with this head -> what it explains of held-out prompts."""
    kind, language, weight_decay = HEADS[head]
    settings = CriticConfig(run=str(Path(config.run) / f"critic-{task}-{head}-{updates}-{seed}".replace(" ", "-")),
                            sft=model, reward_model=config.reward_model, device=config.device, seed=seed, steps=updates,
                            batches=min(updates, 250), weight_decay=weight_decay, warmup=min(100, updates // 2))
    reward = None
    if "digits" in task:
        n = int(task.split()[0])
        settings.prompts, settings.max_new_tokens = str(credit.prompts_file(config, n)), n + 2
        reward = credit.reward_of((n, "share", 0), seed)
    elif task == "animals":
        settings.reward = "learned"

    def language_loss(critic, prompts, rollout):
        logprobs, _ = token_logprobs(critic.trunk, prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        return -language * logprobs.sum() / rollout.mask.sum()
    _, figures, rows = train_or_reuse(functools.partial(train, reward=reward, kind=kind,
                                                        beside=language_loss if language else None), settings)
    spent = costs(settings, rows)
    return dict(task=task, head=head, updates=updates, seed=seed, **figures, completions=spent["completions"],
                seconds=spent["seconds_sample"] + spent["seconds_update"])


# --- RL -----------------------------------------------------------------------------------------------------------

def shared_trunk(config, policy, device):
    """In place of ppo.start_critic: a critic whose trunk is the policy itself. Only its head is its own.

    Policy and critic then take turns in moving the trunk, each with its own optimizer. So critic_lr is also the value
    loss's weight: the factor of a loss alone would make no difference to Adam.
    """
    critic = Critic(policy.config, policy.tokenizer).to(device)
    critic.trunk = policy
    return critic


class HeadAlone(Critic):
    """A critic whose head reads the policy's states and does not move them."""

    def values(self, prompts, completion_ids, mask):
        self.trunk.requires_grad_(False)
        values = super().values(prompts, completion_ids, mask)
        self.trunk.requires_grad_(True)
        return values

    def parameters(self, recurse=True):
        """What an optimizer is given."""
        return [*self.scalar.parameters(), *self.gain.parameters()]


def head_alone(config, policy, device):
    critic = HeadAlone(policy.config, policy.tokenizer).to(device)
    critic.trunk = policy
    return critic


def train_with(config, label, seed, steps):
    """Train PPO with this critic (or GRPO) -> what it reached, and rows of how, one per step."""
    run = str(Path(config.run) / f"critic-{label}-{seed}".replace(", ", "-").replace(" ", "_"))
    settings = dict(run=run, sft=config.sft, device=config.device, seed=seed, steps=steps, prompts_per_step=16,
                    group_size=8)
    if label == NO_CRITIC:
        train_policy, settings = grpo.train, grpo.GRPOConfig(**settings)
    else:
        other = shared_trunk if "shared" in label else ppo.start_critic
        start = {HEAD_ALONE: head_alone, PLAIN: credit.plain}.get(label, other)
        train_policy = functools.partial(ppo.train, start_critic=start)
        settings = ppo.PPOConfig(**settings, **STARTS[label])
    policy, metrics = train_or_reuse(train_policy, settings)
    explained = [row["explained_variance"] for row in metrics if row.get("explained_variance", "") != ""]
    reached = dict(setting=label, seed=seed,
                   **measure_arithmetic(policy, load_sft(config), validation(config, "arithmetic")),
                   ev_first=first_of(metrics, "explained_variance"), ev_last=last_of(metrics, "explained_variance"),
                   ev_mean=float(np.mean(explained)) if explained else None,
                   megabytes=model_state(policy, settings, label) / 1e6, seconds=seconds_of(metrics))
    return reached, curve(metrics, ["step", "completions", "accuracy", "explained_variance", "explainable_variance"],
                          setting=label, seed=seed)


def model_state(policy, settings, label):
    """Bytes of the model state, as report.state_bytes counts them, but a shared trunk and its gradients once."""
    state = sum(state_bytes(policy, settings).values())
    trunk = sum(p.numel() * p.element_size() for p in policy.parameters())
    return state - {HEAD_ALONE: 4 * trunk}.get(label, 2 * trunk if "shared" in label else 0)


def plot_critics(learned, rows, curves, path):
    """What critics explain after their training, and along the runs of PPO; and the accuracy at the end."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), width_ratios=[1.2, 1, 1])
    for (head,), group in grouped(learned, "head").items():
        last = [row for row in group if row["updates"] == learned[-1]["updates"]]
        left.plot([row["share"] or 0 for row in last], [row["task"] for row in last], "o", label=head, alpha=0.7)
    left.invert_yaxis()
    left.set(xlabel=f"share of the explainable, after {learned[-1]['updates']} updates", xlim=(-0.1, 1.1))
    for position, ((label,), group) in enumerate(grouped(rows, "setting").items()):
        colour = "black"
        if label != NO_CRITIC:
            y = []                          # (seeds, steps)
            for values in seed_curves(curves, label, "explained_variance"):
                y.append(smooth([value or 0 for value in values]))              # "": all rewards of a step were equal
            colour = plot_band(middle, seed_curves(curves, label, "completions")[0], np.array(y), label)
        right.plot([row["accuracy"] for row in group], [position] * len(group), "o", color=colour)
    middle.axhline(0, color="grey", lw=1)
    middle.set(xlabel="completions sampled", ylabel="explained variance (mean of 5 steps; band: all seeds)",
               ylim=(-1, 1))
    names = list(dict.fromkeys(row["setting"] for row in rows))
    right.set(xlabel="validation accuracy, each seed", yticks=range(len(names)), yticklabels=names)
    right.invert_yaxis()
    left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.1, 1))
    finish(figure, path)
