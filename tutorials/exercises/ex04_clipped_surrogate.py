"""Exercise 4: the clipped surrogate, the loss of PPO and GRPO.

What      Raise the probability of tokens with a positive advantage, lower it where the advantage is negative, and stop
          when the probability has changed by more than clip_eps since the tokens were sampled.
Why       The advantages were measured on the old policy. Several updates on one batch can run away from it; the clip
          takes the gradient of a token that has gone far enough in its direction. It never takes the gradient of
          one that went the wrong way.
Formula   ratio = exp(logprobs - old_logprobs), for each token of its own
          surrogate = min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps) * A)
          loss = - (sum of the surrogate over the real tokens of a completion), averaged over the completions
          PPO, 1707.06347, eq. 7.
Shapes    logprobs, old_logprobs, advantages, mask (B, N) each; clip_eps a number. Returns a scalar.
Hint      The minimum of the two products, not the clipped one alone. The sum over tokens is dim=1, the mean is over
          rows, whatever their lengths.
Real one  grpo_min/grpo.py, policy_loss; its last argument is the KL penalty, which is left out here

    python -m tutorials.exercises.check 4
"""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """(B, N) each -> scalar, to be minimised."""
    raise NotImplementedError
