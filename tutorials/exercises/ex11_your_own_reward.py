"""Exercise 11: a reward of your own, trained end to end.

What      Write a reward function for the arithmetic prompts (`start with 3, times 9, plus 1.`), and say with PAIRS what
          you want of it: completions of which the first should get more than the second. Then train on it.
Why       Whatever a function of the text can say can be trained: short answers, answers without thinking, even numbers.
          And what you forgot to say will be found.
Rules     One finite number for each completion. The same texts get the same reward, in whatever order and company.
          In most groups of the SFT model's completions the rewards should differ, else there is nothing to learn from.
Signature reward(prompts, completions, **columns) -> list of B floats. columns holds lists of B: `answer` (the right
          number as text) and `finished` (False where the length limit cut the completion).
Hint      Begin with one line, such as the length of the completion. Then read what the trained policy says
          (--train shows some of it) and decide whether that is what you meant.
Real one  any of grpo_min/rewards.py

    python -m tutorials.exercises.check 11            then, with the real loop: --train
"""

PAIRS = [  # (what should get more, what should get less): three at least
    # (" 28", "<think> 3 times 9 is 27, 27 plus 1 is 28</think> 28"),
]


def reward(prompts, completions, **columns):
    """A float for each completion."""
    raise NotImplementedError
