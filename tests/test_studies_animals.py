"""The studies of the learned reward, on the animals: their estimators against enumeration and known answers, and each
study at a tiny size.
"""
import itertools
import json

import numpy as np
import pytest

from grpo_min.gold import gold_score
from grpo_min.lab.studies import common, noise, overoptimisation
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from tests import tiny


# --- pairs --------------------------------------------------------------------------------------------------------

def right(rows):
    """Whether the answer of higher gold score was chosen, and how many have the same gold score."""
    facts = {row["prompt"]: row for row in read_jsonl(DATA / "animals_train_facts.jsonl", ["prompt"])}
    margins = common.margins(gold_score, [{**facts[row["prompt"]], **row} for row in rows])
    return margins > 0, int((margins == 0).sum())


def test_annotators_are_right_as_often_as_asked():
    pairs = read_jsonl(DATA / "preferences.jsonl", ["prompt"])[:500]
    relabelled = {rate: noise.relabel(pairs, rate, seed=3) for rate in (1.0, 0.8, 0.6, 0.0)}
    is_right = {rate: right(rows)[0] for rate, rows in relabelled.items()}
    assert all(right(rows)[1] == 0 and len(rows) == len(pairs) - right(pairs)[1] < len(pairs)
               for rows in relabelled.values())
    assert is_right[1.0].all() and not is_right[0.0].any()
    for rate in 0.8, 0.6:
        assert abs(is_right[rate].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(is_right[rate]))
    assert not (is_right[0.6] & ~is_right[0.8]).any()                   # the same mistakes, and more
    assert (is_right[0.6] != right(noise.relabel(pairs, 0.6, seed=4))[0]).mean() > 0.3
    for row in relabelled[0.6][:50]:                                    # the answers are those of a pair
        assert any({row["chosen"], row["rejected"]} == {pair["chosen"], pair["rejected"]} for pair in pairs
                   if pair["prompt"] == row["prompt"])


def test_agreement_with_gold_counts_pairs_that_gold_tells_apart():
    pairs = [dict(prompt="what do cows eat?", chosen=chosen, rejected=rejected, animal="cow", attribute="food")
             for chosen, rejected in [(" grass.", " meat."), (" meat.", " grass."), (" grass.", " meat. of course!"),
                                      (" grass.", " the food of cows is grass."), (" grass.", " grass. look it up.")]]

    def longer(prompts, completions, **columns):
        return [len(text) for text in completions]
    assert common.gold_agreement(gold_score, pairs) == 1
    assert common.gold_agreement(longer, pairs) == 2 / 4                # the fourth pair is a tie of gold
    assert common.gold_agreement(lambda *texts, **columns: [0.0] * len(pairs), pairs) == 0


def test_a_policy_is_measured_on_its_own_samples():
    sft, policy = tiny.gpt(context=128), tiny.gpt(context=128, seed=5)
    rows = read_jsonl(DATA / "animals_val.jsonl", ["prompt"])[:6]
    reward = learned(tiny.gpt(ScalarGPT, context=128))
    same, answered = common.measure_animals(sft, sft, reward, rows, samples=3, batch=4)
    assert [prompt for prompt, *_ in answered] == [row["prompt"] for row in rows for _ in range(3)]
    assert same["kl"] == pytest.approx(0, abs=1e-4)
    assert same["gold"] == pytest.approx((same["gold_even"] + same["gold_odd"]) / 2)
    other, _ = common.measure_animals(policy, sft, reward, rows, samples=30)
    assert other["kl"] > 0.1


# --- best of n ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expected_best_is_the_mean_over_all_choices_of_n(n):
    rng = np.random.default_rng(0)
    scores, values = rng.permutation(12).reshape(2, 6) / 7, rng.normal(size=(2, 6))
    brute = [np.mean([values[row, max(choice, key=lambda i: scores[row, i])]
                      for choice in itertools.combinations(range(6), n)]) for row in range(2)]
    assert overoptimisation.expected_best(scores, values, n) == pytest.approx(brute)


def test_equal_scores_of_equal_answers_do_not_matter():
    scores, values = np.array([[1.0, 3.0, 3.0, 2.0]]), np.array([[5.0, 7.0, 7.0, 6.0]])
    assert overoptimisation.expected_best(scores, values, 2) == pytest.approx([(5 * 7 + 6) / 6])


# --- fits and falls -----------------------------------------------------------------------------------------------

def points(kl, gold, proxy=None):
    return [dict(kl=float(k), gold=float(g), gold_even=float(g), gold_odd=float(g), proxy=float(p))
            for k, g, p in zip(kl, gold, gold if proxy is None else proxy)]


@pytest.mark.parametrize("arm, curve", [("RL, beta 0", lambda d: d * (1.3 - 0.4 * np.log(d))),
                                        (overoptimisation.BEST_OF_N, lambda d: d * (1.3 - 0.4 * d))])
def test_fits_find_alpha_and_beta_again(arm, curve):
    d = np.linspace(0.2, 4, 15)
    alpha, beta, r2 = overoptimisation.fit(points([0, *d ** 2], [0, *curve(d)]), arm)
    assert (alpha, beta, r2) == pytest.approx((1.3, 0.4, 1.0))
    errors = np.random.default_rng(0).normal(size=15)
    alpha, beta, r2 = overoptimisation.fit(points(d ** 2, curve(d) + 0.3 * errors), arm)
    assert (alpha, beta) != pytest.approx((1.3, 0.4), abs=1e-3) and 0 < r2 < 0.99
    other = "RL, beta 0" if arm == overoptimisation.BEST_OF_N else overoptimisation.BEST_OF_N
    assert overoptimisation.fit(points(d ** 2, curve(d)), other)[2] < 0.999


def test_too_few_points_have_no_fit():
    few, flat = points([0, 1, 4, 4], [0, 1, 1, 2]), points([0, 1, 4, 9], [0, 0, 0, 0])
    assert overoptimisation.fit(few, overoptimisation.BEST_OF_N) == (None, None, None)
    assert overoptimisation.fit(flat, overoptimisation.BEST_OF_N) == (0, 0, None)


def test_what_was_lost_is_measured_on_the_other_prompts():
    run = points(range(5), [0, 1, 3, 2, 1], proxy=[0, 1, 2, 3, 4])
    assert overoptimisation.lost_since_best(run, 1) == (2, 2)
    run[2]["gold_odd"] = 1.5                                            # the best of the even ones, by luck
    assert overoptimisation.lost_since_best(run, 1) == (0.5, 2)
    assert overoptimisation.lost_since_best(points(range(5), [0, 1, 3, 2, 1]), 3) == pytest.approx((0, 0))
    assert overoptimisation.lost_since_best(points(range(4), [0, -1, -2, -3], [0, 1, 2, 3]), 1) == (3, 3)


def test_gains_are_over_the_first_point():
    gained = overoptimisation.gains(points([0, -0.1, 2], [5, 6, 4], proxy=[1, 2, 3]))
    assert [(p["kl"], p["gold"], p["proxy"]) for p in gained] == [(0, 0, 0), (0, 1, 1), (2, -1, 2)]


def test_gold_at_equal_kl_by_hand():
    run = points([0, 1, 9, 4, 16], [0, 2, 6, 9, -1])                    # d: 0, 1, 3, 2, 4; it comes back to 4 nats
    at = {kl: overoptimisation.gold_at(run, kl) for kl in (0.25, 1, 4, 6.25, 12.25, 16, 17)}
    assert at == pytest.approx({0.25: 1, 1: 2, 4: 4, 6.25: 5, 12.25: 1.5, 16: -1, 17: None})
    assert overoptimisation.gold_at(points([0, 0, 1], [0, 7, 4]), 0.25) == 5.5


def test_examples_are_liked_and_have_little_gold():
    answered = [("q", f"text {i}", proxy, gold) for i, (proxy, gold) in enumerate(
        [(9, -1), (9, 5), (8, -1), (1, -1.5), (0, 7), (0, 0), (0, 0), (0, 0)])]
    hacked = overoptimisation.liked_and_bad(answered + answered[2:3], count=3)
    assert [row["text"] for row in hacked] == ["text 0", "text 2", "text 1"]
    lines = overoptimisation.hacked_table([dict(pairs=50, prompt="a | b", text=" c`d\n", proxy=9, gold=-1.5)])
    assert lines[-1] == "| 50 | a \\| b | `c'd` | 9.00 | -1.50 |"


# --- the studies --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, trained", [("noise", 4), ("overoptimisation", 11), ("kl", 3)])
def test_a_study_writes_what_its_runs_reached_and_runs_nothing_twice(name, trained, tmp_path, run_study):
    options = dict(eval_prompts=5, sft=tiny.checkpoint(tmp_path / "sft.pt", context=128),
                   reward_model=tiny.reward_checkpoint(tmp_path / "reward.pt"))
    rows, curves, text = run_study(name, again=True, **options)
    key = {"noise": ["rate"], "overoptimisation": ["pairs", "arm"], "kl": ["beta", "charged_in"]}[name]
    arms = ["RL, beta 0", "RL, beta 0.3", "DPO, beta 0.5", "best of n"]
    every_arm = arms[:2] + ["PPO, beta 0", "DPO, beta 0.5", "DPO, beta 0.1", "best of n"]
    assert [tuple(row[k] for k in key) for row in rows] == {
        "noise": [("1.0",), ("0.6",)],
        "overoptimisation": [("1000", arm) for arm in every_arm] + [("50", arm) for arm in arms],
        "kl": [("0.0", "nowhere"), ("0.3", "loss"), ("0.3", "reward")]}[name]
    assert bool(curves) == (name != "noise")
    if name == "overoptimisation":
        assert "Answers after RL" in text and text.count("| 50 | ") > text.count("best of n | 50 ")
        looks = common.column_by([row for row in curves if row["pairs"] == "1000"], "arm", "at")
        trained_for = {"RL": ["0", "1", "2"], "PP": ["0", "1", "2"], "DP": ["0", "1", "2", "3", "4"]}
        assert looks == {arm: trained_for.get(arm[:2], ["1", "2", "4", "8"]) for arm in every_arm}
        runs = tmp_path / "runs/quick"
        learned, dealt = (json.loads((runs / f"overoptimisation-{name}/config.json").read_text())
                          for name in ("1000-ppo-1", "1000-dpo-0.5-1"))
        assert learned["critic"] == str(runs / "overoptimisation-1000-critic-1/checkpoint.pt")
        taught = runs / "overoptimisation-reward-1000-1"
        assert learned["beta"] == 0 and learned["reward_model"] == str(taught / "checkpoint.pt")
        assert dealt["preferences"] == f"{taught}.jsonl"
    assert len(list((tmp_path / "runs/quick").glob("*/checkpoint.pt"))) == trained
