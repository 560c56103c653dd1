"""The tasks in tutorials/tasks beside Countdown: each rule pays what it says and cannot be talked into more, no prompt
is in two splits, and GRPO runs on them. reasoning-gym is a stand-in of a few lines here, and the package itself if it
is installed.
"""
import importlib.util
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

from grpo_min import grpo
from grpo_min.evaluate import evaluate, held_out
from grpo_min.run.config import UserError, run_command
from grpo_min.task import load_task
from tests import tiny

TASKS = Path(__file__).parent.parent / "tutorials" / "tasks"
pytestmark = pytest.mark.usefixtures("no_curves")


def task(name, *functions):
    return load_task(str(TASKS / f"{name}.py"), *functions)


def splits(name):
    """{split: rows}; the same at every call, and when the file is run again."""
    prompts, = task(name, "prompts")
    rows = {split: prompts(split) for split in ("train", "val", "test")}
    again = runpy.run_path(str(TASKS / f"{name}.py"))["prompts"]
    assert rows == {split: prompts(split) for split in rows} == {split: again(split) for split in rows}
    asked = [row["prompt"] for split in rows for row in rows[split]]
    assert len(set(asked)) == len(asked), "no prompt comes twice"
    return rows


def grpo_runs(name, folder, **more):
    """Two steps of GRPO on a tiny model -> its rows of metrics."""
    config = tiny.settings(grpo, folder, task=str(TASKS / f"{name}.py"), prompts="", steps=2,
                           sft=tiny.checkpoint(folder / "wide.pt", context=128), **more)
    _, rows = grpo.train(config)
    assert len(rows) == 2 and all(0 <= row["reward"] <= 1 for row in rows)
    return rows


@pytest.mark.parametrize("name", ["two_words", "gsm8k", "gym"])
def test_a_task_is_a_page(name):
    lines = (TASKS / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


# --- two words ----------------------------------------------------------------------------------------------------

PROMPT = 'Write one short sentence with the words "river" and "moon".'


def two_words(text, finished=True, words=("river", "moon")):
    reward, = task("two_words", "reward")
    return reward([PROMPT], [text], words=[list(words)], finished=[finished])[0]


@pytest.mark.parametrize("text", [
    "The moon shines on the river.", " The river, cold and deep, mirrors the MOON!\n", "Does the Moon love the River?",
    '"The moon is above the river."', "The river saw the moon at five o'clock.", "The “river” mirrors the *moon*.",
    "A half-river, half-moon.",
    "One two three four five six seven eight nine ten river moon.",          # twelve words
    "<think>They go well together.</think> The moon shines on the river."])
def test_a_sentence_with_both_words(text):
    assert two_words(text) == 1.0


NO_SENTENCES = {
    "one word only": "The moon shines on the water.", "the other": "The river is deep.", "nothing": "", "blank": "  \n",
    "plurals": "Rivers have moons.", "a possessive": "The river's end is under the moon.",
    "parts of words": "The upriver honeymoon is over.", "glued": "The rivermoon shines.",
    "a mark within": "The ri-ver mirrors the moon.", "an invisible sign": "The ri\u200bver mirrors the moon.",
    "another alphabet": "The rіver mirrors the moon.",
    "thirteen words": "One two three four five six seven eight nine ten eleven river moon.",
    "hyphens": "The-big-and-old-and-cold-and-wide-and-blue-river-mirrors-the-moon.",
    "two sentences": "The river is deep. The moon is high.", "two, in one line": "The moon.The river.",
    "a line break": "The moon\nshines on the river.", "paragraphs": "River\u2029moon.",
    "no end": "The moon shines on the river", "dots": "The moon shines on the river...", "…": "The moon and the river…",
    "an end and …": "The moon and the river….", "marks": "The moon shines on the river?!", "marks alone": "...",
    "more after the end": "The moon shines on the river. Yes",
    "the prompt": PROMPT, "nearly the prompt": "A short sentence with river and moon.",
    "about the words": "The words are river and moon.", "the words as a list": "river, moon",
    "thinking alone": "<think>The moon shines on the river.</think>",
    "thinking that does not end": "<think>The moon shines on the river.",
}


@pytest.mark.parametrize("text", NO_SENTENCES.values(), ids=NO_SENTENCES)
def test_what_is_no_sentence_with_both_words(text):
    assert two_words(text) == 0.0


def test_a_sentence_that_was_cut():
    assert two_words("The moon shines on the river.", finished=False) == 0.0


def test_the_loophole_that_is_told():
    assert two_words("A button with copper.", words=["copper", "button"]) == two_words("River moon.") == 1.0
    assert "`A button with copper.` is paid in full" in (TASKS / "two_words.py").read_text(encoding="utf-8")


def test_each_pair_judges_its_own_sentence():
    reward, = task("two_words", "reward")
    said = ["The sun is a ball.", "The sun is a ball.", "The cat sat."]
    assert reward(["p"] * 3, said, words=[["sun", "ball"], ["sun", "cat"], ["cat", "cat"]],
                  finished=[True] * 3) == [1.0, 0.0, 1.0]


def test_splits_share_no_word():
    rows = splits("two_words")
    assert {split: len(rows[split]) for split in rows} == dict(train=2000, val=500, test=500)
    words = {}
    for split in rows:
        assert all(len(set(row["words"])) == 2 for row in rows[split])
        assert all(row["prompt"] == PROMPT.replace("river", "{}").replace("moon", "{}").format(*row["words"])
                   for row in rows[split])
        words[split] = {word for row in rows[split] for word in row["words"]}
    assert len(words["val"]) == len(words["test"]) == 50 and len(words["train"]) > 200
    assert not (words["train"] & words["val"] | words["train"] & words["test"] | words["val"] & words["test"])
    every = set.union(*words.values())
    assert all(word.isalpha() and word.islower() for word in every)
    assert not {word + "s" for word in every} & every, "no plural of another"


def test_grpo_on_two_words(tmp_path):
    grpo_runs("two_words", tmp_path)


# --- GSM8K --------------------------------------------------------------------------------------------------------

QUESTION = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
            "How many clips did Natalia sell altogether in April and May?")


def gsm8k(text, target="72", question=QUESTION, finished=True):
    reward, = task("gsm8k", "reward")
    return reward([question], [text], target=[target], finished=[finished])[0]


RIGHT = [       # (what is written, what is meant)
    *[(text, "72") for text in [
        "72", " 72 ", "72.", "72.0", "72.00", "$72", "$72.00", "\\$72", "US$72", "£72", "€72", "**72**", "_72_", "(72)",
        "72%", "72 %", "=72", "72kg", "72 kg", "72\n", "72!", "72,", "72;", '"72"', "`72`", "72€", "7 and 72",
        "72 clips, altogether.", "Natalia sold 72 clips, altogether. ", "48+24=72", "48 + 24 = 72", "48/2=24, 48+24=72",
        "She sold 24 in May.\nThat is 72 in all.", "It is 72 (in April and May).", "10:30 is none, but 72 is one.",
        "#### 72", "####72", "24 clips\n#### 72", "#### $72", "#### 72 clips", "#### 72\n\nShe sold 48 and 24.",
        "The answer is 72.", "The answer is 72, because 48 + 24 is that, and 24 half of 48.", "the answer is: 72; 48",
        "Answer: 72. 24 of them in May.", "Answer: **72** (48 in April)", "ANSWER = 72 (24)", "The answer is $72$. 5",
        "The answer is \\(72\\), not 24.", "The answer is:\n72\n- 48 in April", "The answer is 48 + 24 = 72",
        "The answer is that she sold 72", "The answer is 24. No, the answer is 72. I forgot 48.",
        "\\boxed{72}", "$\\boxed{72}$.", "\\boxed {72}", "\\boxed{72\\text{ clips}}", "\\boxed{\\$72}", "\\boxed{72.0}",
        "\\boxed{72\\text{ clips}} 24", "\\boxed{72} as 48 + 24", "\\boxed{24} then \\boxed{72}",
        "#### 24 but \\boxed{72}", "\\boxed{x = 72}", "\\boxed{\n72\n}", "\\[\\boxed{72}\\] The answer is 24.",
        "<think>answer: 24</think> 72", "10-3 is not 72",
        QUESTION + " 72", QUESTION + "\n72 clips"]],
    *[(text, "1000") for text in ["1,000", "1000", "$1,000.00", "1{,}000", "\\boxed{1,000}", "#### 1,000", "1,000."]],
    ("1,234,567", "1234567"), ("1234567", "1,234,567"), ("The answer is 2,125.", "2,125"),
    *[(text, "-3") for text in ["-3", "−3", "–3", "-3.0", "-$3", "$-3", "= -3", "(-3)", "#### -3", "\\boxed{-3}"]],
    *[(text, "3") for text in ["10-7=3", "6-3", "2–3", "2 - 3", "- 3", "(1)-3", "x-3"]],           # this is no sign
    *[(text, "0.5") for text in [".5", "0.5", "$.50", "0.50 dollars"]],
    ("72.5", "72.5"), ("0", "0"), ("-0", "0"), ("48", "48"), ("She sold 48.", "48"), ("1, 2, 3", "3"),
]


@pytest.mark.parametrize("text, target", RIGHT, ids=range(len(RIGHT)))
def test_numbers_as_people_write_them(text, target):
    assert gsm8k(text, target) == 1.0


WRONG = [       # (what is written, what it does not mean)
    *[(text, "72") for text in [
        "", " ", "seventy-two", "72.5", "72.05", "7.2", "720", "172", "7,2", "72,000", "0.72", ".72", "72.0.1", "-72",
        "7{,}2", "−72", "$-72", "7 2", "72 and 24", "72 / 2", "72/1", "1/72", "72:00", "12:72", "72^1", "7.2e1", "72e0",
        "72k", "72K", "72M", "x72", "v72", "72²", "72½", "７２", "٧٢", "7²", "7.2.", "72-24 = 48", "70 + 2", "9*8",
        "72 is wrong, 24 is right", "72. It was 48 in April", "72\n24", "#### 24 but 72", "The answer is 24, not 72",
        "#### 72\n#### 24", "The answer is 72. The answer is 24.", "\\boxed{72} \\boxed{24}", "\\boxed{24} #### 72",
        "\\boxed{48, 72}", "\\boxed{72, 24}", "\\boxed{48+24}", "\\boxed{48+24=72}", "\\boxed{} 72", "\\boxed{none} 72",
        "\\boxed{\\frac{72}{1}}", "\\boxed{7}2", "#### 72.5", "####", "The answer is", "#### 72k", "#### 1/72",
        "<think>72", "<think>72</think>", "<think>72</think> 24", "72</think>", "72<think>24</think>",
        "__import__('os')", "9" * 100000, "7" + "2" * 100000, "72," * 3000, "a" * 100000, "-" * 100000,
        "answer is " * 9000, "\\boxed{" * 3000 + "24", "\\boxed{{" * 3000, "#" * 9000, "answer" + " " * 9000]],
    *[(text, "123") for text in ["1, 2, 3", "1,2,3", "1 2 3", "1; 2; 3", "#### 1, 2, 3", "\\boxed{1, 2, 3}", "1.2.3",
                                 "\\boxed{1,2,3}", "The answer is 1, 2, 3.", "1,23", "12,3"]],
    *[(text, "48") for text in [QUESTION, QUESTION.split(". ")[0] + ".", f"{QUESTION}\n{QUESTION}", f" {QUESTION} "]],
    *[(text, "3") for text in ["-3", "3.5", "1,2,3", "2/3", "1e3", "3k", "0.3", "3,000"]],
    *[(text, "-3") for text in ["10-3", "3", "x-3", "- 3", "(5)-3"]],
    *[(text, "1000") for text in ["1,0000", "1,00", "10,00", "1.000", "1000.5", "1 000", "1,000,00", "1k"]],
    ("0.05", "5"), ("12:05", "5"), ("$.50", "50"), ("5.", "0.5"), ("1,000,", "1"), ("100,200", "200"),
]


@pytest.mark.parametrize("text, target", WRONG, ids=range(len(WRONG)))
def test_what_is_another_number_or_none(text, target):
    assert gsm8k(text, target) == 0.0


def test_only_whole_sentences_of_the_question_are_passed_over():
    question = "Of 72 cows 3 are ill. How many?"
    assert gsm8k("72", question=question) == gsm8k("72. How many?", question=question) == 1.0
    assert gsm8k("Of 72 cows 3 are ill.", "3", question) == 0.0


def test_an_answer_that_was_cut():
    assert gsm8k("#### 72", finished=False) == 0.0


def test_each_answer_has_its_own_target():
    reward, = task("gsm8k", "reward")
    assert reward(["p"] * 3, ["1", "2", "1"], target=["1", "2", "2"], finished=[True] * 3) == [1.0, 1.0, 0.0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a few rows as they are published, one of them twice."""
    train = [dict(question=f"{i} cows and {i} more?",
                  answer=f"That is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}") for i in range(491, 513)]
    tiny.jsonl(tmp_path / "train.jsonl", [*train, train[10]])
    tiny.jsonl(tmp_path / "test.jsonl", [dict(row, question="Now " + row["question"]) for row in train[:5]])
    monkeypatch.setenv("GSM8K", str(tmp_path))
    return tmp_path


def test_rows_of_the_published_files(folder):
    rows = splits("gsm8k")
    assert {split: len(rows[split]) for split in rows} == dict(train=19, val=3, test=5)
    assert rows["test"][0] == dict(prompt="Now 491 cows and 491 more?", target="982")
    assert all(row["prompt"].startswith("Now ") for row in rows["test"])
    assert "1,024" in [row["target"] for row in rows["train"]]


def test_demonstrations_are_of_train_and_right(folder):
    prompts, demonstrations, reward = task("gsm8k", "prompts", "demonstrations", "reward")
    rows, shown = prompts("train"), demonstrations()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in shown]
    assert shown[0]["response"] == "That is 492+492=984.\n#### 984"
    assert set(reward([row["prompt"] for row in rows], [row["response"] for row in shown],
                      target=[row["target"] for row in rows], finished=[True] * len(rows))) == {1.0}


def test_grpo_on_gsm8k(folder):
    grpo_runs("gsm8k", folder)
    prompts, reward = task("gsm8k", "prompts", "reward")
    assert evaluate(tiny.gpt(context=128), reward, held_out(prompts, "test"), max_new_tokens=6)["reward"][0] <= 1


def line_of(folder, name):
    """What the command says, in one line, of a task that cannot be had."""
    config = tiny.settings(grpo, folder, task=str(TASKS / f"{name}.py"), prompts="")
    with pytest.raises(UserError) as error:
        grpo.train(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_gsm8k_without_its_files(folder, monkeypatch):
    (folder / "train.jsonl").write_text('{"question": "Two?", "answer": "I do not know"}\n')
    train = str(folder / "train.jsonl")
    assert line_of(folder, "gsm8k") == f"{train}: an answer ends with 'I do not know', where a number is needed"
    (folder / "train.jsonl").write_text('{"prompt": "Two?", "answer": "2"}\n')
    assert line_of(folder, "gsm8k").startswith(f'{train}, line 1: the field "question" is missing')
    (folder / "train.jsonl").unlink()
    assert line_of(folder, "gsm8k") == f"cannot read {train}: No such file or directory"
    assert len(task("gsm8k", "prompts")[0]("test")) == 5, "what is not asked for may be missing"
    for name in "", None:
        monkeypatch.setenv("GSM8K", name) if name is not None else monkeypatch.delenv("GSM8K")
        assert line_of(folder, "gsm8k").startswith("GSM8K is not set: it has to name the folder")


def test_the_line_is_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GSM8K", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: grpo.main(["--task", str(TASKS / "gsm8k.py"), "--run", str(tmp_path / "run"), "--sft",
                                       tiny.checkpoint(tmp_path / "base.pt"), "--device", "cpu"]))
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: GSM8K is not set")
    assert not (tmp_path / "run").exists()


# --- reasoning-gym ------------------------------------------------------------------------------------------------

class Sums:
    """As the package's datasets: entries by index, some of them equal, and a scorer of their own."""

    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i >= self.size:
            raise IndexError(i)
        a, b = (i + self.seed) % 30, (i + self.seed) // 30 % 20
        return dict(question=f"{a} + {b} =", answer=str(a + b), metadata=dict(terms=(a, b)))

    def score_answer(self, answer, entry):
        if answer is None:
            return 0.5          # whoever has no answer must not be asked about
        return 1.0 if int(answer) == sum(entry["metadata"]["terms"]) else 0.25


class Evaluating(Sums):
    def score_answer(self, answer, entry):
        return float(eval(answer) == int(entry["answer"]))


@pytest.fixture
def gym(monkeypatch):
    """reasoning-gym in a few lines."""
    kinds = dict(sums=Sums, evaluating=Evaluating)

    def create_dataset(name, size, seed):
        if name not in kinds:
            raise ValueError(f"Dataset '{name}' not registered")
        return kinds[name](size, seed)
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    monkeypatch.setenv("GYM", "sums")


def test_splits_of_a_gym(gym):
    rows = splits("gym")
    assert {split: len(rows[split]) for split in rows} == dict(train=480, val=60, test=60)      # 30 x 20 are distinct


def test_the_scorer_is_the_reward(gym):
    prompts, demonstrations, reward = task("gym", "prompts", "demonstrations", "reward")
    rows = prompts("train")[:7]
    answers = [str(sum(map(int, row["prompt"].strip(" =").split("+")))) for row in rows]
    assert [row["response"] for row in demonstrations()[:7]] == answers
    assert [row["prompt"] for row in demonstrations()] == [row["prompt"] for row in prompts("train")]
    said = [answers[0], f"<think>well</think> {answers[1]}", "999", "no number", f"<think>{answers[4]}", "", answers[6]]
    assert reward([row["prompt"] for row in rows], said, index=[row["index"] for row in rows],
                  finished=[True] * 6 + [False]) == [1.0, 1.0, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_grpo_on_a_gym(gym, tmp_path):
    grpo_runs("gym", tmp_path)


def test_a_gym_that_cannot_be_had(gym, tmp_path, monkeypatch):
    monkeypatch.setenv("GYM", "evaluating")
    assert line_of(tmp_path, "gym").startswith("GYM=evaluating is refused: its code has eval(..)")
    monkeypatch.setenv("GYM", "nothing")
    assert "gym.py, line " in line_of(tmp_path, "gym") and "'nothing' not registered" in line_of(tmp_path, "gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert line_of(tmp_path, "gym").startswith("GYM=nothing needs a package: pip install reasoning-gym")
    monkeypatch.delenv("GYM")
    assert line_of(tmp_path, "gym").startswith("GYM is not set")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_package_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("GYM", "chain_sum")
    rows = splits("gym")
    assert len(rows["train"]) > 1000 and len(rows["val"]) > 150
    prompts, demonstrations, reward = task("gym", "prompts", "demonstrations", "reward")
    asked = dict(prompts=[row["prompt"] for row in rows["train"]], index=[row["index"] for row in rows["train"]],
                 finished=[True] * len(rows["train"]))
    assert set(reward(completions=[row["response"] for row in demonstrations()], **asked)) == {1.0}
    assert set(reward(completions=["no"] * len(rows["train"]), **asked)) == {0.0}
    script = f"import runpy; print(runpy.run_path({str(TASKS / 'gym.py')!r})['prompts']('val')[-1])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TASKS.parent.parent,
                          env=os.environ | dict(PYTHONHASHSEED="7"))
    assert done.stdout.strip() == str(rows["val"][-1])
    for name in "countdown", "string_insertion", "simple_integration":
        monkeypatch.setenv("GYM", name)
        assert f"GYM={name} is refused" in line_of(tmp_path, "gym")
