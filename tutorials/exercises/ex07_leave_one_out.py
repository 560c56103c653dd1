"""Exercise 7: leave-one-out, the baseline of RLOO.

What      As exercise 1, but a completion is compared with the mean of the others of its group, without itself.
Why       With the group's mean, a completion is a part of what it is compared with, which makes its advantage smaller
          than it should be. The baseline of the others does not depend on it at all, so the gradient is unbiased.
Formula   A = R - (sum of the group - R) / (G - 1). RLOO, 2402.14740. It is exercise 1's times G / (G - 1).
Shapes    rewards (B,) with B = Q * G: row b belongs to prompt b // G. Returns (B,), of the same dtype.
Hint      No loop over the completions is needed: the sum of the others is the sum of all, minus this one.
Real one  grpo_min/variants.py, leave_one_out

    python -m tutorials.exercises.check 7
"""
import torch


def leave_one_out(rewards, group_size):
    """(B,) -> (B,). ValueError if the rewards do not make groups of at least 2."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    raise NotImplementedError
