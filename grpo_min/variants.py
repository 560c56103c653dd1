"""What the papers after GRPO have changed, each in a few lines, and the recipes made of it.

    python -m grpo_min.variants --recipe dapo  # a recipe; an option given beside it wins
    python -m grpo_min.variants --ratio sequence  # one part

Everything here wraps grpo.train and stands in for one of its functions. Formulas are those
of the papers named; what is so "here" is ours. Shapes as in grpo.py. "TRL:" names what in
TRL 1.16 has the same gradients (tests/test_trl.py), if use_bias_correction_kl is False or
the KL here `unbiased`.

An aggregation says by what the sum over a completion's tokens is divided before the mean
over completions, in the surrogate and in the KL penalty alike, as in DeepSeekMath's eq. 3
(with the default, `sum`, the KL is that of a whole completion). With minibatches `token`
counts the tokens of the minibatch, and under torchrun those of each rank's own batch.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from grpo_min import grpo
from grpo_min.grpo import GRPOConfig, group_advantages, policy_loss
from grpo_min.rewards import numbers, score
from grpo_min.rollout import Prompts, Rollout, sample, token_logprobs
from grpo_min.run.config import option, parse, require, run_command
from grpo_min.run.data import batch_rows
from grpo_min.run.ranks import RANKS
from grpo_min.run.rng import generator

REFILLS = 10  # rounds of dynamic sampling, at most


# --- advantages: (rewards (B,), group_size, scale) -> (B,) --------------------------------

def leave_one_out(rewards, group_size, scale=False):
    """R - mean of the group's others (RLOO, 2402.14740): (R - mean of all) G / (G - 1)."""
    advantages = group_advantages(rewards, group_size)  # (B,)
    return advantages * group_size / (group_size - 1)


def batch_advantages(rewards, group_size, scale=False):
    """(R - mean of the batch) / its standard deviation (REINFORCE++, 2501.03262).

    Here 1e-4 is added to the divisor, and a KL in the reward charges every token for all of
    it, in the paper for what is to come.
    """
    return group_advantages(rewards, len(rewards), scale=True)


def batch_scaled(rewards, group_size, scale=False):
    """(R - mean of its group) / the batch's standard deviation (2508.08221; + 1e-4)."""
    return group_advantages(rewards, group_size) / (rewards.std() + 1e-4)


def no_baseline(rewards, group_size, scale=False):
    """R itself: REINFORCE without a baseline (Williams, 1992)."""
    return rewards


# TRL: scale_rewards none, if scaled group; batch_scaled: batch. RLOOTrainer: leave_one_out.
ADVANTAGES = dict(mean=group_advantages, leave_one_out=leave_one_out,
                  batch=batch_advantages, batch_scaled=batch_scaled, none=no_baseline)


def gdpo(*parts):
    """GDPO (2601.05242): several rewards, each of them scaled before they are added up.

    train(config, **gdpo((correct, 1.0), (well_formed, 0.2))), of this file or of grpo.py;
    what counts as 0 and the weights are as in rewards.weighted_sum. The sum of weight times
    each reward's scaled advantage is scaled over the batch. UserError if rewards have been
    changed on their way. TRL: multi_objective_aggregation, at normalize_then_sum.
    """
    kept = []  # of the last batch, in the order of its completions

    def reward(prompts, completions, **columns):
        kept[:] = [torch.tensor(numbers(part, prompts, completions, **columns)).double()
                   .nan_to_num() for part, _ in parts]  # (B,) each
        return sum(weight * part for (_, weight), part in zip(parts, kept)).tolist()

    def advantage(rewards, group_size, scale=False):
        pairs = [(weight, part) for (_, weight), part in zip(parts, kept)]
        total = sum(weight * part for weight, part in pairs)  # (B,)
        same = len(total) == len(rewards) and torch.allclose(total, rewards.cpu().double())
        require(same, "gdpo goes with no KL in the reward, dynamic sampling or buffer")
        total = sum(weight * group_advantages(part, group_size, scale=True)
                    for weight, part in pairs)  # (B,)
        return batch_advantages(total, group_size).to(rewards)
    return dict(reward=reward, advantage=advantage)


# --- the loss: a ratio, a clip and an aggregation -----------------------------------------

def sequence_log_ratio(logprobs, old_logprobs, mask):
    """The mean log ratio of a completion's tokens, at each of them: (B, N) -> (B, N)."""
    change = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True)  # (B, 1)
    return (change / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(logprobs)


def group_length(mask, group_size):
    """The mean length of the completions of a row's group: (B, N) -> (B, 1)."""
    tokens = mask.sum(dim=1).view(-1, group_size).sum(dim=1)  # (Q,)
    return (tokens.clamp(min=1) / group_size).repeat_interleave(group_size)[:, None]


AGGREGATIONS = {  # (mask (B, N), config) -> the divisor of a completion's sum
    # TRL: loss_type luspo, grpo, bnpo (and dapo, where the batch is read at once), dr_grpo.
    "sum": lambda mask, config: 1,
    "sequence": lambda mask, config: mask.sum(1, keepdim=True).clamp(min=1),  # 2402.03300
    "token": lambda mask, config: mask.sum().clamp(min=1) / len(mask),  # 2503.14476, eq. 8
    "prompt": lambda mask, config: group_length(mask, config.group_size),  # 2510.13786
    "constant": lambda mask, config: config.max_new_tokens,  # 2503.20783
}


def sapo_gate(ratio, advantages):
    """SAPO's stand-in for a clipped ratio (2511.20347): 4 / tau sigmoid(tau (ratio - 1)).

    Its slope is 1 at a ratio of 1 and falls to both sides, a bit faster if A <= 0.
    TRL: loss_type sapo.
    """
    tau = 1 + 0.05 * (advantages <= 0).to(ratio)  # (B, N)
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def vespo_weight(logprobs, old_logprobs, advantages, mask):
    """VESPO's weight of log pi (2602.10693, section 4.1): w^k e^(lambda (1 - w)).

    w is the ratio of the whole completion, the product of its tokens'; k, lambda are 2, 3
    if A >= 0, else 3, 2. Without a gradient. TRL: loss_type vespo.
    """
    log_w = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True).detach()  # (B, 1)
    k = torch.where(advantages >= 0, 2.0, 3.0)  # (B, N)
    decay = torch.where(advantages >= 0, 3.0, 2.0)  # (B, N)
    return (k * log_w + decay * (1 - log_w.exp())).exp()  # (B, N)


def make_loss(config, clipped=None, kept=None):
    """A function in place of grpo.policy_loss, with the ratio, clip and sums of config.

    ratio `sequence` is GSPO's (2507.18071, eq. 5 to 7): one ratio for a completion, the
    geometric mean of its tokens'. `cispo` (2506.13585, eq. 4 and 5) weighs log pi with the
    clipped ratio, without its gradient, so that no token is left out. TRL: token, sequence
    as importance_sampling_level; loss_type cispo, with epsilon_high 1 more and clip_eps 1.

    clip_max bounds the ratio where A < 0, too, which would count without limit there
    (two-sided clipping, 2505.07291, section 4.1). TRL: delta.

    kl `unbiased` is k3 times the token's ratio (DeepSeek-V3.2, 2512.02556, eq. 7). Whatever
    policy sampled, its expected gradient is that of KL(policy || reference) at the states
    that were visited; k3's is of the other direction, k2's the same at a ratio of 1 alone
    (tests/test_exact.py). TRL: use_bias_correction_kl, its default, if the ratio is token.

    entropy_coef: a bonus of -log pi for each token, times the ratio, through which alone it
    has a gradient: on average that of the entropy at the states that were visited. TRL's
    entropy_coef takes the whole distribution, and always the mean over tokens.

    clipped: a list that is given the shares of tokens below and above config's bounds.
    kept: a list of the (B, N) that says which tokens have an advantage; empty: all.
    """
    low, high = config.clip_eps, config.clip_eps_high or config.clip_eps

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty=0.0):
        divisor = AGGREGATIONS[config.aggregation](mask, config)
        advantages = advantages * kept[0] if kept else advantages  # (B, N)
        log_ratio = logprobs - old_logprobs  # (B, N)
        if config.kl == "unbiased":
            penalty = penalty * log_ratio.exp()  # (B, N)
        if config.entropy_coef > 0:
            penalty = penalty + config.entropy_coef * log_ratio.exp() * logprobs.detach()
        advantages, penalty = advantages / divisor, penalty / divisor  # (B, N)
        if config.ratio == "sequence":
            log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
        if config.clip_max > 0:
            log_ratio = log_ratio.clamp(max=math.log(config.clip_max))
        ratio = log_ratio.detach().exp()  # (B, N)
        if clipped is not None:
            clipped.append([(outside & mask).sum().item() / max(mask.sum().item(), 1)
                            for outside in (ratio < 1 - low, ratio > 1 + high)])
        if config.ratio == "cispo":
            surrogate = ratio.clamp(1 - low, 1 + high) * advantages * logprobs  # (B, N)
        elif config.ratio == "sapo":
            surrogate = sapo_gate(log_ratio.exp(), advantages) * advantages  # (B, N)
        elif config.ratio == "vespo":
            weight = vespo_weight(logprobs, old_logprobs, advantages, mask)  # (B, N)
            surrogate = weight * advantages * logprobs  # (B, N)
        else:
            # Clip-higher (2503.14476, eq. 8): the upper bound if A > 0, else the lower.
            bound = torch.where(advantages > 0, high, low)  # (B, N)
            return policy_loss(log_ratio, 0.0, advantages, mask, bound, penalty)
        return -((surrogate - penalty) * mask).sum(dim=1).mean()
    return loss


# --- completions that are too long, tokens that are too certain ---------------------------

def overlong_penalty(lengths, longest, buffer):
    """DAPO's soft penalty (2503.14476, eq. 13): 0 up to longest - buffer tokens, and from
    there down to -1 at longest. TRL: the reward get_soft_overlong_punishment."""
    return -((lengths - (longest - buffer)) / buffer).clamp(min=0)


def shaped(collect, kept=None):
    """collect, and then what config says of completions that are too long, and of tokens.

    overlong_buffer adds the penalty to the reward, after dynamic sampling; what a reward
    did not judge has the mean of its group again.
    mask_cut leaves what the length limit cut out of the loss and of the metrics (overlong
    filtering, section 3.4), but not out of the mean. TRL: mask_truncated_completions.
    top_entropy leaves an advantage to that share of the batch's tokens which were sampled
    with the highest entropy (2506.01939), as the list kept is told; the divisors and the KL
    have all. TRL: top_entropy_quantile, with the entropies at each update.
    """
    def shaped_collect(config, policy, *arguments):
        batch, prompts, rollout, rewards, texts = collect(config, policy, *arguments)
        if config.top_entropy < 1:
            with torch.no_grad():
                _, entropy = token_logprobs(policy, prompts, rollout.completion_ids,
                                            rollout.mask, config.temperature)  # (B, N)
            least = entropy[rollout.mask].quantile(1 - config.top_entropy)
            kept[:] = [entropy >= least]  # (B, N)
        if config.overlong_buffer > 0:
            longest, judged = config.max_new_tokens, rollout.length > 0  # (B,)
            rewards = rewards + overlong_penalty(rollout.length, longest,
                                                 config.overlong_buffer * longest)  # (B,)
            groups, judged = (x.view(-1, config.group_size) for x in (rewards, judged))
            mean = (groups * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True)
            rewards = groups.where(judged, mean.nan_to_num()).flatten()  # (B,)
        if config.mask_cut:
            rollout.mask = rollout.mask & rollout.finished[:, None]
        return batch, prompts, rollout, rewards, texts
    return shaped_collect


# --- dynamic sampling ---------------------------------------------------------------------

def refilled(dropped):
    """grpo.collect with DAPO's dynamic sampling (2503.14476, section 3.2).

    Groups of equal rewards make room for groups of other prompts, until there is none, or
    REFILLS rounds are over, or every prompt has had its turn; the rest stays. Draws depend
    on seed, step, round and rank alone. dropped: a list that is given how many groups were.
    """
    def collect(config, policy, reward, rows, step, clock):
        batch, prompts, rollout, rewards, texts = grpo.collect(
            config, policy, reward, rows, step, clock)
        G, number_dropped = config.group_size, 0
        taken = set(batch_rows(len(rows), config.prompts_per_step, config.seed, step))
        shuffle = generator(f"{config.seed} refill", step)
        order = torch.randperm(len(rows), generator=shuffle).tolist()
        others = [rows[number] for number in order if number not in taken]
        for refill in range(REFILLS):
            groups = rewards.view(-1, G)  # (Q, G)
            equal = (groups == groups[:, :1]).all(dim=1).nonzero().flatten().tolist()
            equal = equal[:len(others)]  # numbers of groups
            if not equal:
                break
            fresh, others = others[:len(equal)], others[len(equal):]
            number_dropped += len(equal)
            asked = [row["prompt"] for row in fresh]
            prompts = Prompts.from_texts(asked, policy.tokenizer, clock.device)
            new = sample(policy, prompts, G, config.max_new_tokens, config.temperature,
                         generator(f"{config.seed} refill {refill}", step))
            clock.lap("sample")
            numbers = [q * G + g for q in equal for g in range(G)]
            places = torch.tensor(numbers, device=clock.device)  # (rows that are new,)
            new_rewards, new_texts = score(reward, fresh, new, G, policy.tokenizer)
            for b, text in zip(numbers, new_texts):
                texts[b] = text
            rewards = rewards.index_copy(0, places, new_rewards)  # (B,)
            rollout = replace_rows(rollout, places, new, policy.tokenizer.pad)
            for q, row in zip(equal, fresh):
                batch[q] = row
            clock.lap("score")
        dropped.append(number_dropped)
        asked = [row["prompt"] for row in batch]
        prompts = Prompts.from_texts(asked, policy.tokenizer, clock.device)
        return batch, prompts, rollout, rewards, texts
    return collect


def replace_rows(rollout, places, new, pad):
    """A rollout with the n rows of another in place of its rows number places (n,)."""
    N = max(rollout.mask.shape[1], new.mask.shape[1])

    def put(old, new, filler):
        old, new = (F.pad(x, (0, N - x.shape[1]), value=filler) for x in (old, new))
        return old.index_copy(0, places, new)  # (B, N)
    return Rollout(put(rollout.completion_ids, new.completion_ids, pad),
                   put(rollout.mask, new.mask, False),
                   put(rollout.logprobs, new.logprobs, 0.0),
                   rollout.finished.index_copy(0, places, new.finished))


# --- recipes ------------------------------------------------------------------------------

RECIPES = {
    # 2402.03300, eq. 3 and section 4.2: beta 0.04.
    "grpo": dict(scale_advantages=True, aggregation="sequence", ratio="token", kl="k3",
                 kl_in="loss", beta=0.04),
    # 2503.14476, section 3 and 4.1; the buffer has 4,096 of 20,480 tokens, here 8 of 40.
    "dapo": dict(scale_advantages=True, aggregation="token", clip_eps=0.2,
                 clip_eps_high=0.28, beta=0.0, dynamic_sampling=True, overlong_buffer=0.2),
    # 2503.20783, section 3.2: neither of the two divisors.
    "dr_grpo": dict(advantage="mean", aggregation="constant", beta=0.0),
    # 2402.14740: a completion is one action. TRL: RLOOTrainer, if a batch has one update.
    "rloo": dict(advantage="leave_one_out", aggregation="sum", kl="k1", kl_in="reward"),
    # 2507.18071, section 5.1. Its formulas leave the KL out; beta 0 as in TRL.
    "gspo": dict(scale_advantages=True, aggregation="sequence", ratio="sequence",
                 clip_eps=3e-4, clip_eps_high=4e-4, beta=0.0),
    # 2506.13585: no KL, no lower bound (clip_eps 1). The upper one is not published, 4 is
    # in Tinker's documentation. The paper also samples dynamically: --dynamic-sampling.
    "cispo": dict(scale_advantages=True, aggregation="token", ratio="cispo", clip_eps=1.0,
                  clip_eps_high=3.0, beta=0.0),
    # 2501.03262: the KL is k1 in the reward. Aggregation and beta as implemented here.
    "reinforce++": dict(advantage="batch", aggregation="token", kl="k1", kl_in="reward"),
    # 2511.20347: GRPO's sums and advantages; beta 0 as in TRL.
    "sapo": dict(scale_advantages=True, aggregation="sequence", ratio="sapo", beta=0.0),
    # 2602.05261: GSPO times the length; bounds of section 5.1. beta 0 as in TRL.
    "luspo": dict(scale_advantages=True, aggregation="sum", ratio="sequence",
                  clip_eps=2e-3, clip_eps_high=2.5e-3, beta=0.0),
    # 2602.10693, section 4.1. Aggregation as in its authors' code, beta 0 as in TRL.
    "vespo": dict(scale_advantages=True, aggregation="token", ratio="vespo", beta=0.0),
    # 2510.13786, section 4: weights up to 5 (as in TRL), no KL. Not here: asynchronous
    # sampling, interruptions, and that solved prompts and groups of equals are left out.
    "scalerl": dict(advantage="batch_scaled", aggregation="prompt", ratio="cispo",
                    clip_eps=1.0, clip_eps_high=4.0, beta=0.0),
}


@dataclass
class VariantConfig(GRPOConfig):
    """GRPO with other parts: what later papers have changed, and their recipes."""
    run: str = option("runs/variant", "folder to write into")
    recipe: str = option("", "settings that belong together, see above; an option given "
                         "beside it wins", ["", *RECIPES])
    advantage: str = option("mean", "what a reward is compared with", list(ADVANTAGES))
    ratio: str = option("token", "what is clipped: a token's ratio, a sequence's, CISPO's "
                        "weight; or, instead of a clip, SAPO's gate, VESPO's weight",
                        ["token", "sequence", "cispo", "sapo", "vespo"])
    clip_eps_high: float = option(0.0, "the ratio counts up to 1 + clip_eps_high; "
                                  "0: clip_eps")
    clip_max: float = option(0.0, "nor does it count above this where the advantage is "
                             "negative (INTELLECT-2: 4); 0: no limit")
    kl: str = option("k3", "estimator of the KL; unbiased: k3 times the ratio",
                     ["k1", "k2", "k3", "unbiased"])
    entropy_coef: float = option(0.0, "weight of an entropy bonus, reward per nat")
    aggregation: str = option("sum", "what a completion's sum over its tokens is divided "
                              "by, in surrogate and KL: nothing, its length, the batch's "
                              "mean length, its group's, the longest", list(AGGREGATIONS))
    dynamic_sampling: bool = option(False, "groups of equal rewards make room for groups "
                                    f"of other prompts, in at most {REFILLS} rounds")
    overlong_buffer: float = option(0.0, "share of max_new_tokens, at the end, in which "
                                    "the reward falls by up to 1; 0: none")
    mask_cut: bool = option(False, "what the length limit cut is left out of the loss")
    top_entropy: float = option(1.0, "share of the tokens, those of the highest entropy, "
                                "that have an advantage (the paper: 0.2)")


def train(config, collect=None, advantage=None, loss=None, evaluate=None, **parts):
    """grpo.train with the parts that config names, where no argument gives them."""
    require(not config.recipe, "in Python a recipe is VariantConfig(**RECIPES[NAME])")
    require(config.clip_eps_high >= 0,
            f"--clip-eps-high must be at least 0, not {config.clip_eps_high}")
    high = config.clip_eps_high or config.clip_eps
    require(config.clip_max == 0 or config.clip_max >= 1 + high,
            f"--clip-max must be at least {1 + high}, the clip's bound, or 0")
    require(0 <= config.overlong_buffer <= 1,
            f"--overlong-buffer is a share from 0 to 1, not {config.overlong_buffer}")
    require(config.entropy_coef >= 0,
            f"--entropy-coef must be at least 0, not {config.entropy_coef}")
    require(not config.scale_advantages or config.advantage == "mean",
            f"--scale-advantages does not go with --advantage {config.advantage}: add "
            "--no-scale-advantages")
    require(config.microbatches == 1 or config.aggregation != "token",
            "--aggregation token divides by the whole batch's tokens: --microbatches 1")
    require(0 < config.top_entropy <= 1,
            f"--top-entropy is a share above 0, up to 1, not {config.top_entropy}")
    require(config.top_entropy == 1 or config.minibatches == config.microbatches == 1,
            "--top-entropy compares a whole batch: --minibatches 1 --microbatches 1")
    clipped, dropped, kept = [], [], []

    def further_metrics(policy, step):
        row = dict(evaluate(policy, step)) if evaluate else {}
        if clipped:
            row["clip_low"], row["clip_high"] = torch.tensor(clipped).mean(dim=0).tolist()
        if dropped:
            row["dropped"] = dropped[-1] * RANKS  # rows are averaged over the ranks
        clipped.clear()
        return row
    if loss is None:
        loss = make_loss(config, clipped, kept)
    if collect is None:
        collect = refilled(dropped) if config.dynamic_sampling else grpo.collect
        collect = shaped(collect, kept)
    return grpo.train(config, collect=collect, loss=loss, evaluate=further_metrics,
                      advantage=advantage or ADVANTAGES[config.advantage], **parts)


def as_options(settings):
    """{clip_eps: 0.2, resume: True} -> --clip-eps 0.2 --resume"""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                    for name, value in settings.items())


VariantConfig.__doc__ += "\n\nrecipes:\n" + "\n".join(
    f"  {name:<12} {as_options(settings)}" for name, settings in RECIPES.items())


def main(argv=None):
    recipe = parse(VariantConfig, argv).recipe
    config = parse(VariantConfig, argv, **RECIPES.get(recipe, {}))
    train(replace(config, recipe=""))  # its settings are in place


if __name__ == "__main__":
    run_command(main)
