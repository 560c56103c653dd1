"""Exercise 1: the advantage of GRPO.

What      For each prompt a group of G completions was sampled and scored. The advantage of a completion is its reward
          minus the mean reward of its group.
Why       The mean says what the policy usually gets for this prompt. What is above it should become likelier, what is
          below it less likely. PPO needs a second network to know this; GRPO asks the group.
Formula   A = R - mean(R of the group); with scale, A / (std(R of the group) + 1e-4), the std with n - 1.
          DeepSeekMath, 2402.03300, section 4.1.2.
Shapes    rewards (B,) with B = Q * G: row b belongs to prompt b // G. Returns (B,), of the same dtype.
Hint      One view, one mean over one dimension with keepdim=True, one flatten. Compute in float64: in float32 the mean
          of twelve times 0.7 is not 0.7, and a tiny std makes large advantages of that rounding error.
Real one  grpo_min/grpo.py, group_advantages

    python -m tutorials.exercises.check 1
"""
import torch


def group_advantages(rewards, group_size, scale=False):
    """(B,) -> (B,). ValueError if the rewards do not make groups of at least 2."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    raise NotImplementedError
