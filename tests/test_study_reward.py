"""The studies of the learned reward: their estimators against enumeration and known answers, their sentences in every
branch, and each study at a tiny size.
"""
import csv
import itertools

import numpy as np
import pytest

from data import prepare
from grpo_min import study, study_reward
from grpo_min.gold import gold_score
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.runs import DATA, read_jsonl
from tests import tiny


# --- pairs --------------------------------------------------------------------------------------------------------

def right(rows):
    """Whether the answer of higher gold score was chosen, and how many have the same gold score."""
    asked = {row["prompt"]: row for row in prepare.animal_prompts("train")}
    facts = [(asked[row["prompt"]]["animal"], asked[row["prompt"]]["attribute"]) for row in rows]
    chosen, rejected = (np.array(gold_score(rows, [row[side] for row in rows], *zip(*facts)))
                        for side in ("chosen", "rejected"))
    return chosen > rejected, int((chosen == rejected).sum())


def test_annotators_are_right_as_often_as_asked():
    pairs = read_jsonl(DATA / "preferences.jsonl", ["prompt"])[:1000]
    by_rate = {rate: study_reward.relabel(pairs, rate, seed=3) for rate in (1.0, 0.8, 0.6, 0.0)}
    is_right = {rate: right(rows)[0] for rate, rows in by_rate.items()}
    assert all(right(rows)[1] == 0 and len(rows) == len(pairs) - right(pairs)[1] < len(pairs)
               for rows in by_rate.values())
    assert is_right[1.0].all() and not is_right[0.0].any()
    for rate in 0.8, 0.6:
        assert abs(is_right[rate].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(is_right[rate]))
    assert not (is_right[0.6] & ~is_right[0.8]).any()                   # the same mistakes, and more
    assert (is_right[0.6] != right(study_reward.relabel(pairs, 0.6, seed=4))[0]).mean() > 0.3
    for row in by_rate[0.6][:50]:                                       # the answers are those of a pair
        assert any({row["chosen"], row["rejected"]} == {pair["chosen"], pair["rejected"]} for pair in pairs
                   if pair["prompt"] == row["prompt"])


def test_agreement_with_gold_counts_pairs_that_gold_tells_apart():
    pairs = [dict(prompt="what do cows eat?", chosen=chosen, rejected=rejected, animal="cow", attribute="food")
             for chosen, rejected in [(" grass.", " meat."), (" meat.", " grass."), (" grass.", " meat. of course!"),
                                      (" grass.", " the food of cows is grass."), (" grass.", " grass. look it up.")]]
    def longer(prompts, completions, **columns):
        return [len(text) for text in completions]
    assert study_reward.gold_agreement(gold_score, pairs) == 1
    assert study_reward.gold_agreement(longer, pairs) == 2 / 4          # the fourth pair is a tie of gold
    assert study_reward.gold_agreement(lambda *texts, **columns: [0.0] * len(pairs), pairs) == 0


# --- best of n ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expected_best_is_the_mean_over_all_choices_of_n(n):
    rng = np.random.default_rng(0)
    scores, values = rng.permutation(12).reshape(2, 6) / 7, rng.normal(size=(2, 6))
    brute = [np.mean([values[row, max(choice, key=lambda i: scores[row, i])]
                      for choice in itertools.combinations(range(6), n)]) for row in range(2)]
    assert study_reward.expected_best(scores, values, n) == pytest.approx(brute)


def test_equal_scores_of_equal_answers_do_not_matter():
    scores, values = np.array([[1.0, 3.0, 3.0, 2.0]]), np.array([[5.0, 7.0, 7.0, 6.0]])
    assert study_reward.expected_best(scores, values, 2) == pytest.approx([(5 * 7 + 6) / 6])


# --- fits and falls -----------------------------------------------------------------------------------------------

def points(kl, gold, proxy=None):
    return [dict(kl=float(k), gold=float(g), gold_even=float(g), gold_odd=float(g), proxy=float(p))
            for k, g, p in zip(kl, gold, gold if proxy is None else proxy)]


@pytest.mark.parametrize("arm, curve", [("RL, beta 0", lambda d: d * (1.3 - 0.4 * np.log(d))),
                                        (study_reward.BEST_OF_N, lambda d: d * (1.3 - 0.4 * d))])
def test_fits_find_alpha_and_beta_again(arm, curve):
    d = np.linspace(0.2, 4, 15)
    alpha, beta, r2 = study_reward.fit(points([0, *d ** 2], [0, *curve(d)]), arm)
    assert (alpha, beta, r2) == pytest.approx((1.3, 0.4, 1.0))
    noise = np.random.default_rng(0).normal(size=15)
    alpha, beta, r2 = study_reward.fit(points(d ** 2, curve(d) + 0.3 * noise), arm)
    assert (alpha, beta) != pytest.approx((1.3, 0.4), abs=1e-3) and 0 < r2 < 0.99
    other = "RL, beta 0" if arm == study_reward.BEST_OF_N else study_reward.BEST_OF_N
    assert study_reward.fit(points(d ** 2, curve(d)), other)[2] < 0.999


def test_too_few_points_have_no_fit():
    assert study_reward.fit(points([0, 1, 4, 4], [0, 1, 1, 2]), study_reward.BEST_OF_N) == (None, None, None)
    alpha, beta, r2 = study_reward.fit(points([0, 1, 4, 9], [0, 0, 0, 0]), study_reward.BEST_OF_N)
    assert (alpha, beta) == (0, 0) and r2 is None


def test_what_was_lost_is_measured_on_the_other_prompts():
    found = points(range(5), [0, 1, 3, 2, 1], proxy=[0, 1, 2, 3, 4])
    assert study_reward.lost_since_best(found, 1) == (2, 2)
    found[2]["gold_odd"] = 1.5                                          # the best of the even ones, by luck
    assert study_reward.lost_since_best(found, 1) == (0.5, 2)
    assert study_reward.lost_since_best(points(range(5), [0, 1, 3, 2, 1]), 3) == pytest.approx((0, 0))
    assert study_reward.lost_since_best(points(range(4), [0, -1, -2, -3], [0, 1, 2, 3]), 1) == (3, 3)


def test_gains_are_over_the_first_point():
    found = study_reward.gains(points([0, -0.1, 2], [5, 6, 4], proxy=[1, 2, 3]))
    assert [(p["kl"], p["gold"], p["proxy"]) for p in found] == [(0, 0, 0), (0, 1, 1), (2, -1, 2)]


def test_examples_are_liked_and_have_little_gold():
    answered = [("q", f"text {i}", proxy, gold) for i, (proxy, gold) in enumerate(
        [(9, -1), (9, 5), (8, -1), (1, -1.5), (0, 7), (0, 0), (0, 0), (0, 0)])]
    chosen = study_reward.liked_and_bad(answered + answered[2:3], count=3)
    assert [text for _, text, _, _ in chosen] == ["text 0", "text 2", "text 1"]
    lines = study_reward.examples([dict(pairs=50, prompt="a | b", text=" c`d\n", proxy=9, gold=-1.5)])
    assert lines[-1] == "| 50 | a \\| b | `c'd` | 9.00 | -1.50 |"


# --- sentences ----------------------------------------------------------------------------------------------------

def test_settings_are_told_apart_by_every_seed_only():
    words = study_reward.compared("X", {"a": [1, 2], "b": [3, 4], "c": [0, 0.5], "d": [1.5, 9]})
    assert words == ("X: a (1.50 (1.00 to 2.00)). Higher with every seed: b (3.50 (3.00 to 4.00)). Lower with every "
                     "seed: c (0.25 (0.00 to 0.50)). Not told from it by the seeds: d (5.25 (1.50 to 9.00)).")
    assert "Higher" not in study_reward.compared("X", {"a": [1], "b": [1]})
    low, high = {"p": [1, 2], "q": [1, 2]}, {"p": [3, 4], "q": [2, 3]}
    assert study_reward.side_by_side(low, high) == (
        "lower with every seed at p (1.50 (1.00 to 2.00) against 3.50 (3.00 to 4.00)); elsewhere the seeds overlap")
    assert study_reward.side_by_side(high, low).startswith("higher with every seed at p (3.50")
    assert study_reward.side_by_side(low, low) == "not told apart by the seeds anywhere"
    both = study_reward.side_by_side({"p": [1], "q": [5]}, {"p": [2], "q": [2]})
    assert "lower with every seed at p" in both and "and higher with every seed at q" in both and "else" not in both


def test_words_about_noise():
    def rows(low, way):
        return [dict(rate=rate, agreement=agreement, way=w) for rate, agreements, ways in
                [(1.0, [0.95, 0.97], [0.8, 0.9]), (0.6, low, way)] for agreement, w in zip(agreements, ways)]
    words = study_reward.noise_words(rows([0.7, 0.8], [0.2, 0.3]))
    assert "more often than its annotators with every seed at 60%." in words and words.count("Lower with every") == 2
    words = study_reward.noise_words(rows([0.59, 0.98], [0.85, 0.95]))
    assert "Nowhere does it agree" in words and words.count("Not told from it by the seeds: 60%") == 2


def overoptimised(arm, pairs, lost, rise, gold, r2=0.9):
    return [dict(arm=arm, pairs=pairs, lost=l, proxy_since_best=r, gold=g, r2=r2) for l, r, g in zip(lost, rise, gold)]


def test_words_about_overoptimisation():
    rows = [*overoptimised("RL, beta 0", 4000, [-0.1, -0.2], [0, 0], [4, 4.2]),
            *overoptimised("RL, beta 0", 200, [0.3, -0.2], [1, 1], [3.9, 4.1]),
            *overoptimised("RL, beta 0", 50, [1, 2], [3, 4], [1, 2]),
            *overoptimised("RL, beta 0.1", 4000, [0.1, 0.2], [-1, -1], [4, 4.2]),
            *overoptimised("RL, beta 0.1", 200, [0, 0], [1, 1], [3.9, 4.1]),
            *overoptimised("RL, beta 0.1", 50, [0, 0], [0, 0], [2.5, 3], r2=None)]
    words = study_reward.overoptimisation_words(rows)
    assert words.startswith("Over-optimisation was seen: ")
    assert ("* RL, beta 0: with every seed 50 pairs (1.50 (1.00 to 2.00)); with some seeds 200 pairs (0.05 (-0.20 to "
            "0.30)); with no seed 4000 pairs (-0.15 (-0.20 to -0.10))\n" in words)
    assert "* RL, beta 0.1: with no seed 4000 pairs (0.15" in words         # gold fell, but the score fell too
    assert "with all of 2 seeds about once in 4 times" in words
    assert ("With RL, beta 0.1 in place of RL, beta 0, gold at the end is higher with every seed at 50 pairs (2.75"
            in words)
    assert "Gold gained at the end of RL, beta 0: 4000 pairs" in words and "Lower with every seed: 50 pairs" in words
    assert "forms, over single runs: RL, beta 0 (0.90), RL, beta 0.1 (0.90)." in words
    none = study_reward.overoptimisation_words([row for row in rows if row["pairs"] != 50])
    assert none.startswith("Over-optimisation was not seen: ") and "with every seed 50" not in none
    assert "* RL, beta 0: with some seeds 200 pairs" in none
    assert "Gao" not in study_reward.overoptimisation_words(overoptimised("RL, beta 0", 50, [0], [0], [1], r2=None))


def test_words_about_where_the_kl_is_charged():
    def rows(reward_kl, reward_gold):
        return [dict(beta=beta, charged_in=where, kl=kl, gold=gold) for beta, where, kls, golds in
                [(0.0, "nowhere", [20, 30], [5, 6]), (0.1, "loss", [5, 6], [5, 6]),
                 (0.1, "reward", reward_kl, reward_gold)] for kl, gold in zip(kls, golds)]
    words = study_reward.kl_words(rows([2, 3], [7, 8]))
    assert "Charged in the loss, KL goes from 25.00 (20.00 to 30.00) at beta 0 to 5.50 (5.00 to 6.00)" in words
    assert "against in the reward, KL is higher with every seed at beta 0.1 (" in words
    assert "gold is lower with every seed at beta 0.1" in words
    assert "Higher with every seed: beta 0.1 in the reward" in words
    words = study_reward.kl_words(rows([5, 25], [5, 6]))
    assert "in 1 of 1 cases" in words and "in 0 of 1 cases" in words
    assert words.count("not told apart by the seeds anywhere") == 2


# --- the studies --------------------------------------------------------------------------------------------------

@pytest.fixture
def arguments(tmp_path):
    return ["--quick", "--eval-prompts", "5", "--sft", tiny.checkpoint(tmp_path / "sft.pt", context=128),
            "--reward-model", tiny.reward_checkpoint(tmp_path / "reward.pt"), "--device", "cpu", "--run",
            str(tmp_path / "runs"), "--out", str(tmp_path / "out")]


def written(folder, name, more=()):
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{name}.csv", f"{name}.md", f"{name}.png", *more])
    assert (folder / f"{name}.png").stat().st_size > 5000
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file)), (folder / f"{name}.md").read_text()


@pytest.mark.parametrize("name, runs", [("noise", 4), ("overoptimisation", 6), ("kl", 3)])
def test_a_study_writes_what_its_runs_reached_and_runs_nothing_twice(name, runs, arguments, tmp_path, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr(study_reward, "beside_each_other", tiny.one_after_the_other)
    study.main([name, *arguments])
    rows, text = written(tmp_path / "out", name, [] if name == "noise" else [f"{name}-curves.csv"])
    assert text in capsys.readouterr().out + "\n" and "every seed" in text
    key = {"noise": ["rate"], "overoptimisation": ["pairs", "arm"], "kl": ["beta", "charged_in"]}[name]
    assert [tuple(row[k] for k in key) for row in rows] == {
        "noise": [("1.0",), ("0.6",)],
        "overoptimisation": [(n, arm) for n in ("4000", "50") for arm in ("RL, beta 0", "RL, beta 0.3", "best of n")],
        "kl": [("0.0", "nowhere"), ("0.3", "loss"), ("0.3", "reward")]}[name]
    if name == "overoptimisation":
        assert "What the reward models came to like" in text and text.count("| 50 | ") > text.count("best of n | 50 ")
        with open(tmp_path / "out/overoptimisation-curves.csv", newline="") as file:
            curves = list(csv.DictReader(file))
        at = {arm: [row["at"] for row in curves if (row["pairs"], row["arm"]) == ("50", arm)]
              for arm in ("best of n", "RL, beta 0")}
        assert at == {"best of n": ["1", "2", "4", "8"], "RL, beta 0": ["0", "1", "2"]}
    checkpoints = {path: path.read_bytes() for path in (tmp_path / "runs/quick").glob("*/checkpoint.pt")}
    assert len(checkpoints) == runs
    study.main([name, *arguments])
    assert "step 1/" not in capsys.readouterr().out and (tmp_path / f"out/{name}.md").read_text() == text
    assert {path: path.read_bytes() for path in (tmp_path / "runs").glob("**/checkpoint.pt")} == checkpoints


def test_a_policy_is_measured_on_its_own_samples(tmp_path):
    sft, policy = tiny.gpt(context=128), tiny.gpt(context=128, seed=5)
    rows = study_reward.held_out("animals", "val", 6)
    reward = learned(tiny.gpt(ScalarGPT, context=128))
    same, answered = study_reward.measure(sft, sft, reward, rows, samples=3, batch=4)
    assert len(answered) == 18 and [prompt for prompt, *_ in answered[:4]] == [rows[0]["prompt"]] * 3 + [
        rows[1]["prompt"]]
    assert same["kl"] == pytest.approx(0, abs=1e-4)
    assert same["gold"] == pytest.approx((same["gold_even"] + same["gold_odd"]) / 2)
    other, _ = study_reward.measure(policy, sft, reward, rows, samples=30)
    assert other["kl"] > 0.1


def test_jobs_can_be_sent_to_other_processes(arguments):
    config = study.parse(study.StudyConfig, arguments)
    assert study_reward.beside_each_other is not tiny.one_after_the_other
    with study_reward.beside_each_other(study_reward.pick_device("cpu")) as begin:
        row, curve = begin(study_reward.one_kl_run, config, 0.1, "reward", 1).result()
    assert row["charged_in"] == "reward" and [line["step"] for line in curve] == [0, 1]
