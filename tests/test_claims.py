"""What people say, and what was measured: each row of the README's table in numbers, from the files of the studies.

A study that is run again may change an answer. Then the row's words have to change, and its numbers here.
"""
import json
import re

import numpy as np
import pytest

from grpo_min.report import sides
from grpo_min.study import RESULTS
from grpo_min.study_reward import by
from tutorials.show import result


def study(name, figure, label="setting", **where):
    """{label: the figure of each seed} of the rows of NAME.csv in which the columns have these values."""
    return by([row for row in result(name) if all(row[column] == value for column, value in where.items())], label,
              figure)


def means(of_label):
    return [np.mean(values) for values in of_label.values()]


def compared(reward, *keys):
    """{algorithm: a held-out figure, or a number of its own, of each seed}."""
    found = {}
    for record in json.loads((RESULTS / f"comparison-{reward}.json").read_text()):
        if "run" in record:
            found.setdefault(record["algorithm"], []).append(
                record["figures"][keys[0]][keys[1]][0] if len(keys) == 2 else sum(record[keys[0]].values()))
    return found


def less_memory():
    state = compared("correct", "state_bytes")
    return max(state["GRPO"]) < min(state["PPO"])


def as_good():
    figures = compared("correct", "arithmetic_test", "accuracy"), compared("learned", "animals_test", "progress")
    return all(abs(np.mean(of["GRPO"]) - np.mean(of["PPO"])) < 0.01 for of in figures)


def no_good_critic_needed():
    accuracy, explained = study("critic", "accuracy"), study("critic", "ev_mean")
    little = [np.mean(values) for label, values in explained.items() if "" not in values and label != "shared trunk"]
    megabytes = study("critic", "megabytes")
    return (sides(accuracy)[:2] == ([], ["shared trunk"]) and max(accuracy["shared trunk"]) < 0.75
            and min(little) < 0 < max(little) < 0.3 and megabytes["shared trunk"][0] < megabytes["separate"][0])


def less_noise_without():
    rows = {(row["steps"], row["advantage"]): row for row in result("baselines-gradients")}
    moments = sorted({steps for steps, _ in rows})
    without, with_mean = ([rows[steps, name] for steps in moments] for name in ("none", "group mean, leave-one-out"))
    return (all(a["noise_high"] < b["noise_low"] for a, b in zip(without, with_mean))
            and [b["noise"] / a["noise"] > 3 for a, b in zip(without, with_mean)] == [False, True, True]
            and all(row["score_wrong"] > 5 * row["score_right"] for row in without))


def better_without():
    return "none" in sides(study("baselines", "accuracy"))[0]


def online_is_enough():
    accuracy = study("is_rl_needed", "accuracy")
    start, grpo = accuracy.pop("SFT")[0], np.mean(accuracy["GRPO"])
    _, below, _ = sides(accuracy)
    return ("filtered SFT, online" not in below and np.mean(accuracy["filtered SFT, online"]) >= grpo
            and "filtered SFT, offline" in below
            and 0.75 < (np.mean(accuracy["filtered SFT, offline"]) - start) / (grpo - start) < 0.95)


def no_difference_of_the_std():
    return "mean_std" in sides(study("baselines", "accuracy"))[2]


def not_larger_is_better():
    accuracy = study("group_size", "accuracy")
    return max(accuracy["2 x 64"]) < max(accuracy["64 x 2"]) and max(accuracy["2 x 64"]) < min(accuracy["32 x 4"])


def recipes_alike():
    cosine = {(row["recipe"], row["other"]): row["cosine"] for row in result("recipes-one-update")
              if row["when"] == "with a ratio of 1"}
    directions = {tuple(other for name, other in cosine if name == recipe and cosine[name, other] > 0.9999)
                  for recipe, _ in cosine}
    completions = study("recipes", "completions")
    return (len(directions) == 4 and min(cosine.values()) > 0.9 and len(study("recipes", "accuracy")) == 8
            and sides(study("recipes", "accuracy"))[:2] == (["dapo"], [])
            and min(completions["dapo"]) > 3 * max(completions["grpo"]))


def sequence_mean_is_longer():
    length = study("length", "length_wrong")
    return (all(min(length["sequence"]) > max(length[name]) for name in ("token", "constant"))
            and "sequence" in sides(length)[2])


def hacked():
    rows = [row for row in result("overoptimisation") if row["arm"] == "RL, beta 0"]
    peaks = {}                                   # {choices: distance at which the gold score of each seed is highest}
    for choices in dict.fromkeys(row["pairs"] for row in rows):
        for seed in {row["seed"] for row in rows}:
            points = [row for row in result("overoptimisation-curves")
                      if (row["arm"], row["pairs"], row["seed"]) == ("RL, beta 0", choices, seed)]
            peaks.setdefault(choices, []).append(max(points, key=lambda point: point["gold"])["kl"] ** 0.5)
    lost = study("overoptimisation", "lost", "pairs", arm="RL, beta 0")
    fits = study("overoptimisation", "r2", "arm")
    return (list(lost) == [4000, 1000, 200, 50]
            and all(row["lost"] > 0 and row["proxy_since_best"] > 0 for row in rows if row["pairs"] < 4000)
            and 0 < max(means(lost)[:2]) < min(means(lost)[2:]) and min(means(peaks)[:2]) > max(means(peaks)[2:])
            and np.mean(fits["best of n"]) > 0.9 > max(np.mean(fits["RL, beta 0"]), np.mean(fits["RL, beta 0.3"])))


def penalty_helps():
    lost, gold, proxy = ([study("overoptimisation", figure, "pairs", arm=f"RL, beta {beta}") for beta in ("0", "0.3")]
                         for figure in ("lost", "gold", "proxy"))
    higher = {choices: min(gold[1][choices]) > max(gold[0][choices]) for choices in gold[0]}
    of_kl = {}
    for row in result("kl"):
        of_kl.setdefault((row["beta"], row["charged_in"]), []).append(row["gold"])
    return (all(b < a / 2 for a, b in zip(*map(means, lost))) and all(b < a for a, b in zip(*map(means, proxy)))
            and higher[1000] and higher[200] and sides(of_kl)[:2] == ([], [(0.3, "loss")]))


def noise_costs():
    agreement, way = (study("noise", figure, "rate") for figure in ("agreement", "way"))
    return (0.6 < np.mean(agreement[0.6]) < 0.65 and all(max(agreement[rate]) < rate for rate in (0.8, 0.9))
            and max(way[0.9]) < min(way[1.0]) and np.mean(way[0.9]) < 0.75 * np.mean(way[1.0]))


CLAIMS = {
    "GRPO needs less memory than PPO": less_memory,
    "GRPO is as good as PPO, without a critic": as_good,
    "PPO needs a good critic": no_good_critic_needed,
    "a baseline leaves the gradient's expectation as it is": None,                   # test_exact.py
    "and lowers its variance": less_noise_without,
    "so a baseline makes learning better": better_without,
    "RL is needed, fine-tuning on right answers is not enough": online_is_enough,
    "the standard deviation in the advantage helps, or harms": no_difference_of_the_std,
    "larger groups are better": not_larger_is_better,
    "the newer recipes beat GRPO": recipes_alike,
    "the sequence's mean makes wrong answers longer (Dr. GRPO)": sequence_mean_is_longer,
    "learned rewards get hacked": hacked,
    "the KL penalty prevents it": penalty_helps,
    "a reward model averages out the annotators' noise": noise_costs,
}


def test_every_row_of_the_table_has_its_numbers():
    readme = (RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| people say | measured here"):]
    rows = re.findall(r"^\| (.+?) \| ", table[:table.index("\n\n")], re.MULTILINE)
    assert rows == ["people say", *CLAIMS]


@pytest.mark.parametrize("claim", [claim for claim, holds in CLAIMS.items() if holds])
def test_the_answer_is_what_was_measured(claim):
    assert CLAIMS[claim]()
