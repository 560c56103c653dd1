"""Solution of exercise 4."""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """(B, N) each -> scalar, to be minimised."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B, N)
    return -(surrogate * mask).sum(dim=1).mean()
