"""The benchmark counts the multiplications that are done, and what it writes is what it measured.

Operations are compared with torch's own counter, which sees attention too. No time is asserted anywhere.
"""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_min import benchmark
from grpo_min.config import UserError
from grpo_min.rollout import Prompts, sample, token_logprobs

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
