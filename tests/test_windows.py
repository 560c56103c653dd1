"""What is not there on Windows or macOS is not needed: every module is imported, and every stage runs for a few steps,
in a process without the modules, functions and signals that POSIX alone has, with a console of 256 characters.
"""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_min.run import metrics, resume
from tests import tiny

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_min"
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.glob("**/*.py")
                 if path.name != "__init__.py")
FOLDER = "Müllers \\ Läufe"         # a backslash, spaces, umlauts
LIKE_WINDOWS = '''
import builtins, os, runpy, signal, sys
MISSING = "resource fcntl termios pwd grp pty tty syslog".split()
real_import = builtins.__import__

def import_(name, globals=None, locals=None, fromlist=(), level=0):
    package = (globals or {}).get("__name__", "").startswith(("grpo_min", "tutorials"))
    if package and name in MISSING:
        raise ImportError(f"No module named {name!r}")
    return real_import(name, globals, locals, fromlist, level)

import torch, matplotlib.pyplot, regex, multiprocessing.util, concurrent.futures
builtins.__import__ = import_
for name in "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGQUIT pthread_sigmask alarm setitimer".split():
    delattr(signal, name)
for name in "sched_getaffinity fork getloadavg killpg getpgid setsid nice".split():
    delattr(os, name)
'''


def like_windows(script, folder, *words):
    """Run a script there -> what it printed. The console's encoding is cp1252, and so is that of a file opened without
    one: that is why -X warn_default_encoding is an error in files of the package."""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:grpo_min", "-c",
         LIKE_WINDOWS + script, *map(str, words)], capture_output=True, cwd=folder, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(ROOT), PYTHONIOENCODING="cp1252", OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr.decode("cp1252")[-3000:]
    return done.stdout.decode("cp1252")


def test_every_module_is_imported(tmp_path):
    names = [name for name in MODULES if name != "grpo_min.lab.benchmark_trl"]         # that wants TRL
    out = like_windows(f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('all')", tmp_path)
    assert out.split() == ["all"] and "grpo_min.run.cores" in names and len(names) > 40


def test_every_stage_runs(tmp_path):
    """With an answer that no console of 256 characters can show, in a folder that a shell would trip over."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    rows = [dict(prompt=text, answer=str(4 * i), note="→ \N{PILE OF POO}") for i, text in enumerate(tiny.PROMPTS)]
    asked, shown = tiny.jsonl(folder / "prompts.jsonl", rows), tiny.demonstrations(folder / "sft.jsonl")
    pairs, text = tiny.preferences(folder / "pairs.jsonl"), tiny.text_file(folder / "text.txt")
    words = {
        "pretrain": ["--text", text, "--layers", 1, "--heads", 2, "--width", 16, "--context", 64],
        "sft": ["--base", folder / "pretrain/checkpoint.pt", "--demonstrations", shown, "--batch-size", 4],
        "reward_model": ["--sft", folder / "sft/checkpoint.pt", "--preferences", pairs, "--heldout", pairs,
                         "--batch-size", 4],
        "dpo": ["--sft", folder / "sft/checkpoint.pt", "--preferences", pairs, "--heldout", pairs, "--batch-size", 4],
        "critic": ["--sft", folder / "sft/checkpoint.pt", "--prompts", asked, "--prompts-per-step", 4,
                   "--max-new-tokens", 6],
    }
    loop = ["--sft", folder / "sft/checkpoint.pt", "--prompts", asked, "--prompts-per-step", 4, "--group-size", 3,
            "--max-new-tokens", 6]
    words |= dict(grpo=loop, ppo=[*loop, "--critic", folder / "critic/checkpoint.pt", "--critic-minibatches", 1],
                  variants=[*loop, "--recipe", "dapo"])
    calls = []
    for stage, options in words.items():
        for more in [], ["--resume"]:
            calls.append((stage, [*map(str, options), "--run", str(folder / stage), "--steps", "2", "--device", "cpu",
                                  *more]))
    calls.append(("sample", ["--checkpoint", str(folder / "grpo/checkpoint.pt"), "--prompt", "\N{PILE OF POO} →?"]))
    script = f'''
import importlib
from grpo_min.run.config import UserError, run_command

def mistaken(words):
    raise UserError("there is no → here")
for stage, words in {calls} + [("", [])]:
    main = importlib.import_module("grpo_min." + stage).main if stage else mistaken
    try:
        run_command(lambda: main(words))
    except SystemExit as stopped:
        print("code", stopped.code)
'''
    out = like_windows(script, tmp_path)
    assert out.count("code 0") == len(calls) and out.count("code 2") == 1 and out.count("step 2/2") == 8, out
    header, *lines = (folder / "grpo/metrics.csv").read_text(encoding="utf-8").splitlines()
    column = header.split(",").index("memory_mb")
    assert [line.split(",")[column] for line in lines] == ["", ""]
    assert (folder / "ppo/curves.png").exists()


def test_what_cannot_be_measured_is_empty(monkeypatch):
    monkeypatch.setattr(metrics, "resource", None)
    assert metrics.peak_memory_mb(torch.device("cpu")) == ""


@pytest.mark.parametrize("name, expected", [("posix", "python -m x --run 'a b'"), ("nt", 'python -m x --run "a b"')])
def test_advice_is_written_for_the_shell_that_is_there(name, expected, monkeypatch):
    monkeypatch.setattr(resume.os, "name", name)
    assert resume.command_line("x", "--run", "a b") == expected


def texts_opened_without_an_encoding(source):
    """The lines of a source that open a file as text and leave its encoding to the machine."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            words = [ast.unparse(word) for word in node.args] + [ast.unparse(each.value) for each in node.keywords]
            binary = any("b" in word for word in words if word.strip("'").isalpha() and len(word) <= 5)
            if name in ("open", "read_text", "write_text") and not binary and not any("utf-8" in w for w in words):
                if name != "read_text" or isinstance(node.func, ast.Attribute):
                    yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: path.name)
def test_every_text_is_opened_as_utf8(path):
    assert not list(texts_opened_without_an_encoding(path.read_text(encoding="utf-8")))


def test_a_text_that_is_not_is_seen():
    for source, seen in [("open(path)", 1), ("open(path, 'rb')", 0), ("path.read_text()", 1), ("read_text(path)", 0),
                         ("open(path, 'a', encoding='utf-8')", 0), ("path.write_text('x')", 1)]:
        assert len(list(texts_opened_without_an_encoding(source))) == seen, source
