"""Two processes of torchrun take the steps that one process takes.

The gradients of every stage that can be split, with the same batch and the same completions, are compared in float64
between one process and two ranks (gloo, on the CPU); and a command is started as a user starts it.
"""
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from grpo_min import grpo, ppo, pretrain, ranks, sft
from grpo_min.rollout import Rollout
from grpo_min.runs import read_csv
from grpo_min.tokenizer import END, PAD
from tests import tiny

ROOT = Path(__file__).parent.parent


def fixed_completions(policy, prompts, group_size, new, *_):
    """Random completions that depend on their prompt alone, END in some of them."""
    rows = []
    for text in prompts.texts:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randint(6, 500, (group_size, new), generator=generator))
        rows[-1][torch.arange(group_size), torch.randint(0, new, (group_size,), generator=generator)] = END
    ids = torch.cat(rows)
    mask = (ids == END).cumsum(1) - (ids == END).long() == 0
    return Rollout(ids.masked_fill(~mask, PAD), mask, torch.zeros(ids.shape), torch.ones(len(ids), dtype=torch.bool))


def reward(prompts, completions, **columns):
    """By the completion's length, but for two prompts all of whose completions are worth the same."""
    return [len(text) / 10 * (prompt not in tiny.PROMPTS[:6]) for prompt, text in zip(prompts, completions)]


def first_gradients(folder):
    """{stage: the gradients of the first update of each model} with the ranks that there are."""
    torch.set_default_dtype(torch.float64)
    clip, found = torch.nn.utils.clip_grad_norm_, {}

    def recording(parameters, max_norm):
        parameters = list(parameters)
        seen.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, max_norm)
    torch.nn.utils.clip_grad_norm_ = recording
    grpo.sample = ppo.sample = fixed_completions
    configs = {
        grpo: tiny.settings(grpo, folder, steps=1, beta=0.0),
        ppo: tiny.settings(ppo, folder, steps=1, critic="reward_model",
                           reward_model=tiny.reward_checkpoint(folder / "reward_model.pt")),
        sft: sft.SFTConfig(run="", base=tiny.checkpoint(folder / "base.pt"), steps=1, batch_size=4, warmup=1,
                           demonstrations=tiny.demonstrations(folder / "sft.jsonl"), device="cpu"),
        pretrain: pretrain.PretrainConfig(run="", text=tiny.text_file(folder / "text.txt"), steps=1, layers=1, heads=2,
                                          width=16, context=16, batch_size=4, warmup=1, device="cpu"),
    }
    for stage, config in configs.items():
        seen = []
        stage.train(config, **(dict(reward=reward) if stage in (grpo, ppo) else {}))
        found[stage.__name__] = seen
    torch.nn.utils.clip_grad_norm_ = clip
    torch.set_default_dtype(torch.float32)
    return found


def torchrun(*words, fails=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_gradients_of_two_ranks_are_those_of_one_process(tmp_path, monkeypatch):
    for loop in grpo, ppo:
        monkeypatch.setattr(loop, "sample", loop.sample)              # first_gradients replaces it
    (tmp_path / "one").mkdir()
    one = first_gradients(tmp_path / "one")
    torchrun(__file__, tmp_path)
    two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert one.keys() == two.keys() and len(one["grpo_min.ppo"]) == 2
    for stage in one:
        assert len(one[stage]) == len(two[stage])
        for a, b in zip(one[stage], two[stage]):                  # of PPO those of the policy, then of the critic
            assert all((x - y).abs().max() < 1e-10 for x, y in zip(a, b)), stage
            assert all(x.abs().max() > 1e-6 for x in a)


def test_a_command_with_two_ranks(tmp_path):
    words = ["--run", tmp_path / "run", "--sft", tiny.checkpoint(tmp_path / "sft.pt"), "--prompts",
             tiny.prompts(tmp_path / "prompts.jsonl"), "--steps", 3, "--prompts-per-step", 4, "--group-size", 3,
             "--max-new-tokens", 6, "--device", "cpu"]
    out = torchrun("-m", "--", "grpo_min.grpo", *words)        # without the -- torchrun takes --run for its own
    assert out.count("step 3/3") == 1, "only one rank speaks"
    before, rows = (tmp_path / "run/checkpoint.pt").read_bytes(), read_csv(tmp_path / "run/metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2] and [row["completions"] for row in rows] == [12, 24, 36]
    torchrun("-m", "--", "grpo_min.grpo", *words, "--resume")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_mistake_with_two_ranks(tmp_path):
    (tmp_path / "sft.pt").write_text("no checkpoint")
    told = torchrun("-m", "--", "grpo_min.grpo", "--run", tmp_path / "run", "--sft", tmp_path / "sft.pt", fails=True)
    assert "error: " in told and "sft.pt" in told
    assert "exitcode  : 2" in told and "SIGABRT" not in told


@pytest.mark.parametrize("n, parts", [(4, [[0, 1], [2, 3]]), (6, [[0, 1, 2], [3, 4, 5]])])
def test_shares(n, parts, monkeypatch):
    monkeypatch.setattr(ranks, "RANKS", 2)
    for rank in 0, 1:
        monkeypatch.setattr(ranks, "RANK", rank)
        assert ranks.share(list(range(n))) == parts[rank]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / f"rank{ranks.RANK}"
    folder.mkdir()
    gradients = first_gradients(folder)
    if ranks.RANK == 0:
        torch.save(gradients, Path(sys.argv[1]) / "gradients.pt")
    ranks.leave(0)
