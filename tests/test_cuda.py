"""CUDA: what can be checked without a card is checked without one, the rest is marked gpu and skipped.

The decoder that is recorded as CUDA graphs runs here step by step on the CPU, and must sample what `sample` does.
bfloat16 runs here through the CPU's autocast.
"""
import contextlib
import copy

import pytest
import torch

from grpo_min import grpo, model, ppo
from grpo_min.model import GPT, GPTConfig
from grpo_min.rollout import GraphDecoder, Prompts, sample, token_logprobs
from grpo_min.runs import DATA, generator, load_model, read_jsonl
from grpo_min.tokenizer import END
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def decode(policy, prompts, group_size, N, temperature, seed):
    decoder = GraphDecoder(policy, len(prompts.ids), group_size, N, temperature, CPU)
    return decoder, decoder.sample(prompts, torch.rand(len(prompts.ids) * group_size, N, generator=generator(seed, 0)))


def assert_same_rollout(a, b, tolerance=1e-10):
    assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.mask, b.mask)
    assert torch.equal(a.finished, b.finished)
    assert (a.logprobs - b.logprobs).abs().max() < tolerance


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_the_recorded_steps_sample_what_sample_does(double, small, small_prompts, temperature):
    _, ours = decode(small, small_prompts, 5, 20, temperature, seed=3)
    expected = sample(small, small_prompts, 5, 20, temperature, generator(3, 0))
    assert_same_rollout(ours, expected)
    assert temperature == 0 or (expected.finished.any() and not expected.finished.all()), "or nothing has ended early"


def test_a_decoder_is_used_again_for_other_prompts_and_after_the_weights_have_changed(double, small, small_prompts):
    decoder, _ = decode(small, small_prompts, 4, 12, 1.0, seed=1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.8)
    shorter = Prompts(small_prompts.ids[[2, 0, 2], :4], small_prompts.length[[2, 0, 2]], ["a", "b", "c"])
    ours = decoder.sample(shorter, torch.rand(12, 12, generator=generator(9, 0)))
    kept = copy.deepcopy(ours)
    assert_same_rollout(ours, sample(small, shorter, 4, 12, 1.0, generator(9, 0)))
    decoder.sample(small_prompts, torch.rand(12, 12, generator=generator(10, 0)))
    assert_same_rollout(ours, kept, 1e-30)          # what was handed out is not what the next batch is written into


def test_a_stop_is_seen_after_a_few_tokens(small, small_prompts, monkeypatch):
    """Once all rows have finished, the chunks that are left are not decoded."""
    ran, steps = [], GraphDecoder.steps
    monkeypatch.setattr(GraphDecoder, "steps", lambda self, *part: (ran.append(part), steps(self, *part)))
    decode(small, small_prompts, 2, 24, 1.0, seed=0)
    assert len(ran) > 1, "or it stops without reason"
    del ran[:]
    small.head = lambda states: torch.eye(12)[END].expand(len(states), 12) * 1e3
    _, ours = decode(small, small_prompts, 2, 24, 1.0, seed=0)
    assert ran == [(0, 8)] and ours.length.tolist() == [1] * 6


@pytest.mark.parametrize("loop", [grpo, ppo], ids=["grpo", "ppo"])
def test_bfloat16_leaves_weights_states_and_losses_in_float32(loop, tmp_path, monkeypatch):
    """A run in bfloat16 stays near one in float32, and sampler and trainer near each other."""
    settings = tiny.settings(loop, tmp_path, steps=2, lr=1e-3)
    _, exact = loop.train(settings, reward=tiny.letter_e)
    used = []

    def autocast(device):
        used.append(device.type)
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    monkeypatch.setattr(model, "autocast", autocast)
    policy, rows = loop.train(settings, reward=tiny.letter_e)
    assert used and all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in policy.parameters())
    assert rows[0]["loss"] != exact[0]["loss"], "or nothing was computed in bfloat16"
    assert rows[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.5)
    assert rows[0]["gap"] < 0.1


def test_autocast_is_for_cards_with_bfloat16_alone(monkeypatch):
    assert isinstance(model.autocast(CPU), contextlib.nullcontext)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert isinstance(model.autocast(CUDA), contextlib.nullcontext) and asked == [False]


# --- on a card ----------------------------------------------------------------------------------------------------

@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(model, "autocast", lambda device: contextlib.nullcontext())


@pytest.fixture
def questions():
    return [row["prompt"] for row in read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt"])[:32]]


@pytest.mark.gpu
def test_graphs_sample_what_the_cpu_samples(float32, questions):
    """The same random numbers: in float32 all but a few rows, in which a number falls between two roundings."""
    policy = load_model(DATA / "checkpoints/sft.pt", "GPT")
    expected = sample(policy, Prompts.from_texts(questions), 8, 40, 1.0, generator(1, 0))
    policy = policy.to(CUDA)
    ours = sample(policy, Prompts.from_texts(questions, CUDA), 8, 40, 1.0, generator(1, 0))
    same = [a == b for a, b in zip(ours.texts(), expected.texts())]
    assert sum(same) >= 0.97 * len(same)


@pytest.mark.gpu
def test_graphs_read_the_weights_of_now(questions):
    policy = load_model(DATA / "checkpoints/sft.pt", "GPT", CUDA)
    prompts = Prompts.from_texts(questions, CUDA)
    before = sample(policy, prompts, 8, 40, 1.0, generator(1, 0))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    after = sample(policy, prompts, 8, 40, 1.0, generator(1, 0))
    logprobs, _ = token_logprobs(policy, prompts, after.completion_ids, after.mask)
    assert before.texts() != after.texts() and (logprobs - after.logprobs).abs().max() < 0.1


@pytest.mark.gpu
def test_sampler_and_trainer_agree_on_the_card(questions):
    policy = load_model(DATA / "checkpoints/sft.pt", "GPT", CUDA)
    prompts = Prompts.from_texts(questions, CUDA)
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
    policy = GPT(GPTConfig(context=160, layers=6, heads=6, width=384)).to(CUDA)
    prompts = Prompts.from_texts(["start with 3, times 9."] * 16, CUDA)
    ours = sample(policy, prompts, 8, 96, 1.0, generator(1, 0))
    logprobs, _ = token_logprobs(policy, prompts, ours.completion_ids, ours.mask)
    assert ((logprobs - ours.logprobs) * ours.mask).abs().max() < 0.1
