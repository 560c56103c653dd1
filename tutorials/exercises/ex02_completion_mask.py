"""Exercise 2: which tokens are the policy's own.

What      Completions end at different lengths, but stand in one tensor. The mask is True on every token that the
          policy chose, up to and with its first END, and False on what stands after it.
Why       END is a choice like any other: masked out, stopping would never be trained. What stands after END is
          nobody's choice: counted, it would train the policy on noise.
Formula   mask[b, t] = no END among completion_ids[b, 0], .., completion_ids[b, t - 1]
Shapes    completion_ids (B, N), integers; end is the id of END, a model's tokenizer knows it. Returns (B, N), booleans.
          A row without END was cut: it is True throughout.
Hint      cumsum counts the ENDs up to and with column t. How many of them stood before t? Do not ask for PAD: a policy
          may sample the token PAD like any other of the vocabulary.
Real one  grpo_min/rollout.py, sample, where the mask is written token by token

    python -m tutorials.exercises.check 2
"""
import torch


def completion_mask(completion_ids, end):
    """(B, N) -> (B, N): True up to and with the first END of each row."""
    raise NotImplementedError
