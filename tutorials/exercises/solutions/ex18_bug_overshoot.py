"""Bug hunt 6, mended. Trap 9: the clip is inverted.

The paper has the minimum of two objectives. Negated, they are losses, and minus the minimum is the maximum of the
negated. With the minimum, the tokens that had gone too far kept their gradient, and those to be pushed back had none.
"""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's clipped surrogate (1707.06347, eq. 7), as a loss: (B, N) each -> scalar."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    losses = torch.max(-ratio * advantages, -clipped * advantages)  # (B, N)
    return (losses * mask).sum(dim=1).mean()
