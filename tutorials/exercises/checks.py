"""What is demanded of each exercise, and what to say where an answer falls short.

A check takes the reader's file as a module. It returns if the answer is right, and raises Wrong with the reason, in
words, if not. Right values are worked out by hand, or by a formula that is written differently. `explain` knows the
usual wrong answers by the values they give; tests/exercise_mutants.py has them all, and tests/test_exercises.py sees to
it that none passes.
"""
import math
from collections import Counter

import torch

from grpo_min import tokenizer
from grpo_min.model import GPT, GPTConfig
from grpo_min.rollout import Prompts, sample
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.rng import generator

CONTEXT, LONGEST = 80, 40       # positions of the model; tokens of a completion, at most
TOKENIZER = tokenizer.own()     # of the committed models
PAD, END = TOKENIZER.pad, TOKENIZER.end


class Wrong(Exception):
    """The answer is wrong; the message says in what."""


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def numbers(tensor):
    """A tensor as a person would write it."""
    if tensor.dim() == 0:
        return f"{tensor.item():.4g}"
    return "[" + ", ".join(numbers(row) for row in tensor) + "]"


def explain(got, right, case, wrong):
    """Nothing, if got is right. Else Wrong, with what a usual wrong answer, known by its values, has got wrong.

    case: in words, what was asked; wrong: [(the values of a wrong answer, what is wrong with it), ..].
    """
    if close(got, right):
        return
    for values, message in wrong:
        if close(got, torch.as_tensor(values, dtype=torch.float64).expand_as(right)):
            raise Wrong(f"{case}: {message}")
    raise Wrong(f"{case} should give {numbers(right)}, but gave {numbers(got)}")


def call(function, shape, *arguments, name=None):
    """Call a reader's function on copies of the arguments -> its result, a tensor of that shape."""
    name = name or function.__name__
    copies = [x.clone() if isinstance(x, torch.Tensor) and not x.requires_grad else x for x in arguments]
    result = function(*copies)
    for before, after in zip(arguments, copies):
        expect(not isinstance(before, torch.Tensor) or torch.equal(before, after),
               f"{name} changes a tensor that it was given: make a new one (a function with _ at its end changes)")
    return tensor(result, shape, name)


def tensor(result, shape, name):
    expect(result is not None, f"{name} returned nothing: is the `return` missing?")
    expect(isinstance(result, torch.Tensor), f"{name} returned a {type(result).__name__}, where a tensor belongs")
    expect(result.shape == torch.Size(shape),
           f"{name} returned the shape {tuple(result.shape)}, where {tuple(shape)} belongs")
    return result


def rewards_of(function, prompts, completions, **columns):
    """Call a reader's reward function -> (B,), one finite number for each completion."""
    result = function(prompts, completions, **columns)
    expect(result is not None, "reward returned nothing: is the `return` missing?")
    try:
        rewards = torch.tensor([float(reward) for reward in result], dtype=torch.float64)
    except (TypeError, ValueError):
        raise Wrong(f"reward must return a list of numbers, one per completion, not {result!r:.80}")
    expect(len(rewards) == len(completions), f"reward returned {len(rewards)} numbers for {len(completions)} "
           f"completions")
    for reward, completion in zip(rewards.tolist(), completions):
        expect(math.isfinite(reward), f"the reward of \"{completion}\" is {reward}: it must be a finite number")
    return rewards


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged(lengths, columns=None):
    """A mask (B, N) of rows of these lengths."""
    return torch.arange(columns or max(lengths)) < torch.tensor(lengths)[:, None]


# --- 1 and 7: advantages of a group -------------------------------------------------------------------------------

def check_01(module):
    f = module.group_advantages
    rewards = torch.tensor([1.0, 2, 3, 10, 20, 30])
    groups = rewards.view(2, 3)
    got, case = call(f, (6,), rewards, 3), "Rewards 1, 2, 3 and 10, 20, 30, in groups of 3"
    interleaved = rewards.view(3, 2).T
    interleaved = interleaved - interleaved.mean(1, keepdim=True)
    explain(got, torch.tensor([-1.0, 0, 1, -10, 0, 10]), case, [
        (rewards - rewards.mean(), "your advantages do not sum to zero within group 1: did you average over the whole "
         "batch?"),
        ((groups - groups.mean(0)).flatten(), "your advantages do not sum to zero within group 1: you average over the "
         "same place in each group (dim=0), not over a group"),
        (interleaved.flatten(), "the groups are mixed. Row b belongs to prompt b // G, so the first 3 are one group: "
         "view(-1, group_size)"),
        (interleaved.T.flatten(), "the groups are mixed. Row b belongs to prompt b // G, so the first 3 are one group: "
         "view(-1, group_size)"),
        (rewards, "these are the rewards themselves: subtract the mean of the group"),
        ([1, 0, -1, 10, 0, -10], "the sign is reversed: what is above the mean has a positive advantage"),
        ([-1 / 1.0001, 0, 1 / 1.0001, -10 / 10.0001, 0, 10 / 10.0001],
         "you divide by the standard deviation, though scale is False"),
        ([-1.5, 0, 1.5, -15, 0, 15], "this is the leave-one-out baseline of exercise 7; here the mean includes the "
         "completion itself"),
        ([0, 1, 2, 0, 10, 20], "your advantages do not sum to zero within group 1: the baseline is the group's mean, "
         "not its smallest reward"),
    ])
    uneven = torch.tensor([0.0, 0, 0, 1, 1, 0, 0, 1])
    right = uneven - torch.tensor([0.25] * 4 + [0.5] * 4)
    explain(call(f, (8,), uneven, 4), right, "Rewards 0, 0, 0, 1 and 1, 0, 0, 1, in groups of 4", [
        (uneven, "the baseline is the mean of the group, not its median or its smallest reward"),
    ])
    scaled, deviation = call(f, (6,), rewards, 3, True), torch.tensor([1.0] * 3 + [10.0] * 3)
    centred = torch.tensor([-1.0, 0, 1, -10, 0, 10])
    explain(scaled, centred / (deviation + 1e-4), f"{case}, with scale", [
        (centred, "scale has no effect: divide by the standard deviation of the group"),
        (centred / (deviation * (2 / 3) ** 0.5 + 1e-4), "the standard deviation is the one with n - 1, as torch.std "
         "has it unless told otherwise"),
        (centred / deviation, "1e-4 is missing from the standard deviation: it keeps equal rewards from being 0 / 0"),
        (centred / rewards.std(), "you divide by the standard deviation of the whole batch, not of the group"),
        (centred / (deviation ** 2 + 1e-4), "you divide by the variance: take the standard deviation"),
    ])
    for scale in False, True:
        zero = call(f, (12,), torch.tensor([0.7] * 12), 12, scale)
        expect((zero == 0).all(), "Twelve rewards of 0.7 have advantages of exactly 0, but yours are as large as "
               f"{zero.abs().max().item():.2g}: rounding. Compute in float64")
    expect(got.dtype == torch.float32, f"rewards of float32 came back as {str(got.dtype)[6:]}: .to(rewards.dtype)")
    expect_groups(f)
    compare_groups(f, lambda reward, group: reward - sum(group) / len(group))


def check_07(module):
    f = module.leave_one_out
    rewards = torch.tensor([1.0, 2, 3, 10, 20, 30])
    groups = rewards.view(2, 3)
    got, case = call(f, (6,), rewards, 3), "Rewards 1, 2, 3 and 10, 20, 30, in groups of 3"
    explain(got, torch.tensor([-1.5, 0, 1.5, -15, 0, 15]), case, [
        ([-1, 0, 1, -10, 0, 10], "this is the group's mean, the completion itself included: leave it out of its own "
         "baseline"),
        (rewards - (rewards.sum() - rewards) / 5, "your baseline is of all others of the batch, not of the group"),
        ((groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten(), "the others are G - 1, and you divide by G"),
        ((groups - (groups.sum(0) - groups) / 1).flatten(), "you leave one out along dim=0, over the same place in "
         "each group"),
        ((groups - groups.sum(1, keepdim=True) / 2).flatten(), "you divide by G - 1, but have not taken the completion "
         "itself out of the sum"),
        ([1.5, 0, -1.5, 15, 0, -15], "the sign is reversed: what is above its baseline has a positive advantage"),
        (((groups.sum(1, keepdim=True) - groups) / 2).flatten(), "this is the baseline: the advantage is the reward "
         "minus it"),
    ])
    equal = call(f, (12,), torch.tensor([0.7] * 12), 12)
    expect((equal == 0).all(), "Twelve rewards of 0.7 have advantages of exactly 0, but yours are as large as "
           f"{equal.abs().max().item():.2g}: rounding. Compute in float64")
    expect(got.dtype == torch.float32, f"rewards of float32 came back as {str(got.dtype)[6:]}: .to(rewards.dtype)")
    expect_groups(f)
    compare_groups(f, lambda reward, group: reward - (sum(group) - reward) / (len(group) - 1))


def expect_groups(f):
    for count, group_size in (4, 1), (5, 2):
        try:
            f(torch.zeros(count), group_size)
        except ValueError:
            continue
        raise Wrong(f"{count} rewards in groups of {group_size} must be refused with a ValueError, as the file had it")


def compare_groups(f, formula):
    """Against a formula for one reward and its group, on random rewards: groups of several sizes."""
    for Q, G in (1, 4), (5, 2), (3, 8):
        rewards = random(Q * G, seed=G)
        groups = rewards.view(Q, G).tolist()
        right = torch.tensor([formula(reward, group) for group in groups for reward in group]).double()
        got = call(f, (Q * G,), rewards, G)
        worst = int((got - right).abs().argmax())
        expect(close(got, right), f"{Q} groups of {G} with the rewards {numbers(rewards)}: completion {worst} should "
               f"have the advantage {right[worst]:.4f}, but has {got[worst]:.4f}")


# --- 2: the mask --------------------------------------------------------------------------------------------------

def check_02(module):
    f, word = module.completion_mask, 300
    cases = [       # ids, mask, what a mask that differs there has got wrong
        ([word, word, END, PAD, PAD], [1, 1, 1, 0, 0], "a completion of two tokens and END, padded"),
        ([END, PAD, PAD, PAD, PAD], [1, 0, 0, 0, 0], "a completion that is END alone"),
        ([word, word, word, word, word], [1, 1, 1, 1, 1], "a completion that was cut, without END"),
        ([word, word, word, word, END], [1, 1, 1, 1, 1], "a completion that ends in the last column"),
        ([word, PAD, word, END, PAD], [1, 1, 1, 1, 0], "a completion in which the policy itself sampled the token PAD"),
        ([word, END, word, END, word], [1, 1, 0, 0, 0], "a completion with other tokens after its END"),
    ]
    ids = torch.tensor([row for row, _, _ in cases])
    got = call(f, ids.shape, ids, END)
    expect(got.dtype == torch.bool, f"the mask holds {str(got.dtype)[6:]}, where booleans belong: compare with == or <")
    for row, (tokens, right, name) in zip(got.tolist(), cases):
        if row == [bool(on) for on in right]:
            continue
        shown = " ".join({word: "w", END: "END", PAD: "PAD"}[token] for token in tokens)
        end = tokens.index(END) if END in tokens else None
        if end is None:
            reason = "without END every token is the policy's own: the row is True throughout"
        elif row[end] is False and row[:end] == [True] * end:
            reason = "END itself is masked out. It was sampled like any token, and stopping must be trained"
        elif any(row[end + 1:]):
            reason = "what stands after the first END counts, though no policy chose it"
        else:
            reason = "a token before the first END is masked out" + (
                ". PAD is a token that can be sampled: ask where END stands" if PAD in tokens[:end] else "")
        raise Wrong(f"{name} ({shown}): {reason}. Yours is {[int(on) for on in row]}, right is {right}")
    more = torch.randint(END, END + 4, (50, 9), generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[END not in row[:t] for t in range(9)] for row in more.tolist()])
    expect(torch.equal(call(f, more.shape, more, END), right), "it is right for the six cases above, but not for 50 "
           "random rows")


# --- 3: the KL ----------------------------------------------------------------------------------------------------

def check_03(module):
    f = module.k3
    logprobs, ref = torch.tensor([[0.5, 0.25]]).double().log(), torch.tensor([[0.25, 0.5]]).double().log()
    log2 = math.log(2)
    got = call(f, (1, 2), logprobs, ref)
    case = "The policy gives two tokens 0.5 and 0.25, the reference 0.25 and 0.5"
    explain(got, torch.tensor([[0.5 - 1 + log2, 2 - 1 - log2]]), case, [
        ([[2 - 1 - log2, 0.5 - 1 + log2]], "the direction is reversed. This is the KL seen from the reference; r is "
         "log(reference / policy) = ref_logprobs - logprobs"),
        ([[log2, -log2]], "this is k1, the plain log ratio, which can be negative: k3 is exp(r) - r - 1"),
        ([[-log2, log2]], "this is the log ratio r itself, with the sign of reference / policy: k3 is exp(r) - r - 1"),
        ([[log2 ** 2 / 2] * 2], "this is k2, half the square of the log ratio: k3 is exp(r) - r - 1"),
        ([[-(0.5 - 1 + log2), -(2 - 1 - log2)]], "the sign is reversed: as a penalty this would pay the policy for "
         "drifting away. k3 is never negative"),
        ([[0.5 + log2, 2 - log2]], "the - 1 is missing: where policies agree the estimate is 0"),
        ([[0.5 - 1 - log2, 2 - 1 + log2]], "r is added, where it is to be subtracted: exp(r) - r - 1"),
        ([[0.5 - 1, 2 - 1]], "r is not subtracted: k3 is exp(r) - r - 1"),
    ])
    logprobs, ref = random(2, 20, 10)
    got = call(f, (20, 10), logprobs, ref)
    r = ref - logprobs
    series = sum(r ** n / float(math.factorial(n)) for n in range(2, 30))
    expect(close(got, series), "on random log-probabilities it is not exp(r) - r - 1")
    small = call(f, (1,), torch.tensor([0.0]), torch.tensor([1e-3]))
    expect(abs(small.item() / 5.0017e-7 - 1) < 0.01, "r = 0.001 in float32 should give 5.0e-07, but gave "
           f"{small.item():.1e}: exp(r) - 1 - r loses its digits. Use torch.expm1(r)")
    logprobs = logprobs.clone().requires_grad_()
    got = call(f, (20, 10), logprobs, ref)
    expect(got.requires_grad, "the estimate has no gradient for logprobs: nothing may be detached, nor under no_grad")
    got.sum().backward()
    expect(close(logprobs.grad, 1 - r.exp()), "the gradient for logprobs should be 1 - exp(r); is a part of it "
           "detached?")


# --- 4 and 8: the clipped surrogate -------------------------------------------------------------------------------

def surrogates(loss, ratios, advantages):
    """The surrogate of one token each, as the loss gives it: (n,), and the gradients for its log-probability: (n,)."""
    values, gradients = [], []
    for ratio, advantage in zip(ratios, advantages):
        old = torch.tensor([[-1.3]], dtype=torch.float64)
        logprobs = (old + math.log(ratio)).requires_grad_()
        value = call(loss, (), logprobs, old, torch.full((1, 1), advantage).double(), torch.ones(1, 1).bool(), 0.2,
                     name="the loss")
        expect(value.requires_grad, "the loss has no gradient for logprobs: is something detached, or under no_grad?")
        value.backward()
        expect(logprobs.grad is not None, "the loss has no gradient for logprobs")
        values.append(-value.item())
        gradients.append(-logprobs.grad.item())
    return torch.tensor(values).double(), torch.tensor(gradients).double()


def check_surrogate(loss):
    """A loss with the signature of policy_loss, whose divisor is the number of completions alone."""
    ratios, advantages = [0.5, 0.5, 1.1, 0.9, 1.5, 1.5], [2.0, -2, 2, -2, 2, -2]
    values, gradients = surrogates(loss, ratios, advantages)
    r, A = torch.tensor(ratios).double(), torch.tensor(advantages).double()
    near = r.clamp(0.8, 1.2)
    case = "Single tokens with ratios 0.5, 0.5, 1.1, 0.9, 1.5, 1.5 and advantages 2, -2, 2, -2, 2, -2"
    right = torch.tensor([1.0, -1.6, 2.2, -1.8, 2.4, -3.0]).double()
    explain(values, right, case, [
        (-right, "the sign is reversed: a loss is minimised, so it is minus the surrogate"),
        (torch.max(r * A, near * A), "the clip is inverted: take the smaller of the two products (torch.min). With the "
         "larger one, a token that went too far keeps its gradient, and one that must be pushed back has none"),
        (near * A, "this is the clipped product alone. A token with ratio 1.5 and a negative advantage must be pushed "
         "back, so the minimum of both products belongs here"),
        (r * A, "nothing is clipped"),
        (torch.where(A > 0, torch.min(r * A, near * A), torch.max(r * A, near * A)),
         "the clip is inverted for negative advantages: the minimum of the two products is right for both signs"),
        (torch.min(A / r, (1 / r).clamp(0.8, 1.2) * A), "the ratio is upside down: exp(logprobs - old_logprobs)"),
        (torch.min(r.log() * A, r.log().clamp(0.8, 1.2) * A), "the ratio lacks its exp: exp(logprobs - old_logprobs)"),
        (A, "the ratio is always 1: it must compare logprobs with old_logprobs"),
        (torch.min(r * A, r.clamp(-0.2, 0.2) * A), "the bounds of the clip are 1 - clip_eps and 1 + clip_eps"),
    ])
    explain(gradients, torch.tensor([1.0, 0, 2.2, -1.8, 0, -3]).double(), f"{case}: the values are right, the "
            f"gradients", [
        (torch.zeros(6), "are all 0. The ratio must keep its gradient: detach old_logprobs at most"),
        (A, "are those of the advantage times the log-probability: let the ratio have the gradient itself"),
    ])
    zeros, lengths = torch.zeros(2, 3).double(), ragged([1, 3])
    aggregated = call(loss, (), zeros, zeros, torch.ones(2, 3).double(), lengths, 0.2, name="the loss")
    explain(-aggregated, torch.tensor(2.0), "Completions of 1 and 3 tokens, each token worth 1, in 3 columns", [
        (3.0, "tokens after the end count: use the mask"),
        (1.0, "this is a mean over tokens, of each completion or of the batch: sum over a completion's tokens (dim=1), "
         "then the mean over completions"),
        (4 / 6, "this is the mean over all columns, padding included: sum over dim=1, then the mean over completions"),
        (4.0, "this is the sum over the completions: take the mean over them"),
        (4 / 3, "the mean is taken over the columns: sum over dim=1, then the mean over completions"),
    ])
    # The ratio of two tokens, 2 and 0.5: that of the whole sequence would be 1 and not clipped at all.
    two = call(loss, (), torch.tensor([[2.0, 0.5]]).double().log(), torch.zeros(1, 2).double(),
               torch.ones(1, 2).double(), torch.ones(1, 2).bool(), 0.2, name="the loss")
    explain(-two, torch.tensor(1.7), "One completion whose two tokens have ratios 2 and 0.5, advantages 1", [
        (2.0, "this is one ratio for the whole sequence: each token has its own"),
        (1.0, "this is one ratio for the whole sequence: each token has its own"),
        (0.85, "the tokens of a completion are averaged: sum them"),
    ])
    logprobs, old, advantages = random(3, 4, 5)
    mask = ragged([1, 2, 5, 5])
    results = []
    for garbage in 0.0, 7.0, -7.0:
        filled = [x.masked_fill(~mask, value) for x, value in
                  zip((logprobs, old, advantages), (garbage, -garbage, 1000 * garbage))]
        filled[0].requires_grad_()
        value = call(loss, (), *filled, mask, 0.2, name="the loss")
        value.backward()
        results.append((value.detach(), filled[0].grad))
    expect(all(close(value, results[0][0]) and close(gradient, results[0][1]) for value, gradient in results),
           "the loss changes with what stands after the end of the completions: use the mask")
    right = -sum(min(math.exp(l - o) * a, min(max(math.exp(l - o), 0.8), 1.2) * a) for l, o, a in zip(
        logprobs[mask].tolist(), old[mask].tolist(), advantages[mask].tolist())) / 4
    expect(close(results[0][0], torch.tensor(right)), "four random completions of 1, 2, 5 and 5 tokens should have the "
           f"loss {right:.4f}, but have {results[0][0].item():.4f}")
    wide = call(loss, (), logprobs, old, advantages, mask, 100.0, name="the loss")
    right = -((logprobs - old).exp() * advantages * mask).sum().item() / 4
    expect(close(wide, torch.tensor(right)), "with clip_eps 100 nothing is clipped; is clip_eps used, or a number of "
           "your own?")
    empty = torch.zeros(2, 2, requires_grad=True)
    value = call(loss, (), empty, torch.zeros(2, 2), torch.ones(2, 2), ragged([2, 0]), 0.2, name="the loss")
    value.backward()
    expect(value.isfinite() and empty.grad.isfinite().all(), "a completion without a token makes the loss 0 / 0: an "
           "empty mask must give 0")


def check_04(module):
    check_surrogate(module.policy_loss)


def check_08(module):
    f = module.dr_grpo_loss
    zeros, mask = torch.zeros(2, 3).double(), ragged([1, 3])
    case = "Completions of 1 and 3 tokens, each token worth 1, in 3 columns, of at most 8 tokens"
    got = -call(f, (), zeros, zeros, torch.ones(2, 3).double(), mask, 0.2, 8)
    explain(got, torch.tensor(2 / 8), case, [
        (2.0, "this is exercise 4's loss: the sum of a completion is to be divided by longest"),
        (1.0, "you divide by a completion's own length, or by the number of tokens of the batch, where the constant "
         "belongs"),
        (2 / 3, "you divide by N, the longest of this batch: in another batch that is another number. The constant is "
         "the setting longest"),
        (-2 / 8, "the sign is reversed: a loss is minimised, so it is minus the surrogate"),
        (4 / 8, "the sum over the completions is not averaged: divide by how many there are"),
        (3 / 8, "tokens after the end count: use the mask"),
        (1 / 8, "you divide twice, by the length and by the constant: the constant takes the length's place"),
    ])
    check_surrogate(lambda *arguments: f(*arguments, 8) * 8)
    check_surrogate(lambda *arguments: f(*arguments, 3) * 3)


# --- 5: GAE -------------------------------------------------------------------------------------------------------

def gae_of(f, rewards, values, mask, gamma, lam):
    copies = rewards.clone(), values.clone(), mask.clone()
    result = f(*copies, gamma, lam)
    expect(result is not None, "gae returned nothing: is the `return` missing?")
    expect(isinstance(result, (tuple, list)) and len(result) == 2, "gae returns two tensors: advantages and returns")
    expect(all(map(torch.equal, copies, (rewards, values, mask))), "gae changes a tensor that it was given: make a "
           "new one")
    return [tensor(x, mask.shape, name).double() for x, name in zip(result, ("gae (advantages)", "gae (returns)"))]


def gae_by_definition(rewards, values, length, gamma, lam):
    """sum over l of (gamma lam)^l delta_{t + l}, the double sum of 1506.02438, eq. 16, for one row."""
    value = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(length - t)) for t in range(length)]


def check_05(module):
    f = module.gae
    rewards, values = torch.tensor([[0.0, 0, 10]]).double(), torch.tensor([[1.0, 2, 4]]).double()
    whole = torch.ones(1, 3).bool()
    got, _ = gae_of(f, rewards, values, whole, 1.0, 0.0)
    explain(got, torch.tensor([[1.0, 2, 6]]), "Values 1, 2, 4, then a reward of 10; gamma 1, lam 0: the deltas", [
        ([[1, 2, 10]], "after the last token the value is 0. Yours takes the last value for the next one"),
        ([[-1, -2, 6]], "the value of the next state is missing from delta"),
        ([[-1, -2, -6]], "the sign is reversed: delta is what came minus what was expected"),
        ([[1, 2, -4]], "the last reward is missing: does it stand one token late?"),
        ([[1, 12, -4]], "the reward is counted one token early"),
        ([[9, 8, 6]], "lam has no effect: it multiplies the advantage of the token after"),
        ([[3, 6, 14]], "the value of the state is added, where it is subtracted"),
        ([[0, 0, 10]], "these are the rewards: the values are missing"),
        ([[1, 1, 8]], "values[:, t] is of the state before token t, so the next one is values[:, t + 1]"),
    ])
    got, returns = gae_of(f, rewards, values, whole, 1.0, 1.0)
    explain(got, torch.tensor([[9.0, 8, 6]]), "The same with lam 1: what came in the end minus the value", [
        ([[1, 2, 6]], "the advantage of the token after is not added: A_t = delta_t + gamma * lam * A_{t + 1}"),
        ([[1, 3, 9]], "you go through the columns from the first to the last: the advantage looks ahead, so begin at "
         "the last"),
    ])
    explain(returns, torch.tensor([[10.0, 10, 10]]), "The same: the returns", [
        ([[9, 8, 6]], "these are the advantages: the returns are advantages + values"),
        ([[8, 6, 2]], "the returns are advantages plus values, not minus"),
        ([[0, 0, 10]], "these are the rewards: the returns are advantages + values"),
    ])
    got, _ = gae_of(f, rewards, values, whole, 0.5, 0.5)
    explain(got, torch.tensor([[0.0 + 0.25 * 1.5, 1.5, 6]]), "The same with gamma 0.5 and lam 0.5", [
        ([[0.5 * 3, 3, 6]], "gamma is missing before lam: A_t = delta_t + gamma * lam * A_{t + 1}"),
        ([[1 + 0.25 * 3.5, 2 + 0.25 * 6, 6]], "gamma is missing before the next value: delta = r + gamma * V_next - V"),
        ([[1 + 0.5 * 5, 2 + 0.5 * 6, 6]], "gamma is not used"),
        ([[0.5 * 3.0, 0.0 + 0.5 * 6, 6]], "lam is missing"),
    ])
    for column, name in (0, "rewards"), (1, "values"):
        after = [torch.tensor([[5.0, 0, 0]]).double(), torch.tensor([[3.0, 0, 0]]).double()]
        after[column] = after[column] + torch.tensor([[0.0, 100, -7]])
        got, returns = gae_of(f, *after, ragged([1], 3), 1.0, 0.95)
        expect(abs(got[0, 0].item() - 2) < 1e-5, f"One token with value 3 and reward 5, and padding after it in which "
               f"{name} holds 100: the advantage is 2, whatever stands there, but yours is {got[0, 0].item():.4g}. "
               f"After the last real token rewards and values are 0")
        expect((got[0, 1:] == 0).all(), "where the mask is False the advantages should be 0, but are "
               f"{numbers(got[0, 1:])}")
        expect((returns[0, 1:] == 0).all(), "where the mask is False the returns should be 0, but are "
               f"{numbers(returns[0, 1:])}")
    lengths, (rewards, values) = [1, 4, 7, 7, 2], random(2, 5, 7)
    for gamma, lam in (1.0, 0.95), (0.9, 0.8), (0.37, 0.61), (0.0, 0.5):
        got, returns = gae_of(f, rewards, values, ragged(lengths), gamma, lam)
        for b, length in enumerate(lengths):
            right = gae_by_definition(rewards[b].tolist(), values[b].tolist(), length, gamma, lam)
            right = torch.tensor(right, dtype=torch.float64)  # (length,)
            case = f"A random completion of {length} tokens in {7} columns, gamma {gamma}, lam {lam}"
            explain(got[b, :length], right, case, [])
            explain(returns[b, :length], right + values[b, :length], f"{case}: the returns", [])
            expect((got[b, length:] == 0).all() and (returns[b, length:] == 0).all(), f"{case}: where the mask is "
                   f"False advantages and returns should be 0")
    got, returns = gae_of(f, rewards, values, ragged([0, 4, 7, 7, 2]), 1.0, 0.95)
    expect(got.isfinite().all() and returns.isfinite().all(), "a completion without a token gives numbers that are not "
           "finite")


# --- 6: Bradley-Terry ---------------------------------------------------------------------------------------------

def check_06(module):
    f = module.preference_loss
    chosen, rejected = torch.tensor([5.0, math.log(3)]).double(), torch.tensor([5.0, 0]).double()
    half = [math.log(2), math.log(4 / 3)]
    got = call(f, (), chosen, rejected)
    explain(got, torch.tensor(sum(half) / 2), "Two pairs with margins 0 and log 3, so probabilities 1/2 and 3/4", [
        (sum(half), "this is the sum over the pairs: take the mean"),
        (-sum(half) / 2, "the sign is reversed: the loss is minus the log-probability of the choices"),
        ((math.log(2) + math.log(4)) / 2, "chosen and rejected are exchanged: the loss must fall when the chosen "
         "answer's score rises"),
        (1 - (1 / 2 + 3 / 4) / 2, "this is 1 - sigmoid, without the logarithm"),
        (-(1 / 2 + 3 / 4) / 2, "this is -sigmoid, without the logarithm"),
        (-math.log(3) / 2, "this is the margin alone: it lacks log sigmoid, and pushing scores apart would never end"),
        (-math.log((1 / 2 + 3 / 4) / 2), "the mean is taken before the logarithm: average the logarithms"),
    ])
    for margin, right in (-1000.0, 1000.0), (1000.0, 0.0):
        got = call(f, (), torch.tensor([margin]), torch.tensor([0.0]))
        expect(got.isfinite(), f"a margin of {margin:g} gives {got.item()}: exp or log leaves the range of floats. Use "
               "F.logsigmoid")
        explain(got, torch.tensor(right), f"A margin of {margin:g}", [])
    chosen, rejected = random(2, 30)
    chosen.requires_grad_()
    got = call(f, (), chosen, rejected)
    explain(got.detach(), torch.tensor(sum(math.log1p(math.exp(r - c)) for c, r in zip(
        chosen.tolist(), rejected.tolist())) / 30), "30 random pairs", [])
    expect(got.requires_grad, "the loss has no gradient for the scores")
    got.backward()
    expect(close(chosen.grad, -torch.sigmoid(rejected - chosen.detach()) / 30), "the gradient for the chosen scores is "
           "not that of the formula; is a part detached?")


# --- 9: a reward function without loopholes -----------------------------------------------------------------------

THOUGHT = "<think> 3 times 9 is 27, 27 plus 1 is 28</think>"
ANSWERS = [     # completion, reward where 28 is right, what it shows
    (" 28", 1, "the plain right answer"),
    ("28", 1, "the right answer without the space before it"),
    ("28 ", 1, "the right answer with a space after it: spaces around it do not matter"),
    (THOUGHT + " 28", 1, "the right answer after thinking"),
    ("<think> 1 plus 1 is 99</think> 28", 1, "wrong thoughts and a right answer: only the answer counts"),
    ("<think>\nfirst,\nthen.</think> 28", 1, "thoughts of several lines: they may hold anything but a tag"),
    (" 27", 0, "a wrong answer"),
    ("", 0, "nothing at all"),
    (" 128", 0, "the right number inside another one"),
    (" 281", 0, "the right number inside another one"),
    (" 27 28", 0, "two answers: who lists all numbers is always right"),
    (" 28 28", 0, "two answers, even if they are the same"),
    (" 28, 29", 0, "two answers: who lists all numbers is always right"),
    (" the answer is 28", 0, "words around the number: the rule is exactly the number"),
    (" 28.", 0, "the number with a full stop: the rule is exactly the number"),
    (" 28.0", 0, "another way to write the number: the rule is as it is written"),
    (" 028", 0, "another way to write the number: the rule is as it is written"),
    (" +28", 0, "another way to write the number: the rule is as it is written"),
    (" 20+8", 0, "a sum that was left to the reward function: never evaluate what is said"),
    (" 2 8", 0, "the digits apart"),
    (" \u0662\u0668", 0, "28 in other digits, which int() reads"),
    (" -28", 0, "the wrong sign"),
    (THOUGHT + " 27", 0, "right in the thoughts, wrong in the answer"),
    (THOUGHT, 0, "thoughts without an answer"),
    ("<think></think> 28", 0, "tags with nothing in them"),
    ("<think> 28", 0, "half a pair of tags"),
    (" 28</think>", 0, "half a pair of tags"),
    ("</think> 28", 0, "half a pair of tags"),
    (" 28" + THOUGHT, 0, "thoughts after the answer"),
    (THOUGHT + " 27" + THOUGHT + " 28", 0, "two pairs of tags, each with an answer: a second try"),
    (THOUGHT + THOUGHT + " 28", 0, "two pairs of tags"),
    (THOUGHT + " 28</think>", 0, "a tag too many"),
    ("<think> a <think> b</think> 28", 0, "a tag inside the thoughts"),
    ("so <think> 9</think> 28", 0, "words before the thoughts: a completion begins with <think> or has no tag"),
]


def check_09(module):
    f = module.reward
    for completion, right, what in ANSWERS:
        got = rewards_of(f, ["?"], [completion], answer=["28"], finished=[True])[0].item()
        expect(got == right, f"\"{completion.strip()}\" got {got:g}, where {right} is right (the answer is 28). "
               + (f"A loophole: {what}" if right == 0 else f"It is {what}"))
    cut = rewards_of(f, ["?", "?"], [" 28", THOUGHT + " 28"], answer=["28", "28"], finished=[False, True]).tolist()
    expect(cut == [0, 1], "a completion that the length limit cut (finished is False) got a reward: it might have "
           "gone on, and stopping would never be learned" if cut[0] else "cut and whole completions in one batch: "
           f"the rewards should be [0, 1], but are {cut}")
    texts, right = [" 0", " 00", " 7", " 7", " 3"], ["0", "0", "7", "8", "-3"]
    got = rewards_of(f, ["?"] * 5, texts, answer=right, finished=[True] * 5, operations=["2"] * 5).tolist()
    expect(got == [1, 0, 1, 0, 0], f"answers {texts} where {right} are right should get [1, 0, 1, 0, 0], but got {got}")
    got = rewards_of(f, ["?"], [" 28"], answer=["28"]).tolist()
    expect(got == [1], "without the column `finished`, completions count as finished")


# --- 10: dynamic sampling -----------------------------------------------------------------------------------------

class Source:
    """draw() of a list of groups; it remembers how many were asked for."""

    def __init__(self, groups, rounds):
        self.groups, self.rounds, self.asked = list(groups), rounds, []

    def __call__(self, n):
        expect(isinstance(n, int) and n > 0, f"draw({n}): ask for at least one group, or do not ask")
        self.asked.append(n)
        expect(len(self.asked) <= self.rounds, f"draw was called {len(self.asked)} times, where rounds is "
               f"{self.rounds}: a loop that waits for unequal groups may never end")
        drawn, self.groups = self.groups[:n], self.groups[n:]
        return drawn


def check_10(module):
    f = module.fill_batch
    good, ones, zeros, others = [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.3, 0.3]

    def fill(batch, new, rounds):
        draw, given = Source(new, rounds), [list(group) for group in batch]
        result = f(given, draw, rounds)
        expect(result is not None, "fill_batch returned nothing: is the `return` missing?")
        expect(isinstance(result, (tuple, list)) and len(result) == 2, "fill_batch returns two things: the batch, and "
               "how many groups were replaced")
        expect(given == batch, "fill_batch changes the batch that it was given: begin with batch = list(batch)")
        return list(result[0]), result[1], draw.asked

    expect(fill([good] * 3, [], 3) == ([good] * 3, 0, []), "a batch without equal groups should stay as it is, and "
           "nothing be drawn")
    batch, dropped, asked = fill([good, zeros, ones], [[0.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 3)
    expect(len(batch) == 3, f"from 3 groups came {len(batch)}: each equal group is replaced, so that the batch keeps "
           f"its size")
    expect(zeros not in batch, "a group that is all wrong is still there: its advantages are all 0")
    expect(ones not in batch, "a group that is all right is still there: its advantages are all 0, too")
    expect(batch[0] == good, "a group with different rewards was replaced, or is not in its place any more")
    expect(asked[0] == 2, f"of 3 groups 2 are equal, but you drew {asked[0]}: draw as many as are replaced")
    expect(batch == [good, [0.0, 2.0], [3.0, 4.0]], f"the new groups should take the places of the equal ones, but "
           f"the batch is {batch}")
    expect(dropped == 2, f"2 groups were replaced, but you say {dropped}")
    batch, dropped, asked = fill([good, others], [good], 3)
    expect(asked == [1], "a group with the rewards 0.3 and 0.3 is equal, too: rewards need not be 0 and 1")
    batch, _, asked = fill([[0.0, 1.0, 1.0, 0.0], zeros * 2], [[1.0, 0.0, 0.0, 1.0]], 3)
    expect(asked == [1] and batch[0] == [0.0, 1.0, 1.0, 0.0], "the group 0, 1, 1, 0 was taken for an equal one: "
           "compare all rewards, not the first with the last, nor the mean with a number")
    batch, dropped, asked = fill([good, zeros], [ones, others, good], 3)
    expect(len(asked) > 1, "a new group can be equal, too: look at the whole batch again in the next round")
    expect((batch, dropped, asked) == ([good, good], 3, [1, 1, 1]), f"two equal groups in turn came in place of one: "
           f"after 3 rounds 3 groups were replaced and the batch is fine, but you say {dropped} and have {batch}")
    batch, dropped, asked = fill([zeros, ones], [zeros] * 100, 4)
    expect(len(asked) == 4, f"all that was drawn was equal, and rounds is 4, but you drew {len(asked)} times")
    expect((len(batch), dropped) == (2, 8), f"after 4 rounds of 2 equal groups 8 were replaced, and 2 are left, equal "
           f"as they are; you say {dropped} and have {len(batch)}")
    batch, dropped, asked = fill([zeros, ones, good], [good], 5)
    expect(len(batch) == 3, f"draw had only one group left; what is not replaced stays, but of 3 groups {len(batch)} "
           f"are left")
    expect(dropped == 1, f"draw had only one group left, so 1 was replaced, but you say {dropped}")
    expect(batch == [good, ones, good], f"draw had only one group left: the batch should be {[good, ones, good]}, not "
           f"{batch}")
    none = fill([zeros], [], 5)
    expect(none[:2] == ([zeros], 0), "draw had no group left: the batch stays as it is")


# --- 11: a reward of your own -------------------------------------------------------------------------------------

def sft_groups(groups=8, group_size=8):
    """Completions of the SFT model: prompts, texts and the columns, lists of B."""
    rows = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"])[:groups]
    prompts = [row["prompt"] for row in rows]
    policy = load_model(DATA / "checkpoints/sft.pt")
    rollout = sample(policy, Prompts.from_texts(prompts, TOKENIZER), group_size, LONGEST, 1.0, generator(1, 0))
    repeated = [row for row in rows for _ in range(group_size)]
    return [row["prompt"] for row in repeated], rollout.texts(TOKENIZER), dict(
        answer=[row["answer"] for row in repeated], finished=rollout.finished.tolist())


def check_11(module):
    f, pairs = module.reward, getattr(module, "PAIRS", None)
    prompts, texts, columns = sft_groups()
    rewards = rewards_of(f, prompts, texts, **columns)
    again = rewards_of(f, prompts, texts, **columns)
    expect(torch.equal(rewards, again), "called twice with the same completions, it gives other rewards: GRPO would "
           "compare luck with luck")
    turned = rewards_of(f, prompts[::-1], texts[::-1], **{name: column[::-1] for name, column in columns.items()})
    alone = torch.cat([rewards_of(f, [prompts[b]], [texts[b]], **{name: [columns[name][b]] for name in columns})
                       for b in range(8)])
    expect(close(turned.flip(0), rewards) and close(alone, rewards[:8]), "the reward of a completion depends on which "
           "others are in the batch, or on their order. What is relative to others is the advantage, and GRPO makes it")
    extra = rewards_of(f, prompts, texts, **columns, operations=["2"] * len(texts))
    expect(close(extra, rewards), "it should not mind a column that it does not know: let it take **columns")
    odd = ["", " ", "<think>", "</think></think>", "28" * 50, "\u0662\u0668 \U0001f600"]
    rewards_of(f, ["?"] * len(odd), odd, answer=["28"] * len(odd), finished=[False] * len(odd))
    groups = rewards.view(8, 8)
    differ = (groups != groups[:, :1]).any(dim=1).sum().item()
    expect(differ > 4, f"only {differ} of 8 groups of the SFT model's completions have different rewards, so that most "
           "groups teach nothing: give something for being nearly there")
    expect(isinstance(pairs, (list, tuple)) and len(pairs) >= 3, "PAIRS should hold at least three pairs: (what "
           "should get more, what should get less)")
    expect(all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
               for pair in pairs), "each of PAIRS is two strings: (what should get more, what should get less)")
    for better, worse in pairs:
        got = rewards_of(f, ["start with 3, times 9, plus 1."] * 2, [better, worse], answer=["28"] * 2,
                         finished=[True] * 2)
        expect(got[0] > got[1], f"you say that \"{better}\" should get more than \"{worse}\", but the rewards are "
               f"{got[0]:g} and {got[1]:g}")


# --- 12: a task of your own ---------------------------------------------------------------------------------------

def rows_of(function, argument, fields, at_least):
    """Call prompts or demonstrations -> a list of dicts that hold these fields as strings."""
    name = f"prompts(\"{argument}\")" if argument else "demonstrations()"
    rows = function(argument) if argument else function()
    expect(isinstance(rows, (list, tuple)) and all(isinstance(row, dict) for row in rows),
           f"{name} should return a list of dicts")
    expect(len(rows) >= at_least, f"{name} returned {len(rows)}, where at least {at_least} are needed")
    for field in fields:
        expect(all(isinstance(row.get(field), str) for row in rows), f"{name}: each dict needs \"{field}\", a string")
    expect(all(row.keys() == rows[0].keys() for row in rows), f"{name}: all dicts need the same fields")
    return list(rows)


def check_12(module):
    train, test = rows_of(module.prompts, "train", ["prompt"], 200), rows_of(module.prompts, "test", ["prompt"], 20)
    expect(train == module.prompts("train"), "prompts(\"train\") is another list at each call: seed what is random")
    expect(train[0].keys() == test[0].keys(), "the prompts of train and test have different fields")
    expect(not {"completions", "finished"} & train[0].keys(), "completions and finished cannot be fields of a prompt: "
           "the reward gets columns of these names already")
    known = {row["prompt"]: row for row in train}
    shared = known.keys() & {row["prompt"] for row in test}
    expect(not shared, f"\"{min(shared, default='')}\" is in both splits: the test would measure what was learned by "
           f"heart")
    demonstrations = rows_of(module.demonstrations, None, ["prompt", "response"], 32)
    for row in train + test:
        length = len(TOKENIZER.encode_prompt(row["prompt"]))
        expect(length + LONGEST <= CONTEXT, f"\"{row['prompt']}\" has {length} tokens: with {LONGEST} for the "
               f"completion it does not fit into the context of {CONTEXT}")
    for row in demonstrations:
        length = len(TOKENIZER.encode_completion(row["response"]))
        expect(length <= LONGEST, f"the demonstration \"{row['response']}\" has {length} tokens, where at most "
               f"{LONGEST} are sampled: it could never be said")
        expect(row["prompt"] in known, f"the demonstration of \"{row['prompt']}\" is of no prompt of \"train\"")

    def score(rows, completions):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return rewards_of(module.reward, columns.pop("prompt"), completions, finished=[True] * len(rows), **columns)
    asked, responses = [known[row["prompt"]] for row in demonstrations], [row["response"] for row in demonstrations]
    rewards = score(asked, responses)
    expect(torch.equal(rewards, score(asked, responses)), "called twice with the same completions, reward gives other "
           "numbers")
    lowest = int(rewards.argmin())
    expect(rewards.min() == rewards.max(), f"the demonstration \"{responses[lowest]}\" of "
           f"\"{asked[lowest]['prompt']}\" gets {rewards[lowest]:g}, where others get {rewards.max():g}: each should "
           f"get the highest reward")
    likely = [text for text, _ in Counter(responses).most_common(50)]
    for constant in ["", " ", *likely, "".join(likely)]:
        mean = score(test, [constant] * len(test)).mean()
        expect(mean <= 0.6 * rewards.max(), f"the constant answer \"{constant:.40}\" gets {mean:.2f} on average, "
               f"where a right one gets {rewards.max():g}: a policy would find that and ignore the prompts")


# --- 13 to 19: bug hunts. First what can be seen from outside, without the line --------------------------------------

def tiny_policy(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(TOKENIZER.vocab_size, context=16, layers=1, heads=1, width=8))


def check_kl(f, name):
    logprobs, ref = random(2, 6, 5)
    r = ref - logprobs
    for kind, right in ("k1", -r), ("k2", r ** 2 / 2), ("k3", r.exp() - r - 1):
        got = call(f, (6, 5), logprobs, ref, kind, name=name)
        expect(close(got, right), f"{kind} of random log-probabilities is not right: the first should be "
               f"{right[0, 0]:.4f}, but is {got[0, 0]:.4f}")


def check_13(module):
    policy, ids = tiny_policy(), torch.arange(10)[None]
    with torch.no_grad():
        start = policy.plain(ids)
        reference = module.reference_of(policy)
        expect(isinstance(reference, GPT), "reference_of should return a GPT")
        before = reference.plain(ids)
        expect(close(before, start), "at the start the reference and the policy should give the same logits, but do "
               "not")
        expect(all(weight.requires_grad for weight in policy.parameters()), "once there is a reference, the policy "
               "can no longer be trained: its weights want no gradient")
        expect(not any(weight.requires_grad for weight in reference.parameters()), "the reference should need no "
               "gradient")
        for weight in policy.parameters():
            weight += 0.3
        expect(not close(policy.plain(ids), start), "the policy's weights were changed, and its logits did not change")
        expect(close(reference.plain(ids), before), "the policy's weights were changed, as an optimizer would, and the "
               "reference gave other logits than before: it has moved along. Between the two there is never a "
               "difference")
    check_kl(module.kl_estimate, "kl_estimate")


def check_14(module):
    ref = torch.tensor([[0.3, 0.4, 0.3]]).double().log()
    for kind in "k2", "k3":
        logits = torch.tensor([[0.7, 0.2, 0.1]]).double().log().requires_grad_()

        def kl():
            logprobs = logits.log_softmax(-1)
            return (logprobs.exp() * (logprobs - ref)).sum().item()
        before, logprobs = kl(), logits.log_softmax(-1)
        # Each token as often as the policy samples it: the expectation of the loss that the loop has.
        loss = (logprobs.exp().detach() * call(module.penalty, (1, 3), logprobs, ref, kind)).sum()
        expect(loss.requires_grad, "the penalty has no gradient for logprobs")
        loss.backward()
        with torch.no_grad():
            logits -= 0.1 * logits.grad
        expect(kl() < before, f"one step of gradient descent on the penalty ({kind}) took a policy from a KL of "
               f"{before:.4f} to {kl():.4f}: it is paid for drifting, not charged")
    check_kl(module.penalty, "penalty")
    check_surrogate(module.policy_loss)


def check_15(module):
    f = module.group_advantages
    for Q, G in (2, 3), (3, 2), (4, 2):
        for row in range(Q * G):
            rewards = torch.zeros(Q * G)
            rewards[row] = 1
            got = call(f, (Q * G,), rewards, G)
            expect(got.argmax() == row, f"{Q} groups of {G}, and only completion {row} was right. Most reinforced is "
                   f"completion {int(got.argmax())}: the prize goes to another one")
            others = torch.arange(Q * G) // G != row // G
            expect((got[others] == 0).all(), f"{Q} groups of {G}, and only completion {row} was right. The rewards of "
                   f"the other groups are all equal, and yet their advantages are not all 0: {numbers(got)}")
    check_01(module)
    check_surrogate(module.policy_loss)


def check_16(module):
    rewards, mask = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]]).double(), ragged([3, 4])
    values = torch.zeros(2, 4).double()
    for _ in range(10):
        _, values = gae_of(module.gae, rewards, values, mask, 1.0, 0.95)
    expect(values.max() < 1.01, "I let a critic learn your returns exactly, ten times over, on two completions with "
           f"reward 1. It then promises {values.max().item():.3g} for a token, where nothing is worth more than 1")
    check_05(module)
    values = torch.tensor([[1.0, 2, 50], [3, 50, 50]]).double()
    for clip, right in (0, (1 + 4 + 9) / 4), (0.2, (1 + 4 + 9) / 4):
        zeros = torch.zeros(2, 3).double()
        got = call(module.value_loss, (), values, zeros, zeros, ragged([2, 1], 3), clip)
        explain(got, torch.tensor(right), f"value_loss with errors of 1, 2 and 3 in two completions, clip {clip}", [])


def check_17(module):
    f = module.group_advantages
    for reward, G in (0.7, 12), (0.1, 12), (0.1, 6), (0.7, 7):
        for scale in True, False:
            got = call(f, (2 * G,), torch.tensor([reward] * 2 * G), G, scale)
            expect(not got.isnan().any(), f"{G} equal rewards of {reward}: the advantages are 0 / 0")
            expect((got == 0).all(), f"{G} equal rewards of {reward} {'with' if scale else 'without'} scale: there is "
                   f"nothing to choose between them, and yet each has an advantage of {got[0].item():.2g}")
    check_01(module)


def check_18(module):
    _, gradients = surrogates(module.policy_loss, [1.5, 0.5, 1.5, 0.5], [2.0, -2, -2, 2])
    further = "is pushed further all the same"
    expect(gradients[0] == 0, "a good token (advantage 2) has become 1.5 times as likely, more than the clip allows, "
           "and "
           + further)
    expect(gradients[1] == 0, "a bad token (advantage -2) has become half as likely, less than the clip allows, and "
           + further)
    expect(gradients[2] < 0, "a bad token (advantage -2) has become 1.5 times as likely, and nothing pushes it back")
    expect(gradients[3] > 0, "a good token (advantage 2) has become half as likely, and nothing pushes it back")
    check_surrogate(module.policy_loss)


def check_19(module):
    policy, prompts, ids = tiny_policy(), Prompts.from_texts(["a"], TOKENIZER), torch.tensor([[7, 8, 9]])
    weights = {name: weight.clone() for name, weight in policy.state_dict().items()}
    critic, optimizer = module.critic_and_optimizer(policy, 0.02)
    expect((critic(prompts, ids) == 0).all(), "the first values should all be 0: its head starts with zeros")
    expect(close(critic.trunk.plain(ids), policy.plain(ids)), "the critic should start from the policy's weights, and "
           "does not")
    trunk = {name: weight.clone() for name, weight in critic.trunk.state_dict().items()}
    for _ in range(30):
        optimizer.zero_grad()
        ((critic(prompts, ids) - 1) ** 2).sum().backward()
        optimizer.step()
    values = critic(prompts, ids)
    expect((values != 0).all(), "I trained it for 30 steps to say 1, and it still says 0 everywhere: no weight that "
           "it computes with has changed")
    expect(all(torch.equal(weights[name], weight) for name, weight in policy.state_dict().items()),
           "training the critic has changed the policy: they share weights")
    expect(not all(torch.equal(trunk[name], weight) for name, weight in critic.trunk.state_dict().items()),
           "the head learns, but the trunk under it stays as it was")
    expect(((values - 1).abs() < 0.5).all(), f"I trained it for 30 steps to say 1 with a learning rate of 0.02, and "
           f"it says {numbers(values.detach()[0])}: is lr used?")


# --- 20: DPO ------------------------------------------------------------------------------------------------------

def check_20(module):
    f, mask = module.dpo_loss, ragged([2, 1, 1, 2])
    logprobs = torch.tensor([[-1.0, -2], [-4, 7], [-2, 7], [-1, -3]]).double()
    ref_logprobs = torch.tensor([[-2.0, -3], [-4.5, -3], [-1, -3], [-2, -3]]).double()

    def loss_of(*margins):
        return torch.tensor([math.log1p(math.exp(-margin)) for margin in margins]).mean()
    case = ("Two pairs, whose completions have become (chosen, rejected) 2 and 0.5, -1 and 1 nats more probable than "
            "under the reference, beta 0.5")
    right = loss_of(0.75, -1.0)
    explain(call(f, (), logprobs, ref_logprobs, mask, 0.5).double(), right.double(), case, [
        (-right, "the sign is reversed: the loss is minus the logarithm"),
        (2 * right, "this is the sum over the pairs: take their mean"),
        (loss_of(-0.75, 1.0), "chosen and rejected are exchanged, or policy and reference"),
        (loss_of(0.25, -0.75), "a completion's reward is the sum over its tokens, not their mean"),
        (loss_of(1.5, -2.0), "beta is not used"),
        (loss_of(0.5, 1.0), "the reference is missing: the reward is how much more probable the completion has become"),
        (loss_of(0.75 - 5, -1.0 + 5), "what stands where the mask is False counts"),
        (loss_of(1.5, -0.25), "the pairs are mixed. Rows 0 and 1 are the first pair: view(-1, 2)"),
        (loss_of(0.75, -1.0).neg().exp(), "this is a probability: the loss is minus its logarithm"),
        (loss_of(-0.125), "the margins are averaged before the logarithm of the sigmoid"),
    ])
    logprobs, ref_logprobs = random(12, 5), random(12, 5, seed=1)
    logprobs, mask = logprobs.requires_grad_(), ragged([1, 2, 3, 4, 5, 5] * 2)
    value = call(f, (), logprobs, ref_logprobs, mask, 0.3)
    expect(value.requires_grad, "the loss has no gradient for logprobs: is something detached, or under no_grad?")
    value.backward()
    rewards = [0.3 * sum(row[on].tolist()) for row, on in zip(logprobs.detach() - ref_logprobs, mask)]
    margins = [a - b for a, b in zip(rewards[::2], rewards[1::2])]
    expect(close(value.detach().double(), loss_of(*margins).double()), "it is right for the two pairs above, but not "
           "for six random ones")
    slopes = [sign * 0.3 / 6 / (1 + math.exp(margin)) for margin in margins for sign in (-1, 1)]
    expect(close(logprobs.grad, torch.tensor(slopes).double()[:, None] * mask), "the value is right, its gradient is "
           "not: is a part of it detached?")
    far = torch.tensor([[-3000.0], [-1.0]], requires_grad=True)
    value = call(f, (), far, torch.zeros(2, 1), torch.ones(2, 1).bool(), 0.5)
    value.backward()
    expect(close(value.detach(), torch.tensor(1499.5)) and far.grad.isfinite().all(), "a margin of -1499.5 should give "
           f"1499.5, but gave {value.item():.4g}: sigmoid is rounded to 0 there; use F.logsigmoid")


# --- 21: values by Monte Carlo ------------------------------------------------------------------------------------

def values_by_definition(ids, mask, rewards, peers, same=lambda a, b, t: a[:t] == b[:t]):
    """peers(b): the rows that row b is compared with -> (B, N)."""
    values = torch.zeros(mask.shape, dtype=torch.float64)
    rows, rewards = ids.tolist(), rewards.tolist()
    for b, t in mask.nonzero().tolist():
        shared = [rewards[other] for other in peers(b) if same(rows[b], rows[other], t)]
        values[b, t] = sum(shared) / max(len(shared), 1)
    return values


def check_21(module):
    f, rewards = module.state_values, torch.tensor([1.0, 0, 5, 3, 1, 8])
    ids = torch.tensor([[5, 6, 9, END], [5, 7, 9, END], [8, 6, END, PAD],
                        [5, 6, 9, END], [5, 6, END, PAD], [5, 6, END, PAD]])
    mask = ragged([4, 4, 3, 4, 3, 3])

    def group(b):
        return range(b // 3 * 3, b // 3 * 3 + 3)

    def others(b):
        return [other for other in group(b) if other != b]
    right = values_by_definition(ids, mask, rewards, group)
    case = ("Two groups: 5 6 9 END, 5 7 9 END, 8 6 END with the rewards 1, 0, 5; and 5 6 9 END, 5 6 END, 5 6 END with "
            "3, 1, 8")
    explain(call(f, (6, 4), ids, mask, rewards, 3).double(), right, case, [
        (values_by_definition(ids, mask, rewards, group, lambda a, b, t: a[:t + 1] == b[:t + 1]), "these are the "
         "values after token t: column t is of the state before it, and column 0 the mean of the whole group"),
        (values_by_definition(ids, mask, rewards, lambda b: range(6)), "completions of other groups count: what begins "
         "with the same tokens after another prompt is another state"),
        (values_by_definition(ids, mask, rewards, others), "the completion itself is left out: it passed the state, "
         "too"),
        (values_by_definition(ids, mask, rewards, group, lambda a, b, t: t == 0 or a[t - 1] == b[t - 1]), "only the "
         "token before is compared: a state is all that was said so far"),
        (values_by_definition(ids, mask, rewards, group, lambda a, b, t: a[t] == b[t]), "only one token is compared: a "
         "state is all that was said so far"),
        (values_by_definition(ids, mask, rewards, group, lambda a, b, t: True), "this is the group's mean at each "
         "token: the longer the beginning, the fewer completions share it"),
        (rewards[:, None] * mask, "this is each completion's own reward"),
        (rewards[:, None] * mask - right, "these are advantages, reward minus value: the values themselves are asked "
         "for"),
    ])
    got = call(f, (6, 4), ids, ragged([4] * 6), rewards, 3)
    expect((call(f, (6, 4), ids, mask, rewards, 3)[~mask] == 0).all() and got.isfinite().all(),
           "where the mask is False the values should be 0")
    for G, columns, words in (4, 6, 2), (8, 5, 3), (2, 7, 2):
        draw = torch.Generator().manual_seed(G)
        ids = torch.randint(5, 5 + words, (3 * G, columns), generator=draw)
        mask, rewards = ragged([1 + b % columns for b in range(3 * G)], columns), random(3 * G, seed=G)
        ids = ids.masked_fill(~mask, PAD)
        ids[mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))] = END
        right = values_by_definition(ids, mask, rewards, lambda b: range(b // G * G, b // G * G + G))
        expect(close(call(f, mask.shape, ids, mask, rewards, G).double(), right), f"it is right for the groups above, "
               f"but not for three random groups of {G}")


HINTS = {
    13: "weight.data = original.data copies no number: from then on both names stand for the same memory, and the "
     "optimizer writes into it. Who else needs to know copy_, clone or copy.deepcopy?",
    14: "The loss is minimised. The objective, reward minus beta times the KL, is maximised: one is minus the other. "
     "How many times has the sign been turned?",
    15: "view(a, b) fills row after row. Take 6 rewards of 2 prompts, 3 each: which view makes rows of 3, and what "
     "does flatten() read first after a transposition?",
    16: "After its last token a completion has no future. What is `following` there? In the returns it is added to the "
        "reward, the critic learns the sum, and next time it is more.",
    17: "The mean of twelve 0.7 is not 0.7 in float32, because their sum is rounded. The difference is tiny, and so is "
        "what it is divided by. float64 holds the sum of equal float32 numbers exactly.",
    18: "The paper takes the smaller of the two products, of an objective. Minus the smaller of two numbers is the "
     "larger of what, once both are negated?",
    19: "An optimizer has those weights that existed when it was made. Which of them does the critic still have at "
     "the end?",
}
