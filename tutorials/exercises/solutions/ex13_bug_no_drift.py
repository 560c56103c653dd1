"""Bug hunt 1, mended. Trap 18: the reference that moves along with the policy.

`weight.data = original.data` made the two share their memory, so that each step of the optimizer moved both. copy_
copies the numbers. (The real loop has copy.deepcopy. state_dict() alone has the same trap: its tensors are the live
ones.)
"""
import torch

from grpo_min.model import GPT


def reference_of(policy):
    """The reference: a model of its own, with the weights that the policy has now. It is never trained."""
    reference = GPT(policy.config, policy.tokenizer)
    for weight, original in zip(reference.parameters(), policy.parameters()):
        weight.data.copy_(original.data)
    return reference.requires_grad_(False)


def kl_estimate(logprobs, ref_logprobs, kind):
    """k1, k2 or k3 (Schulman, 2020): (B, N), (B, N) -> (B, N)."""
    log_ratio = ref_logprobs - logprobs  # (B, N)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio ** 2 / 2
    return torch.expm1(log_ratio) - log_ratio
