"""Which settings suit each algorithm? Every setting of GRPO and PPO is one run (or --seeds of them) from the same SFT
weights, on arithmetic, and for the learning rate on the animals too. Policies are judged on the validation prompts.
Writes tuning.csv and tuning.md.
"""
from datetime import date
from pathlib import Path

from grpo_min.evaluate import evaluate
from grpo_min.lab import compare
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import GOALS, TASKS, to_goal
from grpo_min.lab.studies.common import (last_of, run_jobs, seconds_of, seed_table, seeds_of, sized, validation,
                                         write_study)

RATES = {"defaults": {}, "lr / 3": dict(lr=1 / 3), "lr x 3": dict(lr=3)}
SETTINGS = {
    ("correct", "GRPO"): {**RATES, "scale_advantages True": dict(scale_advantages=True), "beta 0": dict(beta=0.0),
                          "minibatches 4": dict(minibatches=4)},
    ("correct", "PPO"): {**RATES, "whiten True": dict(whiten=True), "beta 0": dict(beta=0.0),
                         "minibatches 4": dict(minibatches=4), "lam 0": dict(lam=0.0), "lam 0.5": dict(lam=0.5),
                         "lam 1": dict(lam=1.0), "critic_epochs 0": dict(critic_epochs=0),
                         "critic_epochs 4": dict(critic_epochs=4), "critic_lr 0.0003": dict(critic_lr=3e-4),
                         "critic_lr 0.001": dict(critic_lr=1e-3), "critic sft, critic_lr 0.003": dict(critic="sft",
                                                                                                      critic_lr=3e-3)},
    ("learned", "GRPO"): RATES,
    ("learned", "PPO"): {**RATES, "lam 0.5": dict(lam=0.5), "lam 1": dict(lam=1.0)},
}
LABELS = {"task": ("task", "{}"), "algorithm": ("algorithm", "{}"), "settings": ("settings", "{}")}
NUMBERS = {"accuracy or gold score (validation)": ("quality", "{:.3f}"), "KL (nats)": ("kl", "{:.2f}"),
           "completions to the goal": ("goal_completions", "{:.0f}"),
           "explained variance, last 10 steps": ("explained_variance", "{:.2f}"), "seconds": ("seconds", "{:.0f}")}


def study(config):
    rewards, jobs = list(TASKS), []
    critics = dict(zip(rewards, run_jobs(config, train_critic, [(reward,) for reward in rewards])))
    for (reward, algorithm), settings in SETTINGS.items():
        for label in list(settings)[:sized(config, len(settings), 2)]:
            warm_start = critics[reward] if algorithm == "PPO" else None
            jobs += [(reward, algorithm, label, seed, warm_start) for seed in seeds_of(config, 1)]
    rows = run_jobs(config, train_setting, jobs)
    goals = " and ".join(f"{goal} ({TASKS[reward]})" for reward, goal in GOALS.items())
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"Seeds 1 to {len(seeds_of(config, 1))}: mean (lowest to highest). Accuracy is that of arithmetic, "
              f"the gold score that of the animals. Goal: a reward of {goals}, mean of five steps. KL: mean of the "
              f"last ten steps. {config.eval_prompts} validation prompts, 4 samples each. {date.today()}."]
    write_study(config, "tuning", lines, rows)


def comparison(config):
    """These settings, as the comparison has them."""
    return compare.CompareConfig(run=config.run, sft=config.sft, reward_model=config.reward_model, device=config.device,
                                 steps=config.steps or sized(config, 0, 2))


def train_critic(config, reward):
    return compare.train_critic(comparison(config), reward)


def train_setting(config, reward, algorithm, label, seed, warm_start):
    """Train with these settings and look at the validation prompts -> a row of the table."""
    changes = dict(SETTINGS[reward, algorithm][label])
    train, settings = compare.settings_of_run(comparison(config), algorithm, reward, seed, warm_start)
    settings.lr *= changes.pop("lr", 1)
    for name, value in changes.items():
        setattr(settings, name, value)
    settings.run = str(Path(config.run) / f"{algorithm}-{reward}-{label}-{seed}".replace(" ", "-").replace("/", "by"))
    policy, metrics = train_or_reuse(train, settings)
    task = TASKS[reward]
    figures = evaluate(policy, task, validation(config, task))
    return dict(task=task, algorithm=algorithm, settings=label, seed=seed, lr=settings.lr,
                quality=figures["accuracy" if task == "arithmetic" else "gold"][0], kl=last_of(metrics, "kl"),
                **to_goal(metrics, reward), explained_variance=last_of(metrics, "explained_variance"),
                seconds=seconds_of(metrics))
