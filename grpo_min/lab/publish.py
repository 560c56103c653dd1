"""Copies what was measured to where it is committed: python -m grpo_min.lab.publish

From what `python -m grpo_min`, and then perhaps `python -m grpo_min.lab.compare --run runs/main/compare` with more
seeds, wrote in runs/main, the weights of the stages before RL go to data/checkpoints, tables, curves and figures to
tutorials/results, and so do those of the benchmark. The pages then get the tables between <!-- NAME --> and
<!-- end of NAME -->, and links to the seven steps in grpo.py their line numbers.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from grpo_min import critic, grpo
from grpo_min.critic import Critic
from grpo_min.evaluate import evaluate, held_out
from grpo_min.lab.report import RESULTS, plot_learning
from grpo_min.model import GPT, ScalarGPT
from grpo_min.pretrain import pack, read_documents
from grpo_min.reward_model import judge
from grpo_min.rewards import correct
from grpo_min.run.checkpoint import load_model, serialise, weights
from grpo_min.run.config import option, parse, run_command
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA, make_folder, save_file

CHECKPOINTS = [("pretrain", "base", GPT), ("sft", "sft", GPT), ("reward_model", "reward_model", ScalarGPT),
               ("compare/critic-correct", "critic", Critic)]
PAGES = [RESULTS / "README.md", RESULTS / "SPEED.md", RESULTS.parent / "README.md"]
TABLES = ["pipeline.md", "before_after.md", "reward_model/reward_model.md", "reward_model/calibration.png"]


@dataclass
class PublishConfig:
    """Copy the results of the main job to tutorials/results and data/checkpoints, and put the tables into the pages."""
    run: str = option("runs/main", "folder of the main job")
    benchmark: str = option("runs/benchmark", "folder of the benchmark; with _real behind it, of that of a real model")


def publish(config):
    """Copy what is there; what is not there stays as it was committed."""
    run = Path(config.run)
    make_folder(RESULTS)
    make_folder(DATA / "checkpoints")
    for stage, name, kind in CHECKPOINTS:
        path = run / stage / "checkpoint.pt"
        if path.exists():
            model = load_model(path, kind=kind)
            save_file(DATA / "checkpoints" / f"{name}.pt", serialise(**weights(model)))
    save_file(DATA / "checkpoints" / "scores.json", json.dumps(scores(), indent=1).encode())
    paths = [*(run / name for name in TABLES), *sorted((run / "compare").glob("comparison-*")),
             *sorted(Path(config.benchmark).glob("benchmark.*")),
             *sorted(Path(f"{config.benchmark}_real").glob("benchmark_real.*"))]
    for path in paths:
        if path.exists():
            save_file(RESULTS / path.name, path.read_bytes())
    plot_learning(RESULTS / "comparison-correct.csv", RESULTS / "learning.png")
    for page in PAGES:
        save_file(page, fill_in(page.read_text(encoding="utf-8")).encode())


def scores():
    """What the committed weights score on a few held-out rows: {name: number}."""
    base, sft, reward, values = (load_model(DATA / "checkpoints" / f"{name}.pt", kind=kind)
                                 for _, name, kind in CHECKPOINTS)
    explained = critic.judge(critic.CriticConfig(), sft, values, correct, held_out("arithmetic", "test", 100))
    documents = read_documents(DATA / "pretrain.txt", base.tokenizer)
    rows = pack(documents, base.config.context, 0)[:50]                                       # (50, context + 1)
    with torch.no_grad():
        loss = F.cross_entropy(base.plain(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    pairs = read_jsonl(DATA / "preferences_heldout.jsonl", ["prompt", "chosen", "rejected", "animal", "attribute"])
    return dict(base_loss=loss, reward_model_accuracy=judge(reward, pairs[:300])["accuracy"][0],
                critic_explained=explained["explained"],
                sft_accuracy=evaluate(sft, "arithmetic", held_out("arithmetic", "test", 200))["accuracy"][0])


def fill_in(text):
    """A page with the contents of tutorials/results/NAME between <!-- NAME --> and <!-- end of NAME -->, and its links
    to the banners of grpo.py pointing to their lines."""
    for name in re.findall(r"<!-- end of (\S+) -->", text):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = text.index(begin) + len(begin), text.index(end)
        text = text[:before] + "\n" + (RESULTS / name).read_text(encoding="utf-8").strip() + "\n" + text[after:]
    lines = {}
    for number, line in enumerate(Path(grpo.__file__).read_text(encoding="utf-8").splitlines(), start=1):
        for banner in re.findall(r"# --- (\d)\.", line):
            lines[banner] = number
    return re.sub(r"(\[banner (\d)\]\(\S+/grpo.py#L)\d*", lambda link: f"{link[1]}{lines[link[2]]}", text)


def main(argv=None):
    publish(parse(PublishConfig, argv))


if __name__ == "__main__":
    run_command(main)
