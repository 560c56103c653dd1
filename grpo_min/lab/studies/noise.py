"""What do noisy annotators cost? They choose the answer of higher gold score in 60% to 100% of the pairs: what does a
reward model learn from them, and what does a policy reach that GRPO trains on it?

On the animals, from the SFT model, 5 seeds, judged on the validation prompts. Writes noise.csv (a row per run),
noise.md and noise.png.
"""
from datetime import date
from pathlib import Path

import numpy as np

from grpo_min import reward_model
from grpo_min.evaluate import evaluate
from grpo_min.gold import MAXIMUM, gold_score
from grpo_min.lab.studies.common import (column_by, gold_agreement, heldout_pairs, load_sft, margins, measure_animals,
                                         run_jobs, seconds_of, seed_table, seeds_of, shuffled, sized, train_policy,
                                         train_reward_model, validation, write_study)
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.plots import finish, plt

RATES = [1.0, 0.9, 0.8, 0.7, 0.6]      # share of the pairs in which the annotators follow the gold score
PAIRS, UPDATES = 4000, 800             # of each reward model
LABELS = {"annotators follow gold in": ("rate", "{:.0%}")}
NUMBERS = {"reward model agrees with gold": ("agreement", "{:.1%}"), "gold score after GRPO": ("gold", "{:.2f}"),
           "way to the maximum": ("way", "{:.1%}"), "KL (nats)": ("kl", "{:.2f}"),
           "reward model's score": ("proxy", "{:.2f}")}


def study(config):
    start, = run_jobs(config, sft_gold, [()])
    jobs = [(rate, seed) for rate in sized(config, RATES, [RATES[0], RATES[-1]]) for seed in seeds_of(config)]
    rows = run_jobs(config, train_on_choices, jobs)
    for row in rows:
        row["way"] = (row["gold"] - start) / (MAXIMUM - start)
    choices = np.sign(margins(gold_score, heldout_pairs()))
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"Seeds 1 to {len(seeds_of(config))}: mean (lowest to highest). Each reward model: "
              f"{sized(config, PAIRS, 100)} pairs, less those of equal gold score; GRPO: {rows[0]['steps']} steps of "
              f"16 x 8, judged on {config.eval_prompts} validation prompts with 4 samples each. Gold score of the SFT "
              f"model: {start:.2f}, the maximum: {MAXIMUM:.2f}. The annotators of data/preferences.jsonl, who are "
              "seldom wrong where much is at stake, follow gold in "
              f"{np.mean(choices[choices != 0] > 0):.1%} of the held-out pairs. {date.today()}."]
    write_study(config, "noise", lines, rows)
    plot_noise(rows, Path(config.out) / "noise.png")


def sft_gold(config):
    """The SFT model's mean gold score."""
    return evaluate(load_sft(config), "animals", validation(config, "animals"))["gold"][0]


def train_on_choices(config, rate, seed):
    """A reward model of such annotators, and a policy trained on it -> a row of the table."""
    choices = read_jsonl(DATA / "preferences.jsonl", reward_model.FIELDS)
    pairs = relabel(shuffled(choices, seed)[:sized(config, PAIRS, 100)], rate, seed)
    checkpoint, reward = train_reward_model(config, f"noise-reward-{rate:.0%}-{seed}", pairs,
                                            sized(config, UPDATES, 4), seed)
    policy, metrics = train_policy(config, f"noise-{rate:.0%}-{seed}", checkpoint, sized(config, 70, 2), seed)
    figures, _ = measure_animals(policy, load_sft(config), reward, validation(config, "animals"))
    return dict(rate=rate, seed=seed, pairs=len(pairs), steps=len(metrics),
                agreement=gold_agreement(reward, heldout_pairs()),
                **{name: figures[name] for name in ("gold", "kl", "proxy")}, seconds=seconds_of(metrics))


def relabel(pairs, rate, seed):
    """Pairs of answers -> rows of prompt, chosen and rejected, in which the answer of higher gold score is chosen with
    probability `rate`. Pairs of equal gold score are left out. With the same seed, who is right at a low rate is also
    right at a higher one."""
    facts = {row["prompt"]: row for row in read_jsonl(DATA / "animals_train_facts.jsonl",
                                                      ["prompt", "animal", "attribute"])}
    rows = []
    for pair, uniform in zip(pairs, np.random.default_rng(seed).random(len(pairs))):
        better, worse = pair["chosen"], pair["rejected"]
        fact = facts[pair["prompt"]]
        margin, = margins(gold_score, [dict(fact, chosen=better, rejected=worse)])
        if margin == 0:
            continue
        if (margin < 0) == (uniform < rate):
            better, worse = worse, better
        rows.append(dict(prompt=pair["prompt"], chosen=better, rejected=worse))
    return rows


def plot_noise(rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, name, label in zip(axes, ["agreement", "way"], ["reward model agrees with gold, held-out pairs",
                                                              "way to the maximum of gold after GRPO"]):
        means = {rate: np.mean(values) for rate, values in column_by(rows, "rate", name).items()}
        axis.plot(list(means), list(means.values()), label="mean of the seeds")
        axis.plot([row["rate"] for row in rows], [row[name] for row in rows], "o", color="C0", alpha=0.5, ms=4,
                  label="each seed")
        axis.set(xlabel="annotators agree with gold (share of pairs)", ylabel=label)
    axes[0].plot(list(means), list(means), color="grey", lw=1, ls=":", label="as often as its annotators")
    axes[0].legend(frameon=False)
    finish(figure, path)
