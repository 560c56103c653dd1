"""The studies of what RL adds, of placebos and of forgetting: figures worked out by hand, and each at a tiny size."""
import itertools

import numpy as np
import pytest

from grpo_min.lab.studies import coverage, forgetting, is_rl_needed, placebo
from grpo_min.lab.studies.common import StudyConfig
from grpo_min.run.checkpoint import load_model, serialise, weights
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA, save_file

SFT = str(DATA / "checkpoints/sft.pt")


# --- coverage -----------------------------------------------------------------------------------------------------

def test_pass_at_k_by_hand_and_by_enumeration():
    assert coverage.pass_at([2], 4, 2) == pytest.approx(5 / 6)          # of six pairs one has two wrong answers
    assert coverage.pass_at([2, 0, 4], 4, 2) == pytest.approx((5 / 6 + 0 + 1) / 3)
    for k in 1, 3, 5:
        chosen = [any(choice) for choice in itertools.combinations([1, 1, 0, 0, 0], k)]
        assert coverage.pass_at([2], 5, k) == pytest.approx(np.mean(chosen))


def test_solved_by_none_before_and_by_most_runs_after():
    gained, lost = coverage.changes([0, 0, 0, 3, 1, 5], [[1, 2, 0, 0, 0, 9], [8, 0, 0, 0, 7, 9], [1, 0, 4, 0, 0, 9]])
    assert gained == [True, False, False, False, False, False]
    assert lost == [False, False, False, True, True, False]


def test_gains_and_losses_are_told_for_each_kind_of_prompts():
    rows = [("sums", "SFT", 0, [0, 4]), ("sums", "GRPO", 1, [2, 0]), ("sums", "GRPO", 2, [1, 0]),
            ("chains", "SFT", 0, [0, 0]), ("chains", "GRPO", 1, [0, 0])]
    lines = coverage.change_table([dict(zip(["asked", "setting", "seed", "right"], row)) for row in rows])
    assert [line.split(" | ")[3:] for line in lines[2:]] == [
        ["1 of 2, 50% (95% interval 9% to 91%)", "1 of 2, 50% (95% interval 9% to 91%) |"],
        ["0 of 2, 0% (95% interval 0% to 66%)", "0 of 2, 0% (95% interval 0% to 66%) |"]]


def test_the_base_model_goes_on_with_a_text():
    assert coverage.last_value(" 3 plus 4 is 7, 7 minus 2 is 5.") == "5" and coverage.last_value(" 12.") == " 12"
    config = StudyConfig(device="cpu", eval_prompts=20)
    tokenizer = coverage.trained(config, coverage.BASE, 0, 1).tokenizer
    assert tokenizer.encode_prompt("cows eat") == [tokenizer.end, *tokenizer.encode("cows eat")]
    arithmetic, longer = coverage.count_right(config, "", coverage.BASE, 0, 1, 8)
    assert len(arithmetic["right"]) == len(longer["right"]) == 20 and max(arithmetic["right"]) == 8
    assert np.mean(arithmetic["right"]) > 4 > 1 > np.mean(longer["right"]), "it has read no chain as long"


def test_coverage_to_the_end(tmp_path, run_study):
    rows, curves, text = run_study("coverage", again=True, steps=2, eval_prompts=5)
    methods = [coverage.BASE, is_rl_needed.SFT, coverage.AGAIN, is_rl_needed.GRPO, is_rl_needed.PPO,
               is_rl_needed.ONLINE, is_rl_needed.OFFLINE]
    assert [row["setting"] for row in rows if row["asked"] == "longer chains"] == methods
    assert [row["setting"] for row in rows if row["asked"] == coverage.COUNTDOWN] == methods[1:4]
    assert [row["k"] for row in curves[:4]] == ["1", "2", "4", "8"]
    for row in rows:
        assert float(row["pass@1"]) <= float(row["pass@2"]) <= float(row["pass@8"])
    assert text.count("| longer chains | base model | ") == 2 + 4 and "| Countdown | SFT | GRPO | " in text
    runs = {path.parent.name for path in (tmp_path / "runs/quick").glob("*/checkpoint.pt")}
    assert runs == {"countdown-sft", "countdown-grpo-1", "is_rl_needed-GRPO-1", "is_rl_needed-PPO-1",
                    "is_rl_needed-filtered_SFT,_online-1", "is_rl_needed-filtered_SFT,_offline-1-1"}


# --- placebo ------------------------------------------------------------------------------------------------------

def test_placebos_by_hand():
    texts, answers = [" 7", "<think> 3 plus 4 is 7</think> 7", " 8", " 7" * 50], ["7"] * 4
    assert placebo.wrong([""] * 4, texts, answer=answers, finished=[True, True, True, False]) == [0, 0, 1, 1]
    assert placebo.length([""] * 4, texts) == [1 / 40, 8 / 40, 1 / 40, 1.0]
    tosses = placebo.coin(3)([""] * 4000, [" 7"] * 4000)
    assert set(tosses) == {0.0, 1.0} and abs(np.mean(tosses) - 0.5) < 0.04
    assert placebo.coin(3)([""] * 4000, [" 8"] * 4000) == tosses != placebo.coin(4)([""] * 4000, [" 7"] * 4000)


def test_placebo_to_the_end(tmp_path, run_study):
    rows, curves, text = run_study("placebo", again=True, steps=2)
    assert [row["setting"] for row in rows] == ["SFT", *placebo.SETTINGS]
    assert len(curves) == 2 * len(placebo.SETTINGS) and all(f"| {name} |" in text for name in placebo.SETTINGS)
    reached = {row["setting"]: row for row in rows}
    assert reached["coin"]["updates"] == "2" and reached["coin, 4 minibatches"]["updates"] == "8"
    assert reached["coin"]["clipped"] == "0.0" == reached["coin, 4 minibatches, no clip"]["clipped"]
    assert float(reached["coin, 4 minibatches"]["clipped"]) > 0
    first = {row["setting"]: row for row in curves[::2]}
    assert float(first["wrong answers"]["reward"]) == pytest.approx(1 - float(first["right answers"]["reward"]))
    assert (tmp_path / "runs/quick/is_rl_needed-GRPO-1").exists()


# --- forgetting ---------------------------------------------------------------------------------------------------

def test_where_the_accuracy_is_reached():
    points = [dict(accuracy=accuracy, at=at, kl=kl) for accuracy, at, kl in [
        (0.5, 0, 0.0), (0.8, 2, 0.4), (0.9, 6, 1.0), (0.7, 8, 2.0), (0.95, 9, 3.0)]]
    assert forgetting.at_level(points, 0.85, ["at", "kl"]) == pytest.approx(dict(at=4, kl=0.7))
    assert forgetting.at_level(points, 0.9, ["kl"]) == pytest.approx(dict(kl=1.0))
    assert forgetting.at_level(points, 0.96, ["at", "kl"]) == dict(at=None, kl=None)


def test_what_the_kl_explains():
    points = [dict(kl=kl, lost=0.5 * kl + 2 * kl ** 2) for kl in (0.0, 0.1, 0.5, 2.0)]
    assert forgetting.explained(points, "kl") == pytest.approx(1)
    apart = [dict(kl=1.0, lost=lost) for lost in (1.0, 3.0)]
    assert forgetting.explained(apart, "kl") == pytest.approx(0)


def test_the_shorthand_keeps_the_values():
    row = dict(prompt="start with 15, minus 4, times 2.",
               response="<think> 15 minus 4 is 11, 11 times 2 is 22</think> 22")
    assert forgetting.shorthand(row) == dict(row, response="<think> 11, 22</think> 22")


def test_both_directions_of_the_kl(tmp_path):
    """One model is surer of every token than the other: the KL from the less sure one is the larger by far."""
    surer = load_model(SFT)
    for parameter in surer.norm.parameters():                           # all logits twice as large
        parameter.data *= 2
    save_file(tmp_path / "surer.pt", serialise(step=0, **weights(surer)))
    config = StudyConfig(device="cpu", eval_prompts=40)
    there = forgetting.measure(config, surer)
    back = forgetting.measure(StudyConfig(device="cpu", eval_prompts=40, sft=str(tmp_path / "surer.pt")),
                              load_model(SFT))
    assert there["kl_forward"] == pytest.approx(back["kl"], rel=0.5) and there["kl_forward"] > 1.5 * there["kl"] > 0
    same = forgetting.measure(config, load_model(SFT))
    assert abs(same["kl"]) < 1e-5 > abs(same["kl_forward"]) and 2 < same["gold"] < 5


def test_forgetting_to_the_end(tmp_path, run_study):
    rows, curves, text = run_study("forgetting", again=True, steps=2, eval_prompts=10)
    methods = [forgetting.OWN, forgetting.THINKING, forgetting.SHORTHAND, is_rl_needed.GRPO, is_rl_needed.PPO,
               is_rl_needed.ONLINE]
    assert [row["setting"] for row in rows] == methods and all(f"| {method} |" in text for method in methods)
    assert [row["at"] for row in curves] == ["0", "2", "4"] * 3 + ["0", "2"] * 3
    assert all(float(row["lost"]) == 0 for row in curves if row["at"] == "0")
    kept = read_jsonl(tmp_path / "runs/quick/forgetting-SFT,_shorthand-1-2.jsonl", ["prompt", "response"])
    assert len(kept) > 2500 and all(row["response"].startswith("<think> ") for row in kept)
    assert not any(" is " in row["response"] for row in kept)
