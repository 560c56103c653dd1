"""Exercise 12: a task of your own, from prompts to a trained policy.

What      Everything that is the task's own, in one file: prompts, demonstrations to begin from, and a reward. The
          committed base model is fine-tuned on the demonstrations, and then trained by GRPO.
Why       RL only makes likelier what the policy sometimes does already. The demonstrations have to bring it so far
          that a group of 8 holds a right answer now and then.
Rules     No prompt is in both splits. The demonstrations ask prompts of "train", and each gets the highest reward.
          Prompt and completion fit into the context of 80 tokens (40 of them for the completion). No constant answer
          gets more than 60% of what the demonstrations get.
Signature prompts(split) -> list of dicts with "prompt" and whatever else the reward needs; split is "train" (at least
          200) or "test" (at least 20). demonstrations() -> list of dicts with "prompt" and "response".
          reward(prompts, completions, **columns) -> list of B floats; columns has the other fields, and `finished`.
Hint      The base model knows small numbers and some animals. Tasks of one short line are learned in a minute: the
          larger of two numbers, a list in reverse, counting.
Real one  tutorials/tasks/countdown.py, a file of the same form; as it stands, yours is one for --task, too

    python -m tutorials.exercises.check 12            then, with the real loops: --train
"""


def prompts(split):
    """"train" or "test" -> list of dicts: {"prompt": .., and what the reward needs}."""
    raise NotImplementedError


def demonstrations():
    """-> list of dicts: {"prompt": .., "response": ..}."""
    raise NotImplementedError


def reward(prompts, completions, **columns):
    """A float for each completion."""
    raise NotImplementedError
