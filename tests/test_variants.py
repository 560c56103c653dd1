"""The drop-in parts of GRPO, one by one against numbers worked out by hand, values and gradients; then as recipes.

Ratios are given by the log of the policy now; the old log-probabilities are 0 or small numbers, and are never trained.
"""
import dataclasses
import functools
import json
import math

import pytest
import torch

from grpo_min import grpo, variants
from grpo_min.grpo import group_advantages, kl_estimate, policy_loss
from grpo_min.rollout import Rollout
from grpo_min.run import log, metrics
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import UserError, parse
from grpo_min.run.table import read_csv
from grpo_min.variants import ADVANTAGES, AGGREGATIONS, RECIPES, VariantConfig, make_loss
from tests import tiny
from tests.test_algorithms import close, ragged
from tests.test_loops import crash, state, stop_at
from tests.tiny import PAD, assert_same_run, letter_e, settings

REWARDS = torch.tensor([1.0, 2, 6, 0, 0, 3])          # two groups of three
RATIOS = "token", "sequence", "cispo", "sapo", "vespo"
DEFAULTS = dataclasses.asdict(VariantConfig())
pytestmark = pytest.mark.usefixtures("no_curves")


def loss_of(ratio="token", aggregation="sum", low=0.2, high=0.0, longest=1, clipped=None, group=None, **more):
    """A loss with these parts, with no clip_eps to be told: its own bounds are meant. group None: all are one."""
    def loss(logprobs, old, advantages, mask, *penalty):
        config = VariantConfig(ratio=ratio, aggregation=aggregation, clip_eps=low, clip_eps_high=high,
                               max_new_tokens=longest, group_size=group or len(mask), **more)
        return make_loss(config, clipped)(logprobs, old, advantages, mask, None, *penalty)
    return loss


# --- advantages ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("mean", [-2, -1, 3, -1, -1, 2]),
    ("mean, scaled", [-2 / (7 ** 0.5 + 1e-4), -1 / (7 ** 0.5 + 1e-4), 3 / (7 ** 0.5 + 1e-4),    # mean 3, squares 14 / 2
                      -1 / (3 ** 0.5 + 1e-4), -1 / (3 ** 0.5 + 1e-4), 2 / (3 ** 0.5 + 1e-4)]),  # mean 1, squares 6 / 2
    ("leave_one_out", [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3 - 0]),
    ("batch", [(r - 2) / (5.2 ** 0.5 + 1e-4) for r in (1, 2, 6, 0, 0, 3)]),                     # mean 2, squares 26 / 5
    ("batch_scaled", [A / (5.2 ** 0.5 + 1e-4) for A in (-2, -1, 3, -1, -1, 2)]),
    ("none", [1, 2, 6, 0, 0, 3]),
])
def test_advantages_by_hand(name, expected):
    advantages = ADVANTAGES[name.split(",")[0]](REWARDS, 3, scale="scaled" in name)
    assert close(advantages, expected) and advantages.dtype == torch.float32 and advantages.shape == (6,)


@pytest.mark.parametrize("G", [2, 3, 5])
def test_leave_one_out_is_the_group_means_advantage_times_g_over_g_minus_1(G):
    """R_i - (S - R_i) / (G - 1) = (G R_i - S) / (G - 1) = G / (G - 1) (R_i - S / G), with S the sum of the group."""
    rewards = torch.randn(4 * G, generator=torch.Generator().manual_seed(0)).double()
    assert close(variants.leave_one_out(rewards, G), group_advantages(rewards, G) * G / (G - 1), 1e-12)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("name", ["mean", "leave_one_out", "batch", "batch_scaled"])
def test_equal_rewards_have_advantages_of_exactly_zero(name, scale):
    assert torch.equal(ADVANTAGES[name](torch.tensor([0.7] * 12), 12, scale), torch.zeros(12))


def test_batch_gives_groups_of_equals_an_advantage():
    advantages = variants.batch_advantages(torch.tensor([0.0, 0, 1, 1]), 2)
    assert close(advantages, [v / (3 ** -0.5 + 1e-4) for v in (-.5, -.5, .5, .5)])


@pytest.mark.parametrize("name", ["mean", "leave_one_out"])
@pytest.mark.parametrize("count, group_size", [(4, 1), (5, 2)])
def test_rewards_that_make_no_groups_are_refused(name, count, group_size):
    with pytest.raises(ValueError, match="groups"):
        ADVANTAGES[name](torch.zeros(count), group_size)


# --- aggregation --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, loss, gradients", [        # rows of 1 and 3 tokens, A is 2 and -4
    ("sum", -(2 - 12) / 2, (-2 / 2, 4 / 2)),
    ("sequence", -(2 - 4) / 2, (-2 / 2, 4 / 2 / 3)),
    ("token", -(2 - 12) / 4, (-2 / 4, 4 / 4)),
    ("prompt", -(2 - 12) / 4, (-2 / 4, 4 / 4)),             # of one group
    ("constant", -(2 - 12) / 2 / 10, (-2 / 2 / 10, 4 / 2 / 10)),
])
def test_aggregations_by_hand(name, loss, gradients):
    logprobs = torch.zeros(2, 3, requires_grad=True)
    advantages, mask = torch.tensor([[2.0], [-4.0]]).expand(2, 3), ragged([1, 3])
    found = loss_of("token", name, longest=10)(logprobs, torch.zeros(2, 3), advantages, mask)
    found.backward()
    assert close(found, loss) and close(logprobs.grad, torch.tensor(gradients)[:, None] * mask)


def test_prompts_count_alike_however_long_their_completions_are():
    """Groups of 1 and 3 tokens and of 2 and 6: with A = 1 a token counts 1 / 4 and 1 / 8 of a group, 1 / 2 of that."""
    logprobs, mask = torch.zeros(4, 6, requires_grad=True), ragged([1, 3, 2, 6])
    loss = loss_of(aggregation="prompt", group=2)(logprobs, torch.zeros(4, 6), torch.ones(4, 6), mask)
    loss.backward()
    assert close(loss, -1) and close(logprobs.grad, -torch.tensor([[4.0], [4], [8], [8]]).reciprocal() / 2 * mask)


@pytest.mark.parametrize("ratio", RATIOS)
def test_with_equal_lengths_aggregations_differ_by_a_constant_alone(ratio):
    """sum / 4 = sequence = token = constant where all 3 completions have 4 tokens, and the longest has 4 too."""
    logprobs, old, advantages = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    mask, found = ragged([4, 4, 4]), {}
    for name in AGGREGATIONS:
        leaf = logprobs.clone().requires_grad_()
        loss = loss_of(ratio, name, longest=4)(leaf, old, advantages, mask)
        loss.backward()
        found[name] = torch.cat([loss.detach().view(1), leaf.grad.flatten()])
    for name in set(AGGREGATIONS) - {"sum"}:
        assert close(found[name], found["sum"] / 4, 1e-12), name
    assert found["sum"].abs().max() > 0.1


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_tokens_after_the_end_have_no_effect_and_empty_rows_are_finite(ratio, name):
    mask, found = ragged([2, 0, 4]), []
    for garbage in 0.0, 7.0:
        logprobs, old, advantages, penalty = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(3))
        logprobs = logprobs.masked_fill(~mask, garbage).requires_grad_()
        advantages = advantages[:, :1].expand(3, 4)
        old, penalty = old.masked_fill(~mask, -garbage), penalty.masked_fill(~mask, 9 * garbage)
        loss = loss_of(ratio, name, longest=4)(logprobs, old, advantages, mask, penalty)
        loss.backward()
        found.append((loss.item(), logprobs.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert math.isfinite(found[0][0]) and (found[0][1][~mask] == 0).all() and (found[0][1][mask] != 0).any()
    empty = torch.zeros(2, 2, requires_grad=True)
    nothing = ragged([0, 0], 2)
    loss_of(ratio, name, longest=4)(empty, torch.zeros(2, 2), torch.ones(2, 2), nothing, torch.ones(2, 2)).backward()
    assert torch.equal(empty.grad, torch.zeros(2, 2))


# --- ratio and clip -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, high, surrogate, gradient", [       # A = 2: clip_eps is 0.2
    (1.25, 0.0, 1.2 * 2, 0.0),                  # 0: the upper bound is that of clip_eps
    (1.25, 0.28, 1.25 * 2, 1.25 * 2),           # a higher one keeps what clip_eps alone clips
    (1.3, 0.28, 1.28 * 2, 0.0),
    (1.15, 0.1, 1.1 * 2, 0.0),                  # a lower one clips more
])
def test_clip_higher_by_hand(ratio, high, surrogate, gradient):
    logprobs = torch.tensor([[math.log(ratio)]]).double().requires_grad_()
    loss = loss_of(high=high)(logprobs, torch.zeros(1, 1), torch.full((1, 1), 2.0), ragged([1]))
    loss.backward()
    assert close(loss, -surrogate) and close(logprobs.grad, -gradient)


def test_clip_higher_leaves_the_lower_bound_alone():
    logprobs = torch.tensor([[math.log(0.75)]], requires_grad=True)
    loss = loss_of(high=0.28)(logprobs, torch.zeros(1, 1), torch.full((1, 1), -2.0), ragged([1]))
    loss.backward()
    assert close(loss, 0.8 * 2) and close(logprobs.grad, 0)


def test_parts_of_the_defaults_make_policy_loss():
    logprobs, old, advantages, penalty = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(4))
    ours = loss_of()(logprobs, old, advantages, ragged([1, 4, 2]), penalty)
    assert close(ours, policy_loss(logprobs, old, advantages, ragged([1, 4, 2]), 0.2, penalty))


def of_one_row(ratio, tokens, advantage, clip_eps=0.2, high=0.0, aggregation="sequence"):
    """Loss and gradient of one completion whose tokens have these ratios."""
    logprobs = torch.tensor([tokens]).double().log().requires_grad_()
    old, advantages = torch.zeros(1, len(tokens)).double(), torch.full((1, len(tokens)), advantage).double()
    loss = loss_of(ratio, aggregation, clip_eps, high)(logprobs, old, advantages, ragged([len(tokens)]))
    loss.backward()
    return loss.item(), logprobs.grad[0]


def test_sequence_ratio_by_hand():
    # The geometric mean of 0.5, 1.25 and 1.6 is exactly 1, of 2 and 0.72 it is 1.2, of 4 and 1 it is 2.
    loss, gradient = of_one_row("sequence", [0.5, 1.25, 1.6], 2.0)
    assert loss == pytest.approx(-2) and close(gradient, [-2 / 3] * 3)          # nothing is clipped: all tokens learn
    loss, gradient = of_one_row("sequence", [2.0, 0.72], 3.0, high=0.3)
    assert loss == pytest.approx(-3.6) and close(gradient, [-3.6 / 2] * 2)      # d s / d log pi_t = s / length
    loss, gradient = of_one_row("sequence", [4.0, 1.0], 3.0)
    assert loss == pytest.approx(-3.6) and close(gradient, [0, 0])              # clipped: no token learns
    loss, gradient = of_one_row("sequence", [4.0, 1.0], -3.0)
    assert loss == pytest.approx(6) and close(gradient, [3, 3])                 # a bad one is pushed back, as in PPO


def test_sequence_ratio_is_each_completions_own():
    logprobs, mask = torch.tensor([[2.0, 9], [0.5, 0.5]]).log(), ragged([1, 2])
    ratio = variants.sequence_log_ratio(logprobs, torch.zeros(2, 2), mask).exp()
    assert close(ratio, [[2.0, 2.0], [0.5, 0.5]])


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(advantage):
    # Weights 0.8, 1.1 and 1.2 for ratios of 0.5, 1.1 and 3: clipped on both sides whatever the sign, and none is lost.
    loss, gradient = of_one_row("cispo", [0.5, 1.1, 3.0], advantage, aggregation="sum")
    assert close(gradient, [-0.8 * advantage, -1.1 * advantage, -1.2 * advantage])
    assert loss == pytest.approx(-advantage * (0.8 * math.log(0.5) + 1.1 * math.log(1.1) + 1.2 * math.log(3)))
    _, gradient = of_one_row("cispo", [0.01, 5.0, 6.0], advantage, clip_eps=1.0, high=3.0, aggregation="sum")
    assert close(gradient, [-0.01 * advantage, -4 * advantage, -4 * advantage])          # the recipe's bounds


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_at_ratio_one_all_ratios_have_the_gradient_of_the_policy(aggregation):
    """Tokens' ratios, CISPO, SAPO, VESPO: A d log pi. GSPO: A d (mean of log pi), summed over tokens the same."""
    mask, found = ragged([1, 4, 2]), {}
    advantages = torch.tensor([[1.0], [-2.0], [3.0]]).double().expand(3, 4)
    for ratio in RATIOS:
        logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double().requires_grad_()
        loss_of(ratio, aggregation, 3e-4, longest=4)(logprobs, logprobs.detach(), advantages, mask).backward()
        found[ratio] = logprobs.grad
    divisor = {"sum": 1, "sequence": torch.tensor([[1], [4], [2]]), "token": 7 / 3, "prompt": 7 / 3,
               "constant": 4}[aggregation]
    for ratio in RATIOS:
        assert close(found[ratio], -advantages * mask / 3 / divisor), ratio


def test_away_from_ratio_one_the_ratios_differ():
    found = {ratio: of_one_row(ratio, [0.5, 1.1, 1.5], 2.0, aggregation="sum")[1] for ratio in RATIOS[:3]}
    assert close(found["token"], [-0.5 * 2, -1.1 * 2, 0]) and close(found["cispo"], [-0.8 * 2, -1.1 * 2, -1.2 * 2])
    assert close(found["sequence"], [-2 * (0.5 * 1.1 * 1.5) ** (1 / 3)] * 3)


@pytest.mark.parametrize("advantage, tau", [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_by_hand(advantage, tau):
    """f = 4 / tau sigmoid(tau (r - 1)), and df / d log pi = 4 s (1 - s) r; at r = 1 that is 1."""
    ratios = [0.5, 1.0, 3.0]
    gates = [1 / (1 + math.exp(-tau * (r - 1))) for r in ratios]
    loss, gradient = of_one_row("sapo", ratios, advantage, aggregation="sum")
    assert loss == pytest.approx(-advantage * sum(4 / tau * s for s in gates), rel=1e-6)
    assert close(gradient, [-advantage * 4 * s * (1 - s) * r for s, r in zip(gates, ratios)])
    assert gradient[1].item() == pytest.approx(-advantage) and gradient.abs().min() > 0, "no token is left out"


@pytest.mark.parametrize("advantage, k, decay", [(2.0, 2, 3), (-2.0, 3, 2), (0.0, 2, 3)])
def test_vespo_by_hand(advantage, k, decay):
    """The completion's ratio is 0.5 x 1.5 = 0.75, no root is drawn; w^k e^(lambda (1 - w)) weighs log pi."""
    weight = 0.75 ** k * math.exp(decay * 0.25)
    loss, gradient = of_one_row("vespo", [0.5, 1.5], advantage, aggregation="sum")
    assert close(gradient, [-weight * advantage] * 2)
    assert loss == pytest.approx(-weight * advantage * math.log(0.75))
    zeros, mask = torch.zeros(1, 3), ragged([2], 3)
    logprobs = torch.tensor([[0.5, 1.5, 9]]).log()
    assert close(variants.vespo_weight(logprobs, zeros, zeros + advantage, mask), torch.full((1, 3), weight))
    for log_w in -1000.0, 1000.0:
        assert torch.equal(variants.vespo_weight(zeros + log_w, zeros, zeros + advantage, mask), zeros)


@pytest.mark.parametrize("ratio, advantage, surrogate, gradient", [
    (3.0, -2.0, -6.0, -6.0), (5.0, -2.0, -8.0, 0.0),                    # a bad token's ratio counts up to 4
    (0.5, -2.0, -1.6, 0.0), (1.1, 2.0, 2.2, 2.2), (5.0, 2.0, 2.4, 0.0)])        # all else is PPO's clip
def test_two_sided_clip_by_hand(ratio, advantage, surrogate, gradient):
    for kind, tokens in ("token", [ratio]), ("sequence", [ratio] * 2):
        logprobs = torch.tensor([tokens]).double().log().requires_grad_()
        loss = loss_of(kind, "sequence", clip_max=4.0)(logprobs, torch.zeros(1, len(tokens)), torch.full(
            (1, len(tokens)), advantage), ragged([len(tokens)]))
        loss.backward()
        assert close(loss, -surrogate) and close(logprobs.grad.sum(), -gradient)


def test_unbiased_kl_by_hand():
    """0.3 k3 times a ratio of 2, with k3 of log(ref / policy) = log 3: value and gradient of r k3, aggregated alike."""
    logprobs, k3 = torch.tensor([[math.log(0.4)] * 2]).double().requires_grad_(), 3 - 1 - math.log(3)
    old, ref = torch.tensor([[math.log(0.2)] * 2]).double(), torch.tensor([[math.log(1.2)] * 2]).double()
    penalty = 0.3 * kl_estimate(logprobs, ref, "unbiased")
    loss = loss_of(aggregation="constant", longest=10, kl="unbiased")(
        logprobs, old, torch.zeros(1, 2), ragged([2]), penalty)
    loss.backward()
    assert close(loss, 2 * 0.3 * 2 * k3 / 10) and close(logprobs.grad, [[0.3 * 2 * (k3 + 1 - 3) / 10] * 2])


def test_entropy_bonus_by_hand():
    """0.3 times the ratio times -log pi, without a gradient through log pi: a bonus is a penalty below 0."""
    logprobs = torch.tensor([[math.log(0.4)]]).double().requires_grad_()
    old = torch.tensor([[math.log(0.2)]]).double()
    for penalty in [], [0.5]:
        logprobs.grad = None
        loss = loss_of(entropy_coef=0.3)(logprobs, old, torch.zeros(1, 1), ragged([1]), *penalty)
        loss.backward()
        assert close(loss, 0.3 * 2 * math.log(0.4) + sum(penalty))
        assert close(logprobs.grad, [[0.3 * 2 * math.log(0.4)]]), "what is unlikely becomes more likely"


def test_clip_shares_are_those_of_the_ratio_that_is_clipped():
    logprobs, mask = torch.tensor([[1.25, 1.0], [0.5, 9.0]]).log(), ragged([2, 1])
    zeros = torch.zeros(2, 2)

    def shares(**parts):
        clipped = []
        loss_of(clipped=clipped, **parts)(logprobs, zeros, zeros, mask)
        (low, high), = clipped
        return low * 3, high * 3
    assert shares() == pytest.approx((1, 1)) and shares(high=0.28) == pytest.approx((1, 0))
    assert shares(ratio="cispo", low=1.0, high=0.1) == pytest.approx((0, 1))
    assert shares(high=0.1, ratio="sequence") == pytest.approx((1, 2)), "sqrt(1.25) is 1.118, and both tokens are in"


# --- all of it against the papers' formulas -----------------------------------------------------------------------

def by_the_papers(ratio, aggregation, low, high, longest, G, logprobs, old, advantages, mask, penalty):
    """The loss, row by row and token by token: min(r A, clip(r, 1 - low, 1 + high) A) less the penalty, aggregated."""
    sums, tokens = [], mask.sum()
    for b, n in enumerate(mask.sum(1).tolist()):
        total = logprobs.new_zeros(())
        for t in range(n):
            r, A = (logprobs[b, t] - old[b, t]).exp(), advantages[b, t]
            if ratio == "sequence":
                r = ((logprobs[b, :n] - old[b, :n]).sum() / n).exp()
            surrogate = torch.min(r * A, r.clamp(1 - low, 1 + high) * A)
            if ratio == "cispo":
                surrogate = r.clamp(1 - low, 1 + high).detach() * A * logprobs[b, t]
            if ratio == "sapo":
                tau = 1.0 if A > 0 else 1.05
                surrogate = 4 / (tau * (1 + (-tau * (r - 1)).exp())) * A
            if ratio == "vespo":
                w, (k, decay) = (logprobs[b, :n] - old[b, :n]).sum().exp().item(), (2, 3) if A >= 0 else (3, 2)
                surrogate = math.exp(decay) * w ** k * math.exp(-decay * w) * A * logprobs[b, t]
            total = total + surrogate - penalty[b, t]
        sums.append(total / n if aggregation == "sequence" else total / longest if aggregation == "constant" else total)
    if aggregation == "prompt":
        groups = [sum(sums[q:q + G]) / mask[q:q + G].sum() for q in range(0, len(mask), G)]
        return -sum(groups) / len(groups)
    return -sum(sums) / (tokens if aggregation == "token" else len(mask))


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.3, 0.1), (0.25, 0.25), (1.0, 3.0)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_loss_is_that_of_the_papers(ratio, aggregation, low, high):
    """Values and gradients, with advantages of both signs, ratios on both sides of both bounds, and a KL penalty."""
    mask, spread = ragged([1, 6, 3, 5, 2, 4]), torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(7)).double()
    old, ref, advantages = spread[0] - 2, spread[1] - 2, 3 * spread[2]
    found = []
    for loss in loss_of(ratio, aggregation, low, high, longest=7, group=3), functools.partial(
            by_the_papers, ratio, aggregation, low, high, 7, 3):
        logprobs = torch.randn(6, 6, generator=torch.Generator().manual_seed(8)).double().mul(0.6).add(old)
        logprobs.requires_grad_()
        penalty = 0.3 * kl_estimate(logprobs, ref, "k3")
        value = loss(logprobs, old, advantages, mask, penalty)
        value.backward()
        found.append((value, logprobs.grad))
    (ours, gradient), (theirs, expected) = found
    assert close(ours, theirs, 1e-7) and close(gradient, expected, 1e-7)
    changes = ((logprobs - old) * mask).detach()
    r = (changes.sum(1) / mask.sum(1) if ratio == "sequence" else changes[mask]).exp()
    assert (low == 1 or r.min() < 1 - low) and (high == 3 or r.max() > 1 + high), "or nothing is clipped"
    assert (advantages[mask] > 0).any() and (advantages[mask] < 0).any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_an_aggregation_divides_surrogate_and_penalty_alike(ratio, aggregation):
    """Advantages that are the penalty cancel it, where every ratio is 1, whatever both are divided by."""
    mask, numbers = ragged([1, 4, 2]), torch.randn(3, 4, generator=torch.Generator().manual_seed(9)).double()
    zeros = torch.zeros(3, 4).double()
    loss = loss_of(ratio, aggregation, longest=7)
    charge = loss(zeros, zeros, 0 * numbers, mask, numbers)
    divisor = {"sum": 1, "sequence": torch.tensor([[1], [4], [2]]), "token": 7 / 3, "prompt": 7 / 3,
               "constant": 7}[aggregation]
    assert close(charge, (numbers * mask / divisor).sum() / 3)
    if ratio in ("token", "sequence"):                           # the others' value is not that of their ratio
        assert close(loss(zeros, zeros, numbers, mask, numbers), 0, 1e-9)
        assert close(loss(zeros, zeros, numbers, mask, 2 * numbers), charge)


# --- in the loop --------------------------------------------------------------------------------------------------

def test_the_defaults_are_those_of_grpo(tmp_path):
    """Without a part named, it is the run of grpo.py, clipped and scaled alike."""
    for more in dict(), dict(scale_advantages=True, epochs=2, clip_eps=0.01):
        (ours, rows), (theirs, expected) = [
            module.train(settings(module, tmp_path, steps=2, **more), reward=letter_e) for module in (variants, grpo)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))
        for row, other in zip(rows, expected):
            assert row.keys() == other.keys() and row["loss"] == pytest.approx(other["loss"], abs=1e-6)
            assert row["clip_low"] == pytest.approx(other["clip_low"]) and row["gap"] == other["gap"]


def test_scaled_advantages_are_others(tmp_path):
    found = [variants.train(settings(variants, tmp_path, steps=2, scale_advantages=on), reward=letter_e)[0]
             for on in (False, True)]
    assert not tiny.same(state(found[0]), state(found[1]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_is_the_one_named(name, tmp_path):
    seen = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        seen.append(advantages)
        return (logprobs * 0).sum()

    def reward(prompts, completions, **columns):
        return [float(i % 5) for i in range(12)]
    variants.train(settings(variants, tmp_path, steps=1, advantage=name), reward=reward, loss=loss)
    assert torch.equal(seen[0][:, 0], ADVANTAGES[name](torch.arange(12.0) % 5, 3))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_surrogate_and_penalty_are_divided_alike_and_by_all_tokens(aggregation, beta, tmp_path, monkeypatch):
    """Groups of equals count in the mean over tokens, too."""
    rollouts = tiny.recorded_rollouts(grpo, monkeypatch)

    def reward(prompts, completions, **columns):
        return [0.0] * 6 + [1.0, 2, 6, 0, 0, 3]                                         # two groups of equals
    config = settings(variants, tmp_path, steps=1, beta=beta, aggregation=aggregation)
    _, (row,) = variants.train(config, reward=reward, kl=lambda logprobs, ref_logprobs, kind: 0 * logprobs + 0.3)
    length = rollouts[0][1].mask.sum(1).double()                                        # (12,)
    assert length.min() < length.max()
    divisor = {"sum": torch.ones(12), "sequence": length, "token": length.mean().expand(12),
               "prompt": length.view(4, 3).mean(1).repeat_interleave(3),
               "constant": torch.full((12,), 6.0)}[aggregation]
    advantages = torch.tensor([0.0] * 6 + [-2, -1, 3, -1, -1, 2])
    expected = ((beta * 0.3 - advantages) * length / divisor).mean().item()
    assert row["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_rows_clip_shares_are_those_of_the_variants_own_ratio_and_bounds(tmp_path, watch):
    """Means over the updates of a step; of the sequences' ratio, where that is clipped, and with the upper bound."""
    measured, losses = watch(metrics, "update_metrics"), watch(variants, "sequence_log_ratio")
    config = settings(variants, tmp_path, steps=2, epochs=2, minibatches=2, ratio="sequence", aggregation="constant",
                      clip_eps=0.001, clip_eps_high=0.004)
    _, rows = variants.train(config, reward=letter_e)
    assert len(measured) == len(losses) == 8
    for step, row in enumerate(rows):
        expected = []
        for ((*_, mask), log_ratio) in losses[4 * step:4 * step + 4]:
            ratio = log_ratio.detach().exp()
            expected.append([(outside & mask).sum() / mask.sum() for outside in (ratio < 0.999, ratio > 1.004)])
        low, high = torch.tensor(expected).mean(0).tolist()
        assert row["clip_low"] == pytest.approx(low) and row["clip_high"] == pytest.approx(high)
        tokens = [result for _, result in measured[4 * step:4 * step + 4]]
        assert low > 0 and abs(row["clip_low"] - sum(update["clip_low"] for update in tokens) / 4) > 0.01


def test_evaluate_joins_the_row_beside_the_clip_shares(tmp_path):
    def evaluate(policy, step):
        return dict(held_out=step) if step else {}
    _, rows = variants.train(settings(variants, tmp_path, steps=2), reward=letter_e, evaluate=evaluate)
    assert [row.get("held_out") for row in rows] == [None, 1] and all(row["clip_low"] == 0 for row in rows)


def test_default_parts_are_the_functions_of_grpo(tmp_path, watch):
    used = watch(variants, "policy_loss")
    variants.train(settings(variants, tmp_path, steps=1), reward=letter_e)
    assert len(used) == 1 and ADVANTAGES["mean"] is group_advantages


def test_arguments_win_over_names(tmp_path):
    config = settings(variants, tmp_path, steps=1, beta=0.0, advantage="batch", aggregation="token",
                      dynamic_sampling=True)
    calls = []

    def collect(*arguments):
        calls.append(arguments)
        return grpo.collect(*arguments)
    policy, (row,) = variants.train(config, reward=letter_e, advantage=lambda rewards, *_: rewards * 0,
                                    loss=lambda logprobs, *_: logprobs.sum() * 0 + 7, collect=collect)
    assert row["loss"] == 7 and tiny.same(state(policy), state(load_model(config.sft)))
    assert len(calls) == 1 and "dropped" not in row


@pytest.mark.parametrize("more, said", [(dict(clip_eps_high=-0.1), "--clip-eps-high"),
                                        (dict(clip_max=1.25, clip_eps_high=0.28), "--clip-max must be at least 1.28"),
                                        (dict(clip_max=-1.0), "--clip-max"),
                                        (dict(overlong_buffer=1.1), "--overlong-buffer"),
                                        (dict(entropy_coef=-0.1), "--entropy-coef"),
                                        (dict(top_entropy=0.0), "--top-entropy is a share"),
                                        (dict(top_entropy=0.2, minibatches=2), "--top-entropy compares a whole batch"),
                                        (dict(kl="unbiased", kl_in="reward"), "--kl-in reward"),
                                        (dict(scale_advantages=True, advantage="batch"), "--scale-advantages")])
def test_settings_that_cannot_work(more, said, tmp_path):
    with pytest.raises(UserError, match=said):
        variants.train(settings(variants, tmp_path, **more), reward=letter_e)


# --- recipes ------------------------------------------------------------------------------------------------------

PUBLISHED = {       # all that differs from the defaults
    "grpo": dict(scale_advantages=True, aggregation="sequence", beta=0.04),
    "dapo": dict(scale_advantages=True, aggregation="token", clip_eps_high=0.28, beta=0.0, dynamic_sampling=True,
                 overlong_buffer=0.2),
    "dr_grpo": dict(aggregation="constant", beta=0.0),
    "rloo": dict(advantage="leave_one_out", kl="k1", kl_in="reward"),
    "gspo": dict(scale_advantages=True, aggregation="sequence", ratio="sequence", clip_eps=3e-4, clip_eps_high=4e-4,
                 beta=0.0),
    "cispo": dict(scale_advantages=True, aggregation="token", ratio="cispo", clip_eps=1.0, clip_eps_high=3.0, beta=0.0),
    "reinforce++": dict(advantage="batch", aggregation="token", kl="k1", kl_in="reward"),
    "sapo": dict(scale_advantages=True, aggregation="sequence", ratio="sapo", beta=0.0),
    "luspo": dict(scale_advantages=True, ratio="sequence", clip_eps=2e-3, clip_eps_high=2.5e-3, beta=0.0),
    "vespo": dict(scale_advantages=True, aggregation="token", ratio="vespo", beta=0.0),
    "scalerl": dict(advantage="batch_scaled", aggregation="prompt", ratio="cispo", clip_eps=1.0, clip_eps_high=4.0,
                    beta=0.0),
}


@pytest.fixture
def parsed(monkeypatch):
    """parsed(words) -> the config that a command line with these words trains with, as a dict."""
    def parsed(words):
        configs = []
        monkeypatch.setattr(variants, "train", configs.append)
        variants.main(words.split())
        return dataclasses.asdict(configs[0])
    return parsed


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_parts_and_nothing_else(name, parsed):
    assert parsed(f"--recipe {name} --steps 7") == dict(DEFAULTS, steps=7, **PUBLISHED[name])


def test_a_recipe_does_not_depend_on_the_defaults(parsed, monkeypatch):
    changed = dict(clip_eps=0.7, beta=0.7, kl="k2", ratio="cispo")
    fields = [(f.name, f.type, dataclasses.field(default=changed.get(f.name, f.default), metadata=f.metadata))
              for f in dataclasses.fields(VariantConfig)]
    monkeypatch.setattr(variants, "VariantConfig", dataclasses.make_dataclass("Other", fields))
    found = parsed("--recipe grpo")
    parts = [found[name] for name in ("beta", "kl", "ratio", "scale_advantages", "clip_eps")]
    assert parts == [0.04, "k3", "token", True, 0.7]


@pytest.mark.parametrize("words", ["--recipe dapo --beta 0.01 --no-dynamic-sampling --aggregation sum",
                                   "--beta 0.01 --aggregation sum --no-dynamic-sampling --recipe dapo"])
def test_an_option_wins_over_the_recipe(words, parsed):
    # All three are the defaults, so that comparing with these would not show that they were given.
    assert parsed(words) == dict(DEFAULTS, scale_advantages=True, clip_eps_high=0.28, overlong_buffer=0.2)


def test_a_recipe_that_nothing_would_heed_is_refused():
    with pytest.raises(UserError, match="RECIPES"):
        variants.train(variants.VariantConfig(run="", recipe="dapo"))


@pytest.mark.parametrize("aggregation", variants.AGGREGATIONS)
def test_microbatches_change_no_gradient_or_are_refused(aggregation, tmp_path, double):
    """A divisor of the whole batch cannot be had from a part of it: the mean of parts' means has another gradient."""
    config = VariantConfig(**vars(settings(grpo, tmp_path, steps=1)), aggregation=aggregation)
    norms = []
    for parts in 1, 2, 4:
        config = dataclasses.replace(config, microbatches=parts)
        if aggregation == "token" and parts > 1:
            with pytest.raises(UserError, match="--aggregation token divides by the whole batch's tokens"):
                variants.train(config, reward=tiny.letter_e)
        else:
            norms.append(variants.train(config, reward=tiny.letter_e)[1][0]["grad_norm"])
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-9) and norms[0] > 0


def test_a_recipe_for_one_command_line_leaves_the_next_alone(parsed):
    parsed("--recipe gspo")
    assert parsed("") == DEFAULTS and parse(VariantConfig, []) == VariantConfig()


@pytest.mark.parametrize("option, value", [("--recipe", "grpoo"), ("--advantage", "median"), ("--ratio", "batch"),
                                           ("--aggregation", "product")])
def test_unknown_names_are_refused_in_one_line(option, value):
    with pytest.raises(UserError, match=f"argument {option}: invalid choice: '{value}'") as refused:
        variants.main([option, value])
    assert "\n" not in str(refused.value)


def test_help_lists_the_recipes_and_the_readme_names_them(capsys, root, parsed):
    with pytest.raises(SystemExit):
        variants.main(["--help"])
    shown, readme = capsys.readouterr().out, (root / "README.md").read_text(encoding="utf-8")
    _, _, table = shown.partition("recipes:\n")
    table = table.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table] == list(RECIPES)
    for line in table:
        name, options = line.split(maxsplit=1)
        assert parsed(options) == parsed(f"--recipe {name}"), "the options printed are the recipe"
    command, = [line for line in readme.splitlines() if line.startswith("python -m grpo_min.variants --recipe ")]
    assert all(name in command.replace(",", " ").split() for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("more", [[], ["--epochs", "2", "--minibatches", "2"]], ids=["one update", "four updates"])
def test_recipes_run(name, more, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "train", functools.partial(variants.train, reward=letter_e))
    before = tiny.gpt()
    options = dict(run=tmp_path / "run", sft=tiny.checkpoint(tmp_path / "sft.pt"), steps=2, lr=0.001,
                   prompts=tiny.prompts(tmp_path / "prompts.jsonl"), prompts_per_step=4, group_size=3, max_new_tokens=6)
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    variants.main(["--recipe", name, *words, *more])
    policy = load_model(tmp_path / "run/checkpoint.pt")
    assert not tiny.same(state(policy), state(before))
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert {key: written[key] for key in RECIPES[name]} == RECIPES[name]
    rows = read_csv(tmp_path / "run/metrics.csv")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows) and len(rows) == 2


# --- dynamic sampling ---------------------------------------------------------------------------------------------

def hard(*good):
    """A reward whose groups differ for these prompts, and are all equal for the others."""
    def reward(prompts, completions, **columns):
        return [float(i % 3) if prompt in good else 1.0 for i, prompt in enumerate(prompts)]
    return reward


def dynamic(folder, **more):
    return settings(variants, folder, **dict(dict(steps=1, dynamic_sampling=True), **more))


def trained_prompts(config, reward, watch):
    """The prompts of the trained batch of every step, and the rows of metrics."""
    calls = watch(metrics, "shown_samples")
    _, rows = variants.train(config, reward=reward)
    return [[row["prompt"] for row in batch] for (_, _, _, batch, *_), _ in calls], rows


def watch_both(watch, name):
    """The calls of grpo.py, which samples first, and of variants.py, which samples what replaces it."""
    calls = watch(grpo, name)
    return watch(variants, name, calls)


def test_groups_of_equals_are_replaced_until_the_batch_is_full(tmp_path, watch, monkeypatch):
    sampled, advantages = watch_both(watch, "sample"), []
    monkeypatch.setitem(ADVANTAGES, "mean", lambda *arguments: (
        advantages.append(arguments), group_advantages(*arguments))[1])
    kept, (row,) = trained_prompts(dynamic(tmp_path), hard(*tiny.PROMPTS[:7]), watch)
    assert len(set(kept[0])) == 4 and set(kept[0]) <= set(tiny.PROMPTS[:7]) and row["equal_groups"] == 0
    seen = [text for (_, prompts, *_), _ in sampled for text in prompts.texts]
    assert len(set(seen)) == len(seen) > 4, "no prompt is sampled twice"
    assert row["dropped"] == len(seen) - 4 and row["completions"] == 3 * len(seen)
    assert torch.equal(advantages[0][0], torch.tensor([0.0, 1, 2] * 4))
    assert row["seconds_sample"] > 0 and row["reward"] == 1


def test_groups_that_differ_stay_where_they_are(tmp_path, watch):
    good = tiny.PROMPTS[:7]
    first, _ = trained_prompts(settings(variants, tmp_path, steps=1), hard(*good), watch)
    kept, _ = trained_prompts(dynamic(tmp_path), hard(*good), watch)
    assert any(prompt in good for prompt in first[0]) and any(prompt not in good for prompt in first[0])
    assert all(new == old for old, new in zip(first[0], kept[0]) if old in good)


def test_what_is_trained_are_the_rows_of_the_prompts_kept(tmp_path, watch):
    """Prompt, completion ids, mask and the sampler's log-probabilities stay together, whatever was replaced."""
    updates, parts = watch(metrics, "update_metrics"), watch(grpo, "token_logprobs")
    kept, (row,) = trained_prompts(dynamic(tmp_path, epochs=1), hard(*tiny.PROMPTS[:7]), watch)
    assert row["dropped"] > 0 and row["gap"] < 1e-5
    assert parts[0][0][1].texts == kept[0] and updates[0][0][6].sum() > 12


def test_nothing_is_replaced_where_all_groups_differ(tmp_path):
    found = [variants.train(settings(variants, tmp_path, dynamic_sampling=on), reward=hard(*tiny.PROMPTS))
             for on in (False, True)]
    assert tiny.same(state(found[0][0]), state(found[1][0]))
    assert [row.get("dropped") for _, rows in found for row in rows] == [None] * 3 + [0] * 3
    assert [row["completions"] for row in found[1][1]] == [12, 24, 36]


def test_it_ends_when_every_prompt_has_had_its_turn(tmp_path, watch):
    sampled = watch_both(watch, "sample")
    config = dynamic(tmp_path, prompts_per_step=5, beta=0.0)                     # 12 prompts: 5, 5 others, the last 2
    policy, (row,) = variants.train(config, reward=hard())
    assert [len(prompts.texts) for (_, prompts, *_), _ in sampled] == [5, 5, 2]
    assert row["dropped"] == 7 and row["completions"] == 36 and row["equal_groups"] == 1
    assert tiny.same(state(policy), state(load_model(config.sft)))


def test_it_ends_after_so_many_rounds(tmp_path, watch, monkeypatch):
    sampled = watch_both(watch, "sample")
    monkeypatch.setattr(variants, "REFILLS", 2)
    _, rows = variants.train(dynamic(tmp_path, prompts_per_step=2, steps=2), reward=hard())
    assert len(sampled) == 2 * 3 and [row["dropped"] for row in rows] == [4, 4]
    assert [row["completions"] for row in rows] == [18, 36]


def test_draws_depend_on_seed_step_and_round_alone(tmp_path, watch):
    sampled, generators = watch_both(watch, "sample"), watch_both(watch, "generator")
    variants.train(dynamic(tmp_path, seed=3, steps=2, prompts_per_step=4), reward=hard())
    assert [arguments for arguments, _ in generators] == [
        each for step in (0, 1) for each in ((3, step), ("3 refill", step), ("3 refill 0", step), ("3 refill 1", step))]
    orders = [[text for (_, prompts, *_), _ in sampled[i + 1:i + 3] for text in prompts.texts] for i in (0, 3)]
    assert len(sampled) == 6 and orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    def reward(prompts, completions, **columns):
        return [float(len(text) > 8) for text in completions]
    whole, parts = (dynamic(tmp_path, run=str(tmp_path / name), steps=6, epochs=2) for name in ("a", "b"))
    policy, rows = variants.train(whole, reward=reward)
    assert any(row["dropped"] > 0 for row in rows[:3]) and any(row["dropped"] > 0 for row in rows[3:])
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    with pytest.raises(RuntimeError):
        variants.train(parts, reward=stop_at(7, crash, reward))
    assert 0 < load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] < 6
    resumed, resumed_rows = variants.train(dataclasses.replace(parts, resume=True), reward=reward)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert tiny.same(state(policy), state(resumed)) and resumed_rows[-1]["completions"] == rows[-1]["completions"]


def test_what_ranks_have_dropped_is_added_up(tmp_path, monkeypatch):
    """A row is the mean over the ranks, but completions are counted in all of them."""
    config = dynamic(tmp_path, prompts_per_step=5)
    alone = variants.train(config, reward=hard())[1][0]["dropped"]
    monkeypatch.setattr(variants, "RANKS", 3)
    assert variants.train(config, reward=hard())[1][0]["dropped"] == 3 * alone == 21


@pytest.mark.parametrize("longer", ["old", "new"])
def test_rows_of_another_rollout_are_put_in_place(longer):
    def rollout(first, n, N):
        ids = torch.arange(first, first + n * N).view(n, N)
        return Rollout(ids, torch.ones(n, N).bool(), ids / 10, torch.arange(n) % 2 == 0)
    old, new = rollout(100, 4, 3 if longer == "old" else 2), rollout(200, 2, 2 if longer == "old" else 3)
    merged = variants.replace_rows(old, torch.tensor([3, 1]), new, PAD)
    assert merged.completion_ids.tolist() == (
        [[100, 101, 102], [202, 203, PAD], [106, 107, 108], [200, 201, PAD]] if longer == "old" else
        [[100, 101, PAD], [203, 204, 205], [104, 105, PAD], [200, 201, 202]])
    assert torch.equal(merged.mask, merged.completion_ids != PAD)
    assert torch.equal(merged.logprobs, merged.completion_ids.masked_fill(~merged.mask, 0) / 10)
    assert merged.finished.tolist() == [True, False, True, True] and old.completion_ids[1, 0] in (102, 103)


# --- completions that are too long --------------------------------------------------------------------------------

def collecting(lengths, finished, rewards, longest=10):
    """A collect that hands out completions of these lengths, in groups of 2; a length of 0 was not judged."""
    mask = ragged(lengths, longest)
    rollout = Rollout(mask.long(), mask, mask * -1.0, torch.tensor(finished))
    return lambda config, *arguments: ("batch", "prompts", rollout, torch.tensor(rewards), "texts")


def shaped(config, *arguments, **keywords):
    batch, prompts, rollout, rewards, texts = variants.shaped(collecting(*arguments, **keywords))(config, 1, 2, 3)
    assert (batch, prompts, texts) == ("batch", "prompts", "texts")
    return rollout, rewards


def test_penalty_for_length_by_hand():
    """40 tokens at most and a buffer of 8: nothing up to 32, half at 36, all of it at 40, ended there or cut."""
    lengths = torch.tensor([1, 32, 33, 36, 40])
    assert close(variants.overlong_penalty(lengths, 40, 8.0), [0, 0, -1 / 8, -0.5, -1])
    assert close(variants.overlong_penalty(lengths, 20480, 4096.0), [0] * 5)
    config = VariantConfig(group_size=2, max_new_tokens=10, overlong_buffer=0.4)
    rollout, rewards = shaped(config, [6, 7, 9, 10], [True, True, True, False], [1.0, 1, 0, 0])
    assert close(rewards, [1, 0.75, -0.75, -1]) and rollout.length.tolist() == [6, 7, 9, 10]


def test_what_was_not_judged_has_the_mean_of_its_group_after_the_penalty_too():
    config = VariantConfig(group_size=2, max_new_tokens=10, overlong_buffer=0.4)
    _, rewards = shaped(config, [0, 8, 0, 0], [False] * 4, [1.0, 1, 0, 0])
    assert close(rewards, [0.5, 0.5, 0, 0])


def test_cut_completions_are_left_out_of_the_loss_and_their_rewards_count():
    config = VariantConfig(group_size=2, max_new_tokens=10, mask_cut=True, overlong_buffer=0.4)
    rollout, rewards = shaped(config, [10, 10, 8, 3], [False, True, True, True], [0.0, 1, 1, 1])
    assert rollout.length.tolist() == [0, 10, 8, 3] and close(rewards, [-1, 0, 0.5, 1])


def test_without_these_settings_nothing_is_changed():
    rollout, rewards = shaped(VariantConfig(group_size=2, max_new_tokens=10), [10, 9], [False, True], [0.3, 1])
    assert rollout.length.tolist() == [10, 9] and torch.equal(rewards, torch.tensor([0.3, 1]))


@pytest.mark.parametrize("more", [dict(overlong_buffer=0.5), dict(mask_cut=True)])
@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_length_counts_in_the_loop_after_dynamic_sampling(more, dynamic_sampling, tmp_path, watch):
    """Groups whose rewards are equal but for the penalty are replaced; what is trained is what was kept, shaped."""
    shown = watch(metrics, "shown_samples")
    config = dynamic(tmp_path, dynamic_sampling=dynamic_sampling, **more)
    _, (row,) = variants.train(config, reward=hard(*tiny.PROMPTS[:7]))
    (_, rewards, advantages, _, rollout, *_), _ = shown[0]
    cut = ~rollout.finished
    assert 0 < cut.sum() < 12 and (row.get("dropped", 0) > 0) == dynamic_sampling
    if "mask_cut" in more:
        assert torch.equal(rollout.length == 0, cut) and set(rewards.tolist()) == {0, 1, 2}
        return
    assert torch.equal(rollout.length[cut], torch.full((int(cut.sum()),), 6))
    expected = (rollout.length - 3).clamp(min=0) / 3
    before = rewards + expected
    assert all(reward in (0, 1, 2) for reward in before.round(decimals=5).tolist()) and expected.max() == 1
    assert close(advantages[:, 0], group_advantages(rewards, 3))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_tokens_of_the_highest_entropy_alone_have_an_advantage(share, tmp_path, watch):
    """As many of the batch's tokens as asked for, the most uncertain ones; what the others have is the penalty."""
    computed, used = watch(variants, "token_logprobs"), watch(variants, "policy_loss")
    variants.train(settings(variants, tmp_path, steps=1, top_entropy=share, beta=0.0), reward=letter_e)
    ((_, _, _, mask, _), (_, entropy)), = computed
    ((_, _, advantages, *_), _), = used
    whole = advantages.abs().amax(dim=1, keepdim=True).expand_as(mask) > 0             # the group was not equal
    kept = advantages != 0
    assert whole.any() and not (kept & ~whole).any()
    assert entropy[mask & kept].min() > entropy[mask & whole & ~kept].max()
    rank = (entropy[mask] >= entropy[mask & kept].min()).double().mean().item()
    assert abs(rank - share) < 0.06


def test_without_an_advantage_a_token_still_has_the_penalty():
    config, mask = VariantConfig(top_entropy=0.5), torch.ones(1, 2).bool()
    loss = make_loss(config, kept=[torch.tensor([[True, False]])])
    logprobs = torch.zeros(1, 2, requires_grad=True)
    loss(logprobs, torch.zeros(1, 2), torch.tensor([[3.0]]), mask, 0.2, 5.0 * logprobs).backward()
    assert logprobs.grad.tolist() == [[-3.0 + 5, 5]]


# --- several rewards ----------------------------------------------------------------------------------------------

def test_gdpo_by_hand():
    """Rewards that differ in scale alone count alike: (1, 0) and (0, 100) cancel where their sum would not."""
    def first(prompts, completions, **columns):
        return [1.0, 0, 1, 0]

    def second(prompts, completions, **columns):
        return [0.0, 100, 7, None]                                      # what it did not judge is 0
    parts = variants.gdpo((first, 1.0), (second, 1.0))
    rewards = torch.tensor(parts["reward"](["?"] * 4, ["text"] * 4))
    assert rewards.tolist() == [1, 100, 8, 0]
    of_one, of_seven, of_hundred = (x / 2 / (x / 2 ** 0.5 + 1e-4) for x in (1, 7, 100))      # the deviation of (x, 0)
    total = [of_one - of_hundred, of_hundred - of_one, of_one + of_seven, -of_one - of_seven]
    deviation = (sum(x * x for x in total) / 3) ** 0.5
    found = parts["advantage"](rewards, 2, False)
    assert close(found, [x / (deviation + 1e-4) for x in total]) and found.dtype == torch.float32
    assert abs(found[0]) < 1e-3 and found[2] > 1


def test_gdpo_trains_and_weights_count(tmp_path, watch):
    def short(prompts, completions, **columns):
        return [-float(len(text)) for text in completions]
    shown = watch(metrics, "shown_samples")
    for weight in 1.0, 0.0:
        parts = variants.gdpo((letter_e, 1.0), (short, weight))
        variants.train(settings(variants, tmp_path, steps=1), **parts)
    (_, rewards, advantages, *_), _ = shown[0]
    (_, alone, of_one, *_), _ = shown[1]
    assert not torch.equal(rewards, alone) and not close(advantages, of_one)
    assert close(of_one[:, 0], variants.batch_advantages(group_advantages(alone, 3, scale=True), 3))


@pytest.mark.parametrize("more", [dict(kl="k1", kl_in="reward", beta=0.5), dict(overlong_buffer=1.0)])
def test_gdpo_refuses_rewards_that_were_changed(more, tmp_path):
    parts = variants.gdpo((letter_e, 1.0), (letter_e, 1.0))
    with pytest.raises(UserError, match="gdpo goes with no KL in the reward"):
        variants.train(settings(variants, tmp_path, steps=2, **more), **parts)
