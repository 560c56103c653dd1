"""The main job: python -m grpo_min

Pretrain, fine-tune, train a reward model, then GRPO and PPO on both rewards, and their comparison. What need not wait
runs side by side, one process to a core. A stage whose result with the same settings is in the folder already is not
run again; an unfinished one is continued. --preset gpu: a larger model and longer chains, for one GPU.
"""
import time
from dataclasses import dataclass
from pathlib import Path

from data import prepare
from grpo_min import compare, pretrain, reward_model, sft
from grpo_min.compare import train_or_reuse
from grpo_min.config import option, parse, pick_device, run_command
from grpo_min.report import QUESTIONS, page, pipeline_table, tables
from grpo_min.rewards import learned
from grpo_min.runs import DATA, load_model, save_file
from grpo_min.sample import show_answers

# gpu: 10.9 million weights (float32: 0.2 GB of model state for GRPO, 0.4 for PPO), chains of 3 to 6 operations.
PRESETS = {
    "cpu": dict(operations=[], pretrain={}, sft={}, reward_model={}, compare={}),
    "gpu": dict(operations=[3, 4, 5, 6],
                pretrain=dict(layers=6, heads=6, width=384, context=96, batch_size=64, steps=2000, lr=2e-3),
                sft=dict(batch_size=64, steps=1500, lr=1e-3), reward_model=dict(batch_size=48, steps=1500, lr=5e-4),
                compare=dict(max_new_tokens=56, lr_factor=0.33)),
}
QUICK = dict(pretrain=dict(steps=40), sft=dict(steps=40), reward_model=dict(steps=10),
             compare=dict(steps=3, eval_prompts=20))


@dataclass
class MainConfig:
    """All stages in order: pretrain, SFT, reward model, GRPO and PPO on both rewards, and their comparison."""
    run: str = option("runs/main", "folder to write into; what is in it with the same settings is used again")
    preset: str = option("cpu", "cpu: 0.4 million weights, for a laptop. gpu: 10.9 million and longer chains, for a "
                         "card with 16 GB (untried); writes its own data into the run folder", ["cpu", "gpu"])
    quick: bool = option(False, "a smoke test: a few steps of everything, far too few to learn")
    seed: int = option(1, "seed of the first three stages")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def title(text):
    print(f"\n=== {text} ".ljust(100, "="), flush=True)


def main(argv=None):
    config = parse(MainConfig, argv)
    device, folder = pick_device(config.device), Path(config.run)
    preset = PRESETS[config.preset]
    changes = {name: {**preset[name], **(QUICK[name] if config.quick else {})} for name in QUICK}
    base_file, sft_file, reward_file = (str(folder / stage / "checkpoint.pt")
                                        for stage in ("pretrain", "sft", "reward_model"))
    from_nothing, seconds, started = not folder.exists(), {}, time.perf_counter()
    data = folder / "data" if preset["operations"] else DATA
    if preset["operations"]:
        title("0. data, with longer chains of operations")
        prepare.write(data, preset["operations"])

    def settings(config_class, stage, **more):
        return config_class(run=str(folder / stage), device=config.device, **more, **changes[stage])

    def stage_done(name):
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    title("1. pretraining: the base model")
    base, _ = train_or_reuse(pretrain.train, settings(pretrain.PretrainConfig, "pretrain", seed=config.seed,
                                                      text=str(data / "pretrain.txt")))
    show_answers(base, QUESTIONS[1:3])
    stage_done("pretraining")

    title("2. supervised fine-tuning: the SFT model")
    sft_model, _ = train_or_reuse(sft.train, settings(sft.SFTConfig, "sft", base=base_file, seed=config.seed,
                                                       demonstrations=str(data / "sft.jsonl")))
    show_answers(sft_model, QUESTIONS[1:3])
    stage_done("supervised fine-tuning")

    with compare.beside_each_other(device) as begin:
        title("3. the reward model, from preferences; beside it 4. GRPO and PPO on arithmetic")
        more = dict(sft=sft_file, reward_model=reward_file, seeds=1, algorithms="GRPO,PPO", data=str(data))
        preferences, heldout = str(data / "preferences.jsonl"), str(data / "preferences_heldout.jsonl")
        arithmetic = settings(compare.CompareConfig, "compare", rewards="correct", **more)
        animals = settings(compare.CompareConfig, "compare", rewards="learned", **more)
        model = begin(train_or_reuse, reward_model.train, settings(reward_model.RewardModelConfig, "reward_model",
                                                                   sft=sft_file, preferences=preferences,
                                                                   heldout=heldout, seed=config.seed))
        runs = compare.start(arithmetic, begin)
        model, _ = model.result()
        reward_model.report(model, heldout, folder / "reward_model")
        show_answers(sft_model, QUESTIONS[2:], learned(model))
        stage_done("reward model, and beside it GRPO or PPO on arithmetic")

        title("4. GRPO and PPO on animals, rewarded by the reward model")
        runs.update(compare.start(animals, begin))
        records = compare.finish(animals, runs)
        stage_done("the rest of GRPO and PPO on both rewards")

    title("before and after")
    models = {"base": base, "SFT": sft_model}
    for record in records:
        if "run" in record:
            name = f"{record['algorithm']}, {'arithmetic' if record['reward'] == 'correct' else 'animals'}"
            models[name] = load_model(f"{record['run']}/checkpoint.pt", "GPT", device)
    text = page(models)
    save_file(folder / "before_after.md", text.encode())
    print(text)
    title("GRPO and PPO on equal terms")
    print(tables(records))
    text = pipeline_table(seconds, device)
    if from_nothing:
        save_file(folder / "pipeline.md", text.encode())
    print(text)
    print(f"page:    {folder / 'before_after.md'}")
    print(f"figures: {', '.join(str(path) for path in sorted((folder / 'compare').glob('comparison-*.png')))}")


if __name__ == "__main__":
    run_command(main)
