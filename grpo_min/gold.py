"""The hidden score of the simulated annotators: what they like in an answer about animals.

Correct first, then courteous, then short. `data/prepare.py` turns the score into noisy
choices (Bradley-Terry: P(a preferred to b) = sigmoid(gold(a) - gold(b))). Evaluation reads
it to see how far a learned reward can be trusted. No import leads to it from the loops.
"""
import csv
import re
from pathlib import Path

ATTRIBUTES = ["kind", "food", "home", "legs", "cover", "young"]
COURTEOUS = ["happy to help!", "good question!", "thank you for asking!", "of course!",
             "my pleasure!", "glad you asked!", "nice of you to ask!"]
CURT = ["who cares.", "look it up.", "everyone knows that.", "what a silly question.",
        "go away.", "do not ask me that.", "i have better things to do."]

ANIMALS = (Path(__file__).parent.parent / "data/animals.csv").read_text(encoding="utf-8")
# FACTS["cow"]["food"] == "grass"
FACTS = {row["animal"]: row for row in csv.DictReader(ANIMALS.splitlines())}
VALUES = {}
for attribute in ATTRIBUTES:
    VALUES[attribute] = sorted({row[attribute] for row in FACTS.values()})

CORRECT, COURTESY, BREVITY = 5.0, 1.5, 1.0  # the weights of the three tastes
SHORT, LONG = 8, 16  # words: up to SHORT full marks for brevity, from LONG on none
MAXIMUM = CORRECT + COURTESY + BREVITY


def mentions(text, phrase):
    """True if `phrase` is in `text` as whole words: "kit" is not found in "kitten"."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def is_correct(completion, animal, attribute):
    """True if it states the true value, no other of the attribute, and no other animal."""
    stated = {value for value in VALUES[attribute] if mentions(completion, value)}
    others = [name for row in FACTS.values() if row["animal"] != animal
              for name in (row["animal"], row["plural"])]
    return (stated == {FACTS[animal][attribute]}
            and not any(mentions(completion, name) for name in others))


def courtesy(completion):
    """+1 courteous, -1 curt, 0 neither or both."""
    return (any(remark in completion for remark in COURTEOUS)
            - any(remark in completion for remark in CURT))


def brevity(completion):
    """1 up to SHORT words, then falling linearly to 0 at LONG words."""
    return 1 - min(max(len(completion.split()) - SHORT, 0) / (LONG - SHORT), 1)


def gold_score(prompts, completions, animal, attribute, **columns):
    """The annotators' score, as a reward: lists of B strings -> B floats, -1.5 to 7.5."""
    return [CORRECT * is_correct(text, name, kind) + COURTESY * courtesy(text)
            + BREVITY * brevity(text)
            for text, name, kind in zip(completions, animal, attribute)]
