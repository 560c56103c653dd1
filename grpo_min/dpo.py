"""DPO, Direct Preference Optimization (Rafailov et al., 2305.18290): no RL at all.

Beside stages 3 and 4: the policy is trained on the annotators' choices themselves, without
a reward model and without sampling. Any policy is the best one for some reward under a KL
penalty of weight beta, namely for its implicit reward, beta log(policy / reference) (eq. 5,
up to a number for each prompt, which a comparison does not see). DPO is the loss of
reward_model.py for this reward, and what it has then trained is the policy.

The answers are those of the file, never the policy's own. Margins grow where the rejected
answer becomes unlikely, and the chosen one may, too: watch the columns chosen and rejected.
lr and beta are those of a short search, by the gold score on the animals' val prompts.
"""
from dataclasses import dataclass

import torch
from torch import nn

from grpo_min.reward_model import (pair_batch, pairs_to_train, preference_loss,
                                   report_unseen, unseen_pairs)
from grpo_min.rollout import token_logprobs
from grpo_min.run.checkpoint import frozen_copy, load_model
from grpo_min.run.config import (option, parse, pick_device, require, require_positive,
                                 run_command)
from grpo_min.run.files import DATA
from grpo_min.run.fit import fit


@dataclass
class DPOConfig:
    """DPO: train the SFT model on pairs of answers, of which one was chosen."""
    run: str = option("runs/dpo", "folder to write into")
    resume: bool = option(False, "go on from the checkpoint in --run")
    sft: str = option(str(DATA / "checkpoints/sft.pt"),
                      "checkpoint of the SFT model: policy and reference start there")
    preferences: str = option(str(DATA / "preferences.jsonl"),
                              "JSONL with the fields prompt, chosen and rejected")
    heldout: str = option("", "as for reward_model: pairs for the evaluation")
    holdout: float = option(0.0, "as for reward_model: share of the prompts that are not "
                            "trained on, but judged on")
    steps: int = option(400, "updates; by default, about one pass")
    batch_size: int = option(32, "pairs per update (all, if there are fewer)")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(20, "updates over which the learning rate rises")
    beta: float = option(0.5, "weight of the KL penalty that is implied, reward per nat: "
                         "the smaller, the further the policy goes; with the paper's 0.1 "
                         "too far here, to answers that do not end")
    label_smoothing: float = option(0.0, "share of the choices taken to be wrong, from 0 "
                                    "to below 0.5 (conservative DPO)")
    seed: int = option(1, "seed of the order of pairs")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


class ImplicitReward(nn.Module):
    """The reward of which a policy is the optimum, read like that of a reward model."""

    def __init__(self, policy, reference, beta):
        super().__init__()
        self.policy, self.reference, self.beta = policy, reference, beta
        self.config, self.tokenizer = policy.config, policy.tokenizer

    def last(self, prompts, completion_ids, mask):
        """beta log(policy / reference) of whole completions, END included: (B,)."""
        logprobs, _ = token_logprobs(self.policy, prompts, completion_ids, mask)  # (B, N)
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(self.reference, prompts, completion_ids, mask)
        return self.beta * (logprobs - ref_logprobs).sum(dim=1)  # (B,)


def dpo_loss(chosen, rejected, label_smoothing=0.0):
    """DPO (2305.18290, eq. 7): implicit rewards (n,), (n,) -> scalar.

    The mean of -log sigmoid(chosen - rejected); with label_smoothing, that share of it for
    the opposite choice (Mitchell, 2023: conservative DPO), so that no margin is ever best
    at infinity.
    """
    loss, opposite = preference_loss(chosen, rejected), preference_loss(rejected, chosen)
    return (1 - label_smoothing) * loss + label_smoothing * opposite


def train(config, evaluate=None):
    """Train -> the policy and one row of metrics per step; evaluate as in run/fit.py."""
    require_positive(config, "steps", "batch_size", "lr", "warmup", "beta")
    require(0 <= config.label_smoothing < 0.5, "--label-smoothing must be from 0 to below "
            f"0.5, not {config.label_smoothing}")
    device = pick_device(config.device)
    policy = load_model(config.sft, device)
    rows = pairs_to_train(config, policy)
    reward = ImplicitReward(policy, frozen_copy(policy), config.beta)

    def loss_at(step):
        batch = pair_batch(config, rows, step, policy.tokenizer, device)
        chosen, rejected = reward.last(*batch).view(-1, 2).unbind(dim=1)  # (Q,) each
        metrics = dict(accuracy=(chosen > rejected).float(), margin=chosen - rejected,
                       chosen=chosen, rejected=rejected)
        metrics = {name: value.mean().item() for name, value in metrics.items()}
        return dpo_loss(chosen, rejected, config.label_smoothing), metrics

    return policy, fit(config, policy, [config.sft, config.preferences], loss_at,
                       evaluate=evaluate)


def main(argv=None):
    config = parse(DPOConfig, argv)
    unseen = unseen_pairs(config)  # a mistake in them should show before the training
    policy, _ = train(config)
    reference = load_model(config.sft, next(policy.parameters()).device)
    report_unseen(ImplicitReward(policy, reference, config.beta), config, *unseen)


if __name__ == "__main__":
    run_command(main)
