"""Exercise 20: the loss of DPO, which trains the policy on choices without a reward model.

What      The policy itself is read as a reward model: its implicit reward of a completion is beta times how much more
          probable the completion has become since the reference. The loss is exercise 6's for these rewards.
Why       No reward model and no sampling: two log-probabilities for each completion of a file are all that it needs.
Formula   reward = beta * sum over the completion's tokens of (logprobs - ref_logprobs),
          loss = mean over the pairs of -log sigmoid(reward of the chosen - reward of the rejected).
          Rafailov et al., 2305.18290, eq. 7.
Shapes    logprobs, ref_logprobs, mask (2 Q, N) each: row 2 q is the chosen completion of pair q, row 2 q + 1 the
          rejected one. Returns a scalar.
Hint      What stands where the mask is False is arbitrary. After the sum, view(-1, 2) puts each pair in a row.
Real one  grpo_min/dpo.py, ImplicitReward and dpo_loss

    python -m tutorials.exercises.check 20
"""
import torch
import torch.nn.functional as F


def dpo_loss(logprobs, ref_logprobs, mask, beta):
    """(2 Q, N) each, a number -> scalar."""
    raise NotImplementedError
