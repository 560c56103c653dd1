"""CUDA: marked gpu and skipped without a card. What can be checked without one is checked in test_fast.py: the decoder
that is recorded as CUDA graphs, step by step, and bfloat16.
"""
import contextlib

import pytest
import torch

from grpo_min import grpo, model, ppo
from grpo_min.model import GPT, GPTConfig
from grpo_min.rollout import Prompts, sample, token_logprobs
from grpo_min.run import fast
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.rng import generator
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_autocast_is_for_cards_with_bfloat16_alone(monkeypatch):
    assert isinstance(model.autocast(CPU), contextlib.nullcontext)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert isinstance(model.autocast(CUDA), contextlib.nullcontext) and asked == [False]


# --- on a card ----------------------------------------------------------------------------------------------------

@pytest.fixture
def float32(monkeypatch):
    for module in model, fast:
        monkeypatch.setattr(module, "autocast", lambda device: contextlib.nullcontext())


@pytest.fixture
def questions():
    return [row["prompt"] for row in read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt"])[:32]]


@pytest.mark.gpu
def test_graphs_sample_what_the_cpu_samples(float32, questions):
    """The same random numbers: in float32 all but a few rows, in which a number falls between two roundings."""
    policy = load_model(DATA / "checkpoints/sft.pt")
    expected = sample(policy, Prompts.from_texts(questions, policy.tokenizer), 8, 40, 1.0, generator(1, 0))
    policy = policy.to(CUDA)
    ours = sample(policy, Prompts.from_texts(questions, policy.tokenizer, CUDA), 8, 40, 1.0, generator(1, 0))
    same = [a == b for a, b in zip(*(rollout.texts(policy.tokenizer) for rollout in (ours, expected)))]
    assert sum(same) >= 0.97 * len(same)


@pytest.mark.gpu
def test_graphs_read_the_weights_of_now(questions):
    policy = load_model(DATA / "checkpoints/sft.pt", CUDA)
    prompts = Prompts.from_texts(questions, policy.tokenizer, CUDA)
    before = sample(policy, prompts, 8, 40, 1.0, generator(1, 0))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    after = sample(policy, prompts, 8, 40, 1.0, generator(1, 0))
    logprobs, _ = token_logprobs(policy, prompts, after.completion_ids, after.mask)
    assert before.texts(policy.tokenizer) != after.texts(policy.tokenizer)
    assert (logprobs - after.logprobs).abs().max() < 0.1


@pytest.mark.gpu
def test_sampler_and_trainer_agree_on_the_card(questions):
    policy = load_model(DATA / "checkpoints/sft.pt", CUDA)
    prompts = Prompts.from_texts(questions, policy.tokenizer, CUDA)
    ours = sample(policy, prompts, 8, 40, 1.0, generator(1, 0))
    logprobs, _ = token_logprobs(policy, prompts, ours.completion_ids, ours.mask)
    assert ((logprobs - ours.logprobs) * ours.mask).abs().max() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("loop", [grpo, ppo], ids=["grpo", "ppo"])
def test_a_run_on_the_card_is_the_cpus_run(loop, float32, tmp_path):
    rows = [loop.train(tiny.settings(loop, tmp_path, steps=3, lr=1e-4, device=device), reward=tiny.letter_e)[1]
            for device in ("cpu", "cuda")]
    for cpu, cuda in zip(*rows):
        for name in "reward", "length", "kl", "entropy", "grad_norm":
            assert cuda[name] == pytest.approx(cpu[name], rel=0.02, abs=1e-4), name


@pytest.mark.gpu
def test_a_larger_model_decodes_under_graphs():
    torch.manual_seed(0)
    policy = GPT(GPTConfig(tiny.VOCAB_SIZE, context=160, layers=6, heads=6, width=384)).to(CUDA)
    prompts = Prompts.from_texts(["start with 3, times 9."] * 16, policy.tokenizer, CUDA)
    ours = sample(policy, prompts, 8, 96, 1.0, generator(1, 0))
    logprobs, _ = token_logprobs(policy, prompts, ours.completion_ids, ours.mask)
    assert ((logprobs - ours.logprobs) * ours.mask).abs().max() < 0.1
