"""The main job: python -m grpo_min

Pretrain, fine-tune, train a reward model, then on both rewards GRPO and, after its critic,
PPO, and compare. What need not wait runs side by side, one process to a core. A stage whose
result with these settings is in the folder already is not run again; an unfinished one is
continued.
"""
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from grpo_min import pretrain, reward_model, sft
from grpo_min.lab import compare
from grpo_min.lab.processes import beside_each_other, train_or_reuse
from grpo_min.lab.report import QUESTIONS, before_after, pipeline_table, tables
from grpo_min.rewards import learned
from grpo_min.run.config import option, parse, pick_device, require, run_command
from grpo_min.run.files import DATA, save_file
from grpo_min.sample import show_answers

PRESETS = {      # gpu: float32, 0.2 GB of model state for GRPO, 0.4 for PPO
    "cpu": {},
    "gpu": dict(operations=["3", "4", "5", "6"],
                pretrain=dict(layers=6, heads=6, width=384, context=96, batch_size=64,
                              steps=2000, lr=2e-3),
                sft=dict(batch_size=64, steps=1500, lr=1e-3),
                reward_model=dict(batch_size=48, steps=1500, lr=5e-4),
                compare=dict(max_new_tokens=56, lr_factor=0.33)),
}
QUICK = dict(pretrain=dict(steps=10), sft=dict(steps=5), reward_model=dict(steps=5),
             compare=dict(steps=1, eval_prompts=8))


@dataclass
class MainConfig:
    """Pretrain, SFT, reward model, GRPO and PPO on both rewards, and their comparison."""
    run: str = option("runs/main", "folder; what is in it already is used again")
    preset: str = option("cpu", "cpu: 0.4 million weights, for a laptop. gpu: 10.9 million "
                         "and longer chains, for a card with 16 GB (untried)",
                         ["cpu", "gpu"])
    quick: bool = option(False, "a smoke test: a few steps of everything, too few to learn")
    seed: int = option(1, "seed of every stage")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def write_data(folder, operations):
    """Data with longer chains, by the script that is no part of the package."""
    arguments = ["--out", str(folder.resolve()), "--operations", *operations]
    command = [sys.executable, "-m", "data.prepare", *arguments]
    code = subprocess.call(command, cwd=DATA.parent)
    require(code == 0, f"data.prepare ended with code {code}")


def main(argv=None):
    config = parse(MainConfig, argv)
    device, folder, data = pick_device(config.device), Path(config.run), DATA
    preset, quick = PRESETS[config.preset], QUICK if config.quick else {}
    from_nothing, starts = not folder.exists(), {}

    def stage(name):
        starts[name] = time.perf_counter()
        print(f"\n=== {name} ".ljust(92, "="), flush=True)

    def settings(config_class, name, **more):
        more |= preset.get(name, {}) | quick.get(name, {})
        return config_class(run=str(folder / name), device=config.device, **more)

    def comparison(rewards):
        return settings(compare.CompareConfig, "compare", rewards=rewards, sft=sft_file,
                        reward_model=reward_file, algorithms="GRPO,PPO", data=str(data),
                        first_seed=config.seed)

    base_file, sft_file, reward_file = (str(folder / name / "checkpoint.pt")
                                        for name in ("pretrain", "sft", "reward_model"))
    if "operations" in preset:
        stage("data")
        data = folder / "data"
        write_data(data, preset["operations"])

    stage("pretraining")
    base, _ = train_or_reuse(pretrain.train, settings(
        pretrain.PretrainConfig, "pretrain", seed=config.seed,
        text=str(data / "pretrain.txt")))
    show_answers(base, QUESTIONS[1:3])

    stage("supervised fine-tuning")
    sft_model, _ = train_or_reuse(sft.train, settings(
        sft.SFTConfig, "sft", base=base_file, seed=config.seed,
        demonstrations=str(data / "sft.jsonl")))
    show_answers(sft_model, QUESTIONS[1:3])

    with beside_each_other(device) as begin:
        stage("reward model, and beside it a critic and GRPO on arithmetic")
        heldout = str(data / "preferences_heldout.jsonl")
        training = begin(train_or_reuse, reward_model.train, settings(
            reward_model.RewardModelConfig, "reward_model", sft=sft_file, heldout=heldout,
            preferences=str(data / "preferences.jsonl"), seed=config.seed))
        runs = compare.start(comparison("correct"), begin)
        model, _ = training.result()
        reward_model.report(model, heldout, folder / "reward_model")
        show_answers(sft_model, QUESTIONS[2:], learned(model))

        stage("PPO on arithmetic; a critic, GRPO and PPO on the animals")
        runs |= compare.start(comparison("learned"), begin)
        records = compare.finish(comparison("learned"), runs)

    stage("before and after")
    text = before_after({"base": base, "SFT": sft_model}, records, device)
    costs = pipeline_table(starts, device)
    save_file(folder / "before_after.md", text.encode())
    if from_nothing:
        save_file(folder / "pipeline.md", costs.encode())
    print(f"{text}\n{tables(records)}\n{costs}")
    print(f"page:    {folder / 'before_after.md'}\nfigures: {folder / 'compare'}/*.png")


if __name__ == "__main__":
    run_command(main)
