"""Studies whose results are committed: python -m grpo_min.study tuning

tuning: what learning rate and critic suit each algorithm. Every setting is one run (or --seeds of them) on the
arithmetic task from the same SFT weights, judged on the validation prompts, which nothing else uses. Runs that are
there with the same settings are used again. Writes tutorials/results/tuning.csv and tuning.md.

baselines, group_size, recipes, length: what difference a part of GRPO makes to learning on the arithmetic task, at
equally many completions per step, judged on the validation prompts, with 5 seeds. Each writes NAME.csv (a row per run),
NAME-curves.csv (a row per step), NAME.md (the table, and what it says in words) and NAME.png into tutorials/results.
leave_one_out is not among the baselines: it is the mean's advantage times G / (G - 1), see tests/test_variants.py.

gradients, recipes_one_update: the gradients themselves (study_gradient.py); is_rl_needed, critic: what else could be
done (study_core.py); noise, overoptimisation, kl: the learned reward on the animals (study_reward.py); countdown: a
task of one's own (study_countdown.py).

all: the studies so far but for tuning, one after the other. Where nothing had been run before, minutes.md then says how
long each took.

threads: how fast fine-tuning is with spinning threads, sleeping threads and one thread, alone and beside as many busy
processes as there are cores. Writes tutorials/results/threads.md.

publish: copies what `python -m grpo_min`, and then perhaps `python -m grpo_min.compare --run runs/main/compare` with
more seeds, wrote in runs/main to tutorials/results and data/checkpoints, and puts the tables into the README. If the
job was done once more, into runs/again, its seconds and what it reached are published, too.
"""
import functools
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min import grpo, runs, sft, study_core, study_gradient, study_reward
from grpo_min.compare import ALGORITHMS, beside_each_other, train_or_reuse
from grpo_min.config import option, parse, pick_device, require, run_command
from grpo_min.evaluate import answers, evaluate, held_out
from grpo_min.metrics import thinks
from grpo_min.plots import finish, plt
from grpo_min.pretrain import pack, read_documents
from grpo_min.report import (best_of, first_of, in_words, last_of, machine, seconds_of, spread, table_row, windows,
                             write_study)
from grpo_min.reward_model import judge
from grpo_min.rewards import correct
from grpo_min.runs import DATA, load_model, make_folder, read_jsonl, save_file, serialise, weights
from grpo_min.study_countdown import countdown
from grpo_min.variants import RECIPES

CHECKPOINTS = [("pretrain", "base", "GPT"), ("sft", "sft", "GPT"), ("reward_model", "reward_model", "ScalarGPT")]
RESULTS = Path(__file__).parent.parent / "tutorials" / "results"
GRPO_SETTINGS = [dict(), dict(lr=1e-4), dict(lr=1e-3), dict(scale_advantages=True), dict(beta=0.0),
                 dict(minibatches=4)]
PPO_SETTINGS = [dict(), dict(lr=1e-4), dict(lr=1e-3), dict(critic_lr=1e-3), dict(critic_lr=1e-2),
                dict(critic_warmup=10), dict(lam=1.0), dict(scale_advantages=True)]


LEARNING = {     # study: (what is compared, settings that all share, {label: settings}); the first label is the default
    "baselines": ("advantage", {}, {name: dict(advantage=name)
                                    for name in ["mean", "none", "batch", "mean_std"]}),
    "group_size": ("prompts x completions", {}, {f"{128 // G} x {G}": dict(prompts_per_step=128 // G, group_size=G)
                                                 for G in [8, 2, 4, 16, 32, 64]}),
    "recipes": ("recipe", dict(minibatches=4), {"no recipe": {}, **RECIPES}),
    "length": ("aggregation", {}, {name: dict(aggregation=name)
                                   for name in ["sum", "sequence", "token", "constant"]}),
}
SHARED = dict(steps=40, prompts_per_step=16, group_size=8)       # 128 completions per step


@dataclass
class StudyConfig:
    """Run a study and write its results as CSV and as a Markdown table. The name of the study comes first."""
    run: str = option("runs/study", "folder for the runs")
    out: str = option(str(RESULTS), "folder for the results")
    seeds: int = option(0, "seeds of each setting; 0: 1 for tuning, 3 for countdown, else 5")
    steps: int = option(0, "batches per run; 0: the study's, or the default of each algorithm")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint that all start from")
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint of the reward model, for kl")
    eval_prompts: int = option(1000, "validation prompts per evaluation")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])
    quick: bool = option(False, "a smoke test: two settings of each; its results go into the folder quick of --run")


def tuning(config):
    """Every setting of GRPO and PPO: validation accuracy, KL, explained variance along the run, seconds."""
    with beside_each_other(pick_device(config.device)) as begin:
        rows = [begin(one_setting, config, name, changes, seed)
                for name, all_settings in [("GRPO", GRPO_SETTINGS), ("PPO", PPO_SETTINGS)]
                for changes in (all_settings[:2] if config.quick else all_settings)
                for seed in range(1, (config.seeds or 1) + 1)]
        rows = [row.result() for row in rows]
    forms = [("accuracy", "{:.1%}"), ("thinking", "{:.1%}"), ("kl", "{:.2f}"), ("explained_variance_start", "{:.2f}"),
             ("explained_variance_best", "{:.2f}"), ("explained_variance_end", "{:.2f}"), ("seconds", "{:.0f}")]
    lines = table_row(["algorithm", "settings", "accuracy (validation)", "thinking", "KL (nats)", "explained variance, "
                       "first 10 steps", "best 10", "last 10", "seconds"]) + table_row(["---"] * 9)
    for key in dict.fromkeys((row["algorithm"], row["settings"]) for row in rows):
        chosen = [row for row in rows if (row["algorithm"], row["settings"]) == key]
        lines += table_row([*key, *(spread([row[name] for row in chosen], form) for name, form in forms)])
    write_study(config, "tuning", lines, rows)


def one_setting(config, name, changes, seed):
    """Train with these settings and look at the validation prompts -> a row of the table."""
    train, config_class, _ = ALGORITHMS[name]
    text = ", ".join(f"{key} {value}" for key, value in changes.items()) or "defaults"
    folder = Path(config.run) / f"{name}-{text}-{seed}".replace(", ", "-").replace(" ", "-").lower()
    settings = config_class(run=str(folder), sft=config.sft, seed=seed, device=config.device, **changes,
                            **(dict(steps=config.steps) if config.steps else {}))
    policy, metrics = train_or_reuse(train, settings)
    figures = evaluate(policy, "arithmetic", held_out("arithmetic", "val", config.eval_prompts))
    return dict(algorithm=name, settings=text, seed=seed, accuracy=figures["accuracy"][0],
                thinking=figures["thinking"][0], kl=last_of(metrics, "kl"),
                explained_variance_start=first_of(metrics, "explained_variance"),
                explained_variance_best=best_of(metrics, "explained_variance"),
                explained_variance_end=last_of(metrics, "explained_variance"),
                seconds=seconds_of(metrics))


def learning(config, name):
    """Train each of a study's settings with each seed, and write what they reached and how."""
    what, shared, settings = LEARNING[name]
    settings = dict(list(settings.items())[:2]) if config.quick else settings
    with beside_each_other(pick_device(config.device)) as begin:
        found = {label: [begin(one_learning_run, config, name, label, {**SHARED, **shared, **changes}, seed)
                        for seed in range(1, (config.seeds or 5) + 1)] for label, changes in settings.items()}
        found = {label: [run.result() for run in of_label] for label, of_label in found.items()}
    forms = [("accuracy", "{:.1%}"), ("thinking", "{:.1%}"), ("kl", "{:.2f}"), ("length", "{:.1f}"),
             ("length_wrong", "{:.1f}"), ("grad_norm", "{:.2f}"), ("completions", "{:.0f}"), ("seconds", "{:.0f}")]
    lines = table_row([what, "accuracy (validation)", "thinking", "KL (nats)", "length (tokens)", "length of wrong "
                       "answers", "gradient norm", "completions", "seconds"]) + table_row(["---"] * 9)
    for label, of_label in found.items():
        lines += table_row([label, *(spread([row[key] for row, _ in of_label], form) for key, form in forms)])
    steps, seeds = len(next(iter(found.values()))[0][1]), len(next(iter(found.values())))
    accuracy = {label: [row["accuracy"] for row, _ in of_label] for label, of_label in found.items()}
    completions = {label: np.mean([row["completions"] for row, _ in of_label]) for label, of_label in found.items()}
    lines += ["", f"{steps} steps, seeds 1 to {seeds}: mean (lowest to highest). KL, length and gradient norm are "
              f"means of the last ten steps. {config.eval_prompts} validation prompts, 4 samples each. "
              + "".join(f"`{label}` in training: accuracy without the dropped groups, most of which are all right. "
                        for label, changes in settings.items() if changes.get("dynamic_sampling"))
              + f"{date.today()}.", "", in_words(accuracy, completions)]
    write_study(config, name, lines, [row for of_label in found.values() for row, _ in of_label],
                [row for of_label in found.values() for _, rows in of_label for row in rows])
    plot_learning(what, found, Path(config.out) / f"{name}.png")


def one_learning_run(config, study, label, changes, seed):
    """Train GRPO with these settings -> a row of what it reached, and rows of how, one per step."""
    folder = Path(config.run) / f"{study}-{label}-{seed}".replace(" ", "")
    settings = grpo.GRPOConfig(**{**dict(run=str(folder), sft=config.sft, seed=seed, device=config.device), **changes,
                                  **(dict(steps=config.steps) if config.steps else {})})
    policy, metrics = train_or_reuse(grpo.train, settings)
    rows = held_out("arithmetic", "val", config.eval_prompts)
    texts, finished, lengths = answers(policy, [row["prompt"] for row in rows], 4, 1.0)          # as in evaluate()
    right = correct(texts, texts, [row["answer"] for row in rows for _ in range(4)], finished)
    wrong = [length for length, is_right in zip(lengths, right) if not is_right]
    reached = dict(setting=label, seed=seed, accuracy=float(np.mean(right)),
                   thinking=float(np.mean([thinks(text) for text in texts])), kl=last_of(metrics, "kl"),
                   length=last_of(metrics, "length"),
                   length_wrong=float(np.mean(wrong)) if wrong else None, grad_norm=last_of(metrics, "grad_norm"),
                   completions=metrics[-1]["completions"],
                   seconds=seconds_of(metrics))
    kept = ["step", "completions", "reward", "accuracy", "thinking", "kl", "length", "equal_groups", "clip_high"]
    return reached, [dict(setting=label, seed=seed, **{key: row.get(key, "") for key in kept}) for row in metrics]


def plot_learning(what, found, path):
    """Accuracy along the runs, mean of the seeds over windows of five steps, and what each seed reached at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[3, 2])
    for position, (label, of_label) in enumerate(found.items()):
        curves = np.array([windows(curve, "accuracy", 5) for _, curve in of_label])                 # (seeds, steps - 4)
        x = np.mean([[row["completions"] for row in curve] for _, curve in of_label], axis=0)[-curves.shape[1]:]
        line, = left.plot(x, curves.mean(0), label=label)
        left.fill_between(x, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color(), lw=0)
        right.plot([row["accuracy"] for row, _ in of_label], [position] * len(of_label), "o", color=line.get_color())
    left.set(xlabel="completions sampled", ylabel="accuracy in training")
    left.legend(frameon=False, title=f"{what} (mean, band: all seeds)", fontsize=8, title_fontsize=8)
    right.set(xlabel="validation accuracy after training, each seed", yticks=range(len(found)), yticklabels=list(found))
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=4)
    finish(figure, path)


def laboratory(config):
    """Every study of STUDIES between tuning and all, and how long they take."""
    from_nothing, minutes = not Path(config.run).exists(), {}
    names = list(STUDIES)[1:list(STUDIES).index("all")]
    for name in names:
        print(f"\n=== {name}, study {len(minutes) + 1} of {len(names)} ".ljust(100, "="), flush=True)
        start = time.perf_counter()
        STUDIES[name](config)
        minutes[name] = (time.perf_counter() - start) / 60
    lines = table_row(["study", "minutes"]) + table_row(["---"] * 2)
    for name, taken in [*minutes.items(), ("**all**", sum(minutes.values()))]:
        lines += table_row([name, f"{taken:.1f}"])
    if from_nothing:
        write_study(config, "minutes", [*lines, "", f"{machine(pick_device(config.device))}, {date.today()}."])


def threads(config):
    """Steps of fine-tuning per second, by threads and by what else runs."""
    cores, rows = os.cpu_count(), []
    for name, environment, watches in [(f"{cores} threads, spinning", {}, False),
                                       (f"{cores} threads, sleeping", dict(OMP_WAIT_POLICY="PASSIVE"), False),
                                       ("1 thread", dict(OMP_NUM_THREADS="1"), False),
                                       (f"{cores} threads, spinning, until the run notices others", {}, True)]:
        found = []
        for others in 0, cores:
            print(f"{name}, beside {others} busy processes", flush=True)
            busy = [multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True) for _ in range(others)]
            for process in busy:
                process.start()
            os.environ.update(environment)                                    # what a new process starts with
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found.append(process.submit(steps_per_second, 30 if config.quick else 150, watches).result())
            for name_of in environment:
                del os.environ[name_of]
            for process in busy:
                process.kill()
        rows.append([name, *(f"{rate:.0f}" for rate in found)])
    lines = table_row(["", "alone", f"beside {cores} busy processes"]) + table_row(["---"] * 3)
    lines += [line for row in rows for line in table_row(row)]
    lines += ["", f"Steps of fine-tuning per second, one run each; {machine(torch.device('cpu'))}, {date.today()}."]
    write_study(config, "threads", lines)


def keep_busy():
    torch.set_num_threads(1)
    a = torch.randn(500, 500)
    while True:
        a @ a


def steps_per_second(steps, watches):
    """Fine-tune, the first third of the steps not counted. watches: as always, else the number of threads is fixed."""
    if not watches:
        runs.Run.share_cores = lambda self: None
    times = []
    runs.Run.show = lambda *_: times.append(time.perf_counter())
    sft.train(sft.SFTConfig(run="", steps=steps, device="cpu"))
    return (len(times) - 1 - steps // 3) / (times[-1] - times[steps // 3])


def publish(config):
    """Copy the results of the main job and of the comparison to where they are committed, and update the README."""
    main_run = Path("runs/main")
    make_folder(RESULTS)
    make_folder(DATA / "checkpoints")
    for stage, name, kind in CHECKPOINTS:
        path = main_run / stage / "checkpoint.pt"
        if path.exists():
            save_file(DATA / "checkpoints" / f"{name}.pt", serialise(**weights(load_model(path, kind))))
    save_file(DATA / "checkpoints" / "scores.json", json.dumps(scores(), indent=1).encode())
    again = Path("runs/again")
    if again.exists():
        reached = [path.read_text(encoding="utf-8").split("\n\n")[:2]                 # the heading and the first table
                   for path in sorted((again / "compare").glob("comparison-*.md"))]
        save_file(RESULTS / "again.md", "\n\n".join(sum(reached, [])).encode() + b"\n")
    sources = [(again if again.exists() else main_run) / "pipeline.md", main_run / "before_after.md",
               main_run / "reward_model/reward_model.md", main_run / "reward_model/calibration.png",
               *sorted((main_run / "compare").glob("comparison-*")),
               *sorted(Path("runs/benchmark").glob("benchmark.*"))]
    for path in sources:
        if path.exists():
            save_file(RESULTS / path.name, path.read_bytes())
    readme = RESULTS.parent.parent / "README.md"
    save_file(readme, fill_in(readme.read_text(encoding="utf-8")).encode())


def scores():
    """What the committed weights of the first three stages score on a few held-out rows: {name: number}."""
    base, sft, reward = (load_model(DATA / "checkpoints" / f"{name}.pt", kind) for _, name, kind in CHECKPOINTS)
    rows = pack(read_documents(DATA / "pretrain.txt"), base.config.context, 0)[:50]           # (50, context + 1)
    with torch.no_grad():
        loss = F.cross_entropy(base.plain(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    pairs = read_jsonl(DATA / "preferences_heldout.jsonl", ["prompt", "chosen", "rejected", "animal", "attribute"])
    return dict(base_loss=loss, reward_model_accuracy=judge(reward, pairs[:300])["accuracy"][0],
                sft_accuracy=evaluate(sft, "arithmetic", held_out("arithmetic", "test", 200))["accuracy"][0])


def fill_in(text):
    """The README's text with the contents of tutorials/results/NAME between <!-- NAME --> and <!-- end of NAME -->, and
    the links to the banners of grpo.py pointing to their lines."""
    for name in re.findall(r"<!-- end of (\S+) -->", text):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = text.index(begin) + len(begin), text.index(end)
        text = text[:before] + "\n" + (RESULTS / name).read_text(encoding="utf-8").strip() + "\n" + text[after:]
    source = Path(grpo.__file__).read_text(encoding="utf-8").splitlines()
    lines = {banner: number for number, line in enumerate(source, start=1)
             for banner in re.findall(r"# --- (\d)\.", line)}
    return re.sub(r"\[banner (\d)\]\(grpo_min/grpo.py#L\d*\)",
                  lambda match: f"[banner {match[1]}](grpo_min/grpo.py#L{lines[match[1]]})", text)


STUDIES = {"tuning": tuning, **{name: functools.partial(learning, name=name) for name in LEARNING},
           "gradients": study_gradient.gradients, "recipes_one_update": study_gradient.recipes_one_update,
           "is_rl_needed": study_core.is_rl_needed, "critic": study_core.critic, **study_reward.STUDIES,
           "countdown": countdown, "all": laboratory, "threads": threads, "publish": publish}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    names = [argument for argument in argv[:1] if not argument.startswith("-")]
    config = parse(StudyConfig, argv[len(names):])
    require(names and names[0] in STUDIES, f"name a study first: {', '.join(STUDIES)}")
    pick_device(config.device)
    if config.quick and config.out == StudyConfig.out:
        config.out = str(Path(config.run) / "quick")                 # what is published is not to be overwritten
    STUDIES[names[0]](config)


if __name__ == "__main__":
    run_command(main)
