"""Exercise 21: values of states without a critic, by Monte Carlo.

What      The value of a state is the mean reward of what is sampled from there on. A group holds such samples already:
          the state before token t of a completion was also passed by those completions of its group that begin with
          the same t tokens. Their mean reward is the estimate.
Why       At t = 0 these are all, and the value is GRPO's baseline; the longer the beginning, the fewer share it. With
          gamma 1 and lam 0, exercise 5 then gives each token the advantage V_{t + 1} - V_t: what it has changed. Summed
          over a completion that is GRPO's advantage.
Formula   V_t = mean of R over those completions of the group whose tokens before t are equal to this one's.
          The idea, with samples drawn anew from each state: VinePPO, 2410.01679.
Shapes    completion_ids, mask (B, N), rewards (B,) with B = Q * G: row b belongs to prompt b // G. Returns (B, N):
          column t is of the state before token t; 0 where the mask is False.
Hint      Go through the columns and keep, for each pair of completions of a group, whether they have been equal so far:
          (Q, G, G), at first True everywhere.
Real one  None in grpo_min: its PPO has a critic. The curves of --train compare both.

    python -m tutorials.exercises.check 21
"""
import torch


def state_values(completion_ids, mask, rewards, group_size):
    """(B, N), (B, N), (B,), G -> (B, N)."""
    raise NotImplementedError
