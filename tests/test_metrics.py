"""The columns of metrics.csv mean what the table in run/metrics.py says: each is worked out by hand on a few tokens.

Tokens count where the mask is True and nowhere else; groups are those of one prompt; of several updates the mean is
taken, and of the gap between sampler and trainer the largest.
"""
import math
import subprocess
import sys
import types

import pytest
import torch

from grpo_min.rollout import Rollout, pad_completions
from grpo_min.run import metrics
from grpo_min.run.metrics import Clock, average, rollout_metrics, shown_samples, thinks, update_metrics
from tests.tiny import TOKENIZER

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_update_metrics_by_hand():
    """Three real tokens, with ratios 1.5, 1 and 0.5; what stands in the padding does not count."""
    old = torch.zeros(2, 3)
    logprobs = torch.tensor([[math.log(1.5), 0.0, 9.0], [math.log(0.5), -9.0, -9.0]])
    sampled, entropy = torch.tensor([[0.0, 0.25, 0.0], [-0.5, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0], [3.0, 0, 0]])
    row = update_metrics(torch.tensor(7.0), 0.5, logprobs, old, sampled, entropy, MASK, 0.2)
    assert row == pytest.approx(dict(loss=7, grad_norm=0.5, entropy=2, clip_low=1 / 3, clip_high=1 / 3, gap=0.5))
    below = update_metrics(torch.tensor(7.0), 0.5, logprobs, old, -3 * sampled, entropy, MASK, 0.2)
    assert below["gap"] == 1.5                                                            # whichever is the larger


def test_average_of_updates():
    assert average([dict(loss=1.0, gap=0.5), dict(loss=4.0, gap=0.1)]) == dict(loss=2.5, gap=0.5)


@pytest.fixture
def rollout():
    """Two prompts, two completions each; the last was cut."""
    ids, mask = pad_completions(["1", "<think> 1</think> 2", "", "1"], TOKENIZER, finished=[True, True, True, False])
    return Rollout(ids, mask, torch.zeros(ids.shape), torch.tensor([True, True, True, False]))


def test_rollout_metrics_by_hand(rollout):
    batch, texts = [dict(prompt="p", answer="1"), dict(prompt="q", answer="1")], rollout.texts(TOKENIZER)
    rollout.logprobs = torch.full(rollout.mask.shape, math.log(0.5)) * rollout.mask
    ref_logprobs = torch.full(rollout.mask.shape, math.log(0.25))         # k3 of each token: 1 / 2 - 1 + log 2
    row = rollout_metrics(torch.tensor([1.0, 3.0, 2.0, 2.0]), texts, batch, rollout, 2, ref_logprobs)
    lengths = [2, 5, 1, 1]                                                      # in tokens, END included
    assert rollout.length.tolist() == lengths
    assert row == pytest.approx(dict(reward=2, reward_std=math.sqrt(2) / 2, accuracy=1 / 4, thinking=1 / 4,
                                     equal_groups=1 / 2, truncated=1 / 4, length=9 / 4, kl=9 / 4 * (math.log(2) - 0.5)))
    alone = rollout_metrics(torch.ones(4), texts, [dict(prompt="p")] * 4, rollout, 1, None)
    assert [alone[name] for name in ("reward_std", "accuracy", "equal_groups", "kl")] == [""] * 4


def test_nearly_equal_rewards_are_not_equal(rollout):
    batch = [dict(prompt="p", answer="1"), dict(prompt="q", answer="1")]
    row = rollout_metrics(torch.tensor([1.0, 1.001, 2.0, 2.001]), rollout.texts(TOKENIZER), batch, rollout, 2, None)
    assert row["equal_groups"] == 0


def test_thinking_is_beginning_with_the_tag():
    texts = ["<think>", " <think> 1", "2 <think> 1", "think", ""]
    assert [thinks(text) for text in texts] == [True, True, False, False, False]


def test_clock_adds_up_the_laps_of_each_phase(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for phase in "update", "critic", "update":
        clock.lap(phase)
    assert clock.laps == dict(seconds_update=4.0, seconds_critic=2.0)


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 2**20)])
def test_memory_is_in_megabytes(platform, unit, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "STATUS", tmp_path / "none")
    monkeypatch.setattr(metrics.sys, "platform", platform)
    monkeypatch.setattr(metrics.resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=200 * unit))
    assert metrics.peak_memory_mb(torch.device("cpu")) == 200


@pytest.mark.skipif(not metrics.STATUS.exists(), reason="Linux alone says so")
def test_memory_of_a_process_is_not_that_of_who_started_it():
    script = """import subprocess, sys, torch
from grpo_min.run.metrics import peak_memory_mb
if len(sys.argv) > 1:
    held = torch.ones(2**28)
    subprocess.run([sys.executable, "-c", sys.stdin.read()], check=True)
print(peak_memory_mb(torch.device("cpu")))"""
    done = subprocess.run([sys.executable, "-c", script, "large"], input=script, capture_output=True, text=True,
                          check=True)
    small, large = map(float, done.stdout.split())
    assert large > 1024 > small


def test_shown_samples_are_those_of_the_first_prompts(rollout):
    rewards, advantages = torch.tensor([0.0, 1, 2, 3]), torch.arange(20.0).view(4, 5) / 3
    batch = [dict(prompt="p"), dict(prompt="q")]
    shown = shown_samples(list("abcd"), rewards, advantages, batch, rollout, 2, TOKENIZER)
    assert [(row["prompt"], row["completion"], row["reward"], row["advantage"]) for row in shown] == [
        ("p", "a", 0, 0), ("p", "b", 1, 1.6667), ("q", "c", 2, 3.3333), ("q", "d", 3, 5)]
    assert [row["tokens"] for row in shown] == [
        ["1", "<|end|>"], ["<think>", " 1", "</think>", " 2", "<|end|>"], ["<|end|>"], ["1"]]
    assert not any({"advantages", "values"} & row.keys() for row in shown)
    ids, mask = pad_completions([""] * 8, TOKENIZER)                      # of four groups of two, the first three
    many = Rollout(ids, mask, torch.zeros(ids.shape), mask[:, 0])
    shown = shown_samples(list("abcdefgh"), torch.zeros(8), torch.zeros(8, 1), 2 * batch, many, 2, TOKENIZER)
    assert [(row["prompt"], row["completion"]) for row in shown] == list(zip("ppqqpp", "abcdef"))


def test_shown_samples_of_ppo_have_a_number_for_every_real_token(rollout):
    values = -torch.arange(20.0).view(4, 5) / 3
    shown = shown_samples(list("abcd"), torch.zeros(4), -values, [dict(prompt="p"), dict(prompt="q")], rollout, 2,
                          TOKENIZER, values)
    assert [row["values"] for row in shown] == [
        [0, -0.3333], [-1.6667, -2, -2.3333, -2.6667, -3], [-3.3333], [-5]]
    assert all(row["advantages"] == [-value for value in row["values"]] for row in shown)
