"""The command line: every option is explained, and a user's mistake is answered by one line, never by a traceback.

Each mistake is made on purpose: exit code 2, one line on standard error that begins with "error:" and names what is
wrong, and a run that was in the folder before is still there, byte for byte. Commands run inside this process, but for
three that are started as a user starts them.
"""
import dataclasses
import importlib
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import types
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import pytest
import torch

from grpo_min import critic, dpo, evaluate, grpo, ppo, pretrain, reward_model, sample, sft, variants
from grpo_min.critic import Critic
from grpo_min.lab import compare
from grpo_min.lab.processes import in_own_process
from grpo_min.model import GPT, ScalarGPT
from grpo_min.run import bpe, log, resume
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import UserError, parse, run_command
from grpo_min.run.table import read_csv
from tests import tiny

pytestmark = pytest.mark.usefixtures("no_curves")
ROOT = Path(__file__).parent.parent
RL = [grpo, ppo, variants]
SUPERVISED = [pretrain, sft, reward_model, dpo]
LOOPS = pytest.mark.parametrize("command", RL, ids=["grpo", "ppo", "variants"])


def commands():
    """{what follows python -m: (the module with its main(), its config class)} of every command of the package."""
    found = {}
    for path in sorted((ROOT / "grpo_min").glob("**/*.py")):
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = bpe if name == "grpo_min.tokenizer" else importlib.import_module(name)
            config = re.search(r"\bparse\((\w+)", Path(module.__file__).read_text(encoding="utf-8"))[1]
            found[name.removesuffix(".__main__")] = module, getattr(module, config)
    return found


COMMANDS = commands()
EVERY = pytest.mark.parametrize("name", COMMANDS)


def first_words(name):
    """What a command wants before its options."""
    return ["tuning"] if name == "grpo_min.lab.studies" else []


def arguments(command, folder, **more):
    """A short run of a stage on tiny files, as words of a command line; options in `more` come last and win."""
    options = dict(run=folder / "run", steps=2, device="cpu")
    if command in RL:
        options.update(sft=folder / "sft.pt", prompts=folder / "prompts.jsonl", prompts_per_step=4, group_size=3,
                       max_new_tokens=6)
        tiny.prompts(folder / "prompts.jsonl")
        options |= dict(critic="sft", critic_minibatches=1) if command is ppo else {}
    elif command is critic:
        options.update(sft=folder / "sft.pt", prompts=tiny.prompts(folder / "prompts.jsonl"), prompts_per_step=4,
                       max_new_tokens=6)
    elif command is pretrain:
        options.update(text=tiny.text_file(folder / "text.txt"), layers=1, heads=2, width=16, context=16)
    elif command is sft:
        options.update(base=folder / "sft.pt", demonstrations=tiny.demonstrations(folder / "sft.jsonl"), batch_size=4)
    elif command in (reward_model, dpo):
        options.update(sft=folder / "sft.pt", preferences=tiny.preferences(folder / "pairs.jsonl"), batch_size=4,
                       heldout=folder / "pairs.jsonl")
    elif command is compare:
        options.update(sft=folder / "sft.pt", reward_model=tiny.reward_checkpoint(folder / "reward_model.pt"),
                       eval_prompts=2)
    elif command in (sample, evaluate):
        options = dict(checkpoint=folder / "sft.pt", device="cpu")
    if not (folder / "sft.pt").exists():
        tiny.checkpoint(folder / "sft.pt")
    options.update(more)
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


def snapshot(folder):
    """What is in the run folders: {path: bytes}."""
    paths = [path for path in sorted(folder.glob("run*/**/*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(command, *words, **options) runs it, expects one line and that code, and returns the line."""
    old_run = tmp_path / "run"
    old_run.mkdir()
    for name in "config.json", "metrics.csv", "checkpoint.pt":
        (old_run / name).write_text("what an earlier run left")

    def refused(command, *words, code=2, **options):
        before, words = snapshot(tmp_path), arguments(command, tmp_path, **options) + list(words)
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: command.main(words))
        error = capsys.readouterr().err
        assert stopped.value.code == code
        assert len(error.splitlines()) == 1 and error.startswith("error: ") and 15 < len(error) < 1000, error[:2000]
        assert snapshot(tmp_path) == before, "a command that cannot run leaves every run folder as it was"
        return error
    return refused


def works(command, folder, *words, **options):
    command.main(arguments(command, folder, **options) + list(words))


# --- help ---------------------------------------------------------------------------------------------------------

def test_the_commands_are_all_found():
    core = "tokenizer pretrain sft reward_model dpo critic grpo ppo variants evaluate sample".split()
    lab = "compare studies page benchmark benchmark_real label publish".split()
    assert set(COMMANDS) == {"grpo_min", *(f"grpo_min.{name}" for name in core),
                             *(f"grpo_min.lab.{name}" for name in lab), "grpo_min.real.load", "grpo_min.real.export"}


def start_here(name, words, monkeypatch):
    """python -m NAME words, in this process -> the exit code."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return stopped.value.code


@EVERY
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_names_every_option_its_meaning_and_its_default(name, capsys, monkeypatch):
    _, config = COMMANDS[name]
    assert start_here(name, ["--help"], monkeypatch) == 0
    shown = "".join(capsys.readouterr().out.split())                     # argparse breaks lines where it likes
    assert "".join(config.__doc__.split()) in shown
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-") in shown
        assert "".join(f"{field.metadata['help']} (default: {field.default})".split()) in shown, field.name
        assert all(choice in shown for choice in field.metadata["choices"] or [])


@EVERY
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_unknown_option(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ["--no-such-option", "1"], ["--no-such-option"], ["--no-such-option=1"]:
        assert start_here(name, [*first_words(name), *words], monkeypatch) == 2
        told = capsys.readouterr()
        assert "--no-such-option" in told.err and told.err.count("\n") == 1 and told.out == ""
        assert told.err.startswith("error: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grpo_min.lab.studies", "grpo_min.lab.page"])
def test_a_first_word_that_is_missing_or_wrong(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in [], ["nothing_of_this_name"], ["--out", "x"]:
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: COMMANDS[name][0].main(words))
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
        assert "nothing_of_this_name" in told or "name" in told
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["--steps many", "--lr fast", "--kl k4", "--step 3", "--device tpu", "--seed"])
@LOOPS
def test_values_that_argparse_refuses(command, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: command.main(words.split()))
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and words.split()[0] in told and told.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, (module, config) in COMMANDS.items()
                                  if hasattr(config, "run") and module is not bpe])
def test_the_command_to_go_on_with_is_one_that_works(name, monkeypatch):
    # What Ctrl-C prints is taken apart as a shell would, with a folder whose name holds a space, and parsed again.
    module, config = COMMANDS[name]
    started = types.SimpleNamespace(__spec__=types.SimpleNamespace(name=module.__name__))
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", [module.__file__, *first_words(name), "--run", "runs/my run"])
    words = shlex.split(resume.resume_command())
    assert words[:3] == ["python", "-m", name]
    parsed = parse(config, words[3 + len(first_words(name)):])
    assert parsed.run == "runs/my run" and getattr(parsed, "resume", True) is True


@pytest.mark.parametrize("words", [
    "lab.benchmark --rounds 0", "lab.benchmark --rounds -1", "lab.benchmark --steps 1", "lab.benchmark --against jax",
    "lab.benchmark --out FILE", "lab.compare --rewards correct --run FILE", "lab.label --pairs 0",
    "lab.label --pairs 1 --preferences FILE/x", "lab.page FILE", "lab.studies tuning --seeds few",
    "lab.publish --run", " --preset tpu", " --run FILE", " --quick 3",
    "tokenizer --vocab-size 262 --run FILE", "variants --recipe ppo", "variants --run FILE"])
def test_mistakes_around_the_pipeline(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("here already")
    name, *words = words.split(" ")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: COMMANDS[f"grpo_min.{name}".rstrip(".")][0].main(words))
    told = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and told.startswith("error: ") and told.count("\n") == 1, told
    assert words[-1].split("/")[0] in told or words[-2].strip("-") in told
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"] and Path("FILE").read_text() == "here already"


# --- files --------------------------------------------------------------------------------------------------------

DATA_OPTIONS = [(grpo, "prompts"), (ppo, "prompts"), (sft, "demonstrations"), (reward_model, "preferences"),
                (reward_model, "heldout"), (dpo, "preferences"), (dpo, "heldout")]
DATA = pytest.mark.parametrize("command, option", DATA_OPTIONS, ids=[f"{c.__name__[9:]}-{o}" for c, o in DATA_OPTIONS])


@DATA
def test_data_file_is_missing(command, option, refused, tmp_path):
    assert "nowhere.jsonl" in refused(command, **{option: tmp_path / "nowhere.jsonl"})
    assert str(tmp_path) in refused(command, **{option: tmp_path})                      # a folder


GOOD = dict(prompt="a", answer="1", response="1", chosen="1", rejected="2", animal="cow", attribute="food")
BAD_LINES = {
    "not JSON": b'{"prompt": "a", \n', "half a line": b'{"prompt": "a"', "not an object": b'["a", "b"]\n',
    "null": b"null\n",
    "field missing": b'{"question": "a"}\n', "prompt is a list": json.dumps(dict(GOOD, prompt=["a"])).encode() + b"\n",
    "prompt is null": json.dumps(dict(GOOD, prompt=None)).encode() + b"\n", "not UTF-8": b'{"prompt": "\xff\xfe"}\n',
    "nested too deep": b"[" * 100_000 + b"\n", "enormous number": b'{"n": ' + b"1" * 5000 + b"}\n",
    "2 MB, not JSON": b'{"prompt": "' + b"a cow " * 340_000,
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_a_data_file_is_named(bad, refused, tmp_path):
    path, good = tmp_path / "data.jsonl", json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(good * 20 + bad)
    for command, option in DATA_OPTIONS[::2]:
        error = refused(command, **{option: path})
        assert "data.jsonl" in error and "line 21" in error, error


def test_a_line_of_2_mb_is_named_too(refused, tmp_path):
    path = tiny.jsonl(tmp_path / "data.jsonl", [GOOD] * 20 + [dict(GOOD, prompt="a cow " * 340_000)])
    for command, option in DATA_OPTIONS[:4]:
        error = refused(command, **{option: path})
        assert "data.jsonl" in error and "line 21" in error and "context" in error, error


@DATA
def test_a_field_that_is_missing_or_no_text_is_named(command, option, refused, tmp_path):
    needed = dict(prompts="prompt answer", demonstrations="prompt response", preferences="prompt chosen rejected",
                  heldout="prompt chosen rejected animal attribute")[option].split()
    for field in needed:
        without = {name: value for name, value in GOOD.items() if name != field}
        for row in without, dict(GOOD, **{field: [28]}):
            path = tiny.jsonl(tmp_path / "data.jsonl", [GOOD] * 20 + [row])
            error = refused(command, **{option: path})
            assert "line 21" in error and f'"{field}"' in error, error


def test_a_field_with_a_name_that_rewards_get_already_is_refused_and_any_other_is_a_column(tmp_path, refused):
    for name in "prompts", "completions", "finished":
        rows = [dict(prompt=text, answer="1", **{name: "x"}) for text in tiny.PROMPTS]
        assert name in refused(grpo, prompts=tiny.jsonl(tmp_path / "rows.jsonl", rows))
    rows = [dict(prompt=text, answer="1", reward="x", batch="y") for text in tiny.PROMPTS]
    works(grpo, tmp_path, "--steps", "1", prompts=tiny.jsonl(tmp_path / "rows.jsonl", rows))


@LOOPS
def test_a_field_that_every_reward_gets_already_is_named(command, refused, tmp_path):
    for name in "completions", "finished":
        assert name in refused(command, prompts=tiny.jsonl(tmp_path / "data.jsonl", [dict(GOOD, **{name: "x"})] * 20))


@DATA
def test_data_file_is_empty(command, option, refused, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert "empty" in refused(command, **{option: tmp_path / "empty.jsonl"})


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00", b"too short\n"],
                         ids=["empty", "blank", "binary", "short"])
def test_text_that_cannot_be_pretrained_on(content, refused, tmp_path):
    (tmp_path / "bad.txt").write_bytes(content)
    assert "bad.txt" in refused(pretrain, text=tmp_path / "bad.txt")


def test_text_is_missing(refused, tmp_path):
    assert "nowhere.txt" in refused(pretrain, text=tmp_path / "nowhere.txt")


@LOOPS
def test_batch_is_larger_than_the_data(command, refused):
    assert "13" in refused(command, prompts_per_step=13)


def test_supervised_batch_is_larger_than_the_data(refused):
    assert "13" in refused(sft, batch_size=13)                      # the reward model makes do: tests/test_label.py


@pytest.mark.parametrize("command, option", DATA_OPTIONS[:4], ids=[f"{c.__name__[9:]}" for c, _ in DATA_OPTIONS[:4]])
def test_a_prompt_is_too_long_for_the_context(command, option, refused, tmp_path):
    rows = [GOOD] * 12 + [dict(GOOD, prompt="a cow " * 40)]
    error = refused(command, **{option: tiny.jsonl(tmp_path / "long.jsonl", rows), "steps": 5})
    assert "context" in error and "64" in error, error


def test_a_response_is_too_long_for_the_context(refused, tmp_path):
    rows = [GOOD] * 12 + [dict(GOOD, response="a cow " * 40, chosen="a cow " * 40)]
    for command, option in (sft, "demonstrations"), (reward_model, "preferences"), (dpo, "preferences"):
        error = refused(command, **{option: tiny.jsonl(tmp_path / "long.jsonl", rows), "steps": 5})
        assert "context" in error and "64" in error, error


@pytest.mark.parametrize("command", [sft, reward_model, dpo])
def test_a_long_prompt_and_a_long_response_may_share_a_batch(command, tmp_path):
    # Each row fits into the context of 64, though the padded batch is wider.
    long = "a cow " * 25
    rows = [dict(GOOD, prompt=long), dict(GOOD, response=long, chosen=long)] * 6
    option = "demonstrations" if command is sft else "preferences"
    works(command, tmp_path, **{option: tiny.jsonl(tmp_path / "long.jsonl", rows)}, batch_size=12)


@pytest.mark.parametrize("change", [dict(animal="unicorn"), dict(attribute="horns")])
def test_the_hidden_score_knows_no_such_thing(change, refused, tmp_path):
    path = tiny.jsonl(tmp_path / "pairs2.jsonl", [dict(GOOD, **change)])
    assert list(change.values())[0] in refused(reward_model, heldout=path)


@LOOPS
def test_completions_are_too_long_for_the_context(command, refused):
    error = refused(command, max_new_tokens=60)
    assert "context" in error and "64" in error, error


# --- checkpoints --------------------------------------------------------------------------------------------------

CHECKPOINT_OPTIONS = [(grpo, "sft"), (ppo, "sft"), (variants, "sft"), (sft, "base"), (reward_model, "sft"),
                      (dpo, "sft"), (critic, "sft"), (ppo, "critic"), (sample, "checkpoint"), (evaluate, "checkpoint"),
                      (compare, "sft")]


class HoldsCode:
    """What unpickles to a call: here of os.mkdir, elsewhere of anything."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def shape_of_another(path):
    checkpoint = torch.load(tiny.checkpoint(path), weights_only=True)
    checkpoint["config"]["width"] = 32
    torch.save(checkpoint, path)


def changed(**changes):
    """A checkpoint with some of its entries changed, or without those that are None."""
    def write(path):
        checkpoint = {**torch.load(tiny.checkpoint(path), weights_only=True), **changes}
        torch.save({name: value for name, value in checkpoint.items() if value is not None}, path)
    return write


def cut(path):
    tiny.checkpoint(path)
    path.write_bytes(path.read_bytes()[:3000])


BAD_CHECKPOINTS = {
    "missing": lambda path: None, "a folder": Path.mkdir, "empty": Path.touch, "cut": cut,
    "text": lambda path: path.write_text("weights"), "bytes": lambda path: path.write_bytes(bytes(range(256)) * 10),
    "lines": lambda path: path.write_text("step\nnone\n"), "a list": lambda path: torch.save([1, 2], path),
    "a number": lambda path: torch.save(3, path), "a reward model": lambda path: tiny.checkpoint(path, ScalarGPT),
    "a state dict": lambda path: torch.save(tiny.gpt().state_dict(), path), "another shape": shape_of_another,
    "another vocabulary": lambda path: tiny.checkpoint(path, vocab_size=50), "no config": changed(config=None),
    "no weights": changed(model=None), "config of another version": changed(config=dict(vocab_size=600, rotary=True)),
    "config without vocabulary": changed(config=dict(width=16)), "config no dict": changed(config=[1]),
    "unknown kind": changed(kind="LSTM"),
    "no tokenizer, as in earlier versions": changed(tokenizer=None), "tokenizer no dict": changed(tokenizer=[1]),
    "damaged tokenizer": changed(tokenizer=dict(tiny.TOKENIZER.to_dict(), ranks={})),
    "pickled code": lambda path: path.write_bytes(pickle.dumps(HoldsCode(f"{path}.ran"))),
    "code in torch's format": lambda path: torch.save(dict(kind="GPT", model=HoldsCode(f"{path}.ran")), path),
}


@pytest.mark.parametrize("write", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_checkpoint_that_cannot_be_used(write, refused, tmp_path):
    path = tmp_path / "bad.pt"
    write(path)
    for command, option in CHECKPOINT_OPTIONS:
        words = ["--prompt", "hello"] if command is sample else []
        assert "bad.pt" in refused(command, *words, **{option: path})
    assert not Path(f"{path}.ran").exists(), "code that a file holds is never run"


def test_this_code_would_run_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(HoldsCode(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command, options", [
    (grpo, dict(reward="learned")), (ppo, dict(reward="learned")), (critic, dict(reward="learned")),
    (compare, dict(rewards="learned")), (sample, dict(prompt="hello")),
], ids=["grpo", "ppo", "critic", "compare", "sample"])
def test_reward_model_that_cannot_be_used(command, options, refused, tmp_path):
    assert "nowhere.pt" in refused(command, **options, reward_model=tmp_path / "nowhere.pt")
    error = refused(command, **options, reward_model=tiny.checkpoint(tmp_path / "policy.pt"))
    assert "policy.pt" in error and "GPT" in error


# --- settings -----------------------------------------------------------------------------------------------------

def test_a_group_of_one_has_no_baseline(refused):
    assert "group" in refused(grpo, group_size=1)


def test_ppo_does_without_groups(tmp_path, curves):
    works(ppo, tmp_path, group_size=1)
    assert len(read_csv(tmp_path / "run/metrics.csv")) == 2


def test_the_default_critic_is_for_right_answers_to_arithmetic_alone(refused):
    error = refused(ppo, critic=ppo.PPOConfig.critic, reward="well_formed")
    assert "knows arithmetic alone" in error and "--critic sft" in error


@LOOPS
def test_minibatches_do_not_divide(command, refused):
    assert "minibatches x" in refused(command, minibatches=3)


@LOOPS
def test_kl_in_the_reward_needs_k1(command, refused):
    for kl in "k2", "k3":
        assert "k1" in refused(command, kl_in="reward", kl=kl)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", [name for name, (_, config) in COMMANDS.items() if hasattr(config, "device")])
def test_no_cuda_device(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: COMMANDS[name][0].main([*first_words(name), "--device", "cuda"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and "CUDA" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_commands_that_compute_nothing_have_no_device():
    assert {name for name, (_, config) in COMMANDS.items() if not hasattr(config, "device")} == {
        "grpo_min.tokenizer", "grpo_min.lab.page", "grpo_min.lab.publish", "grpo_min.real.load", "grpo_min.real.export"}


NO_NUMBERS = [    # (commands, option, values that make no sense)
    (RL, "steps", [0, -1]), (RL + [critic], "prompts_per_step", [0, -4]), (RL, "group_size", [0, -3]),
    (RL, "epochs", [0, -1]), (RL, "minibatches", [0, -1]), (RL + [critic], "max_new_tokens", [0, -1]),
    (RL, "lr", [0, -1, "nan"]), (RL + [critic], "temperature", [0, -1, "nan"]),
    (RL, "beta", [-1, "nan"]), (RL, "max_grad_norm", [0, -1]),
    (RL, "clip_eps", [-0.1, "nan"]), ((ppo,), "critic_lr", [-1, "nan"]),
    ((ppo,), "gamma", [-0.1, 1.1]), ((ppo,), "lam", [-0.1, 1.1]),
    (SUPERVISED + [critic], "steps", [0, -1]), (SUPERVISED, "batch_size", [0, -4]),
    (SUPERVISED + [critic], "lr", [0, -1, "nan"]), (SUPERVISED + [critic], "warmup", [0, -1]),
    ([dpo], "beta", [0, -1, "nan"]), ([dpo], "label_smoothing", [-0.1, 0.5, "nan"]), ([sample], "best_of", [-1]),
    ((critic,), "batches", [0, -1]), ((critic,), "weight_decay", [-1, "nan"]), ((ppo,), "critic_epochs", [-1]),
    ((ppo,), "critic_minibatches", [0, 3]),
    ((pretrain,), "heads", [0, -2, 3]), ((pretrain,), "width", [0, -16]), ((pretrain,), "layers", [0, -1]),
    ((pretrain,), "context", [0, -1]), ((sample,), "answers", [0, -1]), ((sample,), "temperature", [-1, "nan"]),
    ((sample,), "max_new_tokens", [0, -1]), ((evaluate,), "samples", [3, 0, -1]), ((evaluate,), "prompts", [0, -1]),
    ((evaluate,), "temperature", [0, -1, "nan"]), ((compare,), "seeds", [0, -1]), ((compare,), "steps", [-1]),
    ((compare,), "eval_prompts", [0, -1]), ((compare,), "rewards", ["", "corect"]),
    ((compare,), "algorithms", ["", "PPO2", "DPO"]), ((compare,), "max_new_tokens", [0, -1]),
    ((compare,), "lr_factor", [0, -1, "nan"]), ((variants,), "clip_eps_high", [-0.1, "nan"]),
    ((variants,), "recipe", ["no_such_recipe"]), ((variants,), "ratio", ["word"]),
]


@pytest.mark.parametrize("command, option, value", [
    pytest.param(command, option, value, id=f"{command.__name__[9:]}-{option}-{value}")
    for commands, option, values in NO_NUMBERS for command in commands for value in values])
def test_settings_that_make_no_sense(command, option, value, refused):
    error = refused(command, *(["--prompt", "hello"] if command is sample else []), **{option: value})
    assert option in error.replace("-", "_") or option.replace("_", " ") in error, f"{error} does not name {option}"


@pytest.mark.parametrize("command", [pretrain, sft, grpo])
def test_run_folder_that_cannot_be_made(command, refused, tmp_path):
    (tmp_path / "file").write_text("here already")
    for path in tmp_path / "file", tmp_path / "file/run":
        assert str(path) in refused(command, run=path)
    assert (tmp_path / "file").read_text() == "here already"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command, name", [(grpo, "metrics.csv"), (grpo, "samples.jsonl"), (sft, "metrics.csv")])
def test_disk_is_full(command, name, tmp_path, capsys, monkeypatch):
    def full(path, *arguments, **keywords):
        return open("/dev/full" if Path(path).name == name else path, *arguments, **keywords)
    monkeypatch.setattr(log, "open", full, raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: works(command, tmp_path))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert "No space left" in error


def test_a_question_that_is_too_long(refused):
    assert "context" in refused(sample, prompt="cow " * 100)
    assert "context" in refused(sample, prompt="hello", max_new_tokens=64)


@pytest.mark.parametrize("domain", ["arithmetic", "animals"])
def test_a_context_that_is_too_short_to_evaluate(domain, refused, tmp_path):
    path = tiny.checkpoint(tmp_path / "short.pt", context=24)
    assert "context" in refused(evaluate, checkpoint=path, opponent=path, domain=domain, prompts=2)


# --- divergence ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [6, 1])
@pytest.mark.parametrize("command", [*RL, *SUPERVISED, critic])
def test_a_learning_rate_that_destroys_the_weights(command, steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    more = dict(warmup=1)
    if command in RL:
        more = dict(reward="learned", reward_model=tiny.reward_checkpoint(tmp_path / "r.pt"))
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: works(command, tmp_path, lr="3e38", steps=steps, **more))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert "learning rate" in error
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    load_model(tmp_path / "run/checkpoint.pt", kind={reward_model: ScalarGPT, critic: Critic}.get(command, GPT))


# --- run folders --------------------------------------------------------------------------------------------------

def test_an_earlier_run_is_kept(tmp_path):
    weights = []
    for seed in 1, 2, 3:
        works(grpo, tmp_path, seed=seed)
        weights.append((tmp_path / "run/checkpoint.pt").read_bytes())
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run.1", "run.2"]
    assert [(tmp_path / name / "checkpoint.pt").read_bytes() for name in ("run.1", "run.2", "run")] == weights
    assert [json.loads((tmp_path / name / "config.json").read_text())["seed"] for name in ("run.1", "run")] == [1, 3]


@pytest.fixture
def begun(tmp_path, refused):
    """A finished run of two steps in the folder `run`, in place of the one that `refused` puts there."""
    shutil.rmtree(tmp_path / "run")
    works(grpo, tmp_path)
    return tmp_path / "run"


def test_going_on_with_other_settings_is_refused(begun, refused, tmp_path):
    assert "lr" in refused(grpo, "--resume", lr=0.5)
    tiny.checkpoint(tmp_path / "sft.pt", seed=3)
    assert "inputs" in refused(grpo, "--resume"), "the SFT model is another one than before, under the same name"
    tiny.checkpoint(tmp_path / "sft.pt")
    works(grpo, tmp_path, "--resume")
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("command, use", [(grpo, "reward=learned"), (ppo, "reward=learned"),
                                          (critic, "reward=learned")])
def test_going_on_from_another_model_is_refused(command, use, refused, tmp_path):
    # Both files have the same name, as in the folders of a main job, and each in turn is another one than before.
    (tmp_path / "stage3").mkdir()
    more = dict([use.split("=")], run=tmp_path / "run2", reward_model=tmp_path / "stage3/sft.pt")
    tiny.reward_checkpoint(tmp_path / "stage3/sft.pt")
    works(command, tmp_path, **more)
    tiny.checkpoint(tmp_path / "stage3/sft.pt", ScalarGPT, seed=5)
    assert "inputs" in refused(command, "--resume", **more)
    tiny.reward_checkpoint(tmp_path / "stage3/sft.pt")
    tiny.checkpoint(tmp_path / "sft.pt", seed=5)
    assert "inputs" in refused(command, "--resume", **more)


@pytest.mark.parametrize("content", [None, "", "{", '{"step": 1}\n', "step\nnone\n"])
@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "samples.jsonl", "checkpoint.pt"])
def test_going_on_with_a_damaged_run(name, content, begun, refused, tmp_path):
    path = begun / name
    path.unlink() if content is None else path.write_text(content)
    if name == "config.json" and content is None:
        works(grpo, tmp_path, "--resume")                      # without it this is no run, and a new one begins
    elif name in ("config.json", "checkpoint.pt"):
        assert str(begun) in refused(grpo, "--resume")
    else:                                                      # metrics and samples may be refused or mended
        try:
            works(grpo, tmp_path, "--resume")
        except UserError as error:
            assert str(begun) in str(error)


# --- talking to a checkpoint --------------------------------------------------------------------------------------

def test_sample_answers(tmp_path, capsys):
    works(sample, tmp_path, prompt="what does a cow eat?", answers=3, max_new_tokens=5,
          reward_model=tiny.reward_checkpoint(tmp_path / "r.pt"))
    first = capsys.readouterr().out
    assert first.count("(score ") == 3
    works(sample, tmp_path, prompt="what does a cow eat?", answers=3, max_new_tokens=5, reward_model=tmp_path / "r.pt")
    assert capsys.readouterr().out == first, "the same seed gives the same answers"


def test_the_best_of_many_samples_is_the_one_that_the_reward_model_scores_highest(tmp_path, capsys):
    options = dict(prompt="what does a cow eat?", max_new_tokens=5,
                   reward_model=tiny.reward_checkpoint(tmp_path / "r.pt"))
    works(sample, tmp_path, answers=7, **options)
    answers = capsys.readouterr().out.splitlines()
    scores = [float(re.search(r"\(score (.*)\)$", answer)[1]) for answer in answers]
    works(sample, tmp_path, best_of=7, **options)
    best = answers[scores.index(max(scores))]
    assert len(set(scores)) > 4 and best != answers[0] and capsys.readouterr().out == best + "\n"


def test_the_best_of_many_samples_needs_somebody_to_choose(refused):
    assert "--reward-model" in refused(sample, prompt="hello", best_of=4)


def test_sample_reads_questions_until_an_empty_line(tmp_path, capsys, monkeypatch):
    questions = iter(["hello", "<|end|><think> \u00fc", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(questions))
    works(sample, tmp_path, answers=1, max_new_tokens=5)
    assert next(questions, "none left") == "none left"

    def end(*_):
        raise EOFError
    monkeypatch.setattr("builtins.input", end)
    works(sample, tmp_path)


# --- as a user starts them ----------------------------------------------------------------------------------------

def start(words, folder, **more):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=folder, env=environment, **more)


def test_a_mistake_in_a_shell(tmp_path):
    process = start(["grpo_min.grpo", *arguments(grpo, tmp_path, group_size=1)], tmp_path)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1


def test_ctrl_c_in_a_shell_and_what_it_says_to_go_on(tmp_path):
    process = start(["grpo_min.grpo", *arguments(grpo, tmp_path, run=tmp_path / "my run", steps=150)], tmp_path)
    while not process.stdout.readline().startswith("step 1/150"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "error: stopped by Ctrl-C"
    command = next(line for line in error.splitlines() if "go on with: " in line).split("go on with: ")[1]
    done = load_checkpoint(tmp_path / "my run/checkpoint.pt")["step"]
    python, dash_m, name, *words = shlex.split(command)
    assert (python, dash_m, name) == ("python", "-m", "grpo_min.grpo") and 0 < done < 150
    grpo.main(words)
    rows = read_csv(tmp_path / "my run/metrics.csv")
    assert [row["step"] for row in rows] == list(range(150)) and not (tmp_path / "my run.1").exists()
    assert load_checkpoint(tmp_path / "my run/checkpoint.pt")["step"] == 150


# --- processes beside each other ----------------------------------------------------------------------------------

def test_ctrl_c_stops_runs_beside_each_other_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    words = arguments(compare, tmp_path, rewards="correct", algorithms="GRPO", steps=400)
    process = start(["grpo_min.lab.compare", *words], tmp_path, start_new_session=True)
    while not process.stdout.readline().startswith("grpo-correct-1: step 1/400"):
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)                                   # as a terminal does: to all of them
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error, error
    # Which of the two is said depends on who hears of it first: the command, or the run that it waits for.
    assert error.splitlines()[-1] in ("stopped", "error: stopped by Ctrl-C")
    run = tmp_path / "run/grpo-correct-1"
    done = load_checkpoint(run / "checkpoint.pt")["step"]
    assert 0 < done < 400 and len(read_csv(run / "metrics.csv")) == done
    # The same command, in this process, up to the first step that it takes.
    step_done, steps = log.Run.step_done, []

    def stopping(run, step, *rest):
        steps.append(step)
        run.stopped = True
        return step_done(run, step, *rest)
    monkeypatch.setattr(log.Run, "step_done", stopping)
    monkeypatch.setattr(compare, "beside_each_other", tiny.one_after_the_other)
    with pytest.raises(UserError, match="Ctrl-C"):
        compare.main(words)
    assert steps == [done] and f"step {done + 1}/400" in capsys.readouterr().out
    assert load_checkpoint(run / "checkpoint.pt")["step"] == done + 1 and not Path(f"{run}.1").exists()


def test_a_call_in_a_process_of_its_own():
    assert in_own_process(torch.get_num_threads) == 1
    with pytest.raises(UserError, match="--steps must be above 0"):                        # a mistake comes back as one
        in_own_process(sft.train, sft.SFTConfig(run="", steps=0))
    with pytest.raises(UserError, match="killed"):
        in_own_process(os._exit, 1)
    before = Future()
    Timer(0.2, before.set_result, [-5]).start()
    assert in_own_process(abs, before) == 5, "what another call returns is waited for"
