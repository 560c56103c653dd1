"""Solution of exercise 12, one of many: which of two numbers is larger. Only some of the demonstrations are needed."""
import random


def pairs(split):
    """All pairs of two different numbers in 0..49, shuffled, the last 200 of them for the test."""
    everything = [(a, b) for a in range(50) for b in range(50) if a != b]
    random.Random(0).shuffle(everything)
    return everything[-200:] if split == "test" else everything[:-200]


def prompts(split):
    """"train" or "test" -> list of dicts: {"prompt": .., and what the reward needs}."""
    return [dict(prompt=f"which is larger, {a} or {b}?", answer=str(max(a, b))) for a, b in pairs(split)]


def demonstrations():
    """-> list of dicts: {"prompt": .., "response": ..}."""
    return [dict(prompt=row["prompt"], response=" " + row["answer"]) for row in prompts("train")[:400]]


def reward(prompts, completions, answer, finished=None, **columns):
    """1.0 for each right completion, 0.0 for the others."""
    finished = finished or [True] * len(completions)
    return [float(end and completion.strip() == right) for completion, right, end in zip(completions, answer, finished)]
