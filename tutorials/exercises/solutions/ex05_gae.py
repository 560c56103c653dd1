"""Solution of exercise 5."""
import torch


def gae(rewards, values, mask, gamma, lam):
    """(B, N) each -> advantages (B, N), returns (B, N)."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)  # (B, N)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values
