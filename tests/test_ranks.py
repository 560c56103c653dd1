"""Two processes of torchrun take the steps that one process takes.

The gradients of every stage that can be split, with the same batch and the same completions, are compared in float64
between one process and two ranks (gloo, on the CPU); and a command runs, is resumed, and makes a mistake on two.
"""
import os
import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from grpo_min import grpo, ppo, pretrain, sft
from grpo_min.rollout import Rollout, sample
from grpo_min.run import ranks
from grpo_min.run.table import read_csv
from tests import tiny
from tests.tiny import END, PAD

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
        ppo: tiny.settings(ppo, folder, steps=1, critic=tiny.critic_checkpoint(folder / "critic.pt")),
        sft: sft.SFTConfig(run="", base=tiny.checkpoint(folder / "base.pt"), steps=1, batch_size=4, warmup=1,
                           demonstrations=tiny.demonstrations(folder / "sft.jsonl"), device="cpu"),
        pretrain: pretrain.PretrainConfig(run="", text=tiny.text_file(folder / "text.txt"), steps=1, layers=1, heads=2,
                                          width=16, context=16, batch_size=4, warmup=1, device="cpu"),
    }
    for stage, config in configs.items():
        seen = []
        stage.train(config, **(dict(reward=reward) if stage in (grpo, ppo) else {}))
        found[stage.__name__] = seen
    torch.nn.utils.clip_grad_norm_, grpo.sample, ppo.sample = clip, sample, sample
    torch.set_default_dtype(torch.float32)
    return found


def torchrun(*words, fails=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder, and what the end of this file has printed as a script of two ranks, started once for several tests."""
    folder = tmp_path_factory.mktemp("ranks")
    words = ["--run", folder / "run", "--sft", tiny.checkpoint(folder / "sft.pt"), "--prompts",
             tiny.prompts(folder / "prompts.jsonl"), "--steps", 3, "--prompts-per-step", 4, "--group-size", 3,
             "--max-new-tokens", 6, "--device", "cpu"]
    return folder, torchrun("--", __file__, folder, *words)        # without the -- torchrun takes --run for its own


def test_gradients_of_two_ranks_are_those_of_one_process(two_ranks, tmp_path):
    one, two = first_gradients(tmp_path), torch.load(two_ranks[0] / "gradients.pt", weights_only=True)
    assert one.keys() == two.keys() and len(one["grpo_min.ppo"]) == 2
    for stage in one:
        assert len(one[stage]) == len(two[stage])
        for a, b in zip(one[stage], two[stage]):                  # of PPO those of the policy, then of the critic
            assert all((x - y).abs().max() < 1e-10 for x, y in zip(a, b)), stage
            assert all(x.abs().max() > 1e-6 for x in a)


def test_a_command_with_two_ranks(two_ranks):
    folder, out = two_ranks
    assert out.count("step 3/3") == 1, "only one rank speaks, and going on with a finished run takes no step"
    rows = read_csv(folder / "run/metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2] and [row["completions"] for row in rows] == [12, 24, 36]
    assert (folder / "run/checkpoint.pt").read_bytes() == (folder / "before.pt").read_bytes()
    assert not (folder / "run.1").exists()


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
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    (folder / f"rank{ranks.RANK}").mkdir()
    gradients = first_gradients(folder / f"rank{ranks.RANK}")
    grpo.main(words)
    if ranks.RANK == 0:
        torch.save(gradients, folder / "gradients.pt")
        (folder / "before.pt").write_bytes((folder / "run/checkpoint.pt").read_bytes())
    torch.distributed.barrier()
    sys.argv = ["grpo.py", *words, "--resume"]
    runpy.run_module("grpo_min.grpo", run_name="__main__", alter_sys=True)       # with what a command does at its end
