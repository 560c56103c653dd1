"""Do the recipes differ at all, with one update per batch? How alike their gradients are on the same batch: at its
first update, where every ratio is 1, and after the policy has moved. Of the surrogate alone, without a KL penalty.

Writes recipes-one-update.csv, .md and .png. d is the number of the policy's weights, R that of recipes.
"""
import copy
import itertools
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min import grpo, variants
from grpo_min.evaluate import interval
from grpo_min.lab.studies.common import collect, load_sft, sized, table, write_study
from grpo_min.lab.studies.gradients import gradient
from grpo_min.lab.studies.recipes import MEASURED
from grpo_min.rollout import token_logprobs
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.optim import optimizer_for
from grpo_min.run.plots import finish, plt

UPDATES = 3               # of the batch, before the recipes are compared again
MOMENTS = ["with a ratio of 1", f"after {UPDATES} updates"]
SETTINGS = {name: variants.VariantConfig(**recipe) for name, recipe in {"no recipe": {}, **MEASURED}.items()}
SAME = 1 - 1e-5           # a cosine above this is 1 but for rounding


def study(config):
    count, Q, G = sized(config, (8, 16, 8), (2, 4, 4))
    policy, names = load_sft(config), list(SETTINGS)
    rows = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q)
    cosines, left_out = [], []
    for step in range(count):
        batch_cosines, batch_left_out = compare_recipes(policy, *collect(policy, rows, Q, G, "recipes", step)[1:4], G)
        cosines.append(batch_cosines)
        left_out.append(batch_left_out)
    cosines, left_out = np.array(cosines), np.array(left_out)  # (count, 2, R, R), (count, 2, R)
    pairs, lines = [], []
    for m, moment in enumerate(MOMENTS):
        cells = []
        for i, recipe in enumerate(names):
            share = left_out[:, m, i].mean()
            cells.append([recipe, *(cosine_cell(cosines[:, m, i, j]) for j in range(len(names))), f"{share:.0%}"])
            for j, other in enumerate(names):
                figure = dict(zip(["cosine", "low", "high"], interval(cosines[:, m, i, j])))
                pairs.append(dict(when=moment, recipe=recipe, left_out=share, other=other, **figure))
        lines += [f"**{moment[0].upper()}{moment[1:]}**", "", *table(["cosine", *names, "tokens left out"], cells), ""]
    lines += [f"Cosines between the recipes' gradients of the surrogate on the same {Q} x {G} completions of the SFT "
              f"model, means over {count} batches; =: the same direction in every batch. The CSV file has 95% "
              "bootstrap intervals over batches. No KL penalty and no dynamic sampling. Tokens left out: share of the "
              "tokens with an advantage that have no gradient, because their ratio is clipped. The updates are those "
              f"of plain GRPO (`no recipe`). {date.today()}."]
    write_study(config, "recipes-one-update", lines, pairs)
    plot_recipes(names, cosines, Path(config.out) / "recipes-one-update.png")


def compare_recipes(policy, prompts, rollout, rewards, G):
    """Of one batch, before and after UPDATES of a copy of the policy: the cosines [2, (R, R)] between the gradients of
    the R recipes, and the share [2, R] of the tokens with an advantage that have no gradient."""
    policy, mask, plain = copy.deepcopy(policy), rollout.mask, grpo.GRPOConfig()

    def logprobs():
        return token_logprobs(policy, prompts, rollout.completion_ids, mask)[0]  # (B, N)
    old_logprobs = logprobs().detach()  # (B, N)
    before, left_out_before = recipe_gradients(policy, logprobs(), old_logprobs, rewards, mask, G)
    optimizer = optimizer_for(policy, plain.lr)
    advantages = grpo.group_advantages(rewards, G)[:, None]  # (B, 1)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        grpo.policy_loss(logprobs(), old_logprobs, advantages, mask, plain.clip_eps).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), plain.max_grad_norm)
        optimizer.step()
    after, left_out_after = recipe_gradients(policy, logprobs(), old_logprobs, rewards, mask, G)
    return [cosine_matrix(before), cosine_matrix(after)], [left_out_before, left_out_after]


def recipe_gradients(policy, logprobs, old_logprobs, rewards, mask, G):
    """-> the gradient of each recipe's surrogate (R, d), and the share of tokens that it leaves out, [R]."""
    gradients, left_out = [], []
    for config in SETTINGS.values():
        advantages = variants.ADVANTAGES[config.advantage](rewards, G, config.scale_advantages)  # (B,)
        advantages = advantages[:, None].expand_as(mask)  # (B, N)
        objective = variants.make_loss(config)(logprobs, old_logprobs, advantages, mask, config.clip_eps)
        gradients.append(gradient(objective, policy))
        token_gradients, = torch.autograd.grad(objective, logprobs, retain_graph=True)  # (B, N)
        counted = mask & (advantages != 0)  # (B, N)
        left_out.append(((token_gradients == 0) & counted).sum().item() / max(counted.sum().item(), 1))
    return torch.stack(gradients), left_out


def cosine_matrix(vectors):
    """(R, d) -> (R, R), in float64, so that vectors which differ in scale alone have a cosine of 1. 0 for a vector of
    zeros, which has no direction."""
    unit = F.normalize(vectors.cpu().double(), dim=1)  # (R, d)
    return (unit @ unit.T).numpy()


def cosine_cell(cosines):
    """Cosines of the batches (n,) -> their mean, or = where all of them are 1."""
    return "=" if cosines.min() > SAME else f"{cosines.mean():.3f}"


def plot_recipes(names, cosines, path):
    """cosines (batches, 2, R, R) as two maps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5))
    for m, (axis, moment) in enumerate(zip(axes, MOMENTS)):
        means = cosines[:, m].mean(0)  # (R, R)
        axis.imshow(means, vmin=-1, vmax=1, cmap="RdBu")
        for i, j in itertools.product(range(len(names)), repeat=2):
            axis.text(j, i, cosine_cell(cosines[:, m, i, j]), ha="center", va="center", fontsize=8,
                      color="white" if abs(means[i, j]) > 0.6 else "black")
        axis.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names,
                 xlabel=f"cosine of the gradients, {moment}")
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    finish(figure, path)
