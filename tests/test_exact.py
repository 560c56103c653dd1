"""The estimators of both loops, summed over everything that can happen.

The policy here knows three tokens and writes at most three of them, END included, so it has 15 completions, and
groups of two or three of them can all be listed. Every expectation below is therefore a finite sum in float64, no
sample: what is claimed to be unbiased is compared with autograd's exact gradient of the expected reward J, through the
very functions that grpo.py and ppo.py train with. Run with -s to see the table of biases and variances.
"""
import itertools

import pytest
import torch

from grpo_min import grpo, ppo
from grpo_min.rollout import Rollout
from grpo_min.variants import VariantConfig, make_loss

LETTERS, END, LONGEST = (0, 1), 2, 3       # tokens 0 and 1 go on, 2 ends
STATES = [state for n in range(LONGEST) for state in itertools.product(LETTERS, repeat=n)]       # 1 + 2 + 4 prefixes
COMPLETIONS = ([state + (END,) for state in STATES] + list(itertools.product(LETTERS, repeat=LONGEST)))
C = len(COMPLETIONS)                                                                             # 15


def table(columns, fill):
    """Rows of different lengths as one (C, LONGEST) tensor."""
    return torch.tensor([list(row) + [fill] * (LONGEST - len(row)) for row in columns])


IDS = table(COMPLETIONS, 0)                                                                      # (C, 3)
MASK = torch.tensor([[t < len(c) for t in range(LONGEST)] for c in COMPLETIONS])                 # (C, 3)
AT = table([[STATES.index(c[:t]) for t in range(len(c))] for c in COMPLETIONS], 0)               # (C, 3) states
pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def logits():
    """The policy: logits (states, 3), other ones in every state."""
    return torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.fixture
def rewards():
    return torch.randn(C, generator=torch.Generator().manual_seed(4))                            # (C,)


def logprobs_of(logits):
    """Of every token of every completion: (C, 3)."""
    return logits.log_softmax(-1)[AT, IDS].masked_fill(~MASK, 0)


def probabilities(logits):
    return logprobs_of(logits).sum(1).exp()                                                      # (C,)


def exact_gradient(logits, rewards):
    """Of J, the expected reward."""
    return torch.autograd.grad((probabilities(logits) * rewards).sum(), logits)[0]


def estimates(logits, G, loss_of_group):
    """Of every group of G completions the gradient estimate (C ** G, states, 3) and the probability (C ** G,).

    loss_of_group(logprobs (G, 3), rows (G,)) -> scalar.
    """
    logprobs = logprobs_of(logits).detach()
    groups = torch.tensor(list(itertools.product(range(C), repeat=G)))                           # (C ** G, G)
    by_logprobs = torch.func.vmap(torch.func.grad(loss_of_group))(logprobs[groups], groups)      # (C ** G, G, 3)
    jacobian = torch.autograd.functional.jacobian(logprobs_of, logits.detach())                  # (C, 3, states, 3)
    found = -torch.einsum("ngt,ngtsv->nsv", by_logprobs, jacobian[groups])
    return found, probabilities(logits).detach()[groups].prod(1)


def mean_and_variance(found, weights):
    """Expected estimate (states, 3), and the sum of the variances of its entries."""
    mean = (weights[:, None, None] * found).sum(0)
    return mean, (weights * ((found - mean) ** 2).sum((1, 2))).sum()


def clipped(logprobs, advantages, rows, loss=grpo.policy_loss):
    """The loop's own loss at its first update, where the old policy is this one. advantages (G,) or (G, 3)."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, LONGEST)
    return loss(logprobs, logprobs.detach(), advantages, MASK[rows], 0.2)


def test_probabilities_add_up_to_one(logits):
    assert C == 15 and probabilities(logits).sum().item() == pytest.approx(1, abs=1e-12)


# --- baselines ----------------------------------------------------------------------------------------------------

def leave_one_out(rewards):
    """Reward minus the mean of the others (RLOO, 2402.14740): (G,) -> (G,)."""
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def true_values(logits, rewards):
    """V(s): the reward expected from each state: (states,)."""
    p, reaches = probabilities(logits).detach(), torch.zeros(len(STATES), C)
    for c, completion in enumerate(COMPLETIONS):
        for t in range(len(completion)):
            reaches[STATES.index(completion[:t]), c] = 1
    return (reaches * p * rewards).sum(1) / (reaches * p).sum(1)


def with_critic(values, rewards, lam=1.0):
    """PPO's loss of a group, with these values of the states."""
    def loss(logprobs, rows):
        mask = MASK[rows]
        rollout = Rollout(IDS[rows], mask, logprobs, None)
        charged = rollout.at_last_token(rewards[rows])                                           # (G, 3)
        advantages, _ = ppo.gae(charged, values[AT[rows]].masked_fill(~mask, 0), mask, 1.0, lam)
        return clipped(logprobs, advantages, rows, ppo.policy_loss)
    return loss


def divided(rewards, G, by):
    """Leave-one-out advantages, with another divisor than the number of completions: each completion's own length
    ("sequence"), all the tokens of the group ("token", DAPO 2503.14476), or the longest length there can be
    ("constant", Dr. GRPO 2503.20783). The loss is linear in the advantages: dividing these divides its terms."""
    def loss(logprobs, rows):
        length = MASK[rows].sum(1)                                                               # (G,)
        divisor = {"sequence": length, "token": length.sum() / G, "constant": LONGEST}[by]
        return clipped(logprobs, leave_one_out(rewards[rows]) / divisor, rows)
    return loss


def estimators(logits, rewards, G):
    """{name: loss of a group}."""
    found = {
        "no baseline": lambda logprobs, rows: clipped(logprobs, rewards[rows], rows),
        "leave one out": lambda logprobs, rows: clipped(logprobs, leave_one_out(rewards[rows]), rows),
        "group mean": lambda logprobs, rows: clipped(logprobs, grpo.group_advantages(rewards[rows], G), rows),
        "group mean and std": lambda logprobs, rows: clipped(logprobs, grpo.group_advantages(rewards[rows], G, True),
                                                             rows),
        "critic, true values": with_critic(true_values(logits, rewards), rewards),
        "critic, values 1 too high": with_critic(true_values(logits, rewards) + 1, rewards),
        "leave one out, constant": divided(rewards, G, "constant"),
        "leave one out, token mean": divided(rewards, G, "token"),
        "leave one out, seq. mean": divided(rewards, G, "sequence"),
    }
    return found


def angle(a, b):
    """Between two gradients, in degrees."""
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos().rad2deg().item()


@pytest.mark.parametrize("G", [2, 3])
def test_expected_gradients(logits, rewards, G):
    """No baseline, leave-one-out and any critic are unbiased; the group mean is exactly (G - 1) / G of the gradient,
    and a constant divisor exactly the gradient divided by it. The others do not even point the same way."""
    exact = exact_gradient(logits, rewards)
    mean = {name: mean_and_variance(*estimates(logits, G, loss))[0]
            for name, loss in estimators(logits, rewards, G).items()}
    for name in "no baseline", "leave one out", "critic, true values", "critic, values 1 too high":
        assert (mean[name] - exact).abs().max() < 1e-12, name
    assert (mean["group mean"] - exact * (G - 1) / G).abs().max() < 1e-12
    assert (mean["leave one out, constant"] - exact / LONGEST).abs().max() < 1e-12
    for name in "group mean and std", "leave one out, token mean", "leave one out, seq. mean":
        assert angle(mean[name], exact) > 1, name


def test_what_the_sequence_mean_optimises(logits, rewards):
    """Dividing by a completion's own length optimises the reward per token, and the baseline no longer cancels: less
    the mean reward times the expected 1 / length. Bad completions are made longer, where good ones are made shorter."""
    per_token = exact_gradient(logits, rewards / MASK.sum(1))
    J = (probabilities(logits) * rewards).sum().detach()
    expected = per_token - J * exact_gradient(logits, 1 / MASK.sum(1))
    mean, _ = mean_and_variance(*estimates(logits, 2, divided(rewards, 2, "sequence")))
    assert (mean - expected).abs().max() < 1e-12


def table_of(logits, rewards, G):
    """{estimator: variance}, printed with the bias."""
    exact, variances = exact_gradient(logits, rewards), {}
    print(f"\nmean reward {(probabilities(logits) * rewards).sum():.2f}, groups of {G}\n"
          f"{'estimator':26} bias / gradient   angle to it   variance")
    for name, loss in estimators(logits, rewards, G).items():
        mean, variance = mean_and_variance(*estimates(logits, G, loss))
        variances[name] = variance.item()
        bias = (mean - exact).norm() / exact.norm()
        print(f"{name:26} {bias:15.1%}   {angle(mean, exact):9.1f}°   {variance:10.4f}")
    return variances


def test_table_of_variances(logits, rewards):
    """A group's mean takes out what all rewards have in common, but of two it is itself noisy: where rewards are zero
    on average no baseline has the lower variance, and where they are not, a far higher one. True values beat both."""
    G = 2
    centred = rewards - (probabilities(logits) * rewards).sum().detach()
    low, high = table_of(logits, centred, G), table_of(logits, centred + 3, G)
    for name in set(low) - {"no baseline"}:
        assert high[name] == pytest.approx(low[name], rel=1e-6), name              # a constant changes nothing
    assert low["no baseline"] < low["leave one out"] < high["no baseline"]
    assert low["critic, true values"] < min(low["no baseline"], low["critic, values 1 too high"])
    assert low["group mean"] == pytest.approx(low["leave one out"] * ((G - 1) / G) ** 2)


# --- the critic ---------------------------------------------------------------------------------------------------

def of_critic(logits, rewards, values, lam=1.0):
    """Expected gradient and variance of PPO's estimate from a single completion, with these values of the states."""
    return mean_and_variance(*estimates(logits, 1, with_critic(values, rewards, lam)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
def test_with_lambda_one_any_values_are_unbiased(logits, rewards, scale, seed):
    values = torch.randn(len(STATES), generator=torch.Generator().manual_seed(seed)) * scale
    assert (of_critic(logits, rewards, values)[0] - exact_gradient(logits, rewards)).abs().max() < 1e-12 * max(scale, 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_with_a_smaller_lambda_only_true_values_are_unbiased(logits, rewards, lam):
    """What the critic gets wrong is believed the more, the smaller lambda is."""
    exact, values = exact_gradient(logits, rewards), true_values(logits, rewards)
    assert (of_critic(logits, rewards, values, lam)[0] - exact).abs().max() < 1e-12
    wrong = values + torch.randn(len(STATES), generator=torch.Generator().manual_seed(6))
    bias = [(of_critic(logits, rewards, wrong, each)[0] - exact).norm() for each in (lam, (1 + lam) / 2)]
    assert bias[0] > 1.5 * bias[1] > 0.01 * exact.norm()


def test_variance_is_least_near_the_true_values(logits, rewards):
    """The variance is a paraboloid over the values of the 7 states. Its lowest point is not exactly at the true values
    (the best baseline weights rewards by the squared gradient of their log-probability), but not far from them."""
    true = true_values(logits, rewards)
    unit = torch.eye(len(STATES))

    def variance(shift):
        return of_critic(logits, rewards, true + shift)[1].item()
    middle = variance(0 * true)
    slope = torch.tensor([(variance(e) - variance(-e)) / 2 for e in unit])                       # (states,)
    curve = torch.tensor([[variance(a + b) - variance(a) - variance(b) + middle for b in unit] for a in unit])
    assert (torch.linalg.eigvalsh(curve) > 0).all(), "it has a lowest point"
    best = -torch.linalg.solve(curve, slope)
    least, noisy = variance(best), [variance(sign * e) for e in unit for sign in (-1, 1)]
    print(f"\nvariance of one completion: {least:.4f} at best, {middle:.4f} with the true values, {min(noisy):.4f} to "
          f"{max(noisy):.4f} with one of the seven values 1 off, {variance(-true + 3):.4f} with all values 3")
    assert (best.abs() < 0.6 * rewards.std()).all()
    assert least < middle < 1.2 * least and middle < variance(-true) < variance(-true + 3)


# --- the KL -------------------------------------------------------------------------------------------------------

def kl_of(logits, reference):
    """KL(policy || reference) over completions, exactly: a scalar with a gradient."""
    return (probabilities(logits) * (logprobs_of(logits) - logprobs_of(reference)).sum(1)).sum()


@pytest.fixture
def reference():
    return torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(5))


def as_a_loss(logits, reference, kind):
    """The expected gradient of the loops' loss with beta = 1 and no advantages: that of the penalty alone."""
    logprobs, zeros = logprobs_of(logits), torch.zeros(1, LONGEST)                                       # (C, 3)
    penalty = grpo.kl_estimate(logprobs, logprobs_of(reference), kind)                                   # (C, 3)
    of_each = torch.stack([grpo.policy_loss(logprobs[c:c + 1], logprobs[c:c + 1].detach(), zeros, MASK[c:c + 1], 0.2,
                                            penalty[c:c + 1]) for c in range(C)])                        # (C,)
    return torch.autograd.grad((probabilities(logits).detach() * of_each).sum(), logits)[0]


def in_the_reward(logits, reference, kind):
    """The expected gradient of charging the estimate as a negative reward, summed over the completion."""
    charge = (grpo.kl_estimate(logprobs_of(logits), logprobs_of(reference), kind) * MASK).sum(1).detach()
    return exact_gradient(logits, charge)


def at_held_states(logits, reference, divergence):
    """The gradient of the mean divergence of the states that are visited, as if the visits did not change."""
    policy, other = logits.log_softmax(-1), reference.log_softmax(-1)
    per_state = {"forward": (policy.exp() * (policy - other)).sum(-1),          # KL(policy || reference), (states,)
                 "reverse": (other.exp() * (other - policy)).sum(-1)}[divergence]
    visits = (probabilities(logits).detach()[:, None] * MASK)                                            # (C, 3)
    return torch.autograd.grad((visits * per_state[AT]).sum(), logits)[0]


def test_expectation_of_the_estimates(logits, reference):
    exact, p = kl_of(logits, reference).item(), probabilities(logits)
    of = {kind: (p * (grpo.kl_estimate(logprobs_of(logits), logprobs_of(reference), kind) * MASK).sum(1)).sum().item()
          for kind in ("k1", "k2", "k3")}
    assert of["k1"] == pytest.approx(exact, abs=1e-12) and of["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(of["k2"] - exact) > 0.01 * exact                                                 # k2 is biased


def test_gradients_of_the_kl(logits, reference):
    """As a loss an estimate sees the states as they are; charged in the reward, k1 also counts where actions lead."""
    exact = torch.autograd.grad(kl_of(logits, reference), logits)[0]
    assert as_a_loss(logits, reference, "k1").abs().max() < 1e-12
    assert (as_a_loss(logits, reference, "k2") - at_held_states(logits, reference, "forward")).abs().max() < 1e-12
    assert (as_a_loss(logits, reference, "k3") - at_held_states(logits, reference, "reverse")).abs().max() < 1e-12
    assert (in_the_reward(logits, reference, "k1") - exact).abs().max() < 1e-12
    print("\ngradient of the KL penalty, compared with that of KL(policy || reference)")
    for name, form, kind in [("k2 as a loss", as_a_loss, "k2"), ("k3 as a loss", as_a_loss, "k3"),
                             ("k2 in the reward", in_the_reward, "k2"), ("k3 in the reward", in_the_reward, "k3")]:
        found = form(logits, reference, kind)
        print(f"{name:16} {found.norm() / exact.norm():5.2f} times as long, {angle(found, exact):3.0f}° off")
        assert angle(found, exact) > 5, name


def off_policy(logits, old, reference, kind, entropy_coef=0.0):
    """The expected gradient of make_loss's penalty, with beta = 1 and no advantages, where `old` has sampled."""
    logprobs, old_logprobs, zeros = logprobs_of(logits), logprobs_of(old).detach(), torch.zeros(1, LONGEST)
    loss = make_loss(VariantConfig(kl=kind, entropy_coef=entropy_coef))
    penalty = grpo.kl_estimate(logprobs, logprobs_of(reference), kind) * (entropy_coef == 0)             # (C, 3)
    of_each = torch.stack([loss(logprobs[c:c + 1], old_logprobs[c:c + 1], zeros, MASK[c:c + 1], None,
                                penalty[c:c + 1]) for c in range(C)])                                    # (C,)
    return torch.autograd.grad((probabilities(old).detach() * of_each).sum(), logits)[0]


def where_visited(old, per_state, logits):
    """The gradient of the mean of per_state (states,) over the states that `old` visits, which are held."""
    visits = probabilities(old).detach()[:, None] * MASK                                                 # (C, 3)
    return torch.autograd.grad((visits * per_state[AT]).sum(), logits)[0]


@pytest.mark.parametrize("seed", [3, 8], ids=["on-policy", "off-policy"])
def test_the_unbiased_kl_has_the_gradient_of_the_kl(logits, reference, seed):
    """k3 times the ratio: at every state visited, exactly the gradient of KL(policy || reference), whoever sampled. k2
    has it if the policy itself sampled, k3 never. Where visits lead is left to the KL in the reward, as with all."""
    old = torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(seed))
    policy, other = logits.log_softmax(-1), reference.log_softmax(-1)
    exact = where_visited(old, (policy.exp() * (policy - other)).sum(-1), logits)
    found = {kind: off_policy(logits, old, reference, kind) for kind in ("k2", "k3", "unbiased")}
    assert (found["unbiased"] - exact).abs().max() < 1e-12
    assert (found["k2"] - exact).abs().max() < 1e-12 if seed == 3 else angle(found["k2"], exact) > 5
    assert angle(found["k3"], exact) > 5
    if seed == 3:
        assert (exact - at_held_states(logits, reference, "forward")).abs().max() < 1e-12


@pytest.mark.parametrize("seed", [3, 8], ids=["on-policy", "off-policy"])
def test_the_entropy_bonus_has_the_gradient_of_the_entropy(logits, reference, seed):
    """-log pi times the ratio: at every state visited the gradient of the entropy, times minus its coefficient."""
    old = torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(seed))
    policy = logits.log_softmax(-1)
    exact = where_visited(old, -(policy.exp() * policy).sum(-1), logits)
    assert (off_policy(logits, old, reference, "k3", 0.7) + 0.7 * exact).abs().max() < 1e-12
    assert exact.abs().max() > 0.01


def test_gradients_of_the_kl_over_a_single_token(logits, reference):
    """Where no state leads to another, the loss forms are exact, each for its own direction of the KL."""
    policy, other = logits[0].log_softmax(-1), reference[0].log_softmax(-1)
    p = policy.exp()

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]
    forward, reverse = gradient((p * (policy - other)).sum()), gradient((other.exp() * (other - policy)).sum())
    loss = {kind: gradient((p.detach() * grpo.kl_estimate(policy, other, kind)).sum()) for kind in ("k1", "k2", "k3")}
    charged = gradient((p * grpo.kl_estimate(policy, other, "k1").detach()).sum())
    ratio = (policy - policy.detach()).exp()
    unbiased = gradient((p.detach() * ratio * grpo.kl_estimate(policy, other, "k3")).sum())
    for found, expected in [(loss["k1"], 0 * forward), (loss["k2"], forward), (loss["k3"], reverse),
                            (charged, forward), (unbiased, forward)]:
        assert (found - expected).abs().max() < 1e-12
    assert angle(forward, reverse) > 5
