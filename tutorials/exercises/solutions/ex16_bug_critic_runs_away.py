"""Bug hunt 4, mended. Trap 15: a value after the last token that is not 0.

The last value stood for its own future. Then the last token's return is its reward plus its own value; the critic
learns that, and the next return is larger by another reward.
"""
import torch


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16): (B, N) each -> advantages, returns (B, N)."""
    rewards, values = rewards * mask, values * mask
    following = torch.cat([values[:, 1:], values[:, -1:]], dim=1)  # (B, N)
    goes_on = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # (B, N)
    following = following * goes_on             # after the last token nothing is to come  # (B, N)
    deltas = rewards + gamma * following - values  # (B, N)
    advantages = torch.zeros_like(values)  # (B, N)
    next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        next_advantage = advantages[:, t] = (deltas[:, t] + gamma * lam * next_advantage) * mask[:, t]
    return advantages, advantages + values


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, summed over tokens, averaged over completions: (B, N) each -> scalar."""
    error = (values - returns) ** 2  # (B, N)
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)  # (B, N)
        error = torch.max(error, (near - returns) ** 2)  # (B, N)
    return 0.5 * (error * mask).sum(dim=1).mean()
