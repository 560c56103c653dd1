"""Bug hunt 1: the KL that is always 0.

Seen      figures/bug1.png. Right answers, lengths and gradients are those of the reference run. But the KL to the
          reference is 0 in every step, where that of the reference run rises. A larger beta changes nothing.
Ask       A policy that learns must differ from where it started. So what is it compared with?
Mend      this file, until `python -m tutorials.exercises.check 13` says pass. With --train it runs in the real loop:
          there `reference_of` is called once, before the first step, and `kl_estimate` in every update. --hint helps.
"""
import torch

from grpo_min.model import GPT


def reference_of(policy):
    """The reference: a model of its own, with the weights that the policy has now. It is never trained."""
    reference = GPT(policy.config, policy.tokenizer)
    for weight, original in zip(reference.parameters(), policy.parameters()):
        weight.data = original.data
    return reference.requires_grad_(False)


def kl_estimate(logprobs, ref_logprobs, kind):
    """k1, k2 or k3 (Schulman, 2020): (B, N), (B, N) -> (B, N)."""
    log_ratio = ref_logprobs - logprobs  # (B, N)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio ** 2 / 2
    return torch.expm1(log_ratio) - log_ratio
