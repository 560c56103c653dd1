"""The studies of learning: every setting and seed is run once, the tables hold what the runs reached, and the sentences
say what the numbers say."""
import csv

from grpo_min import study
from tests import tiny


def test_words_follow_from_the_seeds():
    words = study.in_words({"mean": [0.5, 0.6], "a": [0.61, 0.9], "b": [0.1, 0.49], "c": [0.3, 0.55], "d": [0.6, 0.9]},
                           dict(mean=100, a=100, b=350, c=100, d=100))
    assert words.startswith("Better than `mean` (55.0% (50.0% to 60.0%)) with every seed: `a` (")
    assert "3.5 times" in words and "`b` sampled" in words and "`a` sampled" not in words
    assert "Worse with every seed: `b` (" in words and "The seeds of `c`, `d` overlap" in words
    assert study.in_words({"x": [0.5], "y": [0.5]}, dict(x=1, y=1)).startswith("Nothing was better than `x` (50.0%)")


def test_a_study_writes_what_its_runs_reached(tmp_path, capsys):
    sft = tiny.checkpoint(tmp_path / "sft.pt", context=128)
    arguments = ["recipes", "--quick", "--steps", "2", "--seeds", "1", "--eval-prompts", "5", "--sft", sft, "--device",
                 "cpu", "--run", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    study.main(arguments)
    with open(tmp_path / "out/recipes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], row["seed"]) for row in rows] == [("no recipe", "1"), ("grpo", "1")]
    with open(tmp_path / "out/recipes-curves.csv", newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 2 * 2 and {row["completions"] for row in curves} == {"128", "256"}
    text = (tmp_path / "out/recipes.md").read_text()
    assert text in capsys.readouterr().out + "\n" and "| grpo |" in text and "2 steps, seeds 1 to 1" in text
    assert (tmp_path / "out/recipes.png").stat().st_size > 5000
    weights = (tmp_path / "runs/recipes-grpo-1/checkpoint.pt").read_bytes()
    study.main(arguments)                                               # what has been run is not run again
    assert (tmp_path / "out/recipes.md").read_text() == text and "step 1/" not in capsys.readouterr().out
    assert (tmp_path / "runs/recipes-grpo-1/checkpoint.pt").read_bytes() == weights


def test_the_recipes_are_compared_with_several_updates_per_batch():
    assert study.LEARNING["recipes"][1]["minibatches"] >= 4
    for _, shared, settings in study.LEARNING.values():
        for changes in settings.values():
            setting = {**study.SHARED, **shared, **changes}
            assert setting["prompts_per_step"] * setting["group_size"] == 128


def test_all_studies_one_after_the_other(tmp_path, monkeypatch, capsys):
    ran = []
    for name in study.STUDIES:
        if name != "all":
            monkeypatch.setitem(study.STUDIES, name, lambda config, name=name: ran.append(name))
    words = ["all", "--run", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    study.main(words)
    assert ran == [name for name in study.STUDIES if name not in ("tuning", "all", "threads", "publish")]
    text = (tmp_path / "out/minutes.md").read_text()
    assert all(f"| {name} | 0.0 |" in text for name in [*ran, "**all**"]) and len(ran) == 12
    (tmp_path / "out/minutes.md").unlink()
    (tmp_path / "runs").mkdir()                       # perhaps with runs in it, which are not run again
    study.main(words)
    assert not (tmp_path / "out/minutes.md").exists()
