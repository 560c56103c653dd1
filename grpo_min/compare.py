"""GRPO and PPO on equal terms: python -m grpo_min.compare --seeds 3

Both start from the same SFT weights, see the same prompts in the same order and sample the same number of
completions with the same random numbers; KL penalty, clipping and aggregation are the same. PPO runs a second time
with one completion for each of 256 prompts, its natural setting. Every run is evaluated on held-out prompts. What was
run before with the same settings is used again.

Written into the folder for each reward: comparison-REWARD.json (every figure), .csv (the curves), .md (the tables) and
.png.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo_min import grpo, ppo
from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.evaluate import evaluate, held_out
from grpo_min.gold import MAXIMUM
from grpo_min.plots import plot_comparison
from grpo_min.report import PHASES, state_bytes, tables
from grpo_min.runs import DATA, OtherSettings, fingerprint, load_model, make_folder, save_file, write_csv
from grpo_min.sample import show_answers

ALGORITHMS = {      # name: (train, its config, the settings that differ)
    "GRPO": (grpo.train, grpo.GRPOConfig, {}),
    "PPO": (ppo.train, ppo.PPOConfig, {}),
    "PPO 256x1": (ppo.train, ppo.PPOConfig, dict(prompts_per_step=256, group_size=1)),
}
SETS = {"correct": [("arithmetic", "test"), ("arithmetic", "longer")], "learned": [("animals", "test")]}
CURVES = ["step", "completions", "reward", "accuracy", "thinking", "kl", "length", "entropy", "explained_variance",
          "seconds_sample", "seconds_score", "seconds_critic", "seconds_update"]       # kept in comparison-*.csv
PER_REWARD = {      # settings that depend on what is rewarded, for both algorithms alike
    "correct": {}, "learned": dict(steps=150, lr=6e-4, beta=0.1),
}


@dataclass
class CompareConfig:
    """Train GRPO and PPO from the same weights on the same prompts, over several seeds, and evaluate them."""
    run: str = option("runs/compare", "folder to write into; runs already in it are used again")
    rewards: str = option("correct,learned", "what is rewarded, separated by commas: correct (arithmetic) or learned "
                          "(animals)")
    algorithms: str = option("GRPO,PPO,PPO 256x1", "which to run, separated by commas")
    seeds: int = option(1, "seeds of the RL stage: 1 to this number")
    steps: int = option(0, "batches per run; 0: the default of each algorithm")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint that all start from")
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint of the reward model")
    eval_prompts: int = option(1000, "held-out prompts per evaluation")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def train_or_reuse(train, config):
    """Train; go on with an unfinished run of the same settings; load a finished one. Other settings start anew."""
    try:
        return train(dataclasses.replace(config, resume=True))
    except OtherSettings:
        return train(dataclasses.replace(config, resume=False))


def evaluate_or_reuse(path, config, policy, opponent, reward):
    """Held-out figures of a policy {set: {figure: [mean, low, high]}}, kept in a file beside its checkpoint."""
    settings = dict(prompts=config.eval_prompts, sft=fingerprint(config.sft))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            return kept["figures"]
    sets = ", ".join(f"{domain} ({split})" for domain, split in SETS[reward])
    print(f"evaluating on {config.eval_prompts} held-out prompts of {sets} ...", flush=True)
    figures = {f"{domain}_{split}": evaluate(policy, domain, held_out(domain, split, config.eval_prompts), opponent)
               for domain, split in SETS[reward]}
    save_file(path, json.dumps(dict(settings=settings, figures=figures), indent=1).encode())
    return figures


def compare(config):
    """Train and evaluate every algorithm, reward and seed -> the records, one dict per run, written as JSON too."""
    names = [name.strip() for name in config.algorithms.split(",")]
    rewards = [name.strip() for name in config.rewards.split(",")]
    require(set(names) <= set(ALGORITHMS), f"--algorithms: choose from {', '.join(ALGORITHMS)}")
    require(set(rewards) <= set(SETS), f"--rewards: choose from {', '.join(SETS)}")
    require_positive(config, "seeds", "eval_prompts")
    require(config.steps >= 0, f"--steps must be at least 0, not {config.steps}")
    device, folder = pick_device(config.device), Path(config.run)
    sft = load_model(config.sft, "GPT", device)
    if "learned" in rewards:
        load_model(config.reward_model, "ScalarGPT")        # a mistake should not show after hours only
    make_folder(folder)
    records = []
    for reward in rewards:
        before = evaluate_or_reuse(folder / f"sft-{reward}.json", config, sft, sft, reward)
        of_reward = [dict(algorithm="SFT", reward=reward, seed=0, figures=before)]
        for seed in range(1, config.seeds + 1):
            for name in names:
                of_reward.append(one_run(config, folder, name, reward, seed, sft))
                if reward == "learned":
                    of_set = of_reward[-1]["figures"]["animals_test"]
                    start = before["animals_test"]["gold"][0]
                    of_set["progress"] = [(of_set["gold"][0] - start) / (MAXIMUM - start)]
        write(of_reward, folder / f"comparison-{reward}")
        records += of_reward
    return records


def write(records, path):
    """Write the records of one reward: their figures, curves, tables and picture."""
    kept = [{name: value for name, value in record.items() if name != "rows"} for record in records]
    save_file(f"{path}.json", json.dumps(kept, indent=1).encode())
    runs = [record for record in records if "run" in record]
    write_csv(f"{path}.csv", [dict(algorithm=run["algorithm"], seed=run["seed"],
                                   **{name: row.get(name, "") for name in CURVES})
                              for run in runs for row in run["rows"]])
    save_file(f"{path}.md", tables(records).encode())
    plot_comparison(runs, f"{path}.png")


def one_run(config, folder, name, reward, seed, sft):
    """Train one algorithm with one seed and evaluate it -> its record."""
    train, config_class, differences = ALGORITHMS[name]
    run = folder / f"{name.lower().replace(' ', '-')}-{reward}-{seed}"
    settings = dict(run=str(run), sft=config.sft, reward_model=config.reward_model, reward=reward, seed=seed,
                    device=config.device, **PER_REWARD[reward], **differences)
    if config.steps:
        settings["steps"] = config.steps
    print(f"\n{name}, reward {reward}, seed {seed}")
    settings = config_class(**settings)
    policy, rows = train_or_reuse(train, settings)
    show_answers(policy, [row["prompt"] for row in held_out(*SETS[reward][0], 2)])
    figures = evaluate_or_reuse(run / "evaluation.json", config, policy, sft, reward)
    seconds = {phase: float(np.median([row.get(f"seconds_{phase}", 0.0) for row in rows]))
               for phase in PHASES}
    return dict(algorithm=name, reward=reward, seed=seed, run=str(run), figures=figures, seconds=seconds,
                completions=rows[-1]["completions"], rows=rows, peak_memory_mb=rows[-1]["memory_mb"],
                state_bytes=state_bytes(policy, settings))


def main(argv=None):
    config = parse(CompareConfig, argv)
    records = compare(config)
    print("\n" + tables(records))
    print(f"figures: {', '.join(str(path) for path in sorted(Path(config.run).glob('comparison-*.png')))}")


if __name__ == "__main__":
    run_command(main)
