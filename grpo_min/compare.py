"""GRPO and PPO on equal terms: python -m grpo_min.compare --seeds 3

Both start from the same SFT weights, see the same prompts in the same order and sample the same number of
completions with the same random numbers; KL penalty, clipping and aggregation are the same. PPO runs a second time
with one completion for each of 256 prompts, its natural setting. Every run is evaluated on held-out prompts. Runs go
beside each other, one on each core; what was run before with the same settings is used again.

Written into the folder for each reward: comparison-REWARD.json (every figure), .csv (the curves), .md (the tables) and
.png.
"""
import dataclasses
import json
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grpo_min import grpo, ppo, runs
from grpo_min.config import UserError, option, parse, pick_device, require, require_positive, run_command
from grpo_min.evaluate import evaluate, held_out
from grpo_min.gold import MAXIMUM
from grpo_min.report import PHASES, state_bytes, tables, write
from grpo_min.runs import DATA, OtherSettings, fingerprint, load_model, make_folder, save_file

ALGORITHMS = {      # name: (train, its config, the settings that differ)
    "GRPO": (grpo.train, grpo.GRPOConfig, {}),
    "PPO": (ppo.train, ppo.PPOConfig, {}),
    "PPO 256x1": (ppo.train, ppo.PPOConfig, dict(prompts_per_step=256, group_size=1)),
}
SETS = {"correct": [("arithmetic", "test"), ("arithmetic", "longer")], "learned": [("animals", "test")]}
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
    data: str = option(str(DATA), "folder of the prompts, to train on and to evaluate on")
    max_new_tokens: int = option(40, "longest completion, in tokens")
    lr_factor: float = option(1.0, "all learning rates are multiplied by this: larger models want smaller ones")
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
    settings = dict(prompts=config.eval_prompts, sft=fingerprint(config.sft), data=config.data,
                    max_new_tokens=config.max_new_tokens)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            return kept["figures"]
    sets = ", ".join(f"{domain} ({split})" for domain, split in SETS[reward])
    print(f"{path.parent.name}: evaluating on {config.eval_prompts} held-out prompts of {sets} ...", flush=True)
    figures = {f"{domain}_{split}": evaluate(policy, domain, held_out(domain, split, config.eval_prompts, config.data),
                                             opponent, max_new_tokens=config.max_new_tokens)
               for domain, split in SETS[reward]}
    save_file(path, json.dumps(dict(settings=settings, figures=figures), indent=1).encode())
    return figures


@contextmanager
def beside_each_other(device):
    """begin(function, *arguments) -> a future: each call in a process of its own, with one thread, as many at a time as
    torch would use threads; on CUDA one.

    Two runs of models as small as these, one thread each, take less time than one after the other with two, and what is
    computed does not depend on the number of cores. After an error or Ctrl-C those under way save what they have.
    """
    threads = torch.get_num_threads()
    waiting = ThreadPoolExecutor(1 if device.type == "cuda" else threads)
    torch.set_num_threads(1)                                        # here too, or its threads get in the others' way
    try:
        yield lambda function, *arguments: waiting.submit(in_own_process, function, *arguments)
    finally:
        waiting.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_own_process(function, *arguments):
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_process) as process:
            return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for lack of memory; the same command goes on", exit_code=1)


def begin_process():
    torch.set_num_threads(1)
    runs.beside_others = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches all: a run saves itself and stops


def compare(config):
    """Train and evaluate every algorithm, reward and seed -> the records, one dict per run, written as JSON too."""
    with beside_each_other(pick_device(config.device)) as begin:
        return finish(config, start(config, begin))


def start(config, begin):
    """Begin all the runs -> {reward: the futures of their records, the SFT model's first}."""
    names = [name.strip() for name in config.algorithms.split(",")]
    rewards = [name.strip() for name in config.rewards.split(",")]
    require(set(names) <= set(ALGORITHMS), f"--algorithms: choose from {', '.join(ALGORITHMS)}")
    require(set(rewards) <= set(SETS), f"--rewards: choose from {', '.join(SETS)}")
    require_positive(config, "seeds", "eval_prompts", "max_new_tokens", "lr_factor")
    require(config.steps >= 0, f"--steps must be at least 0, not {config.steps}")
    load_model(config.sft, "GPT")                                    # mistakes should not show after hours only
    if "learned" in rewards:
        load_model(config.reward_model, "ScalarGPT")
    make_folder(Path(config.run))
    jobs = {reward: [(sft_record, config, reward), *((one_run, config, name, reward, seed)
                                                     for seed in range(1, config.seeds + 1) for name in names)]
            for reward in rewards}
    # The short ones last, so that no core is idle for long at the end.
    return {reward: [begin(*job) for job in reversed(of_reward)][::-1] for reward, of_reward in jobs.items()}


def finish(config, started):
    """Wait for the records of all runs, and write those of each reward."""
    records = []
    for reward, futures in started.items():
        of_reward = [future.result() for future in futures]
        if reward == "learned":
            start, *golds = [record["figures"]["animals_test"]["gold"][0] for record in of_reward]
            for record, gold in zip(of_reward[1:], golds):
                record["figures"]["animals_test"]["progress"] = [(gold - start) / (MAXIMUM - start)]
        write(of_reward, Path(config.run) / f"comparison-{reward}")
        records += of_reward
    return records


def sft_record(config, reward):
    sft = load_model(config.sft, "GPT", pick_device(config.device))
    figures = evaluate_or_reuse(Path(config.run) / f"sft-{reward}.json", config, sft, sft, reward)
    return dict(algorithm="SFT", reward=reward, seed=0, figures=figures)


def one_run(config, name, reward, seed):
    """Train one algorithm with one seed and evaluate it -> its record."""
    train, config_class, differences = ALGORITHMS[name]
    run = Path(config.run) / f"{name.lower().replace(' ', '-')}-{reward}-{seed}"
    settings = dict(run=str(run), sft=config.sft, reward_model=config.reward_model, reward=reward, seed=seed,
                    device=config.device, max_new_tokens=config.max_new_tokens,
                    prompts=str(Path(config.data) / f"{SETS[reward][0][0]}_train.jsonl"),
                    **PER_REWARD[reward], **differences)
    if config.steps:
        settings["steps"] = config.steps
    settings = config_class(**settings)
    settings.lr *= config.lr_factor
    if name != "GRPO":
        settings.critic_lr *= config.lr_factor
    policy, rows = train_or_reuse(train, settings)
    sft = load_model(config.sft, "GPT", pick_device(config.device))
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
