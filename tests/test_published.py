"""What is committed is what was measured: the weights of the first three stages load and score what was recorded with
them, and every number of the README stands in a file that a command wrote. The main job runs from nothing to its end.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

from grpo_min import study
from grpo_min.runs import DATA, load_model

ROOT = Path(__file__).parent.parent


def test_committed_weights_are_small_and_score_as_recorded():
    recorded = json.loads((DATA / "checkpoints" / "scores.json").read_text())
    measured = study.scores()
    assert abs(measured["base_loss"] - recorded["base_loss"]) < 0.01
    assert abs(measured["sft_accuracy"] - recorded["sft_accuracy"]) < 0.02
    assert abs(measured["reward_model_accuracy"] - recorded["reward_model_accuracy"]) < 0.01
    for _, name, kind in study.CHECKPOINTS:
        path = DATA / "checkpoints" / f"{name}.pt"
        assert path.stat().st_size < 2_000_000
        assert all(parameter.isfinite().all() for parameter in load_model(path, kind).parameters())


def test_readme_holds_the_committed_tables_and_links_to_the_banners():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert study.fill_in(text) == text
    assert len(re.findall(r"grpo\.py#L\d+", text)) == 7


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_main_job_runs_to_its_end_and_is_not_run_twice(tmp_path):
    command = [sys.executable, "-m", "grpo_min", "--quick", "--run", str(tmp_path / "main")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr[-2000:]
    for name in ("before_after.md", "pipeline.md", "reward_model/reward_model.md", "compare/comparison-learned.md",
                 "compare/comparison-correct.png", "compare/grpo-correct-1/curves.png"):
        assert (tmp_path / "main" / name).stat().st_size > 0
    weights = (tmp_path / "main" / "compare/ppo-learned-1/checkpoint.pt").read_bytes()
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "step 1/" not in second.stdout                           # nothing is trained again
    assert (tmp_path / "main" / "compare/ppo-learned-1/checkpoint.pt").read_bytes() == weights
