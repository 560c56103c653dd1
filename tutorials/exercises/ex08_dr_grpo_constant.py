"""Exercise 8: the constant of Dr. GRPO.

What      The loss of exercise 4, but the sum over a completion's tokens is divided by the length that completions may
          have at most, the same number for all.
Why       GRPO as published divides by the completion's own length. A long wrong answer is then pushed down less per
          token than a short wrong one, and a long right answer up less: a bias towards long wrong answers. A constant
          has no such bias. It only scales the loss, of exercise 4's sum as well.
Formula   loss = - mean over completions of (sum of the surrogate over the real tokens) / longest
          surrogate = min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A). Dr. GRPO, 2503.20783, section 3.2.
Shapes    logprobs, old_logprobs, advantages, mask (B, N) each; longest is max_new_tokens. Returns a scalar.
Hint      longest is a setting. It is neither N, the longest of this batch, nor mask.sum(dim=1), a completion's own.
Real one  grpo_min/variants.py, AGGREGATIONS["constant"] and make_loss

    python -m tutorials.exercises.check 8
"""
import torch


def dr_grpo_loss(logprobs, old_logprobs, advantages, mask, clip_eps, longest):
    """(B, N) each -> scalar, to be minimised."""
    raise NotImplementedError
