"""Bug hunt 2: the penalty that drives the policy away.

Seen      figures/bug2.png. With a beta of 2 the policy should stay where it is, and in the reference run it does. Here
          the KL rises faster and faster, and the right answers get fewer. With a beta of 0.1 (figures/bug2-small.png)
          the curves would not tell you: that run looks no worse than its reference.
Ask       What does the optimizer do with a penalty, and what sign must it have for that?
Mend      this file, until `python -m tutorials.exercises.check 14` says pass. In the real loop beta * penalty is summed
          over a completion's tokens, averaged over the completions, and added to the loss. --hint helps.
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
    return -kl              # the objective is the reward minus beta times the KL
