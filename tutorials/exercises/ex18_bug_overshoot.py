"""Bug hunt 6: updates that do not know when to stop.

Seen      figures/bug6.png. Each batch is used for 8 updates with a learning rate of 1e-3, and the clip should keep the
          policy from going too far on one batch. Here the KL rises several times as high as in the reference run, and
          after a good start the answers get worse.
Ask       For which tokens does the clip take the gradient away? Try ratios of 1.5 and 0.5 and advantages of both signs.
Mend      this file, until `python -m tutorials.exercises.check 18` says pass. --hint helps.
"""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's clipped surrogate (1707.06347, eq. 7), as a loss: (B, N) each -> scalar."""
    ratio = (logprobs - old_logprobs).exp()  # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, N)
    losses = torch.min(-ratio * advantages, -clipped * advantages)  # (B, N)
    return (losses * mask).sum(dim=1).mean()
