"""The benchmark of a real model: its products are those of sampling, its bytes those of the tensors, and what it writes
is what it measured. On small random models; no time is asserted anywhere.
"""
import builtins
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from grpo_min import grpo, ppo
from grpo_min.critic import Critic
from grpo_min.lab import benchmark_real, report
from grpo_min.lab.benchmark_real import QUICK, RealBenchmarkConfig, policy_of, sampling_products, steps_of, texts_of
from grpo_min.real.lora import adapt
from grpo_min.rollout import Prompts, sample
from grpo_min.run import metrics
from grpo_min.run.checkpoint import frozen_copy
from grpo_min.run.config import UserError
from tests import tiny


def policies():
    """A Llama with two heads of queries to one of keys, one whose head has weights of its own, and a GPT."""
    config = benchmark_real.QUICK_MODEL
    return dict(llama=config.build(), untied=replace(config, tied=False).build(), gpt=tiny.gpt(layers=2))


class Shapes(TorchDispatchMode):
    """The shapes of the factors of each product of two matrices, in their order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        kind = function.overloadpacket
        if kind in (torch.ops.aten.mm, torch.ops.aten.addmm):        # addmm: a layer with a bias
            self.seen.append([tuple(factor.shape) for factor in arguments[-2:]])
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", ["llama", "untied", "gpt"])
def test_products_are_those_of_sampling(name):
    model = policies()[name]
    prompts = Prompts.from_texts(["a cow", "a dog and a cow"], model.tokenizer)
    N, G, P = 5, 3, prompts.ids.shape[1]
    model.tokens.weight.data[model.tokenizer.end] = 0
    compute = sampling_products(model, 2, G, P, N)
    counts, shapes = [], []
    for work in lambda: sample(model, prompts, G, N, generator=torch.Generator().manual_seed(0)), compute:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            done = work()
        assert done is None or done.length.tolist() == [N] * 6, "none ended"
        with Shapes() as seen, sdpa_kernel(SDPBackend.MATH):
            work()
        counts.append(counter.get_total_flops())
        shapes.append(seen.seen)
    assert counts[0] == counts[1] > 0
    assert shapes[0] == shapes[1] and len(shapes[1]) == 4 * 2 * N + N


def test_operations_by_hand():
    """One layer, one head: two prompts of 3 tokens, 2 completions of 2 tokens each."""
    config = replace(benchmark_real.QUICK_MODEL, layers=1, heads=1, kv_heads=1, width=8, head_size=8, hidden=16)
    with FlopCounterMode(display=False) as counter:
        sampling_products(config.build(), 2, 2, 3, 2)()
    layer = 8 * 24 + 8 * 8 + 8 * 32 + 16 * 8                         # multiplications of a token with the weights
    attention = 2 * (2 * 3 * 3 * 8) + 2 * (4 * 4 * 8)                # 2 prompts of 3 on 3, then 4 rows on 4 tokens
    head = 2 * 4 * 8 * config.vocab_size
    assert counter.get_total_flops() == 2 * ((2 * 3 + 4) * layer + attention + head)


def test_the_policy_never_samples_end_and_is_trained_as_it_is():
    model = policy_of(RealBenchmarkConfig(quick=True, device="cpu"), context=300)
    assert model.config.context == 300
    state, end = torch.randn(3, 64), model.tokenizer.end
    plain = state @ model.tokens.weight.T
    assert torch.equal(model.head(state), plain)
    with torch.no_grad():
        logits = model.head(state)
    assert (logits[:, end] == -1e9).all() and (logits != plain).sum() == 3


def test_prompts_grow_in_front_and_a_gpt_takes_those_that_fit(tmp_path):
    texts = texts_of(RealBenchmarkConfig(quick=True, device="cpu"), QUICK)
    (short, asked), (long, grown) = texts.items()
    assert short < 80 <= long < 110 and len(asked) == len(grown) == QUICK["prompts"]
    assert all(after.endswith(f". {before}") for before, after in zip(asked, grown))
    path = tiny.checkpoint(tmp_path / "sft.pt", context=64)
    assert list(texts_of(RealBenchmarkConfig(sft=path, device="cpu"), QUICK)) == [short]
    path = tiny.checkpoint(tmp_path / "short.pt", context=16)
    with pytest.raises(UserError, match="a context of 16"):
        texts_of(RealBenchmarkConfig(sft=path, device="cpu"), QUICK)


# --- memory -------------------------------------------------------------------------------------------------------

def size(models):
    """Bytes of the parameters of some models; those that they share count once."""
    tensors = {each.data_ptr(): each.numel() * each.element_size() for model in models for each in model.parameters()}
    return sum(tensors.values())


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("name", ["llama", "untied", "gpt"])
def test_bytes_are_those_of_the_tensors(name, beta, lora):
    policy = policies()[name]
    policy = adapt(policy, lora, "base.pt") if lora else policy
    reference = [frozen_copy(policy)] if beta else []
    critic = policy.with_head(Critic)
    state = report.state_bytes(policy, ppo.PPOConfig(beta=beta))
    models = state["policy"] + state["reference"] + state["critic"]
    assert models == size([policy, *reference, critic])
    trained = sum(p.numel() * 4 for model in (policy, critic) for p in model.parameters() if p.requires_grad)
    assert state["gradients"] == trained and state["Adam's moments"] == 2 * trained
    state = report.state_bytes(policy, grpo.GRPOConfig(beta=beta))
    assert "critic" not in state and state["policy"] + state["reference"] == size([policy, *reference])


def test_bytes_by_hand():
    """Rank 2 beside the four matrices of each of two layers."""
    adapters = 2 * 2 * ((64 + 128) + (64 + 64) + (64 + 192) + (96 + 64))
    state = report.state_bytes(adapt(benchmark_real.QUICK_MODEL.build(), 2, ""), grpo.GRPOConfig(beta=0.0))
    weights = benchmark_real.QUICK_MODEL.vocab_size * 64 + 2 * (64 * (128 + 64 + 192 + 96) + 2 * 64) + 64
    assert state == {"policy": 4 * (weights + adapters), "reference": 0, "gradients": 4 * adapters,
                     "Adam's moments": 8 * adapters}


def test_settings_reach_the_loops(tmp_path, monkeypatch):
    config = RealBenchmarkConfig(quick=True, steps=2, device="cpu", out=str(tmp_path))
    seen, texts = [], texts_of(config, QUICK)
    for loop in grpo, ppo:
        check = loop.check
        monkeypatch.setattr(loop, "check", lambda settings, check=check: (seen.append(settings), check(settings)))
    for name, more in ("GRPO", dict(microbatches=4)), ("PPO", dict(lora=8, beta=0.01)):
        rows = steps_of(config, QUICK, name, *min(texts.items()), **more)
        assert len(rows) == 1 and rows[0]["length"] == QUICK["new"]
        assert (rows[0]["state"]["gradients"] < rows[0]["state"]["policy"]) == ("lora" in more)
    assert [(each.microbatches, each.beta, each.lora) for each in seen] == [(4, 0.0, 0), (2, 0.01, 8)]
    assert seen[1].critic_minibatches == 2 and seen[1].critic == "sft"


# --- the command --------------------------------------------------------------------------------------------------

def run(folder, *words):
    benchmark_real.main(["--quick", "--steps", "2", "--device", "cpu", "--out", str(folder), *words])
    return json.loads((folder / "benchmark_real.json").read_text()), (folder / "benchmark_real.md").read_text()


def test_a_quick_run_writes_table_figure_and_json(tmp_path, capsys):
    content, text = run(tmp_path)
    assert [record["name"] for record in content["records"]] == ["GRPO", "PPO", "GRPO"]
    for record in content["records"]:
        median, low, high = record["step"]
        assert 0 < low <= median <= high and median == pytest.approx(sum(record["seconds"].values()))
        assert record["share"] > 0 and (record["seconds"]["critic"] > 0) == (record["name"] == "PPO")
    full, adapters = content["memory"]
    assert full["settings"] == dict(beta=0.0, microbatches=1, lora=0)
    assert adapters["settings"] == dict(beta=0.01, microbatches=2, lora=8)
    for record in full, adapters:
        assert 100 < sum(record["state"].values()) + record["peak"] < 1e5
        assert 100 < record["phases"]["sample"] <= max(record["phases"].values()) <= record["peak"]
    assert full["phases"].keys() == {"sample", "score", "update"} < adapters["phases"].keys() - {"critic"}
    assert full["state"]["gradients"] == full["state"]["policy"] > 2 * adapters["state"]["gradients"]
    assert (tmp_path / "benchmark_real.png").stat().st_size > 5000
    told = capsys.readouterr().out
    assert text in told and "TRL" not in text and f"torch {torch.__version__}" in text
    assert re.search(r"5 of 5: memory of PPO .*, about \d+ s left", told)
    again, _ = run(tmp_path, "--rounds", "0")
    assert again["records"] == content["records"] and len(again["memory"]) == 2
    assert "2 of 2: memory of PPO" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rounds 0: .*benchmark_real.json, with steps, is not there"):
        run(tmp_path / "elsewhere", "--rounds", "0")


@pytest.mark.skipif(not metrics.STATUS.exists(), reason="Linux alone begins anew to look for a peak")
def test_the_peak_of_a_phase_is_not_that_of_the_phase_before():
    """In a process of its own: 200 MB that are gone do not count any more."""
    script = """import torch
from grpo_min.lab.benchmark_real import forget_peak
from grpo_min.run.metrics import peak_memory_mb
cpu = torch.device("cpu")
torch.ones(50_000_000)
high = peak_memory_mb(cpu)
forget_peak(cpu)
print(high - peak_memory_mb(cpu))"""
    fallen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert 150 < float(fallen) < 250


def test_trl_does_the_same_work(tmp_path, monkeypatch):
    for package in "trl", "datasets", "safetensors":
        pytest.importorskip(package)
    monkeypatch.setitem(QUICK, "memory", [("GRPO", {})])
    monkeypatch.setattr(benchmark_real, "ProcessPoolExecutor", lambda *arguments: ThreadPoolExecutor(1))
    content, text = run(tmp_path, "--against", "trl")
    (short, *_), steps = sorted({record["length"] for record in content["records"]}), {}
    for record in content["records"]:
        steps.setdefault(record["length"], {})[record["name"]] = record["step"][0]
    batches, kept = ["TRL GRPO, 2 at a time", "TRL GRPO, 8 at a time"], "TRL GRPO, 2 at a time, memory kept as here"
    faster = min(batches, key=steps[short].get)
    assert list(steps[short]) == ["GRPO", "PPO", batches[0], kept, batches[1]]
    assert list(steps.pop(max(steps))) == ["GRPO", faster]
    ratio = steps[short][faster] / steps[short]["GRPO"]
    assert f"| {short} | {steps[short]['GRPO']:.3f} | {steps[short][faster]:.3f} | {ratio:.2f} |" in text
    assert "transformers" in text


def test_the_quicker_of_trls_batches_counts_unless_it_keeps_memory():
    times = {"GRPO": 2.0, "TRL, 8": 9.0, f"TRL, 8{benchmark_real.KEPT}": 5.0, "TRL, 64": 7.0}
    records = [dict(name=name, length=46, step=[seconds] * 3) for name, seconds in times.items()]
    assert benchmark_real.ratios(records) == [(46, 2.0, 7.0)]


def test_trl_is_not_required(tmp_path, monkeypatch):
    importing = builtins.__import__

    def without_trl(name, *rest, **more):
        if name == "trl":
            raise ImportError(f"No module named '{name}'")
        return importing(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", without_trl)
    with pytest.raises(UserError, match="--against trl: No module named"):
        run(tmp_path / "out", "--against", "trl")
    assert not (tmp_path / "out").exists()
