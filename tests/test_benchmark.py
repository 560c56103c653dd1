"""The benchmark counts the multiplications that are done, and what it writes is what it measured.

Operations are compared with torch's own counter, which sees attention too; the model state of GRPO and PPO is counted
tensor by tensor. No time is asserted anywhere.
"""
import copy
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grpo_min import ppo, tokenizer
from grpo_min.critic import Critic
from grpo_min.lab import benchmark, pretend, report
from grpo_min.lab.publish import RESULTS
from grpo_min.rollout import Prompts, sample, token_logprobs
from grpo_min.run.config import UserError
from tests.tiny import LOOPS, letter_e, settings

WORK = dict(layers=2, width=64, prompts=4, prompt_length=9, group_size=3, new=6)


def test_operations_are_those_that_torch_counts():
    model, prompts = benchmark.endless(2, 64), Prompts.from_texts(benchmark.random_words(9, 4), tokenizer.own())
    assert prompts.length.tolist() == [9] * 4
    rollout = sample(model, prompts, 3, 6, generator=torch.Generator().manual_seed(0))
    assert rollout.length.tolist() == [6] * 12, "it never ends"
    part, critic = (prompts, rollout.completion_ids, rollout.mask), Critic(model.config)

    def score():
        with torch.no_grad():
            token_logprobs(model, *part)

    def update():
        token_logprobs(model, *part)[0].sum().backward()

    def both_of_the_critic():
        with torch.no_grad():
            critic.values(*part)
        critic.values(*part).sum().backward()
    counted = benchmark.products(**WORK)
    for phase, work in dict(sample=lambda: sample(model, prompts, 3, 6), score=score, update=update,
                            critic=both_of_the_critic).items():
        # Of a fused attention torch counts nothing, so it is done by its two products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        operations = benchmark.operations(counted[phase])
        assert operations == pytest.approx(counter.get_total_flops(), rel=0.01), phase   # without the scalar head


def test_limits_by_hand():
    products = [(3, 2, 10, 20, 30), (1, 1, 1, 1000, 1000)]
    assert benchmark.operations(products) == 3 * 2 * 2 * 10 * 20 * 30 + 2 * 1000 * 1000
    # The first is bound by the rate: 72,000 operations against 3 * 4 * 2 * 1,100 = 26,400 bytes; the second by memory.
    assert benchmark.least_seconds(products, rate=1.0, bandwidth=1.0) == 72_000 + 4 * (1000 + 1000 * 1000 + 1000)


def test_a_prompt_run_once_per_completion_is_counted_so():
    """G - 1 more runs of each prompt, and nothing else."""
    operations = {new: benchmark.operations(benchmark.products(**dict(WORK, new=new))["sample"])
                  for new in (1, 6)}
    prompts = operations[1] - 2 * 4 * 3 * 64 * tokenizer.own().vocab_size    # one new token: prompts and the head alone
    assert benchmark.operations(benchmark.unshared(WORK)) == operations[6] + 2 * prompts


def test_a_quick_run_writes_table_figure_and_json(tmp_path, capsys):
    benchmark.main(["--quick", "--rounds", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [record["name"] for record in content["records"]] == ["GRPO", "PPO"] and len(content["rates"]) == 1
    for record in content["records"]:
        median, low, high = record["step"]
        assert 0 < low <= median <= high and median == pytest.approx(sum(record["seconds"].values()))
        tokens = record["work"]["prompts"] * record["work"]["group_size"] * record["work"]["new"]
        assert record["tokens_per_second"] == pytest.approx(tokens / median)
        assert (record["seconds"]["critic"] > 0) == (record["name"] == "PPO")
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out


def test_committed_table_is_that_of_the_committed_numbers():
    content = json.loads((RESULTS / "benchmark.json").read_text())
    text = (RESULTS / "benchmark.md").read_text()
    assert text.startswith(benchmark.tables(content["records"]))
    work = [(record["name"], record["work"]) for record in content["records"]]
    assert work == benchmark.settings_of(benchmark.BenchmarkConfig(against="trl"))


def test_trl_is_not_required(tmp_path, monkeypatch):
    import builtins
    importing = builtins.__import__

    def without_trl(name, *rest, **more):
        if name in ("trl", "datasets"):
            raise ImportError(f"No module named '{name}'")
        return importing(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", without_trl)
    with pytest.raises(UserError, match="--against trl: No module named"):
        benchmark.main(["--quick", "--rounds", "1", "--against", "trl", "--device", "cpu", "--out", str(tmp_path)])


# --- memory -------------------------------------------------------------------------------------------------------

def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@LOOPS
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_model_state_is_counted_to_the_byte(loop, beta, tmp_path, monkeypatch, watch):
    """Weights, gradients and Adam's moments of what is trained, and the reference's weights, as they lie in memory."""
    optimizers, references = watch(loop, "optimizer_for"), []

    def copied(thing):
        references.append(copy.deepcopy(thing))
        return references[-1]
    monkeypatch.setattr(loop, "frozen_copy", copied)
    config = settings(loop, tmp_path, steps=1, beta=beta)
    policy, _ = loop.train(config, reward=letter_e)
    trained = [(model, optimizer) for (model, _), optimizer in optimizers]
    expected = {"policy": size(policy.parameters()), "reference": sum(size(model.parameters()) for model in references),
                "gradients": sum(size(p.grad for p in model.parameters()) for model, _ in trained),
                "Adam's moments": sum(size([state["exp_avg"], state["exp_avg_sq"]])
                                      for _, optimizer in trained for state in optimizer.state.values())}
    if loop is ppo:
        expected["critic"] = size(trained[1][0].parameters())
    assert report.state_bytes(policy, config) == expected and (expected["reference"] > 0) == (beta > 0)


@pytest.mark.skipif(not pretend.CAN_PRETEND, reason="this torch has no devices made of Python")
@pytest.mark.parametrize("name, most", [("GRPO", 23), ("PPO", 26)])
def test_a_step_waits_for_a_card_no_oftener_than_needed(name, most, tmp_path):
    """Beside once for each token: prompts and random numbers go to the card, texts, rewards and metrics come back."""
    assert 10 < benchmark.waits(benchmark.BenchmarkConfig(out=str(tmp_path)), name, benchmark.QUICK) <= most
