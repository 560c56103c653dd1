"""Drop-in parts of GRPO: what the papers after it have changed, each in a few lines, and the recipes made of them.

    python -m grpo_min.grpo --recipe dapo            # a recipe; an option given beside it wins
    python -m grpo_min.grpo --ratio sequence         # one part

An advantage is a function (rewards (B,), group_size, scale) -> (B,); `mean` is grpo.group_advantages, and the only one
that hears `scale`. A ratio is a function that gives each token's surrogate (B, N). An aggregation says by what the sum
over a completion's tokens is divided before the mean over completions: in the surrogate, and in the KL penalty if that
stands in the loss, as in DeepSeekMath's eq. 3 (with the default, `sum`, the KL is that of a whole completion). With
minibatches `token` counts the tokens of the minibatch, and under torchrun each rank has a batch of its own. Formulas
are those of the papers named; what is so "here" is ours.
"""
import torch


# --- advantages ---------------------------------------------------------------------------------------------------

def in_groups(rewards, group_size):
    """In float64 on the CPU, so that equal rewards have an advantage of exactly 0: (B,) -> (Q, G)."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}: at least 2 in each")
    return rewards.double().cpu().view(-1, group_size)


def mean_std(rewards, group_size, scale=False):
    """(R - mean of the group) / its standard deviation (DeepSeekMath 2402.03300, section 4.1.2).

    n - 1 in the deviation, + 1e-4 here. The same as --scale-advantages.
    """
    groups = in_groups(rewards, group_size)                                                   # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)                                    # (Q, G)
    return (advantages / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten().to(rewards)      # (B,)


def leave_one_out(rewards, group_size, scale=False):
    """R - mean of the others of the group (RLOO 2402.14740): the group mean's advantage times G / (G - 1)."""
    groups = in_groups(rewards, group_size)                                                   # (Q, G)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)                    # (Q, G)
    return (groups - others).flatten().to(rewards)                                            # (B,)


def batch(rewards, group_size, scale=False):
    """(R - mean of the batch) / its standard deviation (REINFORCE++ 2501.03262), + 1e-4 here. Groups do not matter.

    With the KL in the reward the paper charges a token for the KL from there on; here all tokens of a completion are
    charged for the whole of it.
    """
    rewards64 = rewards.double().cpu()                                                        # (B,)
    return ((rewards64 - rewards64.mean()) / (rewards64.std() + 1e-4)).to(rewards)            # (B,)


def none(rewards, group_size, scale=False):
    """R itself: REINFORCE without a baseline (Williams, 1992)."""
    return rewards                                                                            # (B,)


ADVANTAGES = dict(mean_std=mean_std, leave_one_out=leave_one_out, batch=batch, none=none)


# --- ratio and clip -----------------------------------------------------------------------------------------------

def log_ratio(logprobs, old_logprobs, mask, ratio="token"):
    """log of policy now / policy at sampling: of each token (B, N), or its mean over a completion's tokens (B, 1)."""
    change = logprobs - old_logprobs                                                          # (B, N)
    if ratio == "sequence":
        return (change * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)   # (B, 1)
    return change


def clipped(ratio, advantages, low, high):
    """min(r A, clip(r, low, high) A) (PPO 1707.06347, eq. 7, with high apart from low: DAPO 2503.14476, eq. 8)."""
    return torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)                 # (B, N)


def token(logprobs, old_logprobs, advantages, mask, low, high):
    """The ratio of each token, clipped: what grpo.policy_loss does."""
    return clipped(log_ratio(logprobs, old_logprobs, mask).exp(), advantages, low, high)      # (B, N)


def sequence(logprobs, old_logprobs, advantages, mask, low, high):
    """GSPO (2507.18071, eq. 5 to 7): one ratio for a completion, the geometric mean of its tokens', clipped as one."""
    ratio = log_ratio(logprobs, old_logprobs, mask, "sequence").exp()                         # (B, 1)
    return clipped(ratio, advantages, low, high)                                              # (B, N)


def cispo(logprobs, old_logprobs, advantages, mask, low, high):
    """sg(clip(r, low, high)) A log pi (MiniMax-M1 2506.13585, eq. 4 and 5; sg: no gradient): no token is left out."""
    weight = log_ratio(logprobs, old_logprobs, mask).exp().clamp(low, high).detach()          # (B, N)
    return weight * advantages * logprobs                                                     # (B, N)


RATIOS = dict(token=token, sequence=sequence, cispo=cispo)


# --- aggregation --------------------------------------------------------------------------------------------------

AGGREGATIONS = {      # by what a completion's sum is divided, before the mean over B: (mask (B, N), longest) -> divisor
    "sum": lambda mask, longest: 1,
    "sequence": lambda mask, longest: mask.sum(dim=1, keepdim=True).clamp(min=1),       # DeepSeekMath, eq. 3: (B, 1)
    "token": lambda mask, longest: mask.sum().clamp(min=1) / len(mask),                 # DAPO, eq. 8: batch, not group
    "constant": lambda mask, longest: longest,                                          # Dr. GRPO 2503.20783
}


def make_loss(ratio="token", aggregation="sum", clip_eps_high=0.0, longest=1):
    """A function with the signature of grpo.policy_loss, made of these parts; longest is max_new_tokens."""
    def loss(logprobs, old_logprobs, advantages, mask, clip_eps):
        low, high = 1 - clip_eps, 1 + (clip_eps_high or clip_eps)
        surrogate = RATIOS[ratio](logprobs, old_logprobs, advantages, mask, low, high)        # (B, N)
        return -(surrogate * mask / AGGREGATIONS[aggregation](mask, longest)).sum(dim=1).mean()
    return loss


# --- recipes ------------------------------------------------------------------------------------------------------

RECIPES = {
    # 2402.03300, eq. 3 and section 4.2: beta 0.04.
    "grpo": dict(advantage="mean_std", aggregation="sequence", ratio="token", kl="k3", kl_in="loss", beta=0.04),
    # 2503.14476, section 3 and 4.1, without its penalty for completions that are too long.
    "dapo": dict(advantage="mean_std", aggregation="token", clip_eps=0.2, clip_eps_high=0.28, beta=0.0,
                 dynamic_sampling=True),
    # 2503.20783, section 3.2: neither of the two divisors.
    "dr_grpo": dict(advantage="mean", aggregation="constant", beta=0.0),
    # 2402.14740: a completion is one action; with one update per batch this is plain REINFORCE. beta is the default.
    "rloo": dict(advantage="leave_one_out", aggregation="sum", kl="k1", kl_in="reward"),
    # 2507.18071, section 5.1. The paper leaves the KL out of its formulas; beta 0 as in TRL's settings for it.
    "gspo": dict(advantage="mean_std", aggregation="sequence", ratio="sequence", clip_eps=3e-4, clip_eps_high=4e-4,
                 beta=0.0),
    # 2506.13585: no KL, and no lower bound, which is clip_eps 1. The upper one is not published: weights up to 4 are
    # the default of Tinker's documentation. The paper also samples dynamically: add --dynamic-sampling.
    "cispo": dict(advantage="mean_std", aggregation="token", ratio="cispo", clip_eps=1.0, clip_eps_high=3.0, beta=0.0),
    # 2501.03262: the KL is k1 in the reward. Aggregation and beta as implemented here.
    "reinforce++": dict(advantage="batch", aggregation="token", kl="k1", kl_in="reward"),
}
