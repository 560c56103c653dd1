"""A task of one's own: each mistake in its file is answered by one line that names it, the commands use its functions
and nothing else, and the worked example, Countdown, rewards what it says and cannot be talked into more.
"""
import json
import runpy
import warnings
from pathlib import Path

import pytest

from grpo_min import critic, evaluate, grpo, ppo, sft
from grpo_min.rewards import numbers
from grpo_min.run.config import UserError, run_command
from grpo_min.run.table import read_csv
from grpo_min.task import load_task
from tests import tiny
from tests.tiny import TOKENIZER

pytestmark = pytest.mark.usefixtures("no_curves")
COUNTDOWN = Path(__file__).parent.parent / "tutorials" / "tasks" / "countdown.py"
GOOD = '''
def prompts(split):
    return [dict(prompt=f"{split} {i} or {i + 1}?", wish="e" if i % 2 else "a", size=i) for i in range(12)]

def demonstrations():
    return [dict(prompt=f"{i} or {i + 1}?", response=f" e {i}") for i in range(12)]

def reward(prompts, completions, wish, size, finished, **columns):
    assert len(prompts) == len(completions) == len(wish) == len(size) == len(finished) and not columns
    assert all(prompt.split()[1] == str(i) for prompt, i in zip(prompts, size))
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wish)]
'''


def write(folder, text=GOOD, name="mine.py"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def words(folder, command, **more):
    """A short run of a command on a tiny checkpoint, as words of a command line."""
    options = dict(run=folder / "run", steps=2, device="cpu")
    if command is sft:
        options.update(base=folder / "base.pt", batch_size=4)
    elif command is evaluate:
        options = dict(checkpoint=folder / "base.pt", max_new_tokens=6, device="cpu")
    else:
        options.update(sft=folder / "base.pt", prompts_per_step=4, max_new_tokens=6)
        options |= dict(group_size=3) if command is not critic else {}
        options |= dict(critic="sft") if command is ppo else {}
    if not (folder / "base.pt").exists():
        tiny.checkpoint(folder / "base.pt")
    return [word for name, value in {**options, **more}.items() for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(command, text of a task file, **options) runs it, expects one line, and returns the line."""
    def refused(command, text, **options):
        task = write(tmp_path, text)
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: command.main(words(tmp_path, command, task=task, **options)))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and len(error) < 600
        assert task in error, error
        return error.replace(task, "FILE")
    return refused


# --- mistakes -----------------------------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("command", [sft, critic, grpo, ppo, evaluate],
                              ids=["sft", "critic", "grpo", "ppo", "evaluate"])


@ALL
def test_a_file_that_cannot_be_run(command, refused, tmp_path):
    for text, line in [("x = 1\nx = = 2\n", 2), ("import nothing_of_this_name\n", 1), ("\n\n1 / 0\n", 3),
                       ("raise SystemExit(3)\n", 1), ("def f():\n    raise ValueError('a\\nb')\nf()\n", 2),
                       ("if True:\nx = 1\n", 2), ("def f():\n  return f()\nf()\n", 2)]:
        assert f"FILE, line {line}: " in refused(command, text), text
    assert not (tmp_path / "run").exists()


@ALL
def test_a_file_that_is_not_there_or_no_program(command, refused, tmp_path, capsys):
    for path in tmp_path / "nowhere.py", tmp_path:
        with pytest.raises(SystemExit):
            run_command(lambda: command.main(words(tmp_path, command, task=path)))
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot read {path}: ") and error.count("\n") == 1
    (tmp_path / "bytes.py").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="bytes.py"):
        load_task(str(tmp_path / "bytes.py"))


@ALL
def test_a_function_that_is_missing(command, refused, tmp_path):
    needed = ["demonstrations"] if command is sft else ["prompts", "reward"]
    for name in needed:
        for text in GOOD.replace(f"def {name}(", "def another("), GOOD + f"\n{name} = 3\n":
            assert f"FILE defines no function {name}" in refused(command, text)
    others = {"prompts", "demonstrations", "reward"} - set(needed)
    for name in others:                                                   # those that a command does not need may lack
        command.main(words(tmp_path, command, task=write(tmp_path, GOOD.replace(f"def {name}(", "def another("))))


ROWS = {        # what prompts or demonstrations returns: what the line says
    "[]": "FILE has no UNITs", "None": "FILE, UNITs(): TypeError", "3": "FILE, UNITs(): TypeError",
    "['a']": "FILE, UNIT 1: not an object", "[dict(a='b')]": 'FILE, UNIT 1: the field "prompt"',
    "[dict(prompt=[3], response='y')] * 12": 'FILE, UNIT 1: the field "prompt" is [3]',
    "[dict(prompt='x', response='y')] * 12 + [{}]": 'FILE, UNIT 13: the field "prompt"',
    "[dict(prompt='x', response='y')]": "FILE has 1 UNITs, where 4 are needed",
    "[dict(prompt='x', response='y')] * 12 + [1 / 0]": "FILE, line 2: ZeroDivisionError",
    "[dict(prompt='x', response='y')] * 12 + [dict(prompt='a cow ' * 40, response='y')]": "FILE, UNIT 13: ",
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("command", [sft, grpo, ppo], ids=["sft", "grpo", "ppo"])
def test_rows_that_are_none(command, rows, refused, tmp_path):
    name = "demonstrations" if command is sft else "prompts"
    error = refused(command, f"def {name}(*split):\n  return {rows}\n\ndef reward(**columns):\n  return []\n")
    assert ROWS[rows].replace("UNIT", name[:-1]) in error
    assert ("context of 64" in error) == ("cow" in rows)
    assert not (tmp_path / "run").exists(), "before anything is written"


def test_rows_that_are_made_one_by_one(refused):
    yielding = "def prompts(split):\n  yield dict(prompt='x')\n  raise KeyError('late')\ndef reward(**c): return []\n"
    assert "FILE, line 3: KeyError: 'late'" in refused(grpo, yielding)


def test_prompts_that_evaluate_asks_for(refused):
    assert "KeyError: 'val'" in refused(evaluate, GOOD.replace("return [dict(", "return dict(test=1)[split] or [dict("),
                                        split="val")
    assert " 1: " in refused(evaluate, GOOD.replace("dict(prompt=", "dict(question="))


def test_names_that_the_reward_gets_already(refused):
    assert "finished" in refused(grpo, GOOD.replace("size=i", "finished=i"))


REWARDS = {     # the body of reward: what the line says
    "return [1.0]": "12 finite numbers", "return [float('nan')] * len(completions)": "12 finite numbers",
    "return ['good'] * len(completions)": "12 finite numbers", "return [[1]] * len(completions)": "12 finite numbers",
    "return [1e300] * len(completions)": "12 finite numbers", "return None": "FILE, reward(): TypeError",
    "return [1 / 0 for _ in prompts]": "FILE, line 9: ZeroDivisionError", "exit(1)": "FILE, line 9: SystemExit",
    "yield 1 / 0": "FILE, line 9: ZeroDivisionError", "import json; json.loads('{')": "FILE, line 9: JSONDecodeError",
}


@pytest.mark.parametrize("body", REWARDS)
def test_rewards_that_are_none(body, refused):
    before, _ = GOOD.split("    assert len(prompts)")
    text = before + "    " + body + "\n"
    for command in grpo, ppo:
        assert REWARDS[body] in refused(command, text)
    assert REWARDS[body].replace("12 f", "48 f") in refused(evaluate, text)


def test_a_reward_that_does_not_take_the_columns(refused):
    text = GOOD.replace("wish, size, finished, **columns", "wish, size")
    assert "FILE, reward(): TypeError: reward() got an unexpected keyword argument 'finished'" in refused(grpo, text)


@pytest.mark.parametrize("command, options", [(grpo, dict(reward="both")), (ppo, dict(reward="learned")),
                                              (grpo, dict(prompts="p.jsonl")), (sft, dict(demonstrations="d.jsonl"))])
def test_two_tasks_at_once(command, options, tmp_path):
    with pytest.raises(UserError, match="--task replaces"):
        command.main(words(tmp_path, command, task=write(tmp_path), **options))


@ALL
def test_help_says_that_the_file_is_executed(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "executed" in " ".join(capsys.readouterr().out.split())


# --- from demonstrations to an evaluation -------------------------------------------------------------------------

def test_all_commands_on_a_task(tmp_path, capsys):
    task = write(tmp_path)
    sft.main(words(tmp_path, sft, task=task, run=tmp_path / "sft", steps=30, lr=0.01, warmup=5))
    losses = [row["loss"] for row in read_csv(tmp_path / "sft/metrics.csv")]
    assert losses[-1] < 0.7 * losses[0], "the demonstrations are learned"
    start = tmp_path / "sft/checkpoint.pt"
    for loop, name in (grpo, "grpo"), (ppo, "ppo"):
        loop.main(words(tmp_path, loop, task=task, run=tmp_path / name, sft=start, steps=3))
        with open(tmp_path / name / "samples.jsonl", encoding="utf-8") as file:
            samples = [json.loads(line) for line in file]
        assert all(sample["prompt"].startswith("train ") for sample in samples)
        for sample in samples:
            letter = "ae"[int(sample["prompt"].split()[1]) % 2]
            expected = sample["completion"].count(letter) / max(len(sample["completion"]), 1)
            assert sample["reward"] == pytest.approx(expected, abs=1e-4)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert any(file.startswith("mine.py ") for file in settings["inputs"])
    capsys.readouterr()
    out = tmp_path / "figures.json"
    evaluate.main(words(tmp_path, evaluate, task=task, checkpoint=tmp_path / "grpo/checkpoint.pt", prompts=5, out=out))
    figures = json.loads(out.read_text())
    assert list(figures) == ["reward", "reward_greedy", "full", "pass@2", "pass@4", "thinking", "length", "truncated"]
    assert all(low <= mean <= high for mean, low, high in figures.values())
    assert "5 " + task + " test prompts" in capsys.readouterr().out


def test_evaluation_by_hand(tmp_path, monkeypatch):
    said = ["e", "e", "a", "ae", "a", "a", "a", "a*"]

    def answers(policy, prompts, samples, *rest):
        assert prompts == ["val 0 or 1?", "val 6 or 7?"], "evenly spread"
        chosen = said if samples == 4 else said[3::4]
        return [text.strip("*") for text in chosen], ["*" not in text for text in chosen], [1] * len(chosen)
    monkeypatch.setattr(evaluate, "answers", answers)
    prompts, reward = load_task(write(tmp_path), "prompts", "reward")
    rows = evaluate.held_out(prompts, "val", 2)
    figures = {name: mean for name, (mean, _, _) in evaluate.evaluate("a", reward, rows).items()}
    # the wish is "a" twice: rewards 0, 0, 1, 1/2 and 1, 1, 1, 1
    assert figures == pytest.approx({"reward": 5.5 / 8, "reward_greedy": 0.75, "full": 5 / 8, "pass@2": 0.75,
                                     "pass@4": 1, "thinking": 0, "length": 1, "truncated": 1 / 8})


@pytest.mark.parametrize("command", [sft, grpo, ppo], ids=["sft", "grpo", "ppo"])
def test_going_on_with_another_file_is_refused(command, tmp_path):
    options = words(tmp_path, command, task=write(tmp_path))
    command.main(options)
    command.main([*options, "--resume"])
    write(tmp_path, GOOD + "# another version\n")
    with pytest.raises(UserError, match="other settings: inputs"):
        command.main([*options, "--resume"])
    command.main(options)                                                   # without --resume a new run begins
    assert (tmp_path / "run.1").exists()


def test_a_reward_given_as_a_function_wins(tmp_path):
    config = grpo.GRPOConfig(run="", task=write(tmp_path), sft=tiny.checkpoint(tmp_path / "base.pt"), steps=1,
                             prompts_per_step=4, group_size=3, max_new_tokens=6, device="cpu")
    _, rows = grpo.train(config, reward=lambda prompts, completions, **columns: [7.0] * len(completions))
    assert rows[0]["reward"] == 7


# --- Countdown ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def countdown():
    return load_task(str(COUNTDOWN), "prompts", "demonstrations", "reward")


def rewarded(countdown, completion, given=(3, 5, 2), target=16, finished=True):
    with warnings.catch_warnings():
        warnings.simplefilter("error")                          # Python's parser has remarks on some of these
        return countdown[2](["p"], [completion], numbers=[list(given)], target=[target], finished=[finished])[0]


@pytest.mark.parametrize("completion", [
    " (3+5)*2", "(3+5)*2", "2*(5+3)", " ( 3 + 5 ) * 2 ", "((3+5))*(2)", "2  *(3 +5)",
    "<think> 3 plus 5 is 8</think> (3+5)*2", "<think>(((</think>\n(5+3)*2\n", "\t2*(3+5)\t"])
def test_any_right_expression_is_right(countdown, completion):
    assert rewarded(countdown, completion) == 1.0


@pytest.mark.parametrize("completion", ["3+5+2", "3*5+2", "3-5-2", "2*3-5", "(3-5)*2", "<think> x</think> 3+5+2"])
def test_the_numbers_with_another_value_get_a_little(countdown, completion):
    assert rewarded(countdown, completion) == 0.1


CHEATS = [
    "16", "8*2", "2*8", "15+1", "3+5+2+6", "(3+5)*2+0", "3+5", "3*5+2-1", "(3+5)*2*1",             # other numbers
    "3*2+5*2", "3+3+5+5", "2*2*2*2", "(3+5)*2+3-3", "35-2", "3+13", "18-2", "(3+5)*02", "(03+5)*2", "(3+5)*2.0",
    "(3+5)*2e0", "-(3+5)*-2", "(3+5)*+2", "+3*5+2--1", "-3+5+2", "~3", "not 3", "(3+5)*2==16", "(3+5)*2 if 1 else 0",
    "5/3*2", "(3+5)/2", "(3+5)//2", "5%3+2", "2**(5-3)", "2**5-3", "(5-3)**2", "9**9**9**9", "9**(9**(9**9))", "2<<3",
    "3|5", "3&5", "3^5^2", "3@5", "", " ", "()", "(3+5)*2)", "((3+5)*2", "(3+5)2", "3(5)2", "3 5 2",
    "3,5,2", "(3+5)*2,", "(3+5)*2=16", "16=(3+5)*2", "(3+5)*2 = 16", "(3+5)*2.", "(3+5)*2 (3+5)*2", "(3+5)*2;",
    "(3+5)*2 # 16", "x:=16",
    "__import__('os').system('echo 3 5 2')", "exec('x')", "print(16)", "(lambda: 16)()", "[3,5,2][0]", "'16'", "True",
    "None", "...", "16j", "1_6", "0x10", "0b10000", "(3+5)*2\\", "(3+5)\n*2", "(3\n+5)*2", "(3+5)\t*2", "(3+5)*2\x00",
    "\x00", "(３+5)*2", "(3+5)*２", "(3+5)×2", "(3+5)∗2", "(3+5)*²", "(٣+٥)*٢", "Ⅲ+5", "(3＋5)*2", "3\u00a0+5+2",
    "(3+5)*2\ufeff", "[3]",
    "(" * 5000 + "3" + ")" * 5000, "3+" * 50000 + "5", "1" * 100000, "(" * 25 + "3+5" + ")" * 25 + "*2",
    "(3+5)*2" + " " * 40 + "+0", "use 3, 5 and 2", "the answer is (3+5)*2", "plus", "3 plus 5 plus 2",
    "<think>(3+5)*2", "<think></think>(3+5)*2", "(3+5)*2</think>", "</think>(3+5)*2", "<think> x</think>",
    "<think> (3+5)*2</think> 16", "<think> x</think> (3+5)*2<think> y</think>",
    "<think> a</think><think> b</think>(3+5)*2",
    "x<think> a</think>(3+5)*2", "<|end|>", "(3+5)*2<|end|>",
]


@pytest.mark.parametrize("completion", CHEATS, ids=range(len(CHEATS)))
def test_anything_else_gets_nothing(countdown, completion):
    assert rewarded(countdown, completion) == 0.0


def test_what_was_cut_gets_nothing(countdown):
    assert rewarded(countdown, " (3+5)*2", finished=False) == 0.0


def test_the_target_among_the_numbers_and_numbers_that_are_equal(countdown):
    assert rewarded(countdown, "6", (6, 1, 6), 6) == 0.0
    assert rewarded(countdown, "6*1", (6, 1, 6), 6) == 0.0
    assert rewarded(countdown, "6*1-6", (6, 1, 6), 0) == 1.0
    assert rewarded(countdown, "6*6*1", (6, 1, 6), 36) == 1.0 and rewarded(countdown, "6*6*6", (6, 1, 6), 36) == 0.0
    assert rewarded(countdown, "12*3-1", (1, 3, 12), 35) == 1.0
    assert rewarded(countdown, "1*2*3-1", (1, 3, 12), 5) == 0.0


def test_each_row_is_judged_by_its_own_numbers(countdown):
    rewards = countdown[2](["p"] * 3, ["1+2+3"] * 3, numbers=[[1, 2, 3], [3, 2, 1], [1, 2, 4]], target=[6, 7, 7],
                           finished=[True] * 3)
    assert rewards == [1.0, 0.1, 0.0]


def numbers_in(prompt):
    return [int(word.strip(",.")) for word in prompt.split() if word.strip(",.").isdigit()]


def test_splits_share_no_problem_in_any_order(countdown):
    problems = {split: {(tuple(sorted(row["numbers"])), row["target"]) for row in countdown[0](split)}
                for split in ("train", "val", "test")}
    rows = {split: countdown[0](split) for split in problems}
    assert all(len(rows[split]) == len(problems[split]) for split in rows)
    assert len(rows["val"]) == len(rows["test"]) == 500 and len(rows["train"]) > 1500
    assert not (problems["train"] & problems["val"] | problems["train"] & problems["test"]
                | problems["val"] & problems["test"])
    for row in rows["train"]:
        a, b, c = row["numbers"]
        assert row["prompt"] == f"use {a}, {b} and {c} to make {row['target']}."
    asked = [numbers_in(row["prompt"]) for row in countdown[1]()]
    assert {(tuple(sorted(given)), target) for *given, target in asked} == problems["train"], "no other is demonstrated"


def test_demonstrations_are_right_and_fit(countdown):
    rows, solved = countdown[1](), []
    for row in rows:
        *given, target = numbers_in(row["prompt"])
        solved.append(rewarded(countdown, row["response"], given, target))
    assert set(solved) == {1.0} and len(rows) > 6000
    thinking = [row["response"] for row in rows if row["response"].startswith("<think>")]
    assert 0.45 < len(thinking) / len(rows) < 0.55
    for text in thinking:
        for attempt in text.split("</think>")[0].removeprefix("<think>").split("."):
            for step in attempt.split(","):
                a, word, b, is_, value = step.split()
                assert is_ == "is" and int(value) == dict(plus=int(a) + int(b), minus=int(a) - int(b),
                                                          times=int(a) * int(b))[word]
                assert int(value) in range(50)
    longest = max(len(TOKENIZER.encode_completion(row["response"])) for row in rows)
    assert max(len(TOKENIZER.encode_prompt(row["prompt"])) for row in rows) + 60 <= 80 and longest <= 60


def test_the_same_rows_in_every_process(countdown):
    again = runpy.run_path(str(COUNTDOWN))
    assert again["prompts"]("train") == countdown[0]("train") and again["demonstrations"]() == countdown[1]()


def test_checked_as_any_reward(countdown):
    with pytest.raises(UserError, match="reward.. of .*countdown.py must return 2 finite numbers"):
        numbers(countdown[2], ["p"], ["1+2+3", "1"], numbers=[[1, 2, 3]], target=[6], finished=[True])
