"""The mathematics of GRPO and PPO, function by function, against numbers worked out by hand or by another formula.

Each function is small, so each test is: what goes in, what has to come out, and for losses what the gradient is.
Each also fails for at least one well-known wrong version: groups mixed, clip inverted, KL reversed, padding counted.
"""
import inspect
import math

import pytest
import torch

from grpo_min import grpo, ppo
from grpo_min.grpo import group_advantages, kl_estimate, policy_loss
from grpo_min.ppo import gae, value_loss, whiten
from grpo_min.reward_model import preference_loss
from grpo_min.rollout import Rollout
from grpo_min.run.metrics import explained_variance


def close(a, b, tolerance=1e-6):
    a = torch.as_tensor(a, dtype=torch.float64)
    return torch.allclose(a, torch.as_tensor(b, dtype=torch.float64).expand_as(a), rtol=tolerance, atol=tolerance)


def ragged(lengths, columns=None):
    """A mask (B, N) of rows of these lengths."""
    return torch.arange(columns or max(lengths)) < torch.tensor(lengths)[:, None]


def at_last_token(scores, mask):
    return Rollout(mask.long(), mask, mask.float(), scores > 0).at_last_token(scores)


# --- the advantage of GRPO ----------------------------------------------------------------------------------------

def test_group_advantage_is_reward_minus_the_mean_of_its_group():
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 0]), 3)
    assert close(advantages, [2 / 3, -1 / 3, -1 / 3, 2 / 3, -1 / 3, -1 / 3])


def test_groups_are_not_mixed():
    # Group one got 1, 2, 3, group two 10, 20, 30; a mean over the wrong axis or over the batch would show at once.
    rewards = torch.tensor([1.0, 2, 3, 10, 20, 30])
    assert close(group_advantages(rewards, 3), [-1, 0, 1, -10, 0, 10])
    assert close(group_advantages(rewards, 2), [-0.5, 0.5, -3.5, 3.5, -5, 5])
    other = torch.tensor([1.0, 2, 3, -7, 8, 9])
    assert torch.equal(group_advantages(rewards, 3)[:3], group_advantages(other, 3)[:3])


def test_equal_rewards_have_advantages_of_exactly_zero():
    # In float32 the mean of twelve times 0.7 is not 0.7, and dividing by std + 1e-8 would make 0.89 of that.
    rewards = torch.tensor([0.7] * 12)
    for scale in False, True:
        assert torch.equal(group_advantages(rewards, 12, scale), torch.zeros(12))
        assert torch.equal(group_advantages(torch.tensor([0.7] * 12 + [0.1] * 12), 12, scale), torch.zeros(24))


def test_scaled_advantages_are_divided_by_the_standard_deviation_of_the_group():
    rewards = torch.tensor([1.0, 2, 3, 10, 20, 30])
    scaled = group_advantages(rewards, 3, scale=True)
    assert close(scaled, [-1 / 1.0001, 0, 1 / 1.0001, -10 / 10.0001, 0, 10 / 10.0001])
    two = group_advantages(torch.tensor([0.0, 1.0]), 2, scale=True)         # n - 1: the deviation is sqrt(1/2)
    assert close(two, [-0.5 / (0.5 ** 0.5 + 1e-4), 0.5 / (0.5 ** 0.5 + 1e-4)])


def test_group_advantages_keep_dtype_and_shape():
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1]), 2)
    assert advantages.dtype == torch.float32 and advantages.shape == (4,)


@pytest.mark.parametrize("count, group_size", [(4, 1), (4, 0), (5, 2), (4, 8)])
def test_rewards_that_make_no_groups_are_refused(count, group_size):
    with pytest.raises(ValueError, match="groups"):
        group_advantages(torch.zeros(count), group_size)


# --- the clipped surrogate ----------------------------------------------------------------------------------------

TRUTH = [   # ratio, advantage, surrogate, gradient of the surrogate with respect to the log-probability
    (0.5, +2.0, 0.5 * 2, 0.5 * 2),          # below the range, good action: it may recover
    (0.5, -2.0, 0.8 * -2, 0.0),             # below the range, bad action: it is rare enough now
    (1.1, +2.0, 1.1 * 2, 1.1 * 2),          # inside, both signs: the ratio counts as it is
    (0.9, -2.0, 0.9 * -2, 0.9 * -2),
    (1.5, +2.0, 1.2 * 2, 0.0),              # above the range, good action: it is frequent enough now
    (1.5, -2.0, 1.5 * -2, 1.5 * -2),        # above the range, bad action: it is pushed back
]


@pytest.mark.parametrize("ratio, advantage, surrogate, gradient", TRUTH)
@pytest.mark.parametrize("module", [grpo, ppo])
def test_policy_loss_truth_table(module, ratio, advantage, surrogate, gradient):
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss = module.policy_loss(logprobs, old, torch.full((1, 1), advantage).double(), torch.ones(1, 1).bool(), 0.2)
    loss.backward()
    assert close(loss, -surrogate) and close(logprobs.grad, -gradient)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    advantages, mask = torch.arange(12.0).double().view(3, 4) - 5, ragged([4, 2, 3])
    policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2).backward()
    assert close(logprobs.grad, -advantages * mask / 3)


def test_each_token_has_its_own_ratio():
    # The ratio of the whole sequence would be 2 * 0.5 = 1 and not clipped at all.
    old, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    loss = policy_loss(torch.tensor([[math.log(2.0), math.log(0.5)]]), old, torch.ones(1, 2), mask, 0.2)
    assert close(loss, -(1.2 + 0.5))


def test_loss_sums_over_tokens_and_averages_over_rows():
    # One row of 1 token and one of 3, every token worth 1: (1 + 3) / 2, neither 4 / 4 nor (1 + 1) / 2.
    zeros = torch.zeros(2, 3)
    assert close(policy_loss(zeros, zeros, torch.ones(2, 3), ragged([1, 3]), 0.2), -2)


def test_loss_of_minibatches_adds_up():
    # Mean of the halves' losses is the loss of the whole, however the lengths differ.
    logprobs, old, advantages, penalty = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    mask = ragged([1, 2, 5, 5])
    whole = policy_loss(logprobs, old, advantages, mask, 0.2, penalty)
    halves = [policy_loss(logprobs[b], old[b], advantages[b], mask[b], 0.2, penalty[b])
              for b in (slice(0, 2), slice(2, 4))]
    assert close(sum(halves) / 2, whole)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_the_penalty_is_a_sum_over_the_tokens_and_a_mean_over_the_rows(module):
    # The penalty stands inside the same sum as the surrogate, and neither clip nor advantage touches it.
    generator, mask = torch.Generator().manual_seed(6), ragged([1, 2, 5, 5])
    logprobs, old, advantages, penalty = (torch.randn(4, 5, generator=generator).double().requires_grad_()
                                          for _ in range(4))
    charged = module.policy_loss(logprobs, old, advantages, mask, 0.2, penalty)
    apart = module.policy_loss(logprobs, old, advantages, mask, 0.2) + (penalty * mask).sum(1).mean()
    assert close(charged, apart, 1e-12)
    gradients = [torch.autograd.grad(loss, (logprobs, penalty)) for loss in (charged, apart)]
    assert all(close(ours, theirs, 1e-12) for ours, theirs in zip(*gradients))
    assert close(gradients[0][1], mask / 4), "a charge of 1 on any real token costs 1 / B"
    assert torch.equal(module.policy_loss(logprobs, old, advantages, mask, 0.2, 0 * penalty),
                       module.policy_loss(logprobs, old, advantages, mask, 0.2))


def test_two_tokens_with_a_penalty_by_hand():
    # Ratios 2 and 0.5, advantage 1, clip 0.2: (1.2 - 0.3) + (0.5 - 0.1); as a KL, the penalty pulls log pi down.
    logprobs = torch.tensor([[2.0, 0.5]]).double().log().requires_grad_()
    penalty = torch.tensor([[0.3, 0.1]]).double() + 0.4 * (logprobs - logprobs.detach())
    loss = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), ragged([2]), 0.2, penalty)
    loss.backward()
    assert close(loss, -(1.2 - 0.3 + 0.5 - 0.1)) and close(logprobs.grad, [[0.4, 0.4 - 0.5]])


@pytest.mark.parametrize("garbage", [7.0, -7.0])
def test_tokens_after_the_end_have_no_effect(garbage):
    generator, mask = torch.Generator().manual_seed(2), ragged([1, 3, 4])
    tensors = torch.randn(4, 3, 4, generator=generator)         # logprobs, old ones, advantages, penalty

    def loss_and_gradient(*fill):
        logprobs, old, advantages, penalty = (x.masked_fill(~mask, value) for x, value in zip(tensors, fill))
        logprobs.requires_grad_()
        loss = policy_loss(logprobs, old, advantages, mask, 0.2, penalty)
        loss.backward()
        return loss.detach(), logprobs.grad

    clean, dirty = loss_and_gradient(0, 0, 0, 0), loss_and_gradient(garbage, -garbage, 1000 * garbage, 99 * garbage)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (clean[1][~mask] == 0).all() and (clean[1][mask] != 0).any()


def test_rows_without_a_token_are_finite():
    mask = torch.tensor([[True, True], [False, False]])
    logprobs = torch.zeros(2, 2, requires_grad=True)
    for loss in (policy_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), mask, 0.2),
                 policy_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), mask, 0.2, logprobs.exp()),
                 value_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), mask, 0.2),
                 policy_loss(logprobs, torch.zeros(2, 2), torch.ones(2, 2), mask & False, 0.2)):
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all()
    advantages, returns = gae(torch.ones(2, 2), torch.ones(2, 2), mask, 1.0, 0.95)
    assert advantages.isfinite().all() and (advantages[1] == 0).all() and (returns[1] == 0).all()


# --- the KL to the reference --------------------------------------------------------------------------------------

def test_kl_estimates_by_hand():
    # The policy likes the token twice as much as the reference does: log(policy / reference) = log 2.
    logprobs, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert close(kl_estimate(logprobs, ref, "k1"), math.log(2))
    assert close(kl_estimate(logprobs, ref, "k2"), math.log(2) ** 2 / 2)
    assert close(kl_estimate(logprobs, ref, "k3"), 0.5 - 1 + math.log(2))
    assert close(kl_estimate(ref, logprobs, "k1"), -math.log(2))            # liked half as much: k1 is negative,
    assert close(kl_estimate(ref, logprobs, "k3"), 2 - 1 - math.log(2))     # k3 is not


def test_k2_and_k3_are_never_negative_and_zero_only_where_policies_agree():
    logprobs, ref = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(3)).double()
    for kind in "k2", "k3":
        assert (kl_estimate(logprobs, ref, kind) > 0).all() and (kl_estimate(ref, ref, kind) == 0).all()
    assert (kl_estimate(logprobs, ref, "k1") < 0).any()


DISTRIBUTIONS = [([0.9, 0.09, 0.01], [0.3, 0.4, 0.3]), ([0.3, 0.4, 0.3], [0.01, 0.09, 0.9])]


@pytest.mark.parametrize("policy, reference", DISTRIBUTIONS)
@pytest.mark.parametrize("module", [grpo, ppo])
def test_expected_k1_and_k3_are_the_kl_from_policy_to_reference(module, policy, reference):
    p, r = torch.tensor([policy]).double(), torch.tensor([reference]).double()       # every action once, weighed by p
    exact, reversed_kl = (p * (p / r).log()).sum(), (r * (r / p).log()).sum()
    assert abs(exact - reversed_kl) > 0.05, "the two directions must differ for the test to see which one it is"
    for kind in "k1", "k3":
        assert close((p * module.kl_estimate(p.log(), r.log(), kind)).sum(), exact)


def test_k3_as_a_loss_pulls_the_policy_towards_the_reference():
    p, r = torch.tensor([[0.7, 0.3]]).double(), torch.tensor([[0.5, 0.5]]).double()
    logprobs = p.log().requires_grad_()
    kl_estimate(logprobs, r.log(), "k3").sum().backward()
    assert logprobs.grad[0, 0] > 0 > logprobs.grad[0, 1]     # descent lowers what is too likely


@pytest.mark.parametrize("policy, reference", DISTRIBUTIONS)
def test_expected_gradient_of_k1_as_a_loss_is_zero(policy, reference):
    # Why k1 is for the reward only: over the policy's own samples its gradient is that of log p, which averages to 0.
    logits, r = torch.tensor([policy]).log().double().requires_grad_(), torch.tensor([reference]).double()
    logprobs = logits.log_softmax(-1)
    (logprobs.exp().detach() * kl_estimate(logprobs, r.log(), "k1")).sum().backward()
    assert close(logits.grad, 0, 1e-7)


# --- the advantage of PPO -----------------------------------------------------------------------------------------

def gae_by_definition(rewards, values, length, gamma, lam):
    """sum over l of (gamma lam)^l delta_{t + l}, the double sum of 1506.02438, eq. 16, for one row of real tokens."""
    value = [*values[:length], 0.0]                                          # 0 after the last real token
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(length - t)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.37, 0.61), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition(gamma, lam):
    lengths = [1, 4, 7, 7, 2]
    rewards, values = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(4)).double()
    advantages, returns = gae(rewards, values, ragged(lengths), gamma, lam)
    for b, length in enumerate(lengths):
        expected = gae_by_definition(rewards[b].tolist(), values[b].tolist(), length, gamma, lam)
        assert close(advantages[b, :length], expected)
        assert close(returns[b, :length], torch.tensor(expected).double() + values[b, :length])
        assert (advantages[b, length:] == 0).all() and (returns[b, length:] == 0).all()


def test_value_after_the_last_token_is_zero():
    # One token with value 3 and reward 5: the advantage is 2 whatever stands in the columns after it.
    for after in 0.0, 100.0, -100.0:
        advantages, returns = gae(torch.tensor([[5.0, after]]), torch.tensor([[3.0, after]]), ragged([1], 2), 1, 0.95)
        assert close(advantages, [[2, 0]]) and close(returns, [[5, 0]])


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, values = at_last_token(torch.tensor([1.0, -1.0]), ragged([3, 2])), torch.tensor([[0.5, 0.2, 0.9]] * 2)
    advantages, returns = gae(rewards, values, ragged([3, 2]), 1.0, 1.0)
    assert close(returns, [[1, 1, 1], [-1, -1, 0]]) and close(advantages, [[0.5, 0.8, 0.1], [-1.5, -1.2, 0]])


def test_score_stands_on_the_last_real_token():
    placed = at_last_token(torch.tensor([5.0, 6.0, 7.0]), ragged([1, 3, 4]))
    assert close(placed, [[5, 0, 0, 0], [0, 0, 6, 0], [0, 0, 0, 7]])


def test_whitening_ignores_the_padding():
    mask = ragged([1, 3])
    expected = torch.tensor([[1.0, 0, 0], [2, 3, 6]]) - 3 * mask
    expected = expected / (math.sqrt(14 / 3) + 1e-4)                    # 1, 2, 3, 6: mean 3, variance (4+1+0+9) / 3
    for garbage in 0.0, 1e6:
        advantages = torch.tensor([[1.0, garbage, garbage], [2, 3, 6]])
        assert close(whiten(advantages, mask), expected)


# --- the critic ---------------------------------------------------------------------------------------------------

def test_value_loss_by_hand():
    # Half the squares 1, 4 and 9, summed in each row and averaged over two rows; what is masked does not count.
    values = torch.tensor([[1.0, 2, 50], [3, 50, 50]], requires_grad=True)
    loss = value_loss(values, torch.zeros(2, 3), torch.zeros(2, 3), ragged([2, 1], 3), 0)
    loss.backward()
    assert close(loss, (1 + 4 + 9) / 2 / 2) and close(values.grad, [[0.5, 1, 0], [1.5, 0, 0]])


@pytest.mark.parametrize("value, target, error, gradient", [
    (0.1, 1.0, 0.9 ** 2, -0.9),      # within 0.2 of the old value 0: as without clipping
    (0.5, 1.0, 0.8 ** 2, 0.0),       # moved too far towards the target: the kept value 0.2 is worse, and is constant
    (0.5, 0.0, 0.5 ** 2, +0.5),      # moved too far away from it: the true error is worse, and is mended
    (-0.5, -1.0, 0.8 ** 2, 0.0),
])
def test_value_loss_with_clipping_by_hand(value, target, error, gradient):
    values = torch.tensor([[value]], requires_grad=True)
    loss = value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), torch.ones(1, 1).bool(), 0.2)
    loss.backward()
    assert close(loss, error / 2) and close(values.grad, gradient)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2, 99], [3, 99, 99]]), ragged([2, 1], 3)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns - 5, returns, mask) == pytest.approx(1)         # a constant error is not variance
    assert explained_variance(torch.full((2, 3), 2.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)      # 1 - Var(2 returns) / Var(returns)
    garbage = returns.masked_fill(~mask, -1000)
    assert explained_variance(garbage, returns, mask) == 1
    assert explained_variance(returns, torch.ones(2, 3), mask) == "", "nothing to explain where all returns are equal"


# --- the reward model ---------------------------------------------------------------------------------------------

def test_preference_loss_by_hand():
    # P(chosen preferred) = sigmoid(chosen - rejected): margins of 0 and log 3 mean 1/2 and 3/4.
    chosen = torch.tensor([5.0, math.log(3.0)], requires_grad=True)
    loss = preference_loss(chosen, torch.tensor([5.0, 0.0]))
    loss.backward()
    assert close(loss, (math.log(2) + math.log(4 / 3)) / 2) and close(chosen.grad, [-1 / 4, -1 / 8])


def test_preference_loss_is_finite_for_great_margins():
    assert close(preference_loss(torch.tensor([-1000.0]), torch.tensor([0.0])), 1000)
    assert close(preference_loss(torch.tensor([1000.0]), torch.tensor([0.0])), 0)


# --- side by side -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["policy_loss", "kl_estimate"])
def test_functions_that_both_files_have_are_the_same_to_the_letter(name):
    first, second = getattr(grpo, name), getattr(ppo, name)
    assert inspect.getsource(first) == inspect.getsource(second)
    assert (first.__module__, second.__module__) == ("grpo_min.grpo", "grpo_min.ppo"), "written out, not imported"
