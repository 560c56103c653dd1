"""The optimizer, and one update."""
import math

import torch

from grpo_min.run.ranks import mean


def optimizer_for(model, lr, weight_decay=0.0):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99),
                             weight_decay=weight_decay, fused=True)


def update(run, model, optimizer, loss, max_norm=1.0, part=0, parts=1):
    """Backward, clip the gradient to a norm of max_norm, step -> the norm before.

    Of several parts the last one steps, with the mean of their gradients; the others: "".
    """
    if part % parts == 0:
        optimizer.zero_grad()
    (loss / parts).backward()
    if (part + 1) % parts:
        return ""
    for parameter in model.parameters():
        if parameter.requires_grad:
            mean(parameter.grad)  # over the ranks
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm, loss = torch.stack([norm, loss.detach()]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.fail(f"the loss is {loss} and the gradient's norm {norm}")
    optimizer.step()
    return norm
