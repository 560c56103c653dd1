"""What is committed is what was measured: the weights of the stages before RL load and score what was recorded with
them, and every table of a page stands in a file that a command wrote. The main job runs from nothing to its end.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_min import __main__ as main_job
from grpo_min.critic import Critic
from grpo_min.lab import publish
from grpo_min.lab.report import plot_learning
from grpo_min.model import GPT
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.files import DATA
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_committed_weights_are_small_and_score_as_recorded():
    recorded = json.loads((DATA / "checkpoints" / "scores.json").read_text())
    measured = publish.scores()
    assert abs(measured["base_loss"] - recorded["base_loss"]) < 0.01
    assert abs(measured["sft_accuracy"] - recorded["sft_accuracy"]) < 0.02
    assert abs(measured["reward_model_accuracy"] - recorded["reward_model_accuracy"]) < 0.01
    assert abs(measured["critic_explained"] - recorded["critic_explained"]) < 0.03
    for _, name, kind in publish.CHECKPOINTS:
        path = DATA / "checkpoints" / f"{name}.pt"
        assert path.stat().st_size < 2_000_000
        assert all(parameter.isfinite().all() for parameter in load_model(path, kind=kind).parameters())


@PAGES
def test_pages_hold_the_committed_tables(page):
    text = page.read_text(encoding="utf-8")
    assert publish.fill_in(text) == text
    assert publish.fill_in(text.replace("grpo.py#L1", "grpo.py#L5")) == text


def test_learning_is_drawn_from_the_committed_curves(tmp_path):
    plot_learning(publish.RESULTS / "comparison-correct.csv", tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    assert (publish.RESULTS / "learning.png").stat().st_size > 10_000


def test_publish_copies_what_is_there_and_fills_in_the_pages(tmp_path, monkeypatch):
    results, run = tmp_path / "results", tmp_path / "run"
    for folder in results, run / "sft", run / "compare/critic-correct":
        folder.mkdir(parents=True)
    page = tmp_path / "page.md"
    page.write_text("a <!-- pipeline.md -->old<!-- end of pipeline.md --> b")
    shutil.copy(publish.RESULTS / "comparison-correct.csv", run / "compare")
    (run / "pipeline.md").write_text("seconds")
    tiny.checkpoint(run / "sft/checkpoint.pt", seed=3)
    tiny.critic_checkpoint(run / "compare/critic-correct/checkpoint.pt")
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "DATA", tmp_path / "data")
    monkeypatch.setattr(publish, "PAGES", [page])
    monkeypatch.setattr(publish, "scores", lambda: dict(base_loss=1.0))
    publish.main(["--run", str(run), "--benchmark", str(tmp_path / "none")])
    assert page.read_text() == "a <!-- pipeline.md -->\nseconds\n<!-- end of pipeline.md --> b"
    written = sorted(path.name for path in results.iterdir())
    assert written == ["comparison-correct.csv", "learning.png", "pipeline.md"]
    committed = tmp_path / "data/checkpoints"
    assert sorted(path.name for path in committed.iterdir()) == ["critic.pt", "scores.json", "sft.pt"]
    for name, kind, stage in ("sft", GPT, "sft"), ("critic", Critic, "compare/critic-correct"):
        weights = load_model(committed / f"{name}.pt", kind=kind).state_dict()
        assert tiny.same(weights, load_checkpoint(run / stage / "checkpoint.pt")["model"])


def test_main_job_runs_to_its_end_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    folder, words = tmp_path / "main", ["--quick", "--run", str(tmp_path / "main")]
    first = subprocess.run([sys.executable, "-m", "grpo_min", *words], capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr[-2000:]
    for name in ("before_after.md", "pipeline.md", "reward_model/reward_model.md", "compare/comparison-learned.md",
                 "compare/comparison-correct.png", "compare/learning.png", "compare/grpo-correct-1/curves.png"):
        assert (folder / name).stat().st_size > 0
    kept = {path: path.read_bytes() for path in folder.glob("**/*") if path.suffix in (".pt", ".md") and path.is_file()}
    monkeypatch.setattr(main_job, "beside_each_other", tiny.one_after_the_other)
    main_job.main(words)
    assert "step 1/" not in capsys.readouterr().out                   # nothing is trained again
    assert all(path.read_bytes() == content for path, content in kept.items())
