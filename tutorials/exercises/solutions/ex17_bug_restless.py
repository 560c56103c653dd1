"""Bug hunt 5, mended. Trap 8: equal rewards get advantages from rounding.

In float32 the mean of twelve 0.7 is not 0.7. A tiny difference was divided by a standard deviation that is as small or
0, plus 1e-8. It became a large advantage for a whole group of equals: try it. In float64 it is exactly 0, and 1e-4
keeps what little deviation there may be from counting for much.
"""
import torch


def group_advantages(rewards, group_size, scale=False):
    """(R - mean of the group) / its standard deviation: (B,) -> (B,). Without scale, not divided."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    groups = rewards.double().cpu().view(-1, group_size)  # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)  # (Q, G)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)  # (Q, G)
    return advantages.flatten().to(rewards)  # (B,)
