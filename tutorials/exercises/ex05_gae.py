"""Exercise 5: generalised advantage estimation, the advantage of PPO.

What      The critic says of each state what reward it still expects. The advantage of a token is what came after it,
          as far as the critic had not expected it.
Why       lam mixes two sources: 1 trusts the rewards that came (no bias, noisy), 0 trusts the critic's next value
          (steady, and wrong where the critic is).
Formula   delta_t = r_t + gamma * V_{t + 1} - V_t,  A_t = delta_t + gamma * lam * A_{t + 1},  returns = A + V
          V and A after a completion's last real token are 0. 1506.02438, eq. 16.
Shapes    rewards, values, mask (B, N) each; values[:, t] is of the state before token t. Returns (advantages, returns),
          (B, N) each, both 0 where the mask is False.
Hint      Go through the columns from the last to the first and keep A and V of the column after. What stands in the
          padded columns of values is arbitrary: make it 0 before you begin.
Real one  grpo_min/ppo.py, gae

    python -m tutorials.exercises.check 5
"""
import torch


def gae(rewards, values, mask, gamma, lam):
    """(B, N) each -> advantages (B, N), returns (B, N)."""
    raise NotImplementedError
