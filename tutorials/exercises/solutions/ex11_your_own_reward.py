"""Solution of exercise 11, one of many: think before you answer, in few words. It never asks for a right one.

With 0.01 for each character a thought of the usual length costs more than the half point that it brings: a policy that
was trained on that stopped thinking, and said any number.
"""

PAIRS = [  # (what should get more, what should get less): three at least
    ("<think> 3 times 9 is 27</think> 28", " 28"),
    ("<think> so</think> 28", "<think> 3 times 9 is 27, 27 plus 1 is 28</think> 28"),
    (" 28", ""),
]


def reward(prompts, completions, finished=None, **columns):
    """0.5 for an answer, 1 for thoughts and an answer, less 0.005 for each character; 0 if it was cut."""
    finished = finished or [True] * len(completions)
    return [score(completion) if end else 0.0 for completion, end in zip(completions, finished)]


def score(completion):
    thoughts, tag, answer = completion.rpartition("</think>")
    if not answer.strip():
        return 0.0
    thinks = thoughts.startswith("<think>") and thoughts.count("<think>") == 1 and "</think>" not in thoughts
    return (1.0 if thinks else 0.5) - 0.005 * len(completion) if thinks or not tag else 0.0
