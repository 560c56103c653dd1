"""Bug hunt 4: PPO's critic promises ever more.

Seen      figures/bug4.png. Rewards are 0 or 1, so that no state is worth more than 1. But the mean value that the
          critic gives to a state rises past 1 and on. The explained variance stays near 0, where that of the reference
          run does not. Right answers would hardly tell you: an error that is the same for all states mostly cancels
          in the advantages.
Ask       The critic learns towards the returns. What are the returns of the last token of a completion made of?
Mend      this file, until `python -m tutorials.exercises.check 16` says pass. --hint helps.
"""
import torch


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16): (B, N) each -> advantages, returns (B, N)."""
    rewards, values = rewards * mask, values * mask
    following = torch.cat([values[:, 1:], values[:, -1:]], dim=1)  # (B, N)
    goes_on = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # (B, N)
    following = torch.where(goes_on, following, values)  # (B, N)
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
