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

from tests.answer_keys import KEYS
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


# --- length -------------------------------------------------------------------------------------------------------

OF_OUR_MODEL = [path for path in NOTEBOOKS if path.name < "09"]
FOLDED = re.compile("<details>.*?</details>", re.DOTALL)
QUOTED = re.compile(r"`\S+`, line \d+\n```(python|diff)")         # what show.code and show.pieces display


def texts_of(notebook):
    """What a reader sees of a notebook: prose without what is folded, code, and text that is printed or displayed, but
    for source that is quoted from the package."""
    for cell in notebook.cells:
        yield FOLDED.sub("", cell.source) if cell.cell_type == "markdown" else cell.source
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output.get("text") or data.get("text/markdown") or data.get("text/plain", "")
            if "image/png" not in data and not QUOTED.match(text):
                yield text


def words_of(path):
    return sum(len(text.split()) for text in texts_of(nbformat.read(path, as_version=4)))


def test_the_notebooks_of_our_model_have_36000_words_at_most():
    words = {path.name: words_of(path) for path in OF_OUR_MODEL}
    print("\n" + "\n".join(f"{number:6} {name}" for name, number in words.items()))
    assert sum(words.values()) <= 36_000


@pytest.mark.parametrize("path", OF_OUR_MODEL, ids=lambda path: path.stem)
def test_reading_times_are_those_of_120_words_a_minute_and_agree(path):
    minutes = 5 * round(words_of(path) / 120 / 5)
    row, = [line for line in (ROOT / "tutorials/README.md").read_text("utf-8").splitlines() if f"({path.name})" in line]
    said = re.search(r"(\d+) minutes to read", " ".join(nbformat.read(path, as_version=4).cells[1].source.split()))
    assert row.endswith(f"| {said[1]} min |") and abs(int(said[1]) - minutes) <= 5


@pytest.mark.parametrize("path", OF_OUR_MODEL, ids=lambda path: path.stem)
def test_lines_of_a_notebook_are_at_most_120_characters_long(path):
    """But for tables and addresses."""
    lines = [line for cell in nbformat.read(path, as_version=4).cells for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|") and "https://" not in line]


# --- questions ----------------------------------------------------------------------------------------------------

def questions(path):
    """[(question, answer)] of a notebook; the answers are folded."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    pattern = r"^\*\*Question\.\*\*(.*?)<details><summary>Answer</summary>\s*\*\*Answer: (.*?)\.\*\*.*?</details>"
    return re.findall(pattern, "\n\n".join(cells), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", OF_OUR_MODEL, ids=lambda path: path.stem)
def test_four_questions_have_folded_answers(path):
    text = path.read_text(encoding="utf-8")
    assert len(questions(path)) == text.count("**Question.**") == 4 and text.count("**Predict, then run.**") == 3


@pytest.mark.parametrize("name, piece, answer, work_out", [(name, *key) for name, keys in KEYS.items() for key in keys])
def test_an_answer_that_is_a_number_is_what_the_code_says(name, piece, answer, work_out):
    path, = build.notebooks([name])
    said, = [given for question, given in questions(path) if piece in " ".join(question.split())]
    assert said == answer
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", answer.replace("\u2212", "-"))]
    digits = max(len(number.partition(".")[2]) for number in re.findall(r"\d+(?:\.\d+)?", answer))
    assert numbers == pytest.approx([float(value) for value in work_out()], abs=0.5001 * 10 ** -digits)


# --- links and more -----------------------------------------------------------------------------------------------

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
