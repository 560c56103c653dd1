"""What the papers after GRPO have changed, each in a few lines, and the recipes made of it.

    python -m grpo_min.variants --recipe dapo  # a recipe; an option given beside it wins
    python -m grpo_min.variants --ratio sequence  # one part

Everything here wraps grpo.train and stands in for one of its functions. Formulas are those
of the papers named; what is so "here" is ours. Shapes as in grpo.py. "TRL:" names what in
TRL 1.16 has the same gradients (tests/test_trl.py), if use_bias_correction_kl is False.

An aggregation says by what the sum over a completion's tokens is divided before the mean
over completions, in the surrogate and in the KL penalty alike, as in DeepSeekMath's eq. 3
(with the default, `sum`, the KL is that of a whole completion). With minibatches `token`
counts the tokens of the minibatch, and under torchrun those of each rank's own batch.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from grpo_min import grpo
from grpo_min.grpo import GRPOConfig, group_advantages, policy_loss
from grpo_min.rewards import score
from grpo_min.rollout import Prompts, Rollout, sample
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
    it, in the paper for what is to come. TRL's scale_rewards batch takes off group means.
    """
    return group_advantages(rewards, len(rewards), scale=True)


def no_baseline(rewards, group_size, scale=False):
    """R itself: REINFORCE without a baseline (Williams, 1992)."""
    return rewards


# TRL: mean is scale_rewards none, if scaled group. RLOOTrainer: leave_one_out.
ADVANTAGES = dict(mean=group_advantages, leave_one_out=leave_one_out,
                  batch=batch_advantages, none=no_baseline)


# --- the loss: a ratio, a clip and an aggregation -----------------------------------------

def sequence_log_ratio(logprobs, old_logprobs, mask):
    """The mean log ratio of a completion's tokens, at each of them: (B, N) -> (B, N)."""
    change = ((logprobs - old_logprobs) * mask).sum(dim=1, keepdim=True)  # (B, 1)
    return (change / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(logprobs)


AGGREGATIONS = {  # (mask (B, N), longest completion) -> the divisor of a completion's sum
    # TRL: loss_type luspo, grpo, bnpo (and dapo, where the batch is read at once), dr_grpo.
    "sum": lambda mask, longest: 1,
    "sequence": lambda mask, longest: mask.sum(1, keepdim=True).clamp(min=1),  # 2402.03300
    "token": lambda mask, longest: mask.sum().clamp(min=1) / len(mask),  # 2503.14476, eq. 8
    "constant": lambda mask, longest: longest,  # 2503.20783
}


def make_loss(config, clipped=None):
    """A function in place of grpo.policy_loss, with the ratio, clip and sums of config.

    ratio `sequence` is GSPO's (2507.18071, eq. 5 to 7): one ratio for a completion, the
    geometric mean of its tokens'. `cispo` (2506.13585, eq. 4 and 5) weighs log pi with the
    clipped ratio, without its gradient, so that no token is left out. TRL: token, sequence
    as importance_sampling_level; loss_type cispo, with epsilon_high 1 more and clip_eps 1.
    clipped: a list that is given the shares of tokens below and above config's bounds.
    """
    low, high = config.clip_eps, config.clip_eps_high or config.clip_eps

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty=0.0):
        divisor = AGGREGATIONS[config.aggregation](mask, config.max_new_tokens)
        advantages, penalty = advantages / divisor, penalty / divisor  # (B, N)
        log_ratio = logprobs - old_logprobs  # (B, N)
        if config.ratio == "sequence":
            log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
        ratio = log_ratio.detach().exp()  # (B, N)
        if clipped is not None:
            clipped.append([(outside & mask).sum().item() / max(mask.sum().item(), 1)
                            for outside in (ratio < 1 - low, ratio > 1 + high)])
        if config.ratio == "cispo":
            surrogate = ratio.clamp(1 - low, 1 + high) * advantages * logprobs  # (B, N)
            return -((surrogate - penalty) * mask).sum(dim=1).mean()
        # Clip-higher (2503.14476, eq. 8): if A > 0 the upper bound counts, else the lower.
        bound = torch.where(advantages > 0, high, low)  # (B, N)
        return policy_loss(log_ratio, 0.0, advantages, mask, bound, penalty)
    return loss


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
    # 2503.14476, section 3 and 4.1, without its penalty for completions that are too long.
    "dapo": dict(scale_advantages=True, aggregation="token", clip_eps=0.2,
                 clip_eps_high=0.28, beta=0.0, dynamic_sampling=True),
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
}


@dataclass
class VariantConfig(GRPOConfig):
    """GRPO with other parts: what later papers have changed, and their recipes."""
    run: str = option("runs/variant", "folder to write into")
    recipe: str = option("", "settings that belong together, see above; an option given "
                         "beside it wins", ["", *RECIPES])
    advantage: str = option("mean", "what a reward is compared with", list(ADVANTAGES))
    ratio: str = option("token", "what is clipped: a token's ratio, a sequence's, or "
                        "CISPO's weight", ["token", "sequence", "cispo"])
    clip_eps_high: float = option(0.0, "the ratio counts up to 1 + clip_eps_high; "
                                  "0: clip_eps")
    aggregation: str = option("sum", "what a completion's sum over its tokens is divided "
                              "by, in surrogate and KL: nothing, its length, the batch's "
                              "mean length, the longest", list(AGGREGATIONS))
    dynamic_sampling: bool = option(False, "groups of equal rewards make room for groups "
                                    f"of other prompts, in at most {REFILLS} rounds")


def train(config, collect=None, advantage=None, loss=None, evaluate=None, **parts):
    """grpo.train with the parts that config names, where no argument gives them."""
    require(not config.recipe, "in Python a recipe is VariantConfig(**RECIPES[NAME])")
    require(config.clip_eps_high >= 0,
            f"--clip-eps-high must be at least 0, not {config.clip_eps_high}")
    require(not config.scale_advantages or config.advantage == "mean",
            f"--scale-advantages does not go with --advantage {config.advantage}: add "
            "--no-scale-advantages")
    require(config.microbatches == 1 or config.aggregation != "token",
            "--aggregation token divides by the whole batch's tokens: --microbatches 1")
    clipped, dropped = [], []

    def further_metrics(policy, step):
        row = dict(evaluate(policy, step)) if evaluate else {}
        if clipped:
            row["clip_low"], row["clip_high"] = torch.tensor(clipped).mean(dim=0).tolist()
        if dropped:
            row["dropped"] = dropped[-1] * RANKS  # rows are averaged over the ranks
        clipped.clear()
        return row
    if loss is None:
        loss = make_loss(config, clipped)
    if collect is None:
        collect = refilled(dropped) if config.dynamic_sampling else grpo.collect
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
