"""Bug hunt 3, mended. Trap 7: groups are mixed.

view(group_size, -1).T has the right shape, but its rows hold every Qth completion, of different prompts, and flatten()
hands the advantages back in another order than the rewards came: completions were reinforced for what others had done.
"""
import torch


def group_advantages(rewards, group_size, scale=False):
    """Reward minus the mean reward of its group: (B,) -> (B,). Row b belongs to prompt b // group_size."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    groups = rewards.double().cpu().view(-1, group_size)  # (Q, G)
    baseline = groups.mean(dim=1, keepdim=True)  # (Q, 1)
    advantages = groups - baseline  # (Q, G)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten().to(rewards)  # (B,)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """The clipped surrogate, negated: (B, N) each -> scalar."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B, N)
    return -(surrogate * mask).sum(dim=1).mean()
