"""The benchmark counts the multiplications that are done, and what it writes is what it measured.

Operations are compared with torch's own counter, which sees attention too; the model state of GRPO and PPO is counted
tensor by tensor. No time is asserted anywhere.
"""
import copy
import json
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_min import benchmark, ppo, report
from grpo_min.config import UserError
from grpo_min.rollout import Prompts, sample, token_logprobs
from tests.tiny import LOOPS, letter_e, settings

WORK = dict(layers=2, width=64, prompts=4, group_size=3, new=6)


def test_operations_are_those_that_torch_counts():
    model, prompts = benchmark.endless(2, 64), Prompts.from_texts(["start with 3."] * 4)
    limit = benchmark.products(**WORK, prompt_length=prompts.ids.shape[1])
    counted = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rollout = sample(model, prompts, 3, 6, generator=torch.Generator().manual_seed(0))
    counted["sample"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_logprobs(model, prompts, rollout.completion_ids, rollout.mask)
    counted["score"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        token_logprobs(model, prompts, rollout.completion_ids, rollout.mask)[0].sum().backward()
    counted["update"] = counter.get_total_flops()
    assert rollout.length.tolist() == [6] * 12, "it never ends"
    for phase, operations in counted.items():
        assert limit[phase] <= operations < 1.15 * limit[phase], phase                           # attention is extra


def test_a_quick_run_writes_table_figure_and_json(tmp_path, capsys):
    benchmark.main(["--quick", "--rounds", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [record["name"] for record in content["records"]] == ["GRPO", "PPO"] and len(content["rates"]) == 1
    for record in content["records"]:
        median, low, high = record["step"]
        assert 0 < low <= median <= high and median == pytest.approx(sum(record["seconds"].values()))
        assert record["tokens_per_second"] == pytest.approx(32 * 8 * 24 / median)
        assert (record["seconds"]["critic"] > 0) == (record["name"] == "PPO")
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out


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
    monkeypatch.setattr(loop, "copy", types.SimpleNamespace(deepcopy=copied))
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
