"""Does the loop learn a task of one's own? The base model is fine-tuned on the demonstrations of
tutorials/tasks/countdown.py and then trained by GRPO on its reward, with 3 seeds, all judged on its test prompts, which
nothing else uses.

Writes countdown.md: the commands that do the same, the table, and some answers.
"""
from datetime import date
from pathlib import Path

from grpo_min import grpo, sft
from grpo_min.evaluate import evaluate, held_out
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.studies.common import run_jobs, seconds_of, seed_table, seeds_of, sized, table, write_study
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import pick_device
from grpo_min.variants import as_options
from grpo_min.sample import ask
from grpo_min.task import load_task

ROOT, TASK = Path(__file__).parents[3], "tutorials/tasks/countdown.py"
SFT, LENGTH = dict(steps=2000), dict(max_new_tokens=60)      # all else as by default
COMMANDS = [
    f"python -m grpo_min.sft --task {TASK} {as_options(SFT)} --run runs/countdown/sft",
    f"python -m grpo_min.grpo --task {TASK} --sft runs/countdown/sft/checkpoint.pt {as_options(LENGTH)} "
    "--run runs/countdown/grpo",
    f"python -m grpo_min.evaluate --task {TASK} --checkpoint runs/countdown/grpo/checkpoint.pt {as_options(LENGTH)}",
]
NUMBERS = {"reward": ("reward", "{:.3f}"), "solved": ("full", "{:.1%}"), "reward, greedy": ("reward_greedy", "{:.3f}"),
           "pass@4": ("pass@4", "{:.1%}"), "thinking": ("thinking", "{:.1%}"), "length (tokens)": ("length", "{:.1f}"),
           "seconds": ("seconds", "{:.0f}")}


def study(config):
    run_jobs(config, fine_tune, [()])
    start, *trained = run_jobs(config, train_and_judge, [(seed,) for seed in (0, *seeds_of(config, 3))])
    low, high = start["solved_interval"]
    lines = ["```", *COMMANDS, "```", "", *seed_table({"": ("name", "{}")}, NUMBERS, [start, *trained]), ""]
    lines += [f"{start['prompts']} test prompts, 4 samples each. Of GRPO seeds 1 to {len(trained)}: mean (lowest to "
              f"highest). Solved by the fine-tuned model: 95% bootstrap interval {low:.1%} to {high:.1%}. "
              f"{date.today()}.", ""]
    rows = [[prompt, f"`{before}`", f"`{after}`"]
            for (prompt, before), (_, after) in zip(start["answers"], trained[0]["answers"])]
    lines += table(["prompt", "fine-tuned", "GRPO, seed 1"], rows)
    write_study(config, "countdown", lines)


def fine_tune(config):
    """The base model, fine-tuned on the demonstrations -> its run's folder."""
    run = f"{config.run}/countdown-sft"
    train_or_reuse(sft.train, sft.SFTConfig(run=run, task=str(ROOT / TASK), device=config.device,
                                            **sized(config, SFT, dict(steps=2))))
    return run


def train(config, seed):
    """Train GRPO with a seed, or with seed 0 take the fine-tuned model -> the policy, its metrics."""
    start = f"{config.run}/countdown-sft/checkpoint.pt"
    if seed == 0:
        return load_model(start, pick_device(config.device)), []
    return train_or_reuse(grpo.train, grpo.GRPOConfig(
        run=f"{config.run}/countdown-grpo-{seed}", task=str(ROOT / TASK), sft=start, seed=seed, device=config.device,
        **LENGTH, **sized(config, {}, dict(steps=2))))


def train_and_judge(config, seed):
    """What GRPO with a seed, or with seed 0 the fine-tuned model, does on the test prompts."""
    prompts, reward = load_task(str(ROOT / TASK), "prompts", "reward")
    policy, metrics = train(config, seed)
    rows = held_out(prompts, "test", config.eval_prompts)
    figures = evaluate(policy, reward, rows, **LENGTH)
    questions = [row["prompt"] for row in rows[:3]]
    return dict(name="GRPO" if seed else "fine-tuned", **{name: mean for name, (mean, _, _) in figures.items()},
                solved_interval=figures["full"][1:], prompts=len(rows), seconds=seconds_of(metrics) if seed else None,
                answers=[(question, ask(policy, question, 1, 1.0, **LENGTH)[0][0].strip()) for question in questions])
