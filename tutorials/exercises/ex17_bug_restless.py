"""Bug hunt 5: a solved task that gives no rest.

Seen      figures/bug5.png. A right answer is worth 0.7, another 0.1, groups have 12 completions, and advantages are
          scaled. The more groups are all right, the less there is to learn, and the gradient gets smaller in the
          reference run. Here it does not, and now and then it is much larger. Right answers would not tell you.
Ask       What advantages do twelve rewards of 0.7 have? Try it.
Mend      this file, until `python -m tutorials.exercises.check 17` says pass. --hint helps.
"""
import torch


def group_advantages(rewards, group_size, scale=False):
    """(R - mean of the group) / its standard deviation: (B,) -> (B,). Without scale, not divided."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    groups = rewards.view(-1, group_size)  # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)  # (Q, G)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-8)  # (Q, G)
    return advantages.flatten()  # (B,)
