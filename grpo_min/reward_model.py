"""Stage 3: a reward model, trained on the annotators' choices only.

The SFT model with a scalar head, read at the last real token (END). Loss: Bradley-Terry,
the negative log-likelihood of the choices, -log sigmoid(score(chosen) - score(rejected))
(Ouyang et al., 2203.02155, eq. 1).

Held-out pairs are judged beside two limits that the annotators' noise sets: how often the
hidden gold score, too, agrees with the choices (the ceiling), and calibration, the share of
choices that went as surely as was predicted.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min.evaluate import agreement, interval
from grpo_min.gold import ATTRIBUTES, FACTS, gold_score
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, pad_completions, require_fit
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.data import batch_rows, columns, read_jsonl
from grpo_min.run.files import DATA, save_file
from grpo_min.run.fit import fit
from grpo_min.run.plots import plot_calibration
from grpo_min.run.ranks import RANK
from grpo_min.run.rng import generator

SIDES = ["chosen", "rejected"]
FIELDS = ["prompt", *SIDES]


@dataclass
class RewardModelConfig:
    """Stage 3: train a reward model on pairs of answers, of which one was chosen."""
    run: str = option("runs/reward_model", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    sft: str = option(str(DATA / "checkpoints/sft.pt"),
                      "checkpoint of the SFT model to start from")
    preferences: str = option(str(DATA / "preferences.jsonl"),
                              "JSONL with the fields prompt, chosen and rejected")
    heldout: str = option("", "the same, with the fields animal and attribute, for the "
                          "evaluation; default: data/preferences_heldout.jsonl, or none "
                          "beside --preferences of your own")
    holdout: float = option(0.0, "share of the prompts in --preferences that are not "
                            "trained on, but judged on")
    steps: int = option(2800, "updates")
    batch_size: int = option(24, "pairs per update (all, if there are fewer)")
    lr: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(0.5, "AdamW's weight decay, so that the annotators' noise "
                                 "is not learned by heart")
    warmup: int = option(100, "updates over which the learning rate rises")
    seed: int = option(1, "seed of the order of pairs")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def preference_loss(chosen, rejected):
    """Bradley-Terry: the mean of -log sigmoid(chosen - rejected), (n,), (n,) -> scalar."""
    return -F.logsigmoid(chosen - rejected).mean()


def keep_back(rows, share, seed):
    """Choices -> those to train on, those kept back: all that concern a share of prompts.

    UserError if one side would be empty, though a share was asked for.
    """
    require(0 <= share < 1, f"--holdout must be from 0 to below 1, not {share}")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    shuffle = generator(seed, "holdout", rank=0)
    order = torch.randperm(len(prompts), generator=shuffle).tolist()
    kept = {prompts[i] for i in order[:round(share * len(prompts))]}
    require(bool(kept) == (share > 0) and len(kept) < len(prompts),
            f"--holdout {share}: {len(prompts)} prompts are too few")
    return ([row for row in rows if row["prompt"] not in kept],
            [row for row in rows if row["prompt"] in kept])


def pairs_to_train(config, model):
    """The choices that a model is to learn from: checked, and without those kept back."""
    rows, tokenizer = read_jsonl(config.preferences, FIELDS), model.tokenizer
    for side in SIDES:
        lengths = [(len(tokenizer.encode_prompt(row["prompt"])),
                    len(tokenizer.encode_completion(row[side]))) for row in rows]
        require_fit(model.config.context, lengths, config.preferences)
    rows, _ = keep_back(rows, config.holdout, config.seed)
    equal = [row["prompt"] for row in rows if row["chosen"] == row["rejected"]]
    if equal:
        print(f"note: {len(equal)} of {len(rows)} choices are between equal answers and "
              f"teach nothing; the first is on: {equal[0][:60]}")
    passes = config.steps * min(config.batch_size, len(rows)) / len(rows)
    if passes > 20:
        print(f"note: {config.steps} updates see each of only {len(rows)} choices "
              f"{passes:.0f} times and learn them by heart, whatever the loss says: make "
              "more choices or fewer --steps, and see --holdout")
    return rows


def pair_batch(config, rows, step, tokenizer, device):
    """A step's choices -> prompts (Q rows), ids and mask (2 Q, N) of their completions."""
    numbers = batch_rows(len(rows), min(config.batch_size, len(rows)), config.seed, step)
    batch = [rows[number] for number in numbers]
    prompts = Prompts.from_texts([row["prompt"] for row in batch], tokenizer, device)
    # Two completions of each prompt: row 2 q is the chosen one, 2 q + 1 the rejected.
    texts = [row[side] for row in batch for side in SIDES]
    return prompts, *pad_completions(texts, tokenizer, device)


def train(config):
    """Train -> the reward model and one row of metrics per step."""
    require_positive(config, "steps", "batch_size", "lr", "warmup")
    require(config.weight_decay >= 0,
            f"--weight-decay must be at least 0, not {config.weight_decay}")
    device = pick_device(config.device)
    sft = load_model(config.sft, device)
    rows = pairs_to_train(config, sft)
    model = sft.with_head(ScalarGPT)

    def loss_at(step):
        batch = pair_batch(config, rows, step, model.tokenizer, device)
        scores = model.last(*batch).view(-1, 2)  # (Q, 2)
        accuracy = (scores[:, 0] > scores[:, 1]).float().mean().item()
        return preference_loss(scores[:, 0], scores[:, 1]), dict(accuracy=accuracy)

    inputs = [config.sft, config.preferences]
    return model, fit(config, model, inputs, loss_at, config.weight_decay)


def judge(model, pairs):
    """How well a reward model agrees with held-out choices -> a dict that JSON can hold.

    pairs: rows with prompt, chosen, rejected, animal, attribute. accuracy, ceiling (the
    gold score's accuracy on the same pairs, a tie counts half) and shortfall (ceiling -
    accuracy) are [mean, low, high] with 95% intervals. calibration: per tenth of the
    predicted probability, [mean predicted, share that went so, pairs].
    """
    column, reward = columns(pairs), learned(model)
    score, gold = {}, {}
    for side in SIDES:
        score[side] = np.array(reward(column["prompt"], column[side]))  # (n,)
        gold[side] = np.array(gold_score(column["prompt"], column[side], column["animal"],
                                         column["attribute"]))  # (n,)
    margin = score["chosen"] - score["rejected"]  # (n,)
    gold_margin = gold["chosen"] - gold["rejected"]  # (n,)
    right = np.where(margin == 0, 0.5, margin > 0)  # (n,)
    ceiling = np.where(gold_margin == 0, 0.5, gold_margin > 0)  # (n,)
    sure = 1 / (1 + np.exp(-np.abs(margin)))  # (n,) predicted for the likelier answer
    bins = np.minimum(((sure - 0.5) * 10).astype(int), 4)
    calibration = [[sure[bins == b].mean(), right[bins == b].mean(), int((bins == b).sum())]
                   for b in range(5) if (bins == b).any()]
    return dict(pairs=len(pairs), accuracy=interval(right), ceiling=interval(ceiling),
                shortfall=interval(ceiling - right), calibration=calibration)


def report_kept_back(model, kept, path):
    """Say how often a reward model agrees with choices that it was not trained on."""
    column, reward = columns(kept), learned(model)
    chosen, rejected = (reward(column["prompt"], column[side]) for side in SIDES)
    right = [a > b for a, b in zip(chosen, rejected)]
    print(f"\nWith choices kept back from {path} it agrees in {agreement(right)}; a tossed "
          "coin would in half. Four times as many choices would halve the interval.")


def read_heldout(path):
    """Held-out pairs, whose animals and attributes the hidden score must know."""
    pairs = read_jsonl(path, FIELDS + ["animal", "attribute"])
    for number, row in enumerate(pairs, start=1):
        for name, known in ("animal", FACTS), ("attribute", ATTRIBUTES):
            require(row[name] in known, f"{path}, line {number}: the {name} "
                    f"\"{row[name]}\" is not in data/animals.csv")
    return pairs


def report(model, heldout, folder):
    """Judge a reward model on a file of held-out pairs: tables, printed and in a folder."""
    result = judge(model, read_heldout(heldout))
    shares = ["{:.1%} (95% interval {:.1%} to {:.1%})".format(*result[name])
              for name in ("accuracy", "ceiling", "shortfall")]
    table = ["| held-out pairs | reward model agrees | ceiling | shortfall |",
             "| --- | --- | --- | --- |",
             f"| {result['pairs']} | {' | '.join(shares)} |", "",
             "| predicted | happened | pairs |", "| --- | --- | --- |"]
    table += [f"| {predicted:.0%} | {happened:.0%} | {count} |"
              for predicted, happened, count in result["calibration"]]
    print("\n".join(table))
    if folder:
        save_file(Path(folder) / "evaluation.json", json.dumps(result, indent=1).encode())
        save_file(Path(folder) / "reward_model.md", "\n".join(table + [""]).encode())
        plot_calibration(result["calibration"], Path(folder) / "calibration.png")
    return result


def unseen_pairs(config):
    """What to judge on: the file of held-out pairs ("": none), the choices kept back."""
    heldout = config.heldout
    if not heldout and config.preferences == RewardModelConfig.preferences:
        heldout = str(DATA / "preferences_heldout.jsonl")
    if heldout:
        read_heldout(heldout)
    choices = read_jsonl(config.preferences, FIELDS)
    return heldout, keep_back(choices, config.holdout, config.seed)[1]


def report_unseen(model, config, heldout, kept):
    """Judge a reward model on what unseen_pairs has found."""
    if heldout:
        report(model, heldout, config.run if RANK == 0 else "")
    if kept:
        report_kept_back(model, kept, config.preferences)
    if not heldout and not kept:
        print("not judged: --holdout 0.2 keeps choices back for that")


def main(argv=None):
    config = parse(RewardModelConfig, argv)
    unseen = unseen_pairs(config)  # a mistake in them should show before the training
    model, _ = train(config)
    report_unseen(model, config, *unseen)


if __name__ == "__main__":
    run_command(main)
