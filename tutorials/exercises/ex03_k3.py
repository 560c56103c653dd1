"""Exercise 3: k3, the estimate of the KL to the reference.

What      How far is the policy from the reference? The KL divergence is an expectation over all tokens, but only one
          was sampled. k3 estimates it from that one token's two log-probabilities.
Why       The KL penalty keeps the policy near the model it started from. The plain estimate (k1, the log of
          policy / reference) is right on average, but is often negative; k3 is right on average and never negative.
Formula   r = log(reference / policy) of the token; k3 = exp(r) - r - 1. Schulman, 2020, "Approximating KL divergence".
Shapes    logprobs (B, N) of the policy, ref_logprobs (B, N) of the reference. Returns (B, N), with a gradient for
          logprobs.
Hint      torch.expm1(r) is exp(r) - 1 without loss of digits where r is small, and it mostly is. Which of the two
          is subtracted from which? The other way round it is the KL of the wrong direction.
Real one  grpo_min/grpo.py, kl_estimate

    python -m tutorials.exercises.check 3
"""
import torch


def k3(logprobs, ref_logprobs):
    """(B, N), (B, N) -> (B, N): an estimate of KL(policy || reference) at each sampled token."""
    raise NotImplementedError
