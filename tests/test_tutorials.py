"""The notebooks run from top to bottom with a real kernel (fewer steps than for what is committed), and what is
committed is whole: outputs everywhere, no error, every figure. Their first cell works on Colab.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tutorials import build

ROOT = Path(__file__).parent.parent
NOTEBOOKS = build.notebooks()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws_what_is_committed(path, monkeypatch):
    monkeypatch.setenv("GRPO_MIN_FAST", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    committed, ran = code_cells(nbformat.read(path, as_version=4)), code_cells(build.run(path, save=False))
    assert [figures(cell) for cell in ran] == [figures(cell) for cell in committed]
    assert sum(map(figures, committed)) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_one_whole_run(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert cells[0].source == build.FIRST_CELL
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


PAGES = [*NOTEBOOKS, *sorted((ROOT / "tutorials").glob("**/*.md"))]


def headings(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT / "tutorials")))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        assert (path.parent / target).exists(), target
        if anchor and target.endswith(".md"):
            assert anchor in headings((path.parent / target).read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_badge_opens_each_notebook_on_colab(path):
    text = nbformat.read(path, as_version=4).cells[1].source
    assert f"(https://colab.research.google.com/github/grpo-min/grpo_min/blob/main/tutorials/{path.name})" in text


def test_committed_notebooks_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 10 * 2**20


def test_first_cell_on_colab(tmp_path):
    """In an empty folder, with Colab's module loaded and a file:// address in place of the constant."""
    cell = build.FIRST_CELL.replace("https://github.com/grpo-min/grpo_min", ROOT.as_uri())
    assert cell != build.FIRST_CELL
    script = f"import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n{cell}\n{cell}\n" \
        "import grpo_min.grpo\nprint(grpo_min.grpo.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip()) == tmp_path / "grpo_min" / "grpo_min" / "grpo.py"
