"""Wrong answers to the exercises: each must fail its check, and hear what is wrong.

FROM_MUTANTS are wrong lines of tests/mutants.py in the real function; ANSWERS are the other usual mistakes. With each
stands a word that the check's message must have.
"""
import math
import random
import types

import torch
import torch.nn.functional as F

from tests.mutants import MUTANTS, mutated
from tests.tiny import END, PAD
from tutorials.exercises import check, checks

# exercise: (file in grpo_min, function there, name in the exercise); kl_estimate is asked for its k3
REAL = {1: [("grpo", "group_advantages")], 3: [("grpo", "kl_estimate")],
        4: [("grpo", "policy_loss"), ("ppo", "policy_loss")], 5: [("ppo", "gae")]}
NAMES = {1: "group_advantages", 2: "completion_mask", 3: "k3", 4: "policy_loss", 5: "gae", 6: "preference_loss",
         7: "leave_one_out", 8: "dr_grpo_loss", 9: "reward", 10: "fill_batch", 11: "reward", 20: "dpo_loss",
         21: "state_values"}

# (the wrong line of tests/mutants.py, a word of the message)
FROM_MUTANTS = [
    ("groups = rewards.cpu().double().view(group_size, -1).T", "mixed"),
    ("baseline = groups.mean(dim=0, keepdim=True)", "dim=0"),
    ("groups = rewards.view(-1, group_size)", "float64"),
    ("if len(rewards) % group_size:", "ValueError"),
    ("log_ratio = logprobs - ref_logprobs", "direction"),
    ("return -log_ratio", "k1"),
    ("return -(surrogate - penalty).sum(dim=1).mean()", "mask"),
    ("return -(((surrogate - penalty) * mask).sum(dim=1) / mask.sum(dim=1)).mean()", "mean over tokens"),
    ("surrogate = torch.max(ratio * advantages, clipped * advantages)", "inverted"),
    ("surrogate = clipped * advantages", "clipped product alone"),
    ("ratio = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).exp().expand_as(logprobs)", "whole sequence"),
    ("ratio = (old_logprobs - logprobs).exp()", "upside down"),
    ("return -((surrogate - penalty) * mask).sum() / mask.sum()", "mean over tokens"),
    ("return -(((surrogate - penalty) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()", "mean over tokens"),
    ("rewards = rewards * mask", "whatever stands there"),
    ("delta = rewards[:, t] + gamma * (next_value if t + 1 < rewards.shape[1] else values[:, t]) - values[:, t]",
     "after the last token the value is 0"),
]


def real_with(mutant, function):
    """A function of grpo.py or ppo.py with the wrong line in it, or None if the line is not in this function."""
    copies = []
    for text in mutated(mutant), mutated(mutant).replace(mutant.wrong, mutant.right):
        copy = types.ModuleType(f"grpo_min.{mutant.file}")
        exec(compile(text, mutant.file, "exec"), vars(copy))
        copies.append(vars(copy)[function])
    return copies[0] if copies[0].__code__ != copies[1].__code__ else None


def from_mutants():
    """(exercise, wrong line, function) for every mutant that stands in a function which is an exercise."""
    for number, places in REAL.items():
        for mutant in MUTANTS:
            for file, function in places:
                wrong = real_with(mutant, function) if file == mutant.file else None
                if wrong and number == 3:
                    yield number, mutant.wrong, lambda logprobs, ref, wrong=wrong: wrong(logprobs, ref, "k3")
                elif wrong:
                    yield number, mutant.wrong, wrong


# --- 1: group advantages ------------------------------------------------------------------------------------------

def groups_of(rewards, group_size):
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError("groups")
    return rewards.double().view(-1, group_size)


def advantages_from(centre, divide=lambda groups, rewards: groups.std(dim=1, keepdim=True) + 1e-4, always=False):
    """An answer to exercise 1 with a centre and a divisor of its own."""
    def group_advantages(rewards, group_size, scale=False):
        groups = groups_of(rewards, group_size)
        advantages = centre(groups, rewards)
        if scale or always:
            advantages = advantages / divide(groups, rewards)
        return advantages.flatten().to(rewards.dtype)
    return group_advantages


def centred(groups, rewards):
    return groups - groups.mean(dim=1, keepdim=True)


def in_place_advantages(rewards, group_size, scale=False):
    rewards -= rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)
    return rewards


def learnt_by_heart(rewards, group_size, scale=False):
    """The right numbers for the case that is shown, and only for it."""
    if rewards.tolist()[-1:] == [30]:
        return advantages_from(centred)(rewards, group_size, scale)
    return advantages_from(lambda g, r: g - g.min(dim=1, keepdim=True).values)(rewards, group_size, scale)


# --- 2 to 5 -------------------------------------------------------------------------------------------------------

def ends(ids):
    return (ids == END).long()


def surrogate_loss(ratio=lambda l, o: (l - o).exp(), combine=None, low=lambda eps: 1 - eps, high=lambda eps: 1 + eps,
                   reduce=lambda s, mask: -(s * mask).sum(dim=1).mean()):
    """An answer to exercise 4 with parts of its own."""
    def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
        r = ratio(logprobs, old_logprobs)
        near = r.clamp(low(clip_eps), high(clip_eps))
        s = (combine or (lambda r, near, A: torch.min(r * A, near * A)))(r, near, advantages)
        return reduce(s, mask)
    return policy_loss


def inverted_for_negatives(r, near, A):
    return torch.where(A > 0, torch.min(r * A, near * A), torch.max(r * A, near * A))


def log_probability_instead(r, near, A):
    """The right value, with the gradient of A log pi."""
    return torch.min(r * A, near * A).detach() + A * (r.log() - r.log().detach())


def gae_with(delta=lambda r, V, after, gamma: r + gamma * after - V, carry=lambda gamma, lam: gamma * lam,
             returns=lambda A, V: A + V, forward=False, masked=True, keep=True):
    """An answer to exercise 5 with parts of its own."""
    def gae(rewards, values, mask, gamma, lam):
        on = mask.to(values)
        rewards, values = (rewards * on, values * on) if masked else (rewards, values)
        advantages = torch.zeros_like(values)
        follows = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        columns = range(values.shape[1])
        before = torch.zeros_like(values[:, 0])
        for t in columns if forward else reversed(columns):
            d = delta(rewards[:, t], values[:, t], follows[:, t], gamma)
            before = advantages[:, t] = (d + carry(gamma, lam) * before) * (on[:, t] if keep else 1)
        return advantages, returns(advantages, values)
    return gae


def gae_bootstrapping(rewards, values, mask, gamma, lam):
    """The value after the last real token is that of the last."""
    rewards, values = rewards * mask, values * mask
    follows = torch.cat([values[:, 1:], values[:, -1:]], dim=1)
    on = torch.cat([mask[:, 1:], mask[:, -1:] & False], dim=1)
    follows = follows.where(on, values)
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * follows[:, t] - values[:, t]
        later = advantages[:, t] = (delta + gamma * lam * later) * mask[:, t]
    return advantages, advantages + values


# --- 10 -----------------------------------------------------------------------------------------------------------

def filling(equal=lambda group: len(set(group)) == 1, rounds_of=lambda rounds: rounds, drop=True, count=len,
            asked=lambda groups, batch: len(groups), append=False):
    """An answer to exercise 10 with parts of its own."""
    def fill_batch(batch, draw, rounds):
        batch, dropped = list(batch), 0
        for _ in range(rounds_of(rounds)):
            places = [q for q, group in enumerate(batch) if equal(group)]
            if not places:
                break
            fresh = draw(asked(places, batch))
            if append:
                batch = [group for group in batch if not equal(group)] + fresh
            else:
                for q, group in zip(places, fresh):
                    batch[q] = group
            dropped += count(fresh)
            if len(fresh) < len(places):
                break
        return batch, dropped
    return fill_batch


def only_filters(batch, draw, rounds):
    kept = [group for group in batch if len(set(group)) > 1]
    return kept, len(batch) - len(kept)


def never_gives_up(batch, draw, rounds):
    batch, dropped = list(batch), 0
    while any(len(set(group)) == 1 for group in batch):
        places = [q for q, group in enumerate(batch) if len(set(group)) == 1]
        fresh = draw(len(places))
        for q, group in zip(places, fresh):
            batch[q] = group
        dropped += len(fresh)
    return batch, dropped


def in_place_fill(batch, draw, rounds):
    places = [q for q, group in enumerate(batch) if len(set(group)) == 1]
    for q, group in zip(places, draw(len(places)) if places else []):
        batch[q] = group
    return batch, len(places)


# --- 9 and 11: rewards ---------------------------------------------------------------------------------------------

def each(rule):
    """A reward function from a rule for one completion, its answer, and whether it finished."""
    def reward(prompts, completions, answer, finished=None, **columns):
        finished = finished or [True] * len(completions)
        return [float(rule(c, a, end)) for c, a, end in zip(completions, answer, finished)]
    return reward


def after_thinking(completion):
    return completion.split("</think>")[-1].strip()


def as_number(text):
    try:
        return int(text)
    except ValueError:
        return None


def sums(text):
    return sum(int(part) for part in text.split("+")) if text.replace("+", "").isascii() and all(
        part.isdigit() for part in text.split("+")) else None


def before_the_last(completion):
    """Well-formed thoughts by a regular expression that is too kind: anything may be in them."""
    if completion.startswith("<think>") and "</think>" in completion:
        return completion.rsplit("</think>", 1)[1].strip()
    return completion.strip()


def lengths(prompts, completions, **columns):
    return [-len(text) / 10 for text in completions]


def relative(prompts, completions, **columns):
    mean = sum(map(len, completions)) / len(completions)
    return [len(text) - mean for text in completions]


def forgetful(prompts, completions, answer, finished):
    return [-len(text) / 10 for text in completions]


SHORTER = [(" 28", " 28 28"), ("a", "ab"), ("", "a")]
OWN = [     # exercise 11: reward, PAIRS, a word of the message
    (lambda prompts, completions, **columns: [1.0 for _ in completions], SHORTER, "groups"),
    (lambda prompts, completions, **columns: [random.random() for _ in completions], SHORTER, "twice"),
    (lambda prompts, completions, **columns: [math.log(len(text)) if text.strip() else -math.inf
                                              for text in completions], SHORTER, "finite"),
    (relative, SHORTER, "advantage"),
    (lambda prompts, completions, **columns: [float(len("".join(completions)))] * len(completions), SHORTER,
     "depends"),
    (lambda prompts, completions, **columns: 1.0, SHORTER, "list of numbers"),
    (lambda prompts, completions, **columns: None, SHORTER, "nothing"),
    (lambda prompts, completions, **columns: [1.0], SHORTER, "1 numbers"),
    (lambda prompts, completions, **columns: list(completions), SHORTER, "list of numbers"),
    (forgetful, SHORTER, "operations"),
    (lengths, [], "three pairs"),
    (lengths, ["ab", "cd", "ef"], "two strings"),
    (lengths, [pair[::-1] for pair in SHORTER], "should get more"),
    (lambda prompts, completions, **columns: [text.split("</think>")[1].count("1") for text in completions], SHORTER,
     "IndexError"),
]


# --- 12: a task ---------------------------------------------------------------------------------------------------

def task_with(**changes):
    """The solution of exercise 12 with other functions."""
    return types.SimpleNamespace(**{**vars(solution(12)), **changes})


def solution(number):
    return check.load(check.HERE / "solutions" / check.FILES[number].name)


RIGHT = solution(12)
TASKS = [       # exercise 12: a word of the message, what is changed
    ("at least 200", dict(prompts=lambda split: RIGHT.prompts(split)[:100])),
    ("at least 32", dict(demonstrations=lambda: RIGHT.demonstrations()[:5])),
    ("both splits", dict(prompts=lambda split: RIGHT.prompts("train"))),
    ("seed", dict(prompts=lambda split: random.sample(RIGHT.prompts(split), 200))),
    ("list of dicts", dict(prompts=lambda split: [row["prompt"] for row in RIGHT.prompts(split)])),
    ('"prompt"', dict(prompts=lambda split: [dict(question=row["prompt"]) for row in RIGHT.prompts(split)])),
    ("different fields", dict(prompts=lambda split: [{"prompt": row["prompt"], split: "?"} for row in
                                                     RIGHT.prompts(split)])),
    ("columns of these names", dict(prompts=lambda split: [dict(row, finished=True) for row in RIGHT.prompts(split)])),
    ("context", dict(prompts=lambda split: [dict(row, prompt="please, " * 20 + row["prompt"]) for row in
                                            RIGHT.prompts(split)])),
    ("never be said", dict(demonstrations=lambda: [dict(row, response=row["response"] * 50) for row in
                                                   RIGHT.demonstrations()])),
    ('no prompt of "train"', dict(demonstrations=lambda: [dict(prompt=row["prompt"], response=" " + row["answer"]) for
                                                          row in RIGHT.prompts("test")])),
    ("highest reward", dict(demonstrations=lambda: [dict(row, response=" 7") for row in RIGHT.demonstrations()[:1]]
                            + RIGHT.demonstrations())),
    ("constant answer", dict(reward=lambda prompts, completions, **columns: [float(bool(text.strip())) for text in
                                                                            completions])),
    ("constant answer", dict(reward=lambda prompts, completions, answer, **columns: [
        float(right in text.split()) for text, right in zip(completions, answer)])),
    ("other numbers", dict(reward=lambda prompts, completions, **columns: [random.random() for _ in completions])),
    ("numbers for", dict(reward=lambda prompts, completions, **columns: [1.0])),
]


# --- 20 and 21 ----------------------------------------------------------------------------------------------------

def dpo_with(reward=lambda l, r, mask, beta: beta * ((l - r) * mask).sum(dim=1), pairs=lambda x: x.view(-1, 2),
             loss=lambda margin: -F.logsigmoid(margin).mean()):
    """An answer to exercise 20 with parts of its own."""
    def dpo_loss(logprobs, ref_logprobs, mask, beta):
        chosen, rejected = pairs(reward(logprobs, ref_logprobs, mask, beta)).unbind(dim=1)
        return loss(chosen - rejected)
    return dpo_loss


def values_with(peers=lambda b, G: range(b // G * G, b // G * G + G), same=lambda a, b, t: a[:t] == b[:t],
                result=lambda values, rewards, mask: values * mask):
    """An answer to exercise 21 with parts of its own."""
    def state_values(completion_ids, mask, rewards, group_size):
        everywhere = torch.ones_like(mask)
        values = checks.values_by_definition(completion_ids, everywhere, rewards, lambda b: peers(b, group_size), same)
        return result(values, rewards, mask)
    return state_values


# --- all of them --------------------------------------------------------------------------------------------------

ANSWERS = [     # (exercise, a word of the message, the wrong answer)
    (1, "whole batch", advantages_from(lambda g, r: g - g.mean())),
    (1, "themselves", advantages_from(lambda g, r: g)),
    (1, "sign", advantages_from(lambda g, r: -centred(g, r))),
    (1, "scale is False", advantages_from(centred, always=True)),
    (1, "leave-one-out", advantages_from(lambda g, r: centred(g, r) * g.shape[1] / (g.shape[1] - 1))),
    (1, "smallest", advantages_from(lambda g, r: g - g.min(dim=1, keepdim=True).values)),
    (1, "median", advantages_from(lambda g, r: g - g.median(dim=1, keepdim=True).values)),
    (1, "scale has no effect", advantages_from(centred, lambda g, r: 1)),
    (1, "n - 1", advantages_from(centred, lambda g, r: g.std(dim=1, keepdim=True, correction=0) + 1e-4)),
    (1, "whole batch, not of the group", advantages_from(centred, lambda g, r: r.std())),
    (1, "variance", advantages_from(centred, lambda g, r: g.var(dim=1, keepdim=True) + 1e-4)),
    (1, "1e-4", advantages_from(centred, lambda g, r: g.std(dim=1, keepdim=True))),
    (1, "1e-4", advantages_from(centred, lambda g, r: g.std(dim=1, keepdim=True) + 1e-8)),
    (1, "float64", lambda rewards, group_size, scale=False: advantages_from(centred)(
        rewards, group_size, scale).double()),
    (1, "shape", lambda rewards, group_size, scale=False: centred(rewards.view(-1, group_size), None)),
    (1, "return", lambda rewards, group_size, scale=False: None),
    (1, "list", lambda rewards, group_size, scale=False: rewards.tolist()),
    (1, "changes a tensor", in_place_advantages),
    (1, "median or its smallest", learnt_by_heart),

    (2, "END itself", lambda ids, end: ends(ids).cumsum(1) == 0),
    (2, "END itself", lambda ids, end: ids.ne(end) & ((ends(ids).cumsum(1) - ends(ids)) == 0)),
    (2, "PAD is a token", lambda ids, end: ids != PAD),
    (2, "after the first END", lambda ids, end: (ends(ids).flip(1).cumsum(1).flip(1) > 0)
     | ~(ids == end).any(1)[:, None]),
    (2, "without END", lambda ids, end: (ends(ids).cumsum(1) - ends(ids) == 0)
     & (ids == end).any(1)[:, None]),
    (2, "after the first END", lambda ids, end: torch.ones_like(ids).bool()),
    (2, "booleans", lambda ids, end: (ends(ids).cumsum(1) - ends(ids) == 0).float()),
    (2, "after the first END", lambda ids, end: ends(ids).cumsum(1) < 2),
    (2, "before the first END", lambda ids, end: (ends(ids).cumsum(1) - ends(ids) == 0)
     & (torch.arange(ids.shape[1]) > 0)),

    (3, "sign", lambda l, r: (r - l) - torch.expm1(r - l)),
    (3, "k1", lambda l, r: l - r),
    (3, "reference / policy", lambda l, r: r - l),
    (3, "k2", lambda l, r: (r - l) ** 2 / 2),
    (3, "- 1 is missing", lambda l, r: (r - l).exp() - (r - l)),
    (3, "subtracted", lambda l, r: torch.expm1(r - l) + (r - l)),
    (3, "not subtracted", lambda l, r: torch.expm1(r - l)),
    (3, "expm1", lambda l, r: (r - l).exp() - 1 - (r - l)),
    (3, "gradient", lambda l, r: (torch.expm1(r - l) - (r - l)).detach()),
    (3, "detached", lambda l, r: torch.expm1((r - l).detach()) - (r - l)),
    (3, "shape", lambda l, r: (torch.expm1(r - l) - (r - l)).sum(1)),

    (4, "sign", surrogate_loss(reduce=lambda s, mask: (s * mask).sum(dim=1).mean())),
    (4, "nothing is clipped", surrogate_loss(combine=lambda r, near, A: r * A)),
    (4, "negative advantages", surrogate_loss(combine=inverted_for_negatives)),
    (4, "exp", surrogate_loss(ratio=lambda l, o: l - o)),
    (4, "always 1", surrogate_loss(ratio=lambda l, o: (l - l.detach()).exp())),
    (4, "bounds", surrogate_loss(low=lambda eps: -eps, high=lambda eps: eps)),
    (4, "gradient", surrogate_loss(ratio=lambda l, o: (l - o).exp().detach())),
    (4, "clip_eps", surrogate_loss(low=lambda eps: 0.8, high=lambda eps: 1.2)),
    (4, "padding included", surrogate_loss(reduce=lambda s, mask: -(s * mask).mean())),
    (4, "mean over them", surrogate_loss(reduce=lambda s, mask: -(s * mask).sum())),
    (4, "columns", surrogate_loss(reduce=lambda s, mask: -(s * mask).sum(dim=0).mean())),
    (4, "shape", surrogate_loss(reduce=lambda s, mask: -(s * mask).sum(dim=1))),
    (4, "advantage times the log-probability", surrogate_loss(combine=log_probability_instead)),

    (5, "value of the next state is missing", gae_with(delta=lambda r, V, after, gamma: r - V)),
    (5, "sign", gae_with(delta=lambda r, V, after, gamma: V - r - gamma * after)),
    (5, "added", gae_with(delta=lambda r, V, after, gamma: r + gamma * after + V)),
    (5, "values are missing", gae_with(delta=lambda r, V, after, gamma: r)),
    (5, "lam has no effect", gae_with(carry=lambda gamma, lam: gamma)),
    (5, "gamma is missing before lam", gae_with(carry=lambda gamma, lam: lam)),
    (5, "gamma is missing before the next value", gae_with(delta=lambda r, V, after, gamma: r + after - V)),
    (5, "gamma is not used", gae_with(delta=lambda r, V, after, gamma: r + after - V, carry=lambda gamma, lam: lam)),
    (5, "not added", gae_with(carry=lambda gamma, lam: 0)),
    (5, "first to the last", gae_with(forward=True)),
    (5, "advantages + values", gae_with(returns=lambda A, V: A)),
    (5, "not minus", gae_with(returns=lambda A, V: A - V)),
    (5, "whatever stands there", gae_with(masked=False)),
    (5, "after the last token the value is 0", gae_bootstrapping),
    (5, "two tensors", lambda *arguments: gae_with()(*arguments)[0]),
    (5, "nothing", lambda *arguments: None),

    (6, "sum", lambda c, r: -F.logsigmoid(c - r).sum()),
    (6, "sign", lambda c, r: F.logsigmoid(c - r).mean()),
    (6, "exchanged", lambda c, r: -F.logsigmoid(r - c).mean()),
    (6, "without the logarithm", lambda c, r: 1 - torch.sigmoid(c - r).mean()),
    (6, "without the logarithm", lambda c, r: -torch.sigmoid(c - r).mean()),
    (6, "margin alone", lambda c, r: (r - c).mean()),
    (6, "before the logarithm", lambda c, r: -torch.sigmoid(c - r).mean().log()),
    (6, "logsigmoid", lambda c, r: -torch.sigmoid(c - r).log().mean()),
    (6, "logsigmoid", lambda c, r: (1 + (r - c).exp()).log().mean()),
    (6, "gradient", lambda c, r: -F.logsigmoid(c.detach() - r).mean()),
    (6, "shape", lambda c, r: -F.logsigmoid(c - r)),
    (6, "-1000", lambda c, r: -(torch.sigmoid(c - r) + 1e-12).log().mean()),

    (7, "itself included", lambda rewards, G: centred(groups_of(rewards, G), None).flatten().to(rewards)),
    (7, "batch", lambda rewards, G: rewards - (rewards.sum() - rewards) / (len(rewards) - 1)),
    (7, "divide by G", lambda rewards, G: (groups_of(rewards, G) - (
        groups_of(rewards, G).sum(1, keepdim=True) - groups_of(rewards, G)) / G).flatten().to(rewards)),
    (7, "dim=0", lambda rewards, G: (groups_of(rewards, G) - (groups_of(rewards, G).sum(0) - groups_of(rewards, G)) / (
        len(groups_of(rewards, G)) - 1)).flatten().to(rewards)),
    (7, "not taken the completion", lambda rewards, G: (groups_of(rewards, G) - groups_of(rewards, G).sum(
        1, keepdim=True) / (G - 1)).flatten().to(rewards)),
    (7, "sign", lambda rewards, G: -(centred(groups_of(rewards, G), None) * G / (G - 1)).flatten().to(rewards)),
    (7, "this is the baseline", lambda rewards, G: ((groups_of(rewards, G).sum(1, keepdim=True) - groups_of(
        rewards, G)) / (G - 1)).flatten().to(rewards)),
    (7, "float64", lambda rewards, G: (rewards.view(-1, G) - (rewards.view(-1, G).sum(1, keepdim=True) - rewards.view(
        -1, G)) / (G - 1)).flatten()),
    (7, "ValueError", lambda rewards, G: (rewards.double().view(-1, G) - (rewards.double().view(-1, G).sum(
        1, keepdim=True) - rewards.double().view(-1, G)) / max(G - 1, 1)).flatten().to(rewards)),
    (7, "advantage", lambda rewards, G: (centred(groups_of(rewards, G), None) * 1.5).flatten().to(rewards)),

    (8, "exercise 4", lambda *a: surrogate_loss()(*a[:5])),
    (8, "own length", lambda *a: surrogate_loss(reduce=lambda s, mask: -(
        (s * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())(*a[:5])),
    (8, "own length", lambda *a: surrogate_loss(reduce=lambda s, mask: -(s * mask).sum() / mask.sum())(*a[:5])),
    (8, "longest of this batch", lambda *a: surrogate_loss(reduce=lambda s, mask: -(
        s * mask).sum(1).mean() / mask.shape[1])(*a[:5])),
    (8, "sign", lambda *a: -surrogate_loss()(*a[:5]) / a[5]),
    (8, "averaged", lambda *a: surrogate_loss(reduce=lambda s, mask: -(s * mask).sum())(*a[:5]) / a[5]),
    (8, "mask", lambda *a: surrogate_loss(reduce=lambda s, mask: -s.sum(1).mean())(*a[:5]) / a[5]),
    (8, "twice", lambda *a: surrogate_loss(reduce=lambda s, mask: -(
        (s * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())(*a[:5]) / a[5]),
    (8, "inverted", lambda *a: surrogate_loss(combine=lambda r, near, A: torch.max(r * A, near * A))(*a[:5]) / a[5]),
    (8, "should", lambda *a: surrogate_loss()(*a[:5]) / 40),

    (9, "inside another", each(lambda c, a, end: end and a in c)),
    (9, "two answers", each(lambda c, a, end: end and a in after_thinking(c).replace(",", " ").split())),
    (9, "half a pair", each(lambda c, a, end: end and after_thinking(c) == a and "<think></think>" not in c)),
    (9, "thoughts after the answer", each(lambda c, a, end: end and (
        c.split("<think>")[0].strip() == a and c.count("<think>") == c.count("</think>")
        or before_the_last(c) == a and c.startswith("<think>") and "<think></think>" not in c))),
    (9, "another way", each(lambda c, a, end: end and as_number(before_the_last(c)) == int(a))),
    (9, "in the thoughts", each(lambda c, a, end: end and (before_the_last(c) == a or f"is {a}<" in c))),
    (9, "nothing in them", each(lambda c, a, end: end and before_the_last(c) == a)),
    (9, "a space after", each(lambda c, a, end: end and (c.split("</think>")[-1] in (a, " " + a)))),
    (9, "after thinking", each(lambda c, a, end: end and c.strip() == a)),
    (9, "cut", lambda prompts, completions, answer, finished=None, **columns: solution(9).reward(
        prompts, completions, answer, None)),
    (9, "left to the reward function", each(lambda c, a, end: end and (
        before_the_last(c) == a or "+" in c and sums(before_the_last(c)) == int(a)))),
    (9, "list of numbers", lambda prompts, completions, answer, finished=None, **columns: 1.0),
    (9, "operations", lambda prompts, completions, answer, finished=None: solution(9).reward(
        prompts, completions, answer, finished)),
    (9, "finished", lambda prompts, completions, answer, finished, **columns: solution(9).reward(
        prompts, completions, answer, finished)),

    (10, "keeps its size", only_filters),
    (10, "all right", filling(equal=lambda group: sum(group) == 0)),
    (10, "all wrong", filling(equal=lambda group: all(r == 1 for r in group))),
    (10, "0.3", filling(equal=lambda group: set(group) in ({0}, {1}))),
    (10, "first with the last", filling(equal=lambda group: group[0] == group[-1])),
    (10, "next round", filling(rounds_of=lambda rounds: 1)),
    (10, "never end", never_gives_up),
    (10, "as many as are replaced", filling(asked=lambda places, batch: len(batch))),
    (10, "you say", filling(count=lambda fresh: 1)),
    (10, "you say 0", filling(count=lambda fresh: 0)),
    (10, "place", filling(append=True)),
    (10, "changes the batch", in_place_fill),
    (10, "two things", lambda batch, draw, rounds: batch),
    (10, "nothing", lambda batch, draw, rounds: None),
    (10, "3 rounds", filling(rounds_of=lambda rounds: rounds - 1)),

    (20, "sign", dpo_with(loss=lambda margin: F.logsigmoid(margin).mean())),
    (20, "sum over the pairs", dpo_with(loss=lambda margin: -F.logsigmoid(margin).sum())),
    (20, "exchanged", dpo_with(loss=lambda margin: -F.logsigmoid(-margin).mean())),
    (20, "exchanged", dpo_with(lambda l, r, mask, beta: beta * ((r - l) * mask).sum(dim=1))),
    (20, "not their mean", dpo_with(lambda l, r, mask, beta: beta * ((l - r) * mask).sum(dim=1) / mask.sum(dim=1))),
    (20, "beta", dpo_with(lambda l, r, mask, beta: ((l - r) * mask).sum(dim=1))),
    (20, "reference is missing", dpo_with(lambda l, r, mask, beta: beta * (l * mask).sum(dim=1))),
    (20, "mask", dpo_with(lambda l, r, mask, beta: beta * (l - r).sum(dim=1))),
    (20, "mixed", dpo_with(pairs=lambda x: x.view(2, -1).T)),
    (20, "averaged before", dpo_with(loss=lambda margin: -F.logsigmoid(margin.mean()))),
    (20, "gradient", dpo_with(lambda l, r, mask, beta: beta * ((l - r) * mask).sum(dim=1).detach())),
    (20, "logsigmoid", dpo_with(loss=lambda margin: -torch.sigmoid(margin).log().mean())),
    (20, "shape", dpo_with(loss=lambda margin: -F.logsigmoid(margin))),
    (20, "return", lambda *arguments: None),

    (21, "after token t", values_with(same=lambda a, b, t: a[:t + 1] == b[:t + 1])),
    (21, "other groups", values_with(peers=lambda b, G: range(6))),
    (21, "left out", values_with(peers=lambda b, G: [x for x in range(b // G * G, b // G * G + G) if x != b])),
    (21, "token before", values_with(same=lambda a, b, t: t == 0 or a[t - 1] == b[t - 1])),
    (21, "one token", values_with(same=lambda a, b, t: a[t] == b[t])),
    (21, "group's mean", values_with(same=lambda a, b, t: True)),
    (21, "own reward", values_with(result=lambda values, rewards, mask: rewards[:, None] * mask)),
    (21, "advantages", values_with(result=lambda values, rewards, mask: (rewards[:, None] - values) * mask)),
    (21, "should give", values_with(result=lambda values, rewards, mask: values)),
    (21, "random", values_with(peers=lambda b, G: range(b // 3 * 3, b // 3 * 3 + 3))),
    (21, "shape", values_with(result=lambda values, rewards, mask: values[:, 0])),
]


# --- 13 to 19: repairs that are none --------------------------------------------------------------------------------

REPAIRS = [     # (bug hunt, a word of the message, mended or not, a line of that file, what it was made)
    (13, "moved along", "bug", "        weight.data = original.data", "        weight.data = original.data.detach()"),
    (13, "same logits", "mended", "        weight.data.copy_(original.data)", "        pass"),
    (13, "no longer be trained", "mended", "    reference = GPT(policy.config", "    reference = policy"),
    (13, "need no gradient", "mended", "    return reference.requires_grad_(False)", "    return reference"),
    (13, "k1", "mended", "    log_ratio = ref_logprobs - logprobs", "    log_ratio = logprobs - ref_logprobs"),
    (14, "paid for drifting", "bug", "    log_ratio = ", "    log_ratio = logprobs - ref_logprobs"),
    (14, "paid for drifting", "bug", "    return -(surr", "    return (surrogate * mask).sum(dim=1).mean()"),
    (14, "sign", "mended", "    return -(surrogate * mask)", "    return (surrogate * mask).sum(dim=1).mean()"),
    (14, "k1", "mended", "    return kl ", "    return kl.abs()"),
    (14, "no gradient", "mended", "    return kl ", "    return kl.detach()"),
    (15, "other groups are all equal", "bug", "    baseline = ", "    baseline = groups.mean(dim=0, keepdim=True)"),
    (15, "other groups are all equal", "bug", "    return advantages.flatten()", "    return advantages.T.flatten()"),
    (15, "other groups are all equal", "mended", "    baseline = ", "    baseline = groups.mean()"),
    (16, "promises", "bug", "    following = torch.where(", "    following = torch.maximum(following, values)"),
    (16, "value of the next state", "mended", "    deltas = ", "    deltas = rewards - values"),
    (16, "value_loss", "mended", "    error = (values - returns) ** 2", "    error = (values - returns).abs()"),
    (17, "advantage of", "bug", "        advantages = advantages / (groups.std(",
     "        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)"),
    (17, "float64", "mended", "    return advantages.flatten()", "    return advantages.flatten()"),
    (17, "0 / 0", "mended", "        advantages = advantages / (groups.std(",
     "        advantages = advantages / groups.std(dim=1, keepdim=True)"),
    (18, "nothing pushes it back", "bug", "    losses = ", "    losses = -clipped * advantages"),
    (18, "pushed further", "bug", "    losses = ", "    losses = -ratio * advantages"),
    (18, "nothing pushes it back", "bug", "    losses = ",
     "    losses = torch.min(ratio * advantages, clipped * advantages)"),
    (19, "still says 0", "bug", "    critic.trunk = trunk",
     "    critic.trunk = trunk; optimizer = torch.optim.AdamW(critic.parameters(), lr=lr)"),
    (19, "trunk under it", "mended", "    optimizer = ",
     "    optimizer = torch.optim.AdamW(critic.scalar.parameters(), lr=lr)"),
    (19, "share weights", "mended", "    critic.trunk = trunk", "    critic.trunk = policy"),
    (19, "lr used", "mended", "    optimizer = ", "    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-6)"),
    (19, "policy's weights", "mended", "    trunk.load_state_dict(", "    pass"),
]


def repaired(number, kind, line, instead):
    """The solution ("mended") or the reader's file ("bug"), in which the one line that begins so is another."""
    path = check.FILES[number] if kind == "bug" else check.HERE / "solutions" / check.FILES[number].name
    lines = path.read_text(encoding="utf-8").splitlines()
    place, = [i for i, text in enumerate(lines) if text.startswith(line)]
    lines[place] = instead
    module = types.ModuleType(path.stem)
    exec(compile("\n".join(lines), str(path), "exec"), vars(module))
    return module
