"""Several processes of torchrun take the steps that one process takes, and end together.

The gradients of every stage that can be split, with the same batch and the same completions, are compared in float64
between one process, two ranks, and four of two launchers, as on two machines (gloo, on the CPU). A command runs and is
resumed on them; and where one rank alone is killed or makes a mistake, the others end, too, and nothing is lost.
"""
import os
import runpy
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_min import grpo, ppo, pretrain, sft
from grpo_min.rollout import Rollout, sample
from grpo_min.run import log, ranks, resume
from grpo_min.run.checkpoint import load_checkpoint
from grpo_min.run.config import UserError
from grpo_min.run.table import read_csv
from tests import tiny
from tests.tiny import END, PAD

if sys.platform == "win32":
    pytest.skip("needs the processes and signals of POSIX", allow_module_level=True)
ROOT = Path(__file__).parent.parent
STEPS = 8
calls = []      # of the reward


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
    """By the completion's length, but for two prompts all of whose completions are worth the same. MISHAP=kill 1, and
    rank 1 is killed when it asks for the fourth time; MISHAP=mistake 1, and a file is missing."""
    calls.append(prompts)
    if len(calls) == 4 and os.environ.get("MISHAP") == f"kill {ranks.RANK}":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(calls) == 4 and os.environ.get("MISHAP") == f"mistake {ranks.RANK}":
        Path("only on the other machine").read_text()
    return [len(text) / 10 * (prompt not in tiny.PROMPTS[:6]) for prompt, text in zip(prompts, completions)]


def prompts(split):
    """This file is the --task of the commands below: they save after every step, and draw no curves."""
    log.SAVE_EVERY = 0
    sys.modules["grpo_min.run.plots"] = SimpleNamespace(plot_curves=lambda rows, path: None)     # takes long to import
    return [dict(prompt=text) for text in tiny.PROMPTS]


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


def torchrun(*words, nodes=1, last=(), mishap="", fails=False):
    """So many launchers of two ranks each -> what each prints; it fails if any process is left. last: more words for
    the last launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={port}"] if nodes > 1 else ["--standalone"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *where]
    launchers, env = [], dict(os.environ, PYTHONPATH=str(ROOT), MISHAP=mishap)
    try:
        for node in range(nodes):
            more = [f"--node_rank={node}", *map(str, words), *(last if node == nodes - 1 else ())]
            launchers.append(subprocess.Popen([*command, *more], env=env, text=True, stdout=subprocess.PIPE,
                                              stderr=subprocess.PIPE))
        told = [launcher.communicate(timeout=250) for launcher in launchers]    # until no rank holds the pipe any more
    finally:
        for launcher in launchers:
            launcher.terminate()                              # if it has not ended: it ends its ranks first
            launcher.wait()
    for launcher, (out, err) in zip(launchers, told):
        assert (launcher.returncode != 0) == fails, err[-3000:]
        assert f'File "{ROOT}/grpo_min' not in err and "SIGABRT" not in err, err[:3000]
    return [err if fails else out for out, err in told]


def command(run, sft):
    """The words of a command whose task is this file."""
    return ["--run", run, "--sft", tiny.checkpoint(sft), "--task", __file__, "--steps", STEPS, "--prompts-per-step", 4,
            "--group-size", 3, "--max-new-tokens", 6, "--device", "cpu"]


@pytest.fixture(scope="module", params=[1, 2], ids=["two ranks", "four of two launchers"])
def several(request, tmp_path_factory):
    """How many launchers, a folder, and what the end of this file has printed as a script of their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    words = command(folder / "run", folder / "sft.pt")             # without the -- torchrun takes --run for its own
    return request.param, folder, torchrun("--", __file__, folder, *words, nodes=request.param)


def test_gradients_of_several_ranks_are_those_of_one_process(several, tmp_path):
    one, more = first_gradients(tmp_path), torch.load(several[1] / "gradients.pt", weights_only=True)
    assert one.keys() == more.keys() and len(one["grpo_min.ppo"]) == 2
    for stage in one:
        assert len(one[stage]) == len(more[stage])
        for a, b in zip(one[stage], more[stage]):                 # of PPO those of the policy, then of the critic
            assert all((x - y).abs().max() < 1e-10 for x, y in zip(a, b)), stage
            assert all(x.abs().max() > 1e-6 for x in a)


def test_a_command_with_several_ranks(several):
    nodes, folder, told = several
    assert "".join(told).count(f"step {STEPS}/{STEPS}") == 1, "one rank speaks, and going on at the end takes no step"
    rows = read_csv(folder / "run/metrics.csv")
    assert [(row["step"], row["completions"]) for row in rows] == [(k, 12 * k + 12) for k in range(STEPS)]
    assert (folder / "run/checkpoint.pt").read_bytes() == (folder / "before.pt").read_bytes()
    assert not (folder / "run.1").exists()


def test_a_mistake_with_two_ranks(tmp_path):
    (tmp_path / "sft.pt").write_text("no checkpoint")
    told, = torchrun("-m", "--", "grpo_min.grpo", "--run", tmp_path / "run", "--sft", tmp_path / "sft.pt", fails=True)
    assert "error: " in told and "sft.pt" in told and "exitcode  : 2" in told


def test_one_rank_is_killed_or_makes_a_mistake(several, tmp_path):
    """The others end, and go on with what was saved: the run is that of ranks to which nothing happened."""
    nodes, folder, _ = several
    words = ["-m", "--", "grpo_min.grpo", *command(tmp_path / "run", tmp_path / "sft.pt"), "--resume"]
    for mishap in "kill 0", f"mistake {2 * nodes - 1}":             # one by the first launcher, the other by the last
        told = torchrun(*words, nodes=nodes, mishap=mishap, fails=True)
        if mishap == "kill 0":
            assert "SIGKILL" in told[0]
        else:
            assert "FileNotFoundError" in told.pop() and not any("FileNotFoundError" in text for text in told)
        assert all("error: another rank has ended\n" in text for text in told[mishap == "kill 0":])
        assert 0 < load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] < STEPS - 2
    torchrun(*words, nodes=nodes)
    tiny.assert_same_run(folder / "run", tmp_path / "run")


def test_a_mistake_in_the_words_of_one_launcher(tmp_path):
    words = ["-m", "--", "grpo_min.grpo", "--run", tmp_path / "run", "--device", "cpu"]
    first, second = torchrun(*words, nodes=2, last=["--steps", "0"], fails=True)
    assert "error: another rank has ended\n" in first and "error: --steps must be above 0" in second


def test_several_ranks_are_told_to_go_on_with_torchrun(monkeypatch):
    monkeypatch.setattr(resume, "RANKS", 2)
    assert "torchrun" in resume.resume_command()


def test_the_other_ranks_do_not_see_the_run(tmp_path, monkeypatch):
    config = tiny.settings(grpo, tmp_path, run=str(tmp_path / "run"), steps=1, resume=True)
    grpo.train(config, reward=reward)
    monkeypatch.setattr(log, "mean", lambda steps: steps / 2)      # the other of two begins at step 0
    with pytest.raises(UserError, match="not every rank finds the same run"):
        grpo.train(config, reward=reward)


def test_rows_have_one_dtype_on_all_ranks(monkeypatch):
    """Else gloo aborts. A metric of numpy's makes a tensor float64, but did not where it was 0."""
    seen = []
    monkeypatch.setattr(ranks, "RANKS", 2)
    monkeypatch.setattr(ranks, "mean", lambda tensor: seen.append(tensor.dtype) or tensor)
    for value in 0, 0.5, np.float64(0), np.float64(0.5), "":
        ranks.mean_of_rows(dict(loss=0.1, thinking=value), "cpu")
    assert set(seen) == {torch.float32}


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
