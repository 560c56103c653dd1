"""How much of a result is luck? The main job from nothing, five times, with other seeds in every stage; what is left of
the spread if only the reward model has another seed, or only the RL; and the remedy, the mean score of three reward
models (Coste et al., 2310.02743).

Writes luck.csv (a row per run), luck.md and luck.png.
"""
import json
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import __main__ as main_job, reward_model
from grpo_min.gold import MAXIMUM
from grpo_min.lab import compare
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.studies.common import column_by, plot_seeds, run_jobs, seeds_of, table, write_study
from grpo_min.run.files import DATA
from grpo_min.run.plots import finish, plt

EVERY, REWARD, RL, MEAN = "every stage", "the reward model", "RL", "mean of three"
FIGURES = {      # of a main job: (the reward it is compared under, the algorithm, its figure)
    "right, SFT": ("correct", "SFT", "arithmetic_test", "accuracy"),
    "right, GRPO": ("correct", "GRPO", "arithmetic_test", "accuracy"),
    "right, PPO": ("correct", "PPO", "arithmetic_test", "accuracy"),
    "way to the maximum, GRPO": ("learned", "GRPO", "animals_test", "progress"),
    "way to the maximum, PPO": ("learned", "PPO", "animals_test", "progress")}
AGREES, WAY = "reward model agrees", "way to the maximum, GRPO"


def study(config):
    jobs = {seed: whole_job(config, seed) for seed in seeds_of(config)}
    first, *others = jobs
    rows = [dict(varied=EVERY, seed=seed, **figures) for seed, figures in jobs.items()]
    alone = {REWARD: other_reward_model, RL: other_rl}
    for varied, train in alone.items():
        reached = run_jobs(config, train, [(first, seed) for seed in others])
        for seed, figures in zip(jobs, [jobs[first], *reached]):
            rows.append(dict(varied=varied, seed=seed, **{**dict.fromkeys(jobs[first], ""), **figures}))
    trios = dict.fromkeys(tuple(sorted((list(jobs) * 3)[i:i + 3])) for i in range(len(jobs)))       # overlapping
    for trio, figures in zip(trios, run_jobs(config, mean_of_three, [(first, trio) for trio in trios])):
        rows.append({**dict.fromkeys(jobs[first], ""), "varied": MEAN, "seed": " ".join(map(str, trio)), **figures})
    lines = table(["", "median", "lowest", "highest"], spread_of(rows))
    lines += ["", f"Seeds {first} to {max(jobs)}; test prompts. Every stage: pretraining, SFT, reward model, critics, "
              f"RL. Reward model, or RL, alone: the other stages have seed {first}; GRPO. Mean of three: GRPO on the "
              f"mean score of each of these reward models and the two next. {date.today()}."]
    write_study(config, "luck", lines, rows)
    plot_luck(rows, Path(config.out) / "luck.png")


def spread_of(rows):
    """Rows of runs -> cells: what was varied and its figure, the median, the lowest and the highest."""
    cells = []
    for varied, names in (EVERY, [*FIGURES, AGREES]), (REWARD, [AGREES, WAY]), (RL, [WAY]), (MEAN, [WAY]):
        for name in names:
            values = [row[name] for row in rows if row["varied"] == varied]
            cells.append([f"{varied}: {name}", *(f"{each:.1%}" for each in (np.median(values), min(values),
                                                                           max(values)))])
    return cells


def folder_of(config, seed):
    return Path(config.run) / f"luck-{seed}"


def whole_job(config, seed):
    """python -m grpo_min with this seed, or the one that is there -> its FIGURES, and how the reward model agrees."""
    folder = folder_of(config, seed)
    main_job.main(["--run", str(folder), "--seed", str(seed), "--device", config.device, *["--quick"] * config.quick])
    figures = read_agreement(folder / "reward_model")
    for name, (reward, algorithm, prompts, figure) in FIGURES.items():
        records = json.loads((folder / "compare" / f"comparison-{reward}.json").read_text(encoding="utf-8"))
        figures[name], = (record["figures"][prompts][figure][0] for record in records
                          if record["algorithm"] == algorithm)
    return figures


def read_agreement(folder):
    return {AGREES: json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["accuracy"][0]}


def comparison(config, first, **changes):
    """The comparison of the first main job, with GRPO on the animals alone."""
    folder = folder_of(config, first)
    settings = dict(run=str(folder / "luck"), sft=str(folder / "sft/checkpoint.pt"), rewards="learned",
                    reward_model=str(folder / "reward_model/checkpoint.pt"), algorithms="GRPO", device=config.device)
    quick = main_job.QUICK["compare"] if config.quick else {}
    return compare.CompareConfig(**{**settings, **quick, **changes})


def way(settings, figures):
    """What a policy has reached -> its share of the way to the maximum."""
    gold = figures["animals_test"]["gold"][0]
    start = compare.sft_record(settings, "learned")["figures"]["animals_test"]["gold"][0]
    return {WAY: (gold - start) / (MAXIMUM - start)}


def other_rl(config, first, seed):
    settings = comparison(config, first)
    return way(settings, compare.one_run(settings, "GRPO", "learned", seed, None)["figures"])


def mean_of_three(config, first, seeds):
    """GRPO on the mean score of the reward models with these seeds."""
    paths = [reward_model_of(config, first, seed) / "checkpoint.pt" for seed in seeds]
    settings = comparison(config, first, reward_model=",".join(map(str, paths)), run=str(
        folder_of(config, first) / ("luck-mean-" + "-".join(map(str, seeds)))))
    return way(settings, compare.one_run(settings, "GRPO", "learned", first, None)["figures"])


def reward_model_of(config, first, seed):
    """The folder of the reward model with this seed, on the SFT model of the first main job."""
    return folder_of(config, first) / ("reward_model" if seed == first else f"luck-reward_model-{seed}")


def other_reward_model(config, first, seed):
    """Another reward model on the SFT model of the first main job, and GRPO on it -> how it agrees, GRPO's way."""
    folder = reward_model_of(config, first, seed)
    quick = main_job.QUICK["reward_model"] if config.quick else {}
    settings = comparison(config, first, run=str(folder / "compare"), reward_model=str(folder / "checkpoint.pt"))
    model, _ = train_or_reuse(reward_model.train, reward_model.RewardModelConfig(
        run=str(folder), sft=settings.sft, seed=seed, device=config.device, **quick))
    reward_model.report(model, str(DATA / "preferences_heldout.jsonl"), folder)
    figures = compare.one_run(settings, "GRPO", "learned", first, None)["figures"]
    return dict(read_agreement(folder), **way(settings, figures))


def plot_luck(rows, path):
    """Each run as a dot: accuracy on arithmetic, the way on the animals, the way over how the reward model agrees."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.4))
    right = {}
    for name in FIGURES:
        if name.startswith("right"):
            right[name] = [row[name] for row in rows if row["varied"] == EVERY]
    plot_seeds(axes[0], right, dict.fromkeys(right, "C0"))
    axes[0].set(xlabel="accuracy on arithmetic, seeds of every stage")
    plot_seeds(axes[1], column_by(rows, "varied", WAY), {EVERY: "C0", REWARD: "C1", RL: "C2", MEAN: "C3"})
    axes[1].set(xlabel=WAY + ", by what is varied")
    for varied, colour in (EVERY, "C0"), (REWARD, "C1"):
        points = [(row[AGREES], row[WAY]) for row in rows if row["varied"] == varied]
        axes[2].plot(*zip(*points), "o", color=colour, label=varied)
    axes[2].set(xlabel="reward model agrees", ylabel=WAY)
    axes[2].legend(frameon=False, title="varied")
    finish(figure, path)
