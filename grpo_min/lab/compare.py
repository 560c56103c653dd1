"""GRPO and PPO on equal terms: python -m grpo_min.lab.compare --seeds 5

Both start from the same SFT weights, see the same prompts in the same order and sample the same number of
completions with the same random numbers; KL penalty, clipping and aggregation are the same. PPO's critic is trained
first, once for all seeds, and what that costs is counted. PPO runs a second time with one completion for each of 256
prompts, its natural setting, and if asked for a third time with an oracle, values by sampling. On the animals DPO, if
asked for, learns from the annotators' choices and samples nothing. Every run is evaluated on held-out prompts. Runs go
beside each other, one on each core; what was run before with the same settings is used again.

Written into the folder for each reward: comparison-REWARD.json (every figure), .csv (the curves), .md (the tables) and
.png; for arithmetic also learning.png.
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo_min import critic, dpo, grpo, ppo
from grpo_min.evaluate import evaluate, held_out
from grpo_min.gold import MAXIMUM
from grpo_min.lab.processes import beside_each_other, train_or_reuse
from grpo_min.lab.report import ORACLE, PHASES, plot_learning, state_bytes, tables, to_goal, write_comparison
from grpo_min.model import ScalarGPT
from grpo_min.rewards import load_reward
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.run.files import DATA, fingerprint, make_folder, save_file


def oracle(config, policy, device):
    """In place of ppo.start_critic. Many continuations end alike: a reward model scores them once."""
    reward, known = load_reward(config, None, policy, device)[0], {}

    def once(*asked, finished, **columns):
        answers = list(zip(*asked, finished))
        new = list(dict.fromkeys(answer for answer in answers if answer not in known))
        known.update(zip(new, reward(*zip(*new)) if new else []))
        return [known[answer] for answer in answers]
    return critic.Oracle(config, policy, device, once if config.reward == "learned" else None)


ALGORITHMS = {      # name: (train, its config, the settings that differ)
    "GRPO": (grpo.train, grpo.GRPOConfig, {}),
    "PPO": (ppo.train, ppo.PPOConfig, {}),
    "PPO 256x1": (ppo.train, ppo.PPOConfig, dict(prompts_per_step=256, group_size=1)),
    ORACLE: (functools.partial(ppo.train, start_critic=oracle), ppo.PPOConfig, dict(critic="sft", critic_epochs=0)),
    "DPO": (dpo.train, dpo.DPOConfig, {}),
}
LEARNED_VALUES = ["PPO", "PPO 256x1"]      # their critic is trained before
SETS = {"correct": [("arithmetic", "test"), ("arithmetic", "longer")], "learned": [("animals", "test")]}
PER_REWARD = {      # settings that depend on what is rewarded, for both algorithms alike
    "correct": {}, "learned": dict(steps=150, lr=6e-4, beta=0.1),
}
CRITICS = {"correct": {}, "learned": dict(steps=1200, batches=400)}     # settings of their training


@dataclass
class CompareConfig:
    """Train GRPO and PPO from the same weights on the same prompts, over several seeds, and evaluate them."""
    run: str = option("runs/compare", "folder to write into; runs already in it are used again")
    rewards: str = option("correct,learned", "what is rewarded, separated by commas: correct (arithmetic) or learned "
                          "(animals)")
    algorithms: str = option("GRPO,PPO,PPO 256x1", f"which to run, of {', '.join(ALGORITHMS)}; separated by commas")
    seeds: int = option(1, "how many seeds of the RL stage")
    first_seed: int = option(1, "the first of them, and the critics' seed; the others follow")
    steps: int = option(0, "batches per run; 0: the default of each algorithm")
    sft: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint that all start from")
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint of the reward model")
    data: str = option(str(DATA), "folder of the prompts, to train on and to evaluate on")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    lr_factor: float = option(1.0, "all learning rates are multiplied by this: larger models want smaller ones")
    eval_prompts: int = option(1000, "held-out prompts per evaluation")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def compare(config):
    """Train and evaluate every algorithm, reward and seed -> the records, one dict per run, written as JSON too."""
    with beside_each_other(pick_device(config.device)) as begin:
        return finish(config, start(config, begin))


def start(config, begin):
    """Begin all the runs -> {reward: the futures of their records, the SFT model's first}."""
    algorithms = [name.strip() for name in config.algorithms.split(",")]
    rewards = [name.strip() for name in config.rewards.split(",")]
    require(set(algorithms) <= set(ALGORITHMS), f"--algorithms: choose from {', '.join(ALGORITHMS)}")
    require(set(rewards) <= set(SETS), f"--rewards: choose from {', '.join(SETS)}")
    require(set(algorithms) != {"DPO"} or rewards == ["learned"], "--algorithms DPO needs --rewards learned")
    require_positive(config, "seeds", "eval_prompts", "max_new_tokens", "lr_factor")
    require(config.steps >= 0, f"--steps must be at least 0, not {config.steps}")
    load_model(config.sft)                                          # mistakes should not show after hours only
    if "learned" in rewards:
        load_model(config.reward_model, kind=ScalarGPT)
    make_folder(Path(config.run))
    futures = {}
    for reward in rewards:
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        runs = [(name, seed) for seed in seeds for name in algorithms if name != "DPO" or reward == "learned"]
        # The critic first, and meanwhile what does not wait for it. The longest runs are not the last.
        started = {"critic": begin(train_critic, config, reward)} if set(LEARNED_VALUES) & set(algorithms) else {}
        started["sft"] = begin(sft_record, config, reward)
        for name, seed in sorted(runs, key=lambda run: (run[0] != "GRPO", -algorithms.index(run[0]))):
            warm_start = started.get("critic") if name in LEARNED_VALUES else None
            started[name, seed] = begin(one_run, config, name, reward, seed, warm_start)
        futures[reward] = [started[run] for run in ["sft", *runs]]
    return futures


def finish(config, futures):
    """Wait for the records of all runs, and write those of each reward."""
    all_records, folder = [], Path(config.run)
    for reward, waiting in futures.items():
        records = [future.result() for future in waiting]
        if reward == "learned":
            sft_gold, *golds = [record["figures"]["animals_test"]["gold"][0] for record in records]
            for record, gold in zip(records[1:], golds):
                record["figures"]["animals_test"]["progress"] = [(gold - sft_gold) / (MAXIMUM - sft_gold)]
        write_comparison(records, folder / f"comparison-{reward}")
        if reward == "correct":
            plot_learning(folder / "comparison-correct.csv", folder / "learning.png")
        all_records += records
    return all_records


def sft_record(config, reward):
    sft = load_model(config.sft, pick_device(config.device))
    figures = evaluate_or_reuse(Path(config.run) / f"sft-{reward}.json", config, sft, sft, reward)
    return dict(algorithm="SFT", reward=reward, seed=0, figures=figures)


def shared_settings(config, name, reward, **more):
    """Settings that every run on this reward has, and more, where --steps wins."""
    domain, _ = SETS[reward][0]
    more |= dict(steps=config.steps) if config.steps else {}
    return dict(run=str(Path(config.run) / f"{name.lower().replace(' ', '-')}-{reward}"), sft=config.sft, reward=reward,
                reward_model=config.reward_model, device=config.device, max_new_tokens=config.max_new_tokens,
                prompts=str(Path(config.data) / f"{domain}_train.jsonl"), **more)


def train_critic(config, reward):
    """Train PPO's critic for this reward -> its checkpoint, and what it explains and has cost."""
    settings = critic.CriticConfig(**shared_settings(config, "critic", reward, **CRITICS[reward],
                                                     seed=config.first_seed))
    settings.lr *= config.lr_factor
    _, figures, rows = train_or_reuse(critic.train, settings)
    return dict(figures, **critic.costs(settings, rows), checkpoint=f"{settings.run}/checkpoint.pt")


def settings_of_run(config, algorithm, reward, seed, warm_start):
    """How one algorithm is trained, and its settings. warm_start: what train_critic returned, or None."""
    train, config_class, differences = ALGORITHMS[algorithm]
    if algorithm == "DPO":      # by its own defaults
        settings = dpo.DPOConfig(run=str(Path(config.run) / f"dpo-{reward}"), sft=config.sft, seed=seed,
                                 preferences=str(Path(config.data) / "preferences.jsonl"), device=config.device)
        settings.steps = config.steps or settings.steps
    else:
        settings = config_class(**shared_settings(config, algorithm, reward, seed=seed,
                                                  **{**PER_REWARD[reward], **differences}))
    settings.run += f"-{seed}"
    settings.lr *= config.lr_factor
    if warm_start:
        settings.critic, settings.critic_lr = warm_start["checkpoint"], settings.critic_lr * config.lr_factor
    return train, settings


def one_run(config, algorithm, reward, seed, warm_start):
    """Train one algorithm with one seed and evaluate it -> its record."""
    train, settings = settings_of_run(config, algorithm, reward, seed, warm_start)
    run = Path(settings.run)
    policy, rows = train_or_reuse(train, settings)
    rows = [] if algorithm == "DPO" else rows                       # of pairs: nothing was sampled
    sft = load_model(config.sft, pick_device(config.device))
    figures = evaluate_or_reuse(run / "evaluation.json", config, policy, sft, reward)
    seconds, held = {}, grpo.GRPOConfig(beta=settings.beta) if algorithm == ORACLE else settings    # no critic
    for phase in PHASES if rows else []:
        seconds[phase] = float(np.median([row.get(f"seconds_{phase}", 0.0) for row in rows]))
    return dict(algorithm=algorithm, reward=reward, seed=seed, run=str(run), figures=figures, seconds=seconds,
                completions=rows[-1]["completions"] if rows else 0, rows=rows,
                peak_memory_mb=rows[-1]["memory_mb"] if rows else None,
                state_bytes=state_bytes(policy, held), warm_start=warm_start, **to_goal(rows, reward))


def evaluate_or_reuse(path, config, policy, opponent, reward):
    """Held-out figures of a policy {set: {figure: [mean, low, high]}}, kept in a file beside its checkpoint."""
    weights = path.with_name("checkpoint.pt")
    settings = dict(prompts=config.eval_prompts, sft=fingerprint(config.sft), data=config.data,
                    max_new_tokens=config.max_new_tokens, weights=fingerprint(weights) if weights.exists() else "")
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["figures"]
    sets = ", ".join(f"{domain} ({split})" for domain, split in SETS[reward])
    print(f"{path.parent.name}: evaluating on {config.eval_prompts} held-out prompts of {sets} ...", flush=True)
    figures = {}
    for domain, split in SETS[reward]:
        rows = held_out(domain, split, config.eval_prompts, config.data)
        figures[f"{domain}_{split}"] = evaluate(policy, domain, rows, opponent, max_new_tokens=config.max_new_tokens)
    save_file(path, json.dumps(dict(settings=settings, figures=figures), indent=1).encode())
    return figures


def main(argv=None):
    config = parse(CompareConfig, argv)
    records = compare(config)
    print("\n" + tables(records))
    print(f"figures: {', '.join(str(path) for path in sorted(Path(config.run).glob('*.png')))}")


if __name__ == "__main__":
    run_command(main)
