"""Bug hunt 2, mended. Trap 11: the KL with its sign reversed, so that drifting is paid for.

The objective is the reward minus beta times the KL, but a loss is minus the objective, and there the KL has a plus. The
surrogate had been negated once already, in policy_loss.
"""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """The clipped surrogate, negated because it is to be maximised: (B, N) each -> scalar."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B, N)
    return -(surrogate * mask).sum(dim=1).mean()


def penalty(logprobs, ref_logprobs, kind):
    """What is added to the loss for the distance to the reference, without beta: (B, N), (B, N) -> (B, N)."""
    log_ratio = ref_logprobs - logprobs  # (B, N)
    if kind == "k1":
        kl = -log_ratio
    elif kind == "k2":
        kl = log_ratio ** 2 / 2
    else:
        kl = torch.expm1(log_ratio) - log_ratio
    return kl               # the loss is minus the objective, which is the reward minus beta times the KL
