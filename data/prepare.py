"""Writes every file of this folder but animals.csv, which is written by hand: python -m data.prepare

Two domains share one corpus, one tokenizer and one model:

* arithmetic: chains of operations, evaluated left to right, whose values all stay in 0..49
* animals: six facts about each of 42 animals, asked in many ways

| file                              | rows                                | read by                                |
|-----------------------------------|-------------------------------------|----------------------------------------|
| pretrain.txt                      | a document per line                 | pretrain, the tokenizer                |
| sft.jsonl                         | prompt, response                    | sft                                    |
| preferences.jsonl                 | prompt, chosen, rejected            | reward_model                           |
| preferences_heldout.jsonl         | the same, and what was asked        | reward_model's evaluation              |
| arithmetic_train.jsonl            | prompt, answer                      | RL                                     |
| arithmetic_{val,test}.jsonl       | prompt, answer, operations          | tuning, the final evaluation           |
| arithmetic_longer.jsonl           | the same, one more operation        | the final evaluation                   |
| animals_train.jsonl               | prompt                              | RL                                     |
| animals_train_facts.jsonl         | prompt, animal, attribute           | the study of noise alone               |
| animals_{val,test}.jsonl          | prompt, animal, attribute           | tuning, the final evaluation           |
| tokenizer.json                    | tokens and their ids                | tokenizer                              |

animals_train_facts.jsonl is what simulated annotators know: which fact each row of animals_train.jsonl asks for. The
study of noise lets them choose anew; no training loop reads it.

No prompt is in two of train, val, test and longer. Arithmetic is split by chain. Animals are split by phrasing:
a question is an opening and a core, all openings and cores are in train, and val and test ask in combinations
of the two that train never saw, about the same facts.
"""
import argparse
import json
import math
import random
from pathlib import Path

from grpo_min import tokenizer
from grpo_min.gold import ATTRIBUTES, COURTEOUS, CURT, FACTS, VALUES, gold_score
from grpo_min.run import bpe
from grpo_min.run.config import run_command
from grpo_min.run.files import make_folder

SEED = 1
VOCAB_SIZE = 600                 # 6 special tokens, 256 bytes, 338 merges
LARGEST = 49                     # every value of a chain stays in 0..LARGEST
TRAINED_OPERATIONS = [2, 3]      # operations per chain, unless told; the longer set has one more than the most
WORDS = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}


# --- arithmetic ---------------------------------------------------------------------------------------------------

def operations_on(value):
    """Every (word, operand, result) that keeps the result in 0..LARGEST; operands have one digit."""
    for word, operate in WORDS.items():
        for operand in range(2 if word == "times" else 1, 10):
            if 0 <= operate(value, operand) <= LARGEST:
                yield word, operand, operate(value, operand)


def chain(rng, n_operations):
    """A random problem -> its prompt, its worked steps, its answer."""
    start = value = rng.randint(1, LARGEST)
    asked, steps = [f"start with {start}"], []
    for _ in range(n_operations):
        choices = list(operations_on(value))
        word = rng.choice(sorted({word for word, _, _ in choices}))          # the three words equally often
        _, operand, result = rng.choice([c for c in choices if c[0] == word])
        asked.append(f"{word} {operand}")
        steps.append(f"{value} {word} {operand} is {result}")
        value = result
    return ", ".join(asked) + ".", ", ".join(steps), str(value)


def arithmetic_problems(rng, count, operations, taken):
    """`count` problems whose prompts are new; `taken` is the set of the prompts there are."""
    problems = []
    while len(problems) < count:
        n_operations = rng.choice(operations)
        prompt, steps, answer = chain(rng, n_operations)
        if prompt not in taken:
            taken.add(prompt)
            problems.append(dict(prompt=prompt, steps=steps, answer=answer, operations=n_operations))
    return problems


# --- animals ------------------------------------------------------------------------------------------------------

STATEMENTS = {   # {a}: "a cow", {s}: "cows", {v}: the value, {av}: the value with its article
    "kind": ["{a} is {av}.", "{a} is a kind of {v}.", "{a} belongs to the {v} group."],
    "food": ["{a} eats {v}.", "{s} eat {v}.", "the food of {a} is {v}."],
    "home": ["{a} lives {v}.", "{s} live {v}.", "the home of {a} is {v}."],
    "legs": ["{a} has {v}.", "{s} have {v}.", "{a} has {v} in all."],
    "cover": ["{a} is covered with {v}.", "{s} are covered with {v}.", "the body of {a} is covered with {v}."],
    "young": ["a young {n} is {av}.", "the young of {a} is {av}.", "a baby {n} is called {av}."],
}
QUESTIONS = {
    "kind": ["what kind of animal is {a}?", "what sort of animal is {a}?", "what is {a}?",
             "what group does {a} belong to?", "of what kind are {s}?"],
    "food": ["what does {a} eat?", "what do {s} eat?", "what is the food of {a}?", "what food do {s} like?",
             "what can i feed {a}?"],
    "home": ["where does {a} live?", "where do {s} live?", "where is the home of {a}?", "where can i find {a}?",
             "where are {s} at home?"],
    "legs": ["how many legs does {a} have?", "how many legs do {s} have?", "how many legs are there on {a}?",
             "{a} has how many legs?", "on how many legs do {s} go?"],
    "cover": ["what is {a} covered with?", "what are {s} covered with?", "what covers {a}?",
              "what is the body of {a} covered with?", "what is on the outside of {a}?"],
    "young": ["what is a young {n} called?", "what is the young of {a}?", "what is a baby {n}?",
              "what do you call a young {n}?", "what is the name of a baby {n}?"],
}
OPENINGS = ["", "please tell me, ", "hello! ", "a question: ", "say, "]
FILLERS = ["let me think.", "that is how it is.", "this is what i know.", "you can ask me more."]


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def fill(template, animal, value=""):
    """Put an animal, and a value, into a statement or a question."""
    return template.format(n=animal, a=with_article(animal), s=FACTS[animal]["plural"], v=value,
                           av=with_article(value) if value else "")


def phrasings(split):
    """(opening, core) numbers of a split: 5 of the 25 combinations for val, 5 for test, 15 for train."""
    names = {1: "val", 3: "test"}
    return [(o, c) for o in range(len(OPENINGS)) for c in range(5) if names.get((c - o) % 5, "train") == split]


def animal_prompts(split):
    """Every fact, asked in every phrasing of the split."""
    return [dict(prompt=OPENINGS[o] + fill(QUESTIONS[attribute][c], animal), animal=animal, attribute=attribute)
            for animal in FACTS for attribute in ATTRIBUTES for o, c in phrasings(split)]


def wrong_value(rng, animal, attribute):
    return rng.choice([value for value in VALUES[attribute] if value != FACTS[animal][attribute]])


def value_given(rng, animal, attribute):
    """The value that somebody gives: the true one, or in three answers of ten another."""
    return wrong_value(rng, animal, attribute) if rng.random() < 0.3 else FACTS[animal][attribute]


def answer(rng, animal, attribute, value):
    """An answer that gives this value, more or less courteous and long. It begins with a space, as every completion
    does, since a word and the space before it are one token."""
    length = rng.choice(["short", "medium", "long"])
    words = [f"{value}." if length == "short" else fill(rng.choice(STATEMENTS[attribute]), animal, value)]
    if length == "long":
        words.insert(rng.randint(0, 1), rng.choice(FILLERS))
    tone = rng.choice(["courteous", "plain", "curt"])
    if tone != "plain":
        words.insert(rng.choice([0, len(words)]), rng.choice(COURTEOUS if tone == "courteous" else CURT))
    return " " + " ".join(words)


def beside_the_point(rng, animal, attribute):
    """A courteous answer that says nothing, or one that speaks of another animal."""
    if rng.random() < 0.5:
        return f" {rng.choice(FILLERS + COURTEOUS)} {rng.choice(COURTEOUS)}"
    return answer(rng, rng.choice([other for other in FACTS if other != animal]), attribute, FACTS[animal][attribute])


def two_answers(rng, animal, attribute):
    """Two answers to compare. A reward model learns only what its pairs tell apart: in eleven of twenty a right and a
    wrong answer differ in the value alone (which, now and then, answers another question), in two a right one stands
    against one beside the point, in three only the words around the value differ, and in the rest anything."""
    truth, kind = FACTS[animal][attribute], rng.random()
    if kind < 0.55:
        words, wrong = rng.random(), wrong_value(rng, animal, attribute)
        if rng.random() < 0.2:
            wrong = rng.choice([FACTS[animal][other] for other in ATTRIBUTES if FACTS[animal][other] != truth])
        return [answer(random.Random(words), animal, attribute, value) for value in (truth, wrong)]
    if kind < 0.65:
        return [answer(rng, animal, attribute, truth), beside_the_point(rng, animal, attribute)]
    first = value_given(rng, animal, attribute)
    second = first if kind < 0.8 else value_given(rng, animal, attribute)
    return [answer(rng, animal, attribute, value) for value in (first, second)]


def preferences(rng, prompts, count):
    """Pairs of answers and the annotators' noisy choice: Bradley-Terry on the hidden gold score."""
    pairs = []
    while len(pairs) < count:
        asked = rng.choice(prompts)
        first, second = two_answers(rng, asked["animal"], asked["attribute"])
        if first != second:
            gold_first, gold_second = (gold_score([""], [text], [asked["animal"]], [asked["attribute"]])[0]
                                       for text in (first, second))
            if rng.random() > 1 / (1 + math.exp(gold_second - gold_first)):
                first, second = second, first
            pairs.append(dict(asked, chosen=first, rejected=second))
    return pairs


# --- files --------------------------------------------------------------------------------------------------------

def write_jsonl(path, rows, fields):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            values = {field: row[field] for field in fields}
            file.write(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Write the data files; the same seed writes the same bytes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--operations", type=int, nargs="+", default=TRAINED_OPERATIONS, metavar="N",
                        help="operations per chain: each of these numbers equally often (default: 2 3)")
    options = parser.parse_args()
    if min(options.operations) < 2:
        parser.error("--operations: at least 2, or there are not enough different chains")
    write(options.out, options.operations)


def write(out, operations):
    """Write every file to the folder `out`: chains have as many operations as one of `operations` says."""
    make_folder(out)
    # Each kind of file has random numbers of its own: a change in one leaves the others as they are.
    rng = random.Random(f"{SEED} prompts")
    # Prompts. The held-out ones are drawn first: what they hold does not depend on how much there is to train on.
    taken, problem = set(), ["prompt", "answer", "operations"]
    longer = [max(operations) + 1]
    write_jsonl(out / "arithmetic_test.jsonl", arithmetic_problems(rng, 1000, operations, taken), problem)
    write_jsonl(out / "arithmetic_val.jsonl", arithmetic_problems(rng, 1000, operations, taken), problem)
    write_jsonl(out / "arithmetic_longer.jsonl", arithmetic_problems(rng, 1000, longer, taken), problem)
    write_jsonl(out / "arithmetic_train.jsonl", arithmetic_problems(rng, 3600, operations, taken), problem[:2])
    fact = ["prompt", "animal", "attribute"]
    write_jsonl(out / "animals_train.jsonl", animal_prompts("train"), ["prompt"])
    write_jsonl(out / "animals_train_facts.jsonl", animal_prompts("train"), fact)
    write_jsonl(out / "animals_val.jsonl", animal_prompts("val"), fact)
    write_jsonl(out / "animals_test.jsonl", animal_prompts("test"), fact)

    rng = random.Random(f"{SEED} demonstrations")
    # Demonstrations: half of the arithmetic direct, half thinking.
    rows = []
    for row in arithmetic_problems(rng, 6000, operations, taken):
        thinking = f"<think> {row['steps']}</think> {row['answer']}"
        rows.append(dict(prompt=row["prompt"], response=thinking if rng.random() < 0.5 else f" {row['answer']}"))
    questions = animal_prompts("train")
    rows += [dict(prompt=asked["prompt"], response=answer(
                 rng, asked["animal"], asked["attribute"], value_given(rng, asked["animal"], asked["attribute"])))
             for asked in questions + rng.sample(questions, 800)]
    rng.shuffle(rows)
    write_jsonl(out / "sft.jsonl", rows, ["prompt", "response"])

    # Preferences.
    rng = random.Random(f"{SEED} preferences")
    fields = ["prompt", "chosen", "rejected"]
    write_jsonl(out / "preferences.jsonl", preferences(rng, animal_prompts("train"), 13000), fields)
    write_jsonl(out / "preferences_heldout.jsonl", preferences(rng, animal_prompts("test"), 1000),
                fields + ["animal", "attribute"])

    rng = random.Random(f"{SEED} text")
    # Text to pretrain on: every sum and every fact, questions with their answers, and worked chains.
    sums = [f"{value} {word} {operand} is {result}." for value in range(LARGEST + 1)
            for word, operand, result in operations_on(value)]
    statements = [fill(template, animal, FACTS[animal][attribute]) for animal in FACTS for attribute in ATTRIBUTES
                  for template in STATEMENTS[attribute]]
    faq = [f"{asked['prompt']} {FACTS[asked['animal']][asked['attribute']]}." for asked in animal_prompts("train")]
    documents = (sums + statements) * 4 + faq
    documents += [f"{row['prompt']} {row['steps']}."
                  for row in arithmetic_problems(rng, 6000, [1] + operations, taken)]
    rng.shuffle(documents)
    text = "".join(document + "\n" for document in documents)
    (out / "pretrain.txt").write_text(text, encoding="utf-8")

    corpus = text + "".join(f"{row['prompt']}\n{row['response']}\n" for row in rows)
    corpus = corpus.replace("<think>", "").replace("</think>", "")        # these are single tokens
    tokenizer.save(bpe.train(corpus, VOCAB_SIZE), out / "tokenizer.json")


if __name__ == "__main__":
    run_command(main)
