"""Solution of exercise 21."""
import torch


def state_values(completion_ids, mask, rewards, group_size):
    """(B, N), (B, N), (B,), G -> (B, N)."""
    ids = completion_ids.view(-1, group_size, completion_ids.shape[1])  # (Q, G, N)
    rewards = rewards.double().view(-1, 1, group_size)  # (Q, 1, G)
    equal = torch.ones(len(ids), group_size, group_size, dtype=torch.bool)  # (Q, G, G): the same so far?
    columns = []
    for t in range(ids.shape[2]):
        columns.append((equal * rewards).sum(dim=2) / equal.sum(dim=2))  # (Q, G)
        equal = equal & (ids[:, :, None, t] == ids[:, None, :, t])
    return torch.stack(columns, dim=2).view(mask.shape) * mask  # (B, N)
