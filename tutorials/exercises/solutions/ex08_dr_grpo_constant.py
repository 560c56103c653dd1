"""Solution of exercise 8."""
import torch


def dr_grpo_loss(logprobs, old_logprobs, advantages, mask, clip_eps, longest):
    """(B, N) each -> scalar, to be minimised."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B, N)
    return -((surrogate * mask).sum(dim=1) / longest).mean()
