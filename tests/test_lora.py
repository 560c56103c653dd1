"""LoRA: what the adapters compute, that they alone are trained and saved, and that the reference costs nothing."""
import dataclasses
from pathlib import Path

import pytest
import torch

from grpo_min import grpo, ppo
from grpo_min.critic import Critic
from grpo_min.real.llama import LlamaConfig
from grpo_min.real.lora import ALPHA, Adapted
from grpo_min.rollout import Prompts
from grpo_min.run import log
from grpo_min.run.checkpoint import load_checkpoint, load_model, serialise, weights
from grpo_min.run.config import UserError
from grpo_min.run.files import save_file
from grpo_min.sample import ask
from tests import tiny
from tests.test_loops import interrupt, stop_at
from tests.tiny import assert_same_run, letter_e, settings

LLAMA = LlamaConfig(vocab_size=tiny.VOCAB_SIZE, context=64, layers=2, heads=2, kv_heads=1, width=16, head_size=8,
                    hidden=24, theta=1e4, eps=1e-5, bias=True, head_norm=False, tied=False)


def start(path, family):
    """A checkpoint of a tiny GPT or Llama with random weights."""
    if family == "gpt":
        return tiny.checkpoint(path)
    torch.manual_seed(0)
    save_file(path, serialise(step=0, **weights(LLAMA.build(tiny.TOKENIZER))))
    return str(path)


@pytest.fixture(params=["gpt", "llama"])
def family(request):
    return request.param


def config_of(loop, tmp_path, family, **more):
    critic = dict(critic="sft") if loop is ppo else {}
    return settings(loop, tmp_path, sft=start(tmp_path / "start.pt", family),
                    **{**dict(run=str(tmp_path / "run"), lr=1e-2, lora=3), **critic, **more})


def logits(model):
    prompts = Prompts.from_texts(tiny.PROMPTS, tiny.TOKENIZER)
    return model(prompts, torch.arange(300, 312)[:, None].repeat(1, 4))


def test_an_adapter_adds_its_product_by_hand():
    linear, x = torch.nn.Linear(5, 4).double(), torch.randn(2, 3, 5, dtype=torch.double)
    adapted = Adapted(linear, 2, torch.Generator().manual_seed(1))
    assert adapted.A.shape == (2, 5) and adapted.B.shape == (4, 2) and torch.equal(adapted(x), linear(x))
    torch.nn.init.normal_(adapted.B)
    expected = x @ (linear.weight + ALPHA / 2 * adapted.B @ adapted.A).T + linear.bias
    assert torch.allclose(adapted(x), expected, atol=1e-12)
    assert torch.allclose(adapted.merged()(x), expected, atol=1e-12) and adapted.linear is linear


def test_adapters_change_nothing_yet_and_alone_have_gradients(tmp_path, family):
    plain = load_model(start(tmp_path / "start.pt", family))
    ours = load_model(tmp_path / "start.pt", lora=3)
    assert torch.equal(logits(ours), logits(plain))
    logits(ours).square().sum().backward()
    names = {name for name, weight in ours.named_parameters() if weight.grad is not None}
    blocks = len(ours.blocks)
    assert len(names) == 2 * 4 * blocks and all(name.endswith((".A", ".B")) for name in names)
    assert sum(weight.numel() for name, weight in ours.named_parameters() if name in names) == 3 * sum(
        sum(weight.shape) for name, weight in plain.named_parameters() if "blocks" in name and weight.dim() == 2)


@tiny.LOOPS
def test_only_the_adapters_are_trained_and_the_reference_shares_the_rest(loop, tmp_path, family, monkeypatch):
    config, models = config_of(loop, tmp_path, family, beta=0.1), []
    before, read = load_model(config.sft), loop.frozen_logprobs

    def watched(model, *arguments):
        models.append(model)
        return read(model, *arguments)
    monkeypatch.setattr(loop, "frozen_logprobs", watched)
    policy, rows = loop.train(config, reward=letter_e)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[-1]["kl"] > 1e-6
    reference = models[0]
    kept = {name: weight for name, weight in policy.named_parameters() if not weight.requires_grad}
    theirs = dict(reference.named_parameters())
    assert kept and all(theirs[name] is weight for name, weight in kept.items()), "the same tensors"
    assert torch.equal(logits(reference), logits(before)), "the reference is the model before"
    assert not torch.equal(logits(policy), logits(before))


def test_a_critic_has_adapters_of_its_own_on_the_same_weights(tmp_path, family):
    policy = load_model(start(tmp_path / "start.pt", family), lora=3)
    critic = policy.with_head(Critic)
    theirs = dict(policy.named_parameters())
    shared = {name for name, weight in critic.trunk.named_parameters() if weight is theirs[name]}
    assert shared == {name for name, weight in critic.trunk.named_parameters() if not weight.requires_grad}
    learns = {name for name, weight in critic.named_parameters() if weight.requires_grad}
    assert {"scalar.weight", "gain.weight"} < learns and len(learns) == 4 + 8 * len(policy.blocks)
    assert not hasattr(critic.trunk, "unembed")


@tiny.LOOPS
def test_a_checkpoint_holds_adapters_and_comes_back_as_an_ordinary_model(loop, tmp_path, family):
    config = config_of(loop, tmp_path, family)
    policy, _ = loop.train(config, reward=letter_e)
    path = tmp_path / "run/checkpoint.pt"
    saved = load_checkpoint(path)
    assert all(name.endswith((".A", ".B")) for name in saved["model"]) and len(saved["model"]) == 8 * len(policy.blocks)
    assert saved["lora"] == dict(rank=3, base=str(Path(config.sft).resolve()))
    assert len(saved["optimizer"]["state"]) == len(saved["model"]), "moments of the adapters alone"
    model, plain = load_model(path), load_model(config.sft)
    assert model.state_dict().keys() == plain.state_dict().keys() and not hasattr(model, "lora")
    assert torch.allclose(logits(model), logits(policy), atol=1e-5)
    assert all(weight.requires_grad for weight in model.parameters())
    assert ask(model, "start with 3, plus 1.")[0]
    again, _ = loop.train(dataclasses.replace(config, run="", sft=str(path)), reward=letter_e)
    assert again.lora["base"] == str(path), "adapters on what adapters made"


@tiny.LOOPS
def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(loop, tmp_path, family, monkeypatch):
    whole, parts = (config_of(loop, tmp_path, family, run=str(tmp_path / name), steps=5) for name in "ab")
    loop.train(whole, reward=letter_e)
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    with pytest.raises(UserError, match="Ctrl-C"):
        loop.train(parts, reward=stop_at(2, interrupt))
    loop.train(dataclasses.replace(parts, resume=True), reward=letter_e)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_adapters_without_the_model_below_are_refused_in_one_line(tmp_path):
    config = config_of(grpo, tmp_path, "gpt")
    grpo.train(config, reward=letter_e)
    Path(config.sft).rename(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match="checkpoint.pt holds adapters for .*start.pt, which is not there$"):
        load_model(tmp_path / "run/checkpoint.pt")
    tiny.checkpoint(tmp_path / "start.pt", width=32)
    with pytest.raises(UserError, match="another shape"):
        load_model(tmp_path / "run/checkpoint.pt")


@tiny.LOOPS
def test_a_rank_below_zero_is_refused(loop, tmp_path):
    with pytest.raises(UserError, match="^--lora must be at least 0, not -1$"):
        loop.train(config_of(loop, tmp_path, "gpt", lora=-1), reward=letter_e)
