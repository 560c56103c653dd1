"""Which learning rate and which critic suit each algorithm? Every setting of GRPO and PPO is one run (or --seeds of
them) on the arithmetic task from the same SFT weights, judged on the validation prompts. Writes tuning.csv and
tuning.md."""
from datetime import date
from pathlib import Path

from grpo_min import grpo, ppo
from grpo_min.evaluate import evaluate
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.studies.common import (best_of, first_of, last_of, run_jobs, seconds_of, seed_table, seeds_of, sized,
                                         validation, write_study)

GRPO_SETTINGS = {"defaults": {}, "lr 0.0001": dict(lr=1e-4), "lr 0.001": dict(lr=1e-3),
                 "scale_advantages True": dict(scale_advantages=True), "beta 0.0": dict(beta=0.0),
                 "minibatches 4": dict(minibatches=4)}
PPO_SETTINGS = {"defaults": {}, "lr 0.0001": dict(lr=1e-4), "lr 0.001": dict(lr=1e-3),
                "critic_lr 0.001": dict(critic_lr=1e-3), "critic_lr 0.01": dict(critic_lr=1e-2),
                "critic_warmup 10": dict(critic_warmup=10), "lam 1.0": dict(lam=1.0),
                "scale_advantages True": dict(whiten=True)}
ALGORITHMS = {"GRPO": (grpo.train, grpo.GRPOConfig, GRPO_SETTINGS), "PPO": (ppo.train, ppo.PPOConfig, PPO_SETTINGS)}
LABELS = {"algorithm": ("algorithm", "{}"), "settings": ("settings", "{}")}
NUMBERS = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
           "KL (nats)": ("kl", "{:.2f}"),
           "explained variance, first 10 steps": ("explained_variance_start", "{:.2f}"),
           "best 10": ("explained_variance_best", "{:.2f}"), "last 10": ("explained_variance_end", "{:.2f}"),
           "seconds": ("seconds", "{:.0f}")}


def study(config):
    jobs = []
    for algorithm, (_, _, settings) in ALGORITHMS.items():
        for label in list(settings)[:sized(config, len(settings), 2)]:
            jobs += [(algorithm, label, seed) for seed in seeds_of(config, 1)]
    rows = run_jobs(config, train_setting, jobs)
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"{config.steps or grpo.GRPOConfig.steps} steps of {grpo.GRPOConfig.prompts_per_step} prompts x "
              f"{grpo.GRPOConfig.group_size} completions, seeds 1 to {len(seeds_of(config, 1))}: mean (lowest to "
              "highest). KL and explained variance are means of ten steps, KL of the last ten; explained variance: of "
              f"the actual returns, 1 is perfect, 0 as good as a constant. {config.eval_prompts} validation prompts, 4 "
              f"samples each. {date.today()}."]
    write_study(config, "tuning", lines, rows)


def train_setting(config, algorithm, label, seed):
    """Train with these settings and look at the validation prompts -> a row of the table."""
    train, config_class, settings = ALGORITHMS[algorithm]
    run = Path(config.run) / f"{algorithm}-{label}-{seed}".replace(" ", "-").lower()
    steps = config.steps or sized(config, config_class.steps, 2)
    policy, metrics = train_or_reuse(train, config_class(
        run=str(run), sft=config.sft, seed=seed, device=config.device, steps=steps, **settings[label]))
    figures = evaluate(policy, "arithmetic", validation(config, "arithmetic"))
    return dict(algorithm=algorithm, settings=label, seed=seed, accuracy=figures["accuracy"][0],
                thinking=figures["thinking"][0], kl=last_of(metrics, "kl"),
                explained_variance_start=first_of(metrics, "explained_variance"),
                explained_variance_best=best_of(metrics, "explained_variance"),
                explained_variance_end=last_of(metrics, "explained_variance"),
                seconds=seconds_of(metrics))
