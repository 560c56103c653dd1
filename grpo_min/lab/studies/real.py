"""What does RL make of a real model? SmolLM2-135M-Instruct learns tutorials/tasks/two_words.py, by GRPO and by PPO with
3 seeds each, and with one seed under other settings. It is judged on prompts whose words it was never trained on: on
those of validation under all settings, on those of the test after the main runs.

Writes real.md, real.csv, real-curves.csv, real.png, and ten prompts with an answer of each in real-answers.csv. --sft
takes another model than SmolLM2.
"""
import json
import re
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import torch

from grpo_min import grpo, ppo
from grpo_min.lab.processes import in_own_process, train_or_reuse
from grpo_min.lab.report import PHASES, machine, smooth
from grpo_min.lab.studies.common import (StudyConfig, curve, plot_band, seed_curves, seed_table, seeds_of, sized,
                                         table, write_study)
from grpo_min.rewards import score
from grpo_min.rollout import Prompts, frozen_logprobs, sample
from grpo_min.run.checkpoint import load_model, serialise, weights
from grpo_min.run.config import pick_device
from grpo_min.run.files import make_folder, read_text, save_file
from grpo_min.run.plots import finish, plt
from grpo_min.run.rng import generator
from grpo_min.run.table import write_csv
from grpo_min.task import load_task

TASK = Path(__file__).parents[3] / "tutorials" / "tasks" / "two_words.py"
STEPS, Q, G, N, CONTEXT, PROMPTS = 20, 8, 8, 24, 128, 100
SHARED = dict(task=str(TASK), prompts_per_step=Q, group_size=G, max_new_tokens=N, microbatches=2, lr=3e-5, beta=0.0)
LOOPS = {"GRPO": (grpo.train, grpo.GRPOConfig, {}),
         "PPO": (ppo.train, ppo.PPOConfig, dict(critic="sft", critic_lr=3e-6, critic_minibatches=2))}
BEFORE, MAIN = "before", "main"
OTHERS = {          # changes of the main settings, with one seed each
    "GRPO": {"lr 1e-5": dict(lr=1e-5), "lr 1e-4": dict(lr=1e-4), "beta 0.01": dict(beta=0.01),
             "beta 0.05": dict(beta=0.05), "lora 8, lr 3e-4": dict(lora=8, lr=3e-4)},
    "PPO": {"lr 1e-5, critic_lr 3e-5": dict(lr=1e-5, critic_lr=3e-5), "critic_lr 3e-5": dict(critic_lr=3e-5),
            "lr 1e-4, critic_lr 3e-5": dict(lr=1e-4, critic_lr=3e-5), "lam 1": dict(lam=1.0)},
}
CURVES = ["step", "completions", "reward", "length", "entropy", "kl", "grad_norm", "explained_variance",
          "explainable_variance", *(f"seconds_{phase}" for phase in PHASES)]
FIGURES = {"right": ("right", "{:.1%}"), "KL (nats)": ("kl", "{:.1f}"), "words": ("words", "{:.1f}"),
           "different answers of 4": ("different", "{:.2f}"), "patterns": ("patterns", "{:.0f}"),
           "answers of the commonest": ("commonest", "{:.1%}")}
COSTS = {"minutes": ("minutes", "{:.1f}"),
         **{f"{phase} (s per step)": (f"seconds_{phase}", "{:.1f}") for phase in PHASES}}


def study(config):
    start, jobs = beginning(config), [(BEFORE, MAIN, 0)]
    for algorithm, settings in OTHERS.items():
        jobs += [(algorithm, setting, 1) for setting in list(settings)[:sized(config, None, 1)]]
        jobs += [(algorithm, MAIN, seed) for seed in seeds_of(config, 3)]
    threads, rows, curves, answers = torch.get_num_threads(), [], [], []
    for job in jobs:
        row = in_own_process(judged, threads, config, start, *job)
        said, metrics = row.pop("answers"), row.pop("metrics")
        curves += curve(metrics, CURVES, setting=f"{row['algorithm']} {row['setting']}", seed=row["seed"])
        if row["setting"] == MAIN and row["seed"] <= 1:
            answers += [dict(algorithm=row["algorithm"], **answer) for answer in said]
        rows.append(row)
    make_folder(Path(config.out))
    plot(config, rows, curves)
    write_csv(Path(config.out) / "real-answers.csv", answers)
    write_study(config, "real", report(config, rows, answers), rows, curves)


def beginning(config):
    """The checkpoint of the model that all start from."""
    if config.sft != StudyConfig.sft:
        return config.sft
    path = Path(config.run) / "smollm2.pt"
    if not path.exists():
        from grpo_min.real.load import load
        model = load("smollm2", CONTEXT)
        make_folder(path.parent)
        save_file(path, serialise(step=0, **weights(model)))
    return str(path)


# --- a run ----------------------------------------------------------------------------------------------------------

def judged(threads, config, start, algorithm, setting, seed):
    """Train with these settings, unless that is done, or not at all before -> its row, with its metrics and answers.

    What was judged is kept in row.json. The checkpoint, which would take 1.6 GB, or 3.2 with a critic, goes.
    """
    torch.set_num_threads(threads)
    folder = Path(config.run) / f"real-{algorithm}-{setting}-{seed}".replace(" ", "_")
    settings = dict(steps=config.steps or sized(config, STEPS, 2), prompts=config.eval_prompts, start=start)
    if (folder / "row.json").exists():
        row = json.loads(read_text(folder / "row.json"))
        if row.pop("of") == settings:
            return row
    metrics, device = [], pick_device(config.device)
    if algorithm == BEFORE:
        policy = load_model(start, device)
    else:
        train, config_class, own = LOOPS[algorithm]
        changes = OTHERS[algorithm].get(setting, {})
        policy, metrics = train_or_reuse(train, config_class(**{
            **SHARED, **own, **changes, "run": str(folder), "sft": start, "seed": seed, "steps": settings["steps"],
            "device": config.device}))
    row = dict(algorithm=algorithm, setting=setting, seed=seed, metrics=metrics)
    reference = load_model(start, device)
    row.update(answers=[], **judge(policy, reference, "val", config.eval_prompts)[0])
    if setting == MAIN:
        figures, answers = judge(policy, reference, "test", config.eval_prompts)
        row.update({f"test_{name}": value for name, value in figures.items()}, answers=answers[:10])
    if metrics:
        for phase in PHASES:
            row[f"seconds_{phase}"] = float(np.mean([each.get(f"seconds_{phase}") or 0 for each in metrics]))
        row["minutes"] = len(metrics) / 60 * sum(row[f"seconds_{phase}"] for phase in PHASES)
    make_folder(folder)
    save_file(folder / "row.json", json.dumps(dict(row, of=settings)).encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return row


def judge(policy, reference, split, count, samples=4, batch=16):
    """Answers to the first `count` (at most 100) prompts of a split -> figures, and the first answer to each prompt.

    kl: KL(policy || reference) in nats per answer, the mean of k1. A pattern is an answer with blanks for the words.
    """
    prompts, reward = load_task(str(TASK), "prompts", "reward")
    rows, kl, rewards, texts = prompts(split)[:min(count, PROMPTS)], [], [], []
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        asked = Prompts.from_texts([row["prompt"] for row in part], policy.tokenizer, policy.tokens.weight.device)
        rollout = sample(policy, asked, samples, N, 1.0, generator(0, i))
        k1 = (rollout.logprobs - frozen_logprobs(reference, asked, rollout, 1.0, 1)) * rollout.mask  # (B, N)
        scores, said = score(reward, part, rollout, samples, policy.tokenizer)
        kl, rewards, texts = kl + k1.sum(dim=1).tolist(), rewards + scores.tolist(), texts + said
    patterns = [pattern(text, rows[i // samples]["words"]) for i, text in enumerate(texts)]
    different = [len(set(texts[i:i + samples])) for i in range(0, len(texts), samples)]
    figures = dict(right=np.mean(rewards), kl=np.mean(kl).round(3) + 0, different=np.mean(different),
                   words=np.mean([len(text.split()) for text in texts]), patterns=len(set(patterns)),
                   commonest=Counter(patterns).most_common(1)[0][1] / len(patterns), judged=len(texts))
    answers = [dict(prompt=row["prompt"], answer=text, reward=right, pattern=shape)
               for row, text, right, shape in zip(rows, texts[::samples], rewards[::samples], patterns[::samples])]
    return {name: float(value) for name, value in figures.items()}, answers


def pattern(text, words):
    """An answer with _ in place of the words: The moon lights the river. -> The _ lights the _."""
    return re.sub(rf"\b({'|'.join(map(re.escape, words))})\b", "_", text.strip(), flags=re.IGNORECASE)


# --- what is written ------------------------------------------------------------------------------------------------

def report(config, rows, answers):
    """The lines of real.md."""
    before, main = rows[0], [row for row in rows[1:] if row["setting"] == MAIN]
    name, test = {"": ("algorithm", "{}")}, {head: (f"test_{key}", form) for head, (key, form) in FIGURES.items()}
    lines = ["On the test prompts:", "", *seed_table(name, test, [before, *main]), ""]
    lines += ["What it costs:", "", *seed_table(name, COSTS, main), ""]
    lines += ["Other settings, with seed 1, on the validation prompts:", ""]
    first = [row for row in rows if row["seed"] <= 1]
    lines += [*seed_table({**name, "settings": ("setting", "{}")}, FIGURES, first), ""]
    said = {}
    for row in answers:
        text = " ".join(row["answer"].split())[:100].replace("|", "/")
        said.setdefault(", ".join(re.findall('"(.+?)"', row["prompt"])), []).append(f"{text} ({row['reward']:.0f})")
    lines += ["Ten test prompts, and the first answer to each (its reward):", ""]
    headings = ["words", *dict.fromkeys(row["algorithm"] for row in answers)]
    lines += table(headings, [[words, *each] for words, each in said.items()])
    return lines + ["", f"{before['judged']:.0f} answers each, at a temperature of 1. A pattern is an answer with "
                    f"blanks for the two words. Seeds 1 to {len(main) // len(LOOPS)}: mean (lowest to highest). "
                    f"{machine(pick_device(config.device))}, {date.today()}."]


def plot(config, rows, curves):
    """The reward along the main runs, and what the settings ended with: right answers against KL."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for algorithm in LOOPS:
        setting = f"{algorithm} {MAIN}"
        rewards = np.array([smooth(values, 3) for values in seed_curves(curves, setting, "reward")])  # (seeds, steps)
        colour = plot_band(left, seed_curves(curves, setting, "completions")[0], rewards, algorithm)
        own = [row for row in rows if row["algorithm"] == algorithm]
        right.plot([row["kl"] for row in own], [row["right"] for row in own], "o", color=colour, label=algorithm)
        for row in own:
            if row["setting"] != MAIN:
                right.annotate(row["setting"], (row["kl"], row["right"]), fontsize=7, xytext=(4, -3),
                               textcoords="offset points")
    left.set(xlabel="completions sampled", ylabel="reward: right answers, share", ylim=(0, 1.02))
    right.set(xlabel="KL to the model before (nats per answer)", ylabel="right, validation prompts", ylim=(0, 1.02))
    left.legend(frameon=False, title="mean of three steps, band: all seeds", title_fontsize=8)
    right.legend(frameon=False)
    finish(figure, Path(config.out) / "real.png")
