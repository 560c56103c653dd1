"""Solution of exercise 1."""


def group_advantages(rewards, group_size, scale=False):
    """(B,) -> (B,). ValueError if the rewards do not make groups of at least 2."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    groups = rewards.double().view(-1, group_size)  # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)  # (Q, G)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)  # (Q, G)
    return advantages.flatten().to(rewards.dtype)  # (B,)
