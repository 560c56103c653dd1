"""Bug hunt 6: updates that do not know when to stop.

Seen      figures/bug6.png. Each batch is used for 8 updates, and the clip should keep the policy from going too far on
          one batch. Far more ratios than in the reference run lie outside of the clip, the KL rises quickly, and the
          answers get worse.
Ask       For which tokens does the clip take the gradient away? Try ratios of 1.5 and 0.5 and advantages of both signs.
Mend      this file, until `python -m tutorials.exercises.check 18` says pass. --hint helps.
"""
import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's clipped surrogate (1707.06347, eq. 7), as a loss: (B, N) each -> scalar."""
    ratio = (logprobs - old_logprobs).exp()                                                   # (B, N)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)                                         # (B, N)
    losses = torch.min(-ratio * advantages, -clipped * advantages)                            # (B, N)
    return (losses * mask).sum(dim=1).mean()
