r"""GSM8K, word problems of grade school (2110.14168): a task for a pretrained model. The environment variable GSM8K
names the folder with the published files, train.jsonl and test.jsonl, whose lines have a question and an answer:

    {"question": "Natalia sold clips to 48 of ..?", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips ..\n#### 72"}

An answer with the right final number gets a reward of 1, anything else 0. The final number is that of the last
\boxed{..}; without a box, the one right behind the last "####", "answer is" or "answer:"; without that, the last one.
A box with several numbers is no answer, and sentences copied from the question are passed over. The way to the number
is not judged, and no unit: `72 cows` is as good as `72 clips`.

A number is read as people write it: 1,000 and 1000, $72, 72.0, -3, 72kg. What only contains one is none: 1,2,3 or 3/4,
12:05, 1e3, 72k, x72. Where such a thing is the last, there is no final number. --resume does not notice another folder.
"""
import os
import re
from decimal import Decimal

from grpo_min.rewards import final_answer
from grpo_min.run.config import require
from grpo_min.run.data import read_jsonl

EVERY = 10                                                                  # one of so many rows of train is val's
SPELLINGS = {"−": "-", "–": "-", r"\$": "$", "{,}": ","}
BOX = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")            # \boxed{72\text{ clips}}, too
MARK = re.compile(r"(?:####|\banswer(?:\s+is\b|\s*[:=]))[\s*:=(\[\\]*", re.IGNORECASE)
SUM_GOES_ON = re.compile(r" *[-+*/=×÷x] *[$(]?\d")
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
# Something with a digit in it: letters, digits, and what stands between digits. A minus behind a word or a number is
# no sign: 10-3.
RUN = re.compile(r"(?:(?<![\w)])-[$£€]?|[$£€]-?)?(?<![^\W_])[^\W_]*(?:(?<!\.)\.)?\d(?:[^\W_]|[.,:/^](?=\d))*")
NUMBER = re.compile(r"[$£€]?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?![kKmM]$)[A-Za-z]*")


def number(run):
    """The value of a run, or None if it is something else."""
    found = NUMBER.fullmatch(run.replace("-", ""))
    return Decimal(("-" if "-" in run else "") + found[1].replace(",", "")) if found else None


def marked(text):
    """The runs right behind a mark, but not the first of a sum: "the answer is 48 + 24 = 72"."""
    runs = [RUN.match(text, mark.end()) for mark in MARK.finditer(text)]
    return [run[0] for run in runs if run and not SUM_GOES_ON.match(text, run.end())]


def final_number(text):
    """The final number of a text, or None."""
    for written, plain in SPELLINGS.items():
        text = text.replace(written, plain)
    boxes = BOX.findall(text)
    if boxes:
        runs = RUN.findall(boxes[-1])
        return number(runs[0]) if len(runs) == 1 else None
    runs = marked(text) or RUN.findall(text)
    return number(runs[-1]) if runs else None


def without_copies(text, question):
    """The sentences and lines of a text, but those that stand in the question."""
    asked = set(SENTENCE_END.split(question.strip()))
    return "\n".join(sentence for sentence in SENTENCE_END.split(text) if sentence.strip() not in asked)


def judge(answer, question, target):
    if answer is None:
        return 0.0
    said = final_number(without_copies(answer, question))
    return float(said is not None and said == final_number(target))


# --- the task -----------------------------------------------------------------------------------------------------

def published(name):
    """Rows of a published file; of questions that stand there twice, the last."""
    folder = os.environ.get("GSM8K")
    require(folder, "GSM8K is not set: it has to name the folder with GSM8K's train.jsonl and test.jsonl")
    path = os.path.join(folder, f"{name}.jsonl")
    rows = {}
    for row in read_jsonl(path, ["question", "answer"]):
        target = row["answer"].rpartition("####")[2].strip()
        require(number(target) is not None, f"{path}: an answer ends with {target[-40:]!r}, where a number is needed")
        rows[row["question"]] = dict(prompt=row["question"], target=target, answer=row["answer"])
    return list(rows.values())


def rows_of(split):
    rows = published("test" if split == "test" else "train")
    parts = dict(test=rows, val=rows[::EVERY], train=[row for i, row in enumerate(rows) if i % EVERY])
    return parts[split]


def prompts(split):
    return [dict(prompt=row["prompt"], target=row["target"]) for row in rows_of(split)]


def demonstrations():
    """The published ways, without the notes for a calculator, as in 48/2 = <<48/2=24>>24."""
    return [dict(prompt=row["prompt"], response=re.sub(r"<<[^<>]*>>", "", row["answer"])) for row in rows_of("train")]


def reward(prompts, completions, target, finished, **columns):
    return [judge(final_answer(completion), *row) if end else 0.0
            for completion, end, *row in zip(completions, finished, prompts, target)]
