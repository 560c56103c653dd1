"""The reader as annotator, at a terminal: every choice is on the disk before the next pair appears, whatever ends the
sitting. Real processes at a pseudo-terminal where a process can be lost, calls with typed keys where it cannot.
"""
import json
import os
import re
import select
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from grpo_min import reward_model
from grpo_min.evaluate import agreement, wilson
from grpo_min.lab import label
from grpo_min.lab.label import on_screen, read_choices, sample_pairs, schedule
from grpo_min.rewards import learned
from grpo_min.run import files
from grpo_min.run.config import UserError, run_command
from grpo_min.run.rng import generator
from grpo_min.run.table import read_csv
from tests import tiny

ROOT = Path(__file__).parent.parent
QUESTION = "u(ndo), q(uit)? "
SCREEN = re.compile(r"\[(\d+) of (\d+), choices so far: (\d+)\]  (.*?)\r?\n  1: (.*?)\r?\n  2: (.*?)\r?\n")

# On Windows there is no such terminal.
fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))


def words(folder, **more):
    """A sitting of 6 pairs with a tiny model, as words of a command line."""
    if not (folder / "sft.pt").exists():
        tiny.checkpoint(folder / "sft.pt")
        tiny.prompts(folder / "prompts.jsonl")
    options = dict(preferences=folder / "labels.jsonl", checkpoint=folder / "sft.pt", prompts=folder / "prompts.jsonl",
                   pairs=6, repeat=0, max_new_tokens=24, device="cpu")
    return as_words(dict(options, **more))


def as_words(options):
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


def rows(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def is_choice(row, view, key):
    """True if that row says what was chosen with key 1 or 2 of the pair on the screen."""
    sides = ["chosen", "rejected"] if key == "1" else ["rejected", "chosen"]
    return list(row) == ["prompt", "chosen", "rejected"] and [row["prompt"], *(on_screen(row[side]) for side in sides)
                                                              ] == list(view)


# --- at a terminal ------------------------------------------------------------------------------------------------

def take_terminal():
    """In the new process: the pseudo-terminal is its own, and what ends a process does, even if the tests ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A sitting in a process of its own, whose controlling terminal is a pseudo-terminal; `text` is what it printed."""

    def __init__(self, folder, **more):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grpo_min.lab.label", *words(folder, **more)], stdin=slave, stdout=slave,
            stderr=slave, cwd=folder, start_new_session=True, preexec_fn=take_terminal,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8"))
        os.close(slave)
        self.text = ""

    def read(self, until):
        """What is printed up to `until`; None: up to the end of the process."""
        start, new = len(self.text), b""
        while until is None or until.encode() not in new:
            assert select.select([self.master], [], [], 60)[0], f"{self.text}\n{new} and nothing more"
            try:
                part = os.read(self.master, 4096)
            except OSError:                                       # Linux: the other end is closed
                part = b""
            if not part:
                assert until is None, f"the sitting ended: {self.text}{new}"
                break
            new += part
        self.text += new.decode(errors="replace")              # the terminal echoes what is typed
        return self.text[start:]

    def see(self):
        """The next question -> (prompt, answer, answer) of the pair above it."""
        return SCREEN.findall(self.read(QUESTION))[-1][3:]

    def type(self, keys):
        os.write(self.master, keys.encode())

    def end(self):
        """Read to the end -> (what was printed, the exit code)."""
        return self.read(None), self.process.wait(timeout=60)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(**more):
        opened.append(Terminal(tmp_path, **more))
        return opened[-1]
    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        try:
            os.close(one.master)
        except OSError:
            pass


def test_kill_9_loses_no_choice_and_the_next_sitting_goes_on(terminal, tmp_path):
    sitting, path = terminal(), tmp_path / "labels.jsonl"
    view = sitting.see()
    for count, key in enumerate("121", start=1):
        sitting.type(key + "\n")
        before, view = view, sitting.see()
        assert len(rows(tmp_path)) == count and is_choice(rows(tmp_path)[-1], before, key)
    sitting.process.kill()
    sitting.process.wait()
    first = path.read_bytes()
    assert first.count(b"\n") == 3

    path.write_bytes(first + b'{"prompt": "start with 3", "cho')
    sitting = terminal()
    again = sitting.see()
    assert "tore the last line" in sitting.text and "holds 3 choices" in sitting.text
    assert path.read_bytes() == first and view != again
    sitting.type("2\nq\n")
    text, code = sitting.end()
    assert code == 0 and "labels.jsonl holds 4." in text
    assert path.read_bytes().startswith(first) and len(rows(tmp_path)) == 4 and is_choice(rows(tmp_path)[3], again, "2")


@pytest.mark.parametrize("key", ["\x03", "\x04", "q\n"], ids=["Ctrl-C", "end of input", "q"])
def test_ends_that_are_no_mistakes(key, terminal, tmp_path):
    sitting = terminal()
    view = sitting.see()
    sitting.type("2\n")
    sitting.see()
    sitting.type(key)
    text, code = sitting.end()
    assert code == 0 and "Traceback" not in text and "Choices in this sitting: 1," in text and "holds 1." in text
    assert len(rows(tmp_path)) == 1 and is_choice(rows(tmp_path)[0], view, "2")


def test_a_terminal_that_is_closed(terminal, tmp_path):
    sitting = terminal()
    view = sitting.see()
    sitting.type("1\n")
    sitting.see()
    os.close(sitting.master)
    assert sitting.process.wait(timeout=60) == -signal.SIGHUP
    assert len(rows(tmp_path)) == 1 and is_choice(rows(tmp_path)[0], view, "1")


def test_undo_skip_and_a_wrong_key(terminal, tmp_path):
    sitting = terminal()
    first = sitting.see()
    for wrong in b"3", b"", b"12", b"\xfc", b"u":                     # one of them no UTF-8
        os.write(sitting.master, wrong + b"\n")
        reply = sitting.read(QUESTION)
        assert ("nothing to undo" if wrong == b"u" else "please type 1, 2, s, u or q") in reply
        assert (tmp_path / "labels.jsonl").read_bytes() == b""
    views = []
    for key in "1", "SKIP", "2", "s":
        sitting.type(key + "\n")
        views.append(sitting.see())
    assert len({first, *views}) == 5, "other pairs each time"
    assert [row["prompt"] for row in rows(tmp_path)] == [first[0], views[1][0]]
    sitting.type("u\n")
    assert sitting.see() == views[1] and len(rows(tmp_path)) == 1
    sitting.type("1\n")
    assert sitting.see() == views[2] and is_choice(rows(tmp_path)[1], views[1], "1")
    sitting.type("undo\n")
    sitting.read(QUESTION)
    sitting.type("u\n")
    assert sitting.see() == first and rows(tmp_path) == []


# --- with typed keys ----------------------------------------------------------------------------------------------

@pytest.fixture
def sit(tmp_path, monkeypatch, capsys):
    """sit(keys, **options) -> the views and all that was printed. keys: a string, typed one by one and then the end of
    the input; or a function from (prompt, answer, answer) to a key."""
    def sit(keys, **more):
        printed, views, left = [], [], iter(() if callable(keys) else keys)

        def typed(question):
            printed.append(capsys.readouterr().out)
            views.extend(view[3:] for view in SCREEN.findall(printed[-1]))
            try:
                return keys(views[-1]) if callable(keys) else next(left)
            except StopIteration:
                raise EOFError
        monkeypatch.setattr("builtins.input", typed)
        label.main(words(tmp_path, **more))
        return views, "".join(printed) + capsys.readouterr().out
    return sit


@pytest.mark.parametrize("steady", [True, False])
def test_some_pairs_come_again_exchanged_and_are_not_written_again(steady, sit, tmp_path):
    def key(view):
        return "12"[view[1] > view[2]] if steady else "1"
    views, text = sit(key, pairs=8, repeat=0.25)
    again = [n for n, (prompt, a, b) in enumerate(views) if (prompt, b, a) in views[:n]]
    assert len(views) == 10 and len(again) == 2
    for n in again:
        prompt, a, b = views[n]
        assert n - views.index((prompt, b, a)) >= 4, "half a sitting later"
    expected = [view for n, view in enumerate(views) if n not in again]
    assert len(rows(tmp_path)) == len(expected) == 8
    assert all(is_choice(row, view, key(view)) for row, view in zip(rows(tmp_path), expected))
    assert f"the same answer in {agreement([steady] * 2)}" in text
    assert "Choices in this sitting: 10, of which repeats: 2." in text


def test_a_repeat_that_is_undone_leaves_the_file_and_one_that_was_skipped_never_comes(sit, tmp_path):
    views, text = sit("1112u2", pairs=4, repeat=0.5)                 # pairs 0, 1, 2, 0 again, 3, 1 again
    prompt, a, b = views[0]
    assert views[3] == views[5] == (prompt, b, a)
    assert len(rows(tmp_path)) == 3 and f"the same answer in {agreement([True])}" in text
    (tmp_path / "labels.jsonl").unlink()
    views, text = sit("ssssss", pairs=4, repeat=0.5)
    assert len(views) == 4 and rows(tmp_path) == [] and "No pair was chosen from twice" in text


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_schedule(count):
    pairs = [(f"p{k}", f"a{k}", f"b{k}") for k in range(count)]
    for share in 0, 0.1, 0.5:
        turns = schedule(pairs, share, generator(1, 0))
        assert [pair for pair, first in turns if first is None] == pairs
        repeats = [(n, pair, first) for n, (pair, first) in enumerate(turns) if first is not None]
        assert len(repeats) == min(round(share * count), count // 2) == len({first for _, _, first in repeats})
        for n, (prompt, a, b), first in repeats:
            assert turns[first] == ((prompt, b, a), None) and n - first >= count // 2


def test_an_undo_that_fails_midway_loses_nothing(sit, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    words(tmp_path)                                                  # writes the checkpoint
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        sit("12u")
    assert len(rows(tmp_path)) == 2 and [path.name for path in tmp_path.glob("labels*")] == ["labels.jsonl"]


def test_an_undo_takes_back_nothing_that_others_wrote(sit, tmp_path):
    def keys(view, count=[0]):
        count[0] += 1
        if count[0] == 2:
            with open(tmp_path / "labels.jsonl", "a") as file:
                file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        return "1u"[count[0] - 1]
    with pytest.raises(UserError, match="changed"):
        sit(keys)
    assert len(rows(tmp_path)) == 2


def test_the_seed_decides_what_is_shown(sit, tmp_path):
    views, _ = sit("ssssss")
    assert len(set(views)) == 6 and all(a != b for _, a, b in views)
    assert sit("ssssss")[0] == views and sit("ssssss", seed=2)[0] != views


def test_pairs_that_are_never_shown(monkeypatch):
    """Answers that look alike, were cut, would grow when read again, were seen before or were chosen from before."""
    said = [("same.", " same. "), ("cut", "whole."), ("\ufffd" * 6, "short."), ("x", "y"), ("y", " x"), ("new", "old"),
            ("good", "better")]
    texts = [text for pair in said + said[:1] * 25 for text in pair]
    finished = torch.tensor([text != "cut" for text in texts])
    rollout = types.SimpleNamespace(texts=lambda tokenizer: texts, finished=finished)
    monkeypatch.setattr(label, "sample", lambda *_: rollout)
    config = label.LabelConfig(max_new_tokens=12)
    known = [dict(prompt="p", chosen="old", rejected="new ")]
    pairs = sample_pairs(tiny.gpt(), ["p"], 9, known, config, generator(1, 0))
    assert pairs == [("p", "x", "y"), ("p", "good", "better")]
    assert sample_pairs(tiny.gpt(), ["p"], 1, known, config, generator(1, 0)) == pairs[:1]


def test_what_a_terminal_would_obey_is_not_printed():
    assert on_screen(" a\x1b[2J\n b\r\x07 \u202e") == "a?[2J b ? ?" and on_screen(" \n") == "(nothing)"


# --- mistakes -----------------------------------------------------------------------------------------------------

ROW = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize("content", [
    ROW + b"{\n" + ROW, ROW + b'{"prompt": "p", "cho\n', ROW + b"hello", b"hello", b'{"prompt": 3}', b"\n",
    b'{"prompt": "p", "chosen": "a"}\n', ROW.replace(b"}", b', "animal": "cow"}'), b"\xff\xfe\n"])
def test_a_file_that_holds_something_else_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="labels.jsonl"):
        read_choices(path)
    assert path.read_bytes() == content


def test_every_torn_last_line_is_cut_off_and_a_whole_one_kept(tmp_path, capsys):
    path, row = tmp_path / "labels.jsonl", json.loads(ROW)
    assert read_choices(path) == []
    for length in range(len(ROW)):
        path.write_bytes(ROW + ROW[:length])
        whole = length == len(ROW) - 1
        assert read_choices(path) == [row] * (2 if whole else 1)
        assert path.read_bytes() == ROW * (2 if whole else 1)
        assert ("tore" in capsys.readouterr().out) == (not whole and length > 0)
    path.write_bytes(ROW[:20])
    assert read_choices(path) == [] and path.read_bytes() == b""


@pytest.mark.parametrize("options, named", [
    (dict(pairs=0), "--pairs"), (dict(temperature=0), "--temperature"),
    (dict(temperature="nan"), "--temperature"), (dict(max_new_tokens=0), "--max-new-tokens"),
    (dict(repeat=0.6), "--repeat"), (dict(repeat="nan"), "--repeat"), (dict(max_new_tokens=60), "context"),
    (dict(checkpoint="nowhere.pt"), "nowhere.pt"), (dict(prompts="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(temperature=1e-6), "--temperature"),
    (dict(preferences="."), "directory"), (dict(preferences="sft.pt/labels.jsonl"), "sft.pt")])
def test_a_mistake_is_one_line(options, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: label.main(words(tmp_path, **options)))
    error = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "labels.jsonl").exists()


# --- a reward model of them ---------------------------------------------------------------------------------------

def train(folder, **more):
    options = dict(preferences=folder / "labels.jsonl", sft=folder / "sft.pt", run=folder / "run", steps=4,
                   heldout=tiny.preferences(folder / "heldout.jsonl"), device="cpu")
    reward_model.main(as_words(dict(options, **more)))


def test_a_reward_model_learns_from_a_few_choices_and_is_judged_on_others(sit, tmp_path, capsys, watch):
    sit("1" * 8, pairs=8)
    assert len(rows(tmp_path)) == 8
    batches, kept = watch(reward_model, "batch_rows"), watch(reward_model, "report_kept_back")
    train(tmp_path)
    assert len(read_csv(tmp_path / "run/metrics.csv")) == 4 and not kept
    assert [(count, size) for (count, size, *_), _ in batches] == [(8, 8)] * 4          # the default batch has 24
    assert "kept back" not in capsys.readouterr().out
    train(tmp_path, holdout=0.3)
    out = capsys.readouterr().out
    ((model, back, path), _), = kept
    scores = [learned(model)([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) for row in back]
    right = [chosen > rejected for chosen, rejected in scores]
    assert 0 < len(back) < 8 and f"labels.jsonl it agrees in {agreement(right)}; a tossed coin" in out
    assert "by heart" not in out
    train(tmp_path, steps=21)
    assert "each of only 8 choices 21 times" in capsys.readouterr().out


def test_choices_kept_back_are_never_trained_on(tmp_path, watch):
    tiny.checkpoint(tmp_path / "sft.pt")
    choices = [dict(prompt=f"p{i % 7}", chosen=f"a{i}", rejected="b") for i in range(20)]
    tiny.jsonl(tmp_path / "labels.jsonl", choices)
    read, back = watch(reward_model, "pad_completions"), watch(reward_model, "keep_back")
    train(tmp_path, holdout=0.3, batch_size=5, steps=12)
    used = {text for (texts, *_), _ in read for text in texts} - {"b"}
    (trained, kept), again = back[0][1], back[1][1]
    assert (trained, kept) == again and used == {row["chosen"] for row in trained}
    assert len({row["prompt"] for row in kept}) == 2 and not used & {row["chosen"] for row in kept}
    assert sorted(trained + kept, key=choices.index) == choices
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in kept}
    assert reward_model.keep_back(choices, 0, 1) == (choices, [])
    assert reward_model.keep_back(choices, 0.3, 2)[1] != kept


@pytest.mark.parametrize("share", [-0.1, 1, 0.01, 0.99, float("nan")])
def test_shares_that_leave_nothing(share):
    with pytest.raises(UserError, match="--holdout"):
        reward_model.keep_back([dict(prompt=str(i)) for i in range(5)], share, 1)


@pytest.mark.parametrize("right, low", [(5, "57%"), (4, "38%"), (0, "0%")])
def test_the_agreement_with_five_choices(right, low, monkeypatch, capsys):
    monkeypatch.setattr(reward_model, "learned", lambda _: lambda prompts, texts: [float(text) for text in texts])
    kept = [dict(prompt="p", chosen="1", rejected="0" if i < right else "1") for i in range(5)]    # a tie is no success
    reward_model.report_kept_back(None, kept, "mine.jsonl")
    out = capsys.readouterr().out
    assert f"mine.jsonl it agrees in {right} of 5, " in out and f"interval {low} to" in out and "coin" in out


def test_wilson_interval():
    """The ends are the shares p of which the observed one is 1.96 standard errors, sqrt(p (1 - p) / n), away."""
    for right, n in (9, 12), (0, 5), (5, 5), (1, 1), (60, 100):
        share, low, high = wilson([True] * right + [False] * (n - right))
        assert share == right / n and low <= share <= high and high - low > 0.15
        for p in low, high:
            assert (share - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n, abs=1e-9)
    assert agreement([True] * 9 + [False] * 3) == "9 of 12, 75% (95% interval 47% to 91%)"
