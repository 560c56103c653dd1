"""The study of a task of one's own: python -m grpo_min.study countdown

The base model is fine-tuned on the demonstrations of tutorials/countdown.py and then trained by GRPO on its reward,
with 3 seeds, all judged on its test prompts, which nothing else uses. Writes countdown.md into tutorials/results: the
commands that do the same, the table, what it says in words, and some answers. What has been run is not run again.
"""
from datetime import date
from pathlib import Path

from grpo_min import grpo, sft
from grpo_min.compare import beside_each_other, train_or_reuse
from grpo_min.config import as_options, pick_device
from grpo_min.evaluate import evaluate, held_out
from grpo_min.report import seconds_of, spread, table_row, write_study
from grpo_min.runs import load_model
from grpo_min.sample import ask
from grpo_min.task import load_task

ROOT, TASK = Path(__file__).parent.parent, "tutorials/countdown.py"
SFT, LENGTH = dict(steps=2000), dict(max_new_tokens=60)      # all else as by default
QUICK = dict(steps=2)
FIGURES = [("reward", "{:.3f}"), ("full", "{:.1%}"), ("reward_greedy", "{:.3f}"), ("pass@4", "{:.1%}"),
           ("thinking", "{:.1%}"), ("length", "{:.1f}")]
COMMANDS = [
    f"python -m grpo_min.sft --task {TASK} {as_options(SFT)} --run runs/countdown/sft",
    f"python -m grpo_min.grpo --task {TASK} --sft runs/countdown/sft/checkpoint.pt {as_options(LENGTH)} "
    "--run runs/countdown/grpo",
    f"python -m grpo_min.evaluate --task {TASK} --checkpoint runs/countdown/grpo/checkpoint.pt {as_options(LENGTH)}",
]


def countdown(config):
    """Fine-tune, train with each seed, judge, and write what came of it."""
    settings = sft.SFTConfig(run=f"{config.run}/countdown-sft", task=str(ROOT / TASK), device=config.device,
                             **(QUICK if config.quick else SFT))
    seeds = range(1, (config.seeds or 3) + 1)
    with beside_each_other(pick_device(config.device)) as begin:
        begin(train_or_reuse, sft.train, settings).result()
        before, *after = [run.result() for run in [begin(one_run, config, settings, seed) for seed in (0, *seeds)]]
    lines = ["```", *COMMANDS, "```", ""]
    lines += table_row(["", "reward", "solved", "reward, greedy", "pass@4", "thinking", "length (tokens)", "seconds"])
    lines += table_row(["---"] * 8)
    for name, runs in ("fine-tuned", [before]), ("GRPO", after):
        lines += table_row([name, *(spread([run["figures"][key][0] for run in runs], form) for key, form in FIGURES),
                            spread([run["seconds"] for run in runs], "{:.0f}")])
    lines += ["", f"{before['prompts']} test prompts, 4 samples each. Of GRPO seeds 1 to {len(seeds)}: mean (lowest to "
              f"highest). {date.today()}.", ""]
    lines += [in_words(before["figures"]["full"], [run["figures"]["full"][0] for run in after]), ""]
    lines += table_row(["prompt", "fine-tuned", "GRPO, seed 1"]) + table_row(["---"] * 3)
    for prompt, *answers in zip(before["shown"], before["answers"], after[0]["answers"]):
        lines += table_row([prompt, *(f"`{answer.strip()}`" for answer in answers)])
    write_study(config, "countdown", lines)


def one_run(config, start, seed):
    """Train GRPO with a seed, or with seed 0 take the fine-tuned model -> what it does on the test prompts."""
    prompts, reward = load_task(start.task, "prompts", "reward")
    policy, metrics = load_model(f"{start.run}/checkpoint.pt", "GPT", pick_device(config.device)), []
    if seed:
        policy, metrics = train_or_reuse(grpo.train, grpo.GRPOConfig(
            run=f"{config.run}/countdown-grpo-{seed}", task=start.task, sft=f"{start.run}/checkpoint.pt", seed=seed,
            device=config.device, **LENGTH, **(QUICK if config.quick else {})))
    rows = held_out(prompts, "test", config.eval_prompts)
    shown = [row["prompt"] for row in rows[:3]]
    return dict(figures=evaluate(policy, reward, rows, **LENGTH), prompts=len(rows), shown=shown,
                seconds=seconds_of(metrics) if seed else None,
                answers=[ask(policy, prompt, 1, 1.0, **LENGTH)[0] for prompt in shown])


def in_words(before, after):
    """Share solved before [mean, low, high] and after GRPO, of each seed -> what that says."""
    was = f"{before[0]:.1%} (95% interval {before[1]:.1%} to {before[2]:.1%})"
    now = spread(after, "{:.1%}")
    if min(after) > before[2]:
        return f"GRPO solves more with every seed: {now}, before it {was}."
    return f"It is not shown that GRPO solves more: {now}, before it {was}."
