"""Fixtures: tiny models whose logits depend strongly on every token and every position.

A freshly initialised GPT says nearly the same everywhere, so that an error of one column would not show. These have
all their parameters drawn with a large standard deviation.
"""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))      # `pytest` and `python -m pytest` alike find the package

from grpo_min.model import GPT, GPTConfig, ScalarGPT  # noqa: E402
from grpo_min.rollout import Prompts, pad  # noqa: E402
from grpo_min.tokenizer import ASSISTANT, USER, VOCAB_SIZE  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; only with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA card; skipped without one")


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
    """watch(module, name) -> a list that will hold (arguments, result) of every call."""
    def watch(module, name):
        calls, function = [], getattr(module, name)

        def watched(*arguments, **keywords):
            calls.append((arguments, function(*arguments, **keywords)))
            return calls[-1][1]
        monkeypatch.setattr(module, name, watched)
        return calls
    return watch


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
    return Prompts(*pad(rows), ["6 7", "8 9 10 11 6 6", "11"])


@pytest.fixture
def prompts():
    """Three prompts of different lengths."""
    return Prompts.from_texts(["what does a cow eat?", "a", "start with 3, times 9."])
