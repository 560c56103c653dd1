"""The answers to the notebooks' questions that are numbers, worked out anew by the functions that the text is about.

KEYS: {notebook: [(a piece of the question, its answer, a function that returns the answer's numbers)]}.
"""
import math

import torch

from grpo_min import grpo, ppo, reward_model, rollout, variants


def slope(ratio, advantage, clip=0.2):
    """The weight of the gradient of one token's log-probability in the surrogate."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    grpo.policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1).bool(), clip).backward()
    return -logprobs.grad.item()


def kl(policy, reference, *kinds):
    """Estimates of the KL from one token with these probabilities."""
    return [grpo.kl_estimate(torch.tensor(policy).log(), torch.tensor(reference).log(), kind) for kind in kinds]


def best_constant(p, squared_gradients, rewards):
    """The constant baseline of least variance (Weaver and Tao, 2001)."""
    weight = torch.tensor(p) * torch.tensor(squared_gradients)
    return (weight * torch.tensor(rewards)).sum() / weight.sum()


def surprises(values, reward, lam):
    """The temporal-difference errors of a completion with these values before its tokens, and the first advantage."""
    values = torch.tensor([values])
    rewards = torch.zeros_like(values)
    rewards[:, -1] = reward
    mask = torch.ones_like(values).bool()
    return [*ppo.gae(rewards, values, mask, 1.0, 0.0)[0][0], ppo.gae(rewards, values, mask, 1.0, lam)[0][0, 0]]


KEYS = {
    "01": [
        ("three equally likely actions", "0.3, 0 and -0.3", lambda: grpo.group_advantages(
            torch.tensor([0.6, 0.3, 0]), 3)),
        ("Two completions, each with probability 0.5", "0.5", lambda: [best_constant([0.5, 0.5], [1, 1], [1, 0])]),
        ("The rewards of a group of four are 0, 0, 0.6 and 1", "-0.4, -0.4, 0.2 and 0.6", lambda: grpo.group_advantages(
            torch.tensor([0, 0, 0.6, 1]), 4)),
        ("The policy gives a sampled token 0.25", "-0.69 and 0.31", lambda: kl(0.25, 0.5, "k1", "k3")),
    ],
    "02": [
        ("A model with random weights holds all", "6.40", lambda: [math.log(600)]),
        ("now all 8 completions have 24", "199", lambda: [15 + 8 * (24 - 1)]),
        ("Three completions have 3, 5 and 8 tokens", "13", lambda: [
            (rollout.pad([[7] * (n - 1) + [1] for n in (3, 5, 8)], 1)[0] != 1).sum()]),
        ("Nothing in the demonstrations says", "0.43", lambda: [
            grpo.group_advantages(torch.tensor([0.97, 0.11]), 2)[0]]),
    ],
    "03": [
        ("The SFT model thinks in half of its answers", "-0.01", lambda: [
            grpo.group_advantages(torch.tensor([0.98, 1.0]), 2)[0]]),
        ("Two answers have the scores 3 and 1", "0.88", lambda: [
            math.exp(-reward_model.preference_loss(torch.tensor([3.0]), torch.tensor([1.0])))]),
        ("Two answers are shown to many annotators", "1.39", lambda: [min(
            (0.8 * reward_model.preference_loss(m, 0 * m) + 0.2 * reward_model.preference_loss(0 * m, m), m)
            for m in torch.arange(0, 5, 0.01, dtype=torch.float64))[1]]),
        ("The width falls with the square root", "320", lambda: [20 * (36 / 9) ** 2]),
    ],
    "04": [
        ("The rewards of a group are 1, 0, 0, 1", "0.5, -0.5, -0.5, 0.5", lambda: grpo.group_advantages(
            torch.tensor([1.0, 0, 0, 1]), 4)),
        ("An advantage of -0.5, clip 0.2, and a ratio of 0.7", "0", lambda: [slope(0.7, -0.5)]),
        ("The policy is right in half of the cases", "12.5", lambda: [100 * (0.5 ** 4 + 0.5 ** 4)]),
        ("Rewards 1, 0, 0, 1 again", "0.87", lambda: [grpo.group_advantages(torch.tensor([1.0, 0, 0, 1]), 4, True)[0]]),
    ],
    "05": [
        ("The critic says 0.5, 0.6, 0.9 before", "0.1, 0.3, 0.1 and 0.275", lambda: surprises(
            [0.5, 0.6, 0.9], 1.0, 0.5)),
        ("With lambda 1, the critic says 0.4", "0.6", lambda: [surprises([0.4, 0.9, 0.2], 1.0, 1.0)[-1]]),
        ("The critic always says 0.5, lambda is 0", "0, 0 and -0.5", lambda: surprises([0.5, 0.5, 0.5], 0.0, 0.0)[:-1]),
        ("The policy gives a sampled token 0.5, the reference 0.25", "0.069", lambda: [0.1 * kl(0.5, 0.25, "k1")[0]]),
    ],
    "06": [
        ("In float32, training holds for each of", "20 and 36", lambda: [4 + 4 + 8 + 4, 4 + 4 + 8 + 4 + 16]),
        ("Half of the completions are right, with a squared gradient of 1", "0.1", lambda: [
            best_constant([0.5, 0.5], [1, 9], [1, 0])]),
        ("GRPO's seeds end at 95.5, 95.6 and 95.9", "2", lambda: [
            sum(x > max(95.5, 95.6, 95.9) for x in (95.8, 96.2, 96.9))]),
        ("Four groups of four, all rewards equal in three", "75", lambda: [100 * 3 / 4]),
    ],
    "07": [
        ("How many nats is the best of 16 away", "1.84", lambda: [math.log(16) - 15 / 16]),
        ("with $a = 3$ and $b = 1$", "2.25", lambda: [(3 / 2) ** 2]),
        ("Annotators are wrong in 30% of the cases", "78", lambda: [100 * (0.7 ** 3 + 3 * 0.7 ** 2 * 0.3)]),
        ("Without a penalty a run gains 4 in proxy", "2.4", lambda: [max(4 - 0.3 * 6, 3 - 0.3 * 2)]),
    ],
    "08": [
        ("A group has the rewards 1, 0, 0, 0", "0.75 and 1", lambda: [
            kind(torch.tensor([1.0, 0, 0, 0]), 4)[0] for kind in (grpo.group_advantages, variants.leave_one_out)]),
        ("a token ratio of 0.7", "0 and -1.5", lambda: [slope(ratio, -1.0) for ratio in (0.7, 1.5)]),
        ("One part has a completion of 2 tokens", "0.2 and 0.5", lambda: [2 / 10, (2 / 2 + 0 / 8) / 2]),
        ("The policy gives a sampled token 0.5", "-0.47 and 0.13", lambda: kl(0.5, 0.8, "k1", "k3")),
    ],
}
