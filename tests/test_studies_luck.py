"""The study of luck: what varies, what does not, and its table."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grpo_min.lab import compare
from grpo_min.lab.studies import luck
from grpo_min.run.files import DATA


def pretended_job(words):
    """In place of the main job: its folder with the committed weights, and figures that tell the seed."""
    folder, seed = Path(words[words.index("--run") + 1]), int(words[words.index("--seed") + 1])
    for stage in "sft", "reward_model":
        (folder / stage).mkdir(parents=True)
        shutil.copy(DATA / f"checkpoints/{stage}.pt", folder / stage / "checkpoint.pt")
    (folder / "reward_model/evaluation.json").write_text(json.dumps(dict(accuracy=[0.8 + seed / 100, 0, 1])))
    (folder / "compare").mkdir()
    for reward, prompts, figure in ("correct", "arithmetic_test", "accuracy"), ("learned", "animals_test", "progress"):
        records = [dict(algorithm=name, figures={prompts: {figure: [more + seed / 10, 0, 1]}})
                   for name, more in (("SFT", 0.0), ("GRPO", 0.2), ("PPO", 0.1))]
        (folder / f"compare/comparison-{reward}.json").write_text(json.dumps(records))


def test_luck_to_the_end(tmp_path, run_study, monkeypatch):
    jobs = []
    monkeypatch.setattr(luck.main_job, "main", lambda words: (jobs.append(words), pretended_job(words)))
    rows, _, text = run_study("luck", seeds=3)
    assert [words[words.index("--seed") + 1] for words in jobs] == ["1", "2", "3"]
    assert [(row["varied"], row["seed"]) for row in rows] == [
        (varied, seed) for varied in (luck.EVERY, luck.REWARD, luck.RL) for seed in "123"] + [(luck.MEAN, "1 2 3")]
    assert "| every stage: right, GRPO | 40.0% | 30.0% | 50.0% |" in text
    assert "| every stage: reward model agrees | 82.0% | 81.0% | 83.0% |" in text
    ways = {}
    for varied in luck.REWARD, luck.RL:
        ways[varied] = [float(row[luck.WAY]) for row in rows if row["varied"] == varied]
    for varied, (first, *others) in ways.items():
        assert first == pytest.approx(0.3) and len(set(others)) == 2, "seed 1 is the main job's"
        assert f"| {varied}: {luck.WAY} | {np.median(ways[varied]):.1%} |" in text
    folder, = (tmp_path / "runs").glob("**/luck-1")
    assert {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())["seed"]
            for path in folder.glob("luck*/**/config.json")} == {
        "luck/grpo-learned-2": 2, "luck/grpo-learned-3": 3, "luck-reward_model-2": 2, "luck-reward_model-3": 3,
        "luck-reward_model-2/compare/grpo-learned-1": 1, "luck-reward_model-3/compare/grpo-learned-1": 1,
        "luck-mean-1-2-3/grpo-learned-1": 1}


def test_seeds_of_a_comparison(tmp_path, monkeypatch):
    begun = []

    def begin(function, config, *arguments):
        begun.append((function.__name__, *arguments))
    compare.start(compare.CompareConfig(run=str(tmp_path / "c"), rewards="correct", seeds=2, first_seed=4), begin)
    assert {run[3] for run in begun if run[0] == "one_run"} == {4, 5}
    seen = []
    monkeypatch.setattr(compare, "train_or_reuse", lambda train, settings: seen.append(settings) or (None, {}, []))
    monkeypatch.setattr(compare.critic, "costs", lambda settings, rows: {})
    compare.train_critic(compare.CompareConfig(run=str(tmp_path), first_seed=4), "correct")
    assert seen[0].seed == 4
