"""Solution of exercise 12, one of many: which of three numbers is in the middle."""
import random


def prompts(split):
    """"train" or "test" -> list of dicts: {"prompt": .., and what the reward needs}."""
    rng, rows = random.Random(0), {}
    while len(rows) < 2200:
        a, b, c = rng.sample(range(50), 3)
        rows[f"which is in the middle, {a}, {b} or {c}?"] = str(sorted([a, b, c])[1])
    rows = [dict(prompt=prompt, answer=answer) for prompt, answer in rows.items()]
    return rows[-200:] if split == "test" else rows[:-200]


def demonstrations():
    """-> list of dicts: {"prompt": .., "response": ..}."""
    return [dict(prompt=row["prompt"], response=" " + row["answer"]) for row in prompts("train")[:1000]]


def reward(prompts, completions, answer, finished=None, **columns):
    """1.0 for each right completion, 0.0 for the others."""
    finished = finished or [True] * len(completions)
    return [float(end and completion.strip() == right) for completion, right, end in zip(completions, answer, finished)]
