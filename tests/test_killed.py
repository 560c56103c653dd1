"""Nothing is lost: a run that is killed, again and again and at any moment, ends as if nothing had happened.

Real processes are ended by the kernel, after a random time or at a random line of the modules that write files; some
die in the middle of writing a checkpoint. Each is resumed, and in the end the weights, the optimizers' states, the
samples and every column of metrics.csv but seconds and memory equal those of an uninterrupted run to the bit.
`python -m pytest -m slow` kills seven times as often.
"""
import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (the first optimizer imports it, for more than a second: once is enough)

from grpo_min import grpo, ppo
from grpo_min.run import checkpoint, files, log, plots, resume, table
from grpo_min.run.checkpoint import load_checkpoint
from grpo_min.run.config import UserError
from tests.tiny import LOOPS, assert_same_run, letter_e, settings

if sys.platform == "win32":
    pytest.skip("no process is killed like this there", allow_module_level=True)
STEPS, KILLS = 40, 3
WRITERS = {module.__file__ for module in (checkpoint, files, log, resume, table)}
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
processes = multiprocessing.get_context("forkserver")       # each starts from a process that has imported torch already
processes.set_forkserver_preload(["tests.test_killed"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(number):
    """(steps, seconds): so long after the beginning of that step an alarm goes off. Nothing handles it: the kernel ends
    the process wherever it is, as it does at SIGKILL."""
    steps, seconds = number
    step_done = log.Run.step_done

    def counted(run, step, *rest):
        if step == steps:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return step_done(run, step, *rest)
    log.Run.step_done = counted


def die_at_line(number):
    """SIGKILL when so many lines of WRITERS have run. Without a number: write how many there were, in the end."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in WRITERS:
            return None
        count += event == "line"
        if count == number:
            die()
        return trace
    sys.settrace(trace)
    return lambda: count


def die_in_write(number):
    """SIGKILL when half of the so many-th file is written."""
    whole, calls = Path.write_bytes, []

    def half(path, content):
        calls.append(path)
        if len(calls) == number:
            whole(path, content[:len(content) // 2])
            die()
        return whole(path, content)
    Path.write_bytes = half


def die_before_rename(number):
    """SIGKILL when the so many-th file is written, but not yet in its place."""
    replace, calls = os.replace, []

    def dying(*paths):
        calls.append(paths)
        return die() if len(calls) == number else replace(*paths)
    os.replace = dying


def child(name, config, deadly, number, output):
    """What a process does: train, with a checkpoint in every step, and die where it is told."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    log.SAVE_EVERY = 0
    plots.plot_curves = lambda rows, path: None       # it takes longer than all the steps
    counted = deadly(number) if deadly else None
    {"grpo": grpo, "ppo": ppo}[name].train(config, reward=letter_e)
    sys.settrace(None)
    if counted:
        Path(f"{output}.lines").write_text(str(counted()))


def run(loop, config, deadly=None, number=None):
    """Train in a process of its own -> its exit code."""
    process = processes.Process(target=child, args=(loop.__name__[9:], config, deadly, number, f"{config.run}.log"))
    process.start()
    process.join()
    return process.exitcode


def killable(loop, folder, steps=STEPS):
    return settings(loop, folder, run=str(folder / "run"), steps=steps, resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(loop, steps) -> the folder of an uninterrupted run, and the lines of WRITERS that it took."""
    done = {}

    def whole(loop, steps=STEPS):
        if (loop, steps) not in done:
            folder = tmp_path_factory.mktemp("whole")
            config = killable(loop, folder, steps)
            assert run(loop, config, die_at_line, None) == 0
            done[loop, steps] = folder / "run", int(Path(f"{config.run}.log.lines").read_text())
        return done[loop, steps]
    return whole


def step_of(config):
    path = Path(config.run) / "checkpoint.pt"
    return load_checkpoint(path)["step"] if path.exists() else 0


@LOOPS
@SEEDS
def test_killed_after_a_random_time(loop, seed, whole, tmp_path):
    config, rng = killable(loop, tmp_path), random.Random(seed)
    for _ in range(KILLS):
        moment = step_of(config) + rng.randrange(1, 8), rng.uniform(1e-5, 0.02)
        assert run(loop, config, die_after, moment) == -signal.SIGALRM
    assert 0 < step_of(config) < STEPS
    assert run(loop, config) == 0
    assert_same_run(whole(loop)[0], tmp_path / "run")


@LOOPS
@SEEDS
def test_killed_at_a_random_line(loop, seed, whole, tmp_path):
    expected, lines = whole(loop)
    config, rng = killable(loop, tmp_path), random.Random(seed)
    numbers = [rng.randrange(1, 60), rng.randrange(lines // 2), rng.randrange(1, 60), rng.randrange(lines // 3)]
    for number in numbers:                                # two of them while the run begins, or begins again
        assert run(loop, config, die_at_line, number) == -signal.SIGKILL
    assert 0 < step_of(config) < STEPS
    assert run(loop, config) == 0
    assert_same_run(expected, tmp_path / "run")


@LOOPS
@pytest.mark.parametrize("deadly", [die_in_write, die_before_rename])
@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_killed_while_a_file_is_written(loop, deadly, number, whole, tmp_path):
    """The first files are config.json and the checkpoint of step 0."""
    config = killable(loop, tmp_path, steps=10)
    assert run(loop, config, deadly, number) == -signal.SIGKILL
    assert run(loop, config) == 0
    assert_same_run(whole(loop, steps=10)[0], tmp_path / "run")


def test_two_processes_may_save_the_same_file(tmp_path, monkeypatch):
    replace, path = os.replace, tmp_path / "file.json"

    def meanwhile(*names):
        """Another process saves it, too, between our writing and our renaming."""
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        files.save_file(path, b"theirs")
        replace(*names)
    monkeypatch.setattr(os, "replace", meanwhile)
    files.save_file(path, b"ours")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


# --- the disk is full ---------------------------------------------------------------------------------------------

@LOOPS
def test_disk_is_full_when_a_checkpoint_is_written(loop, tmp_path, monkeypatch, no_curves):
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    whole, full = (settings(loop, tmp_path, run=str(tmp_path / name), steps=6) for name in ("a", "b"))
    loop.train(whole, reward=letter_e)
    write, calls = Path.write_bytes, []

    def full_disk(path, content):
        calls.append(path)
        if len(calls) < 6:
            return write(path, content)
        write(path, content[:len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(UserError, match="checkpoint.pt: No space left on device .*last good one is intact"):
            loop.train(full, reward=letter_e)
    assert 0 < load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] < 6
    assert not list((tmp_path / "b").glob("*.tmp")), "half a file would only take the space that is missing"
    loop.train(dataclasses.replace(full, resume=True), reward=letter_e)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl"])
def test_last_line_of_a_file_is_torn(name, tmp_path, monkeypatch, no_curves):
    """A full disk or a crash can leave any part of a line behind the last checkpoint's."""
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    whole, torn = (settings(grpo, tmp_path, run=str(tmp_path / folder), steps=14) for folder in ("a", "b"))
    grpo.train(whole, reward=letter_e)

    def crash(policy, step):
        if step == 12:                           # the last checkpoint is that after 11 steps, two steps behind
            raise RuntimeError
        return {}
    with pytest.raises(RuntimeError):
        grpo.train(torn, reward=letter_e, evaluate=crash)
    assert load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] == 11
    files = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    content = files[tmp_path / "b" / name].decode()
    start = content.index("\n11,") + 1 if name == "metrics.csv" else content.index('{"step": 11,')
    for length in [0, 1, 2, 3, 5, 10, 11, 12, 30, content.index("\n", start) - start]:
        for path, before in files.items():
            path.write_bytes(before)
        (tmp_path / "b" / name).write_text(content[:start + length])
        grpo.train(dataclasses.replace(torn, resume=True), reward=letter_e)
        assert_same_run(tmp_path / "a", tmp_path / "b")
