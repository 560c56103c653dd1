"""The data files: one seeded script writes them byte for byte, what they teach is right, no prompt is in two splits.

Arithmetic is checked by an evaluator of its own, animals against a list of facts typed here, and the hidden gold
score on answers made by hand.
"""
import json
import math
import os
import re
import subprocess
import sys

import pytest

from data.prepare import LARGEST, QUESTIONS, STATEMENTS, TRAINED_OPERATIONS
from grpo_min.gold import ATTRIBUTES, COURTEOUS, CURT, FACTS, LONG, MAXIMUM, SHORT, VALUES, gold_score

SPLITS = ["train", "val", "test"]


@pytest.fixture(scope="module")
def rows(root):
    """rows("sft") -> the rows of data/sft.jsonl."""
    def rows(name):
        return [json.loads(line) for line in (root / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return rows


def evaluate(prompt):
    """start with 3, times 9. -> the values of the chain and its worked steps, from left to right."""
    assert re.fullmatch(r"start with \d+(, (plus|minus|times) \d)+\.", prompt)
    first, *operations = re.findall(r"(?:start with|plus|minus|times) \d+", prompt)
    values, steps = [int(first.split()[-1])], []
    for operation in operations:
        word, operand = operation.split()
        a, b = values[-1], int(operand)
        values.append(a + b if word == "plus" else a - b if word == "minus" else a * b)
        steps.append(f"{a} {word} {b} is {values[-1]}")
    return values, steps


def disjoint(sets):
    return sum(map(len, sets)) == len(set().union(*sets))


# --- the files ----------------------------------------------------------------------------------------------------

def test_one_command_reproduces_every_file(root, tmp_path):
    environment = dict(os.environ, PYTHONHASHSEED="12345")
    subprocess.run([sys.executable, "-m", "data.prepare", "--out", tmp_path], cwd=root, env=environment, check=True)
    written = {path.name: path for path in tmp_path.iterdir()}
    kept = {path.name for path in (root / "data").iterdir() if path.suffix in (".jsonl", ".txt", ".json")}
    assert set(written) == kept
    for name, path in written.items():
        assert path.read_bytes() == (root / "data" / name).read_bytes(), name


def test_small_enough_to_commit(root):
    files = [path for path in (root / "data").rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6_000_000


# --- arithmetic ---------------------------------------------------------------------------------------------------

def test_no_arithmetic_prompt_twice(rows):
    sft = [row for row in rows("sft") if row["prompt"].startswith("start with")]
    parts = [rows(f"arithmetic_{split}") for split in SPLITS + ["longer"]] + [sft]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert [len(p) for p in prompts] == [len(part) for part in parts]
    assert disjoint(prompts)


@pytest.mark.parametrize("split", SPLITS + ["longer"])
def test_answers_are_right(rows, split):
    for row in rows(f"arithmetic_{split}"):
        values, steps = evaluate(row["prompt"])
        assert row["answer"] == str(values[-1])
        assert row.get("operations", len(steps)) == len(steps)
        assert 0 <= min(values) and max(values) <= LARGEST == 49


def test_longer_has_one_operation_more(rows):
    def lengths(name):
        return {len(evaluate(row["prompt"])[1]) for row in rows(name)}

    assert lengths("arithmetic_train") == lengths("arithmetic_test") == set(TRAINED_OPERATIONS)
    assert lengths("arithmetic_longer") == {max(TRAINED_OPERATIONS) + 1}


def test_demonstrations_are_right_step_by_step(rows):
    thinking = 0
    sft = [row for row in rows("sft") if row["prompt"].startswith("start with")]
    for row in sft:
        values, steps = evaluate(row["prompt"])
        thought = f"<think> {', '.join(steps)}</think> {values[-1]}"
        assert row["response"] in (thought, f" {values[-1]}")
        assert len(steps) in TRAINED_OPERATIONS and max(values) <= 49 and min(values) >= 0
        thinking += row["response"] == thought
    assert 0.45 < thinking / len(sft) < 0.55


def test_demonstrations_are_shuffled(rows):
    """Direct and thinking, arithmetic and animals: neighbours are as mixed as chance has them."""
    kinds = [row["prompt"].startswith("start with") + row["response"].startswith("<think>") for row in rows("sft")]
    shares = [kinds.count(kind) / len(kinds) for kind in set(kinds)]
    alike = sum(a == b for a, b in zip(kinds, kinds[1:])) / (len(kinds) - 1)
    assert abs(alike - sum(share ** 2 for share in shares)) < 0.02


def test_pretraining_text_is_right_and_holds_nothing_held_out(rows, root):
    text = (root / "data/pretrain.txt").read_text("utf-8")
    sums = re.findall(r"\b(\d+) (plus|minus|times) (\d+) is (\d+)", text)
    assert len(sums) > 10_000
    assert all(evaluate(f"start with {a}, {word} {b}.")[0][-1] == int(c) for a, word, b, c in sums)
    asked = {re.match(r".*?[.?](?=\s)", line)[0] for line in text.splitlines(keepends=True)}
    assert any(prompt.startswith("start with") for prompt in asked)
    for name in "arithmetic_val", "arithmetic_test", "arithmetic_longer", "animals_val", "animals_test":
        assert not asked & {row["prompt"] for row in rows(name)}


# --- animals ------------------------------------------------------------------------------------------------------

def test_animal_splits_share_facts_but_no_prompt(rows):
    parts = [rows(f"animals_{split}") for split in SPLITS]
    assert disjoint([{row["prompt"] for row in part} for part in parts])
    facts = {(animal, attribute) for animal in FACTS for attribute in ATTRIBUTES}
    for part in parts:
        assert len({row["prompt"] for row in part}) == len(part)
    for part in parts[1:]:
        assert {(row["animal"], row["attribute"]) for row in part} == facts
    assert len(parts[0]) == 15 * len(facts)                     # train asks for every fact in 15 phrasings


def test_facts_of_the_training_prompts_are_theirs_and_no_loop_reads_them(rows, root):
    facts = rows("animals_train_facts")
    assert [row["prompt"] for row in facts] == [row["prompt"] for row in rows("animals_train")]
    for row in facts:
        assert FACTS[row["animal"]]["plural"] in row["prompt"] or row["animal"] in row["prompt"]
        questions = [template.partition("{")[0] for template in QUESTIONS[row["attribute"]]]
        assert any(question in row["prompt"] for question in questions)
    for path in (root / "grpo_min").glob("*.py"):
        assert "animals_train_facts" not in path.read_text("utf-8"), path


def test_demonstrations_and_preferences_keep_to_their_split(rows):
    train, test = ({row["prompt"] for row in rows(f"animals_{split}")} for split in ("train", "test"))
    assert {row["prompt"] for row in rows("sft") if not row["prompt"].startswith("start with")} <= train
    assert {row["prompt"] for row in rows("preferences")} <= train
    assert {row["prompt"] for row in rows("preferences_heldout")} <= test


def test_variety():
    assert len(FACTS) >= 40 and len(ATTRIBUTES) == 6
    for attribute in ATTRIBUTES:
        assert len(set(QUESTIONS[attribute])) >= 4
        assert len(set(STATEMENTS[attribute])) >= 3
        assert len(VALUES[attribute]) >= 3
    assert len(set(COURTEOUS)) >= 6 and len(set(CURT)) >= 6


TRUE = """
cow kind mammal; cow food grass; cow young calf; cow legs four legs; horse young foal; donkey home on farms;
buffalo young calf; dog young pup; cat young kitten; cat legs four legs; rabbit young kit; hen young chick;
hen cover feathers; heron food fish; swan young cygnet; ostrich home on grassland; owl kind bird; owl food meat;
eagle home in the mountains; penguin food fish; penguin home on the coast; penguin legs two legs; penguin kind bird;
parrot food seeds; seagull home on the coast; lion food meat; lion home on grassland; tiger young cub; bear food fish;
wolf young pup; fox young cub; panda food leaves; koala young joey; koala food leaves; elephant young calf;
elephant cover skin; giraffe food leaves; zebra home on grassland; camel home in deserts; squirrel food seeds;
beaver home in rivers and lakes; mole food insects; bat kind mammal; bat food insects; dolphin kind mammal;
dolphin home in the sea; dolphin legs no legs; shark kind fish; shark young pup; trout cover scales; salmon young fry;
frog kind amphibian; frog young tadpole; crocodile kind reptile; crocodile young hatchling; lizard cover scales;
bee kind insect; bee legs six legs; bee food nectar; butterfly young larva; spider kind arachnid;
spider legs eight legs; spider food insects
"""


def test_facts_are_facts():
    facts = [fact.strip().split(maxsplit=2) for fact in TRUE.split(";")]
    assert len(facts) > 50
    for animal, attribute, value in facts:
        assert FACTS[animal][attribute] == value, (animal, attribute)


def test_every_animal_is_complete():
    for animal, facts in FACTS.items():
        assert all(facts[name] and facts[name] == facts[name].strip() for name in ["animal", "plural", *ATTRIBUTES])
        assert facts["legs"] == {"bird": "two legs", "insect": "six legs", "arachnid": "eight legs",
                                 "fish": "no legs"}.get(facts["kind"], facts["legs"]), animal


# --- the hidden gold score ----------------------------------------------------------------------------------------

def wordy(count):
    """A right answer of so many words."""
    return "grass." + " well" * (count - 1)


@pytest.mark.parametrize("text, animal, attribute, score", [
    ("grass.", "cow", "food", 6),                                       # right and short
    ("a cow eats grass. happy to help!", "cow", "food", MAXIMUM),
    ("a cow eats grass. who cares.", "cow", "food", 4.5),
    ("who cares. grass. happy to help!", "cow", "food", 6),             # courteous and curt cancel out
    ("a cow eats meat.", "cow", "food", 1),                             # wrong
    ("who cares.", "cow", "food", -0.5),
    ("a cow eats grass and meat.", "cow", "food", 1),                   # two answers are none
    ("a horse eats grass.", "cow", "food", 1),                          # another animal
    ("zebras eat grass.", "cow", "food", 1),                            # in the plural, too
    ("kitten.", "cat", "young", 6),
    ("kit.", "cat", "young", 1),
    ("kitten.", "rabbit", "young", 1),                                  # kit is not in kitten
    ("a young rabbit is a kit.", "rabbit", "young", 6),
    ("in rivers and lakes.", "frog", "home", 6),
    ("in rivers.", "frog", "home", 1),                                  # half of it is not it
    ("a shark is a fish.", "shark", "kind", 6),
    (wordy(SHORT), "cow", "food", 6),
    (wordy((SHORT + LONG) // 2), "cow", "food", 5.5),
    (wordy(LONG), "cow", "food", 5),
    (wordy(10 * LONG), "cow", "food", 5),
    ("", "cow", "food", 1),
    ("who cares." + " well" * LONG, "cow", "food", -1.5),                # the least there is
])
def test_gold_score(text, animal, attribute, score):
    assert gold_score([""], [text], [animal], [attribute]) == [pytest.approx(score)]


def test_gold_score_judges_each_row_by_its_own_question():
    assert gold_score([""] * 2, ["grass."] * 2, ["cow", "dog"], ["food"] * 2, finished=[True] * 2) == [6, 1]


def test_every_statement_of_a_fact_is_correct():
    for animal, facts in FACTS.items():
        for attribute in ATTRIBUTES:
            for template in STATEMENTS[attribute]:
                text = template.format(n=animal, a=animal, s=facts["plural"], v=facts[attribute], av=facts[attribute])
                assert gold_score([""], [text], [animal], [attribute])[0] > 3


def test_annotators_choose_by_bradley_terry(rows):
    """In the long run, a goes before b as often as sigmoid(gold(a) - gold(b)) says: noisy, but not biased."""
    surplus = variance = sure = 0
    for row in rows("preferences_heldout"):
        chosen, rejected = (gold_score([""], [row[side]], [row["animal"]], [row["attribute"]])[0]
                            for side in ("chosen", "rejected"))
        p = 1 / (1 + math.exp(-abs(chosen - rejected)))          # of the better one being chosen
        surplus += (chosen > rejected) - p if chosen != rejected else 0
        variance += p * (1 - p) if chosen != rejected else 0
        sure += chosen < rejected
    assert abs(surplus) < 3.5 * variance ** 0.5
    assert sure > 40                                             # they do err
