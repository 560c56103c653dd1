"""Studies of the policy gradient: python -m grpo_min.study gradients, or recipes_one_update

gradients: how noisy the gradient of a batch is under each baseline, and how near it comes to that of a large batch, at
three moments of a PPO run, which has a policy and a critic. Writes baselines-gradients.csv, .md and .png.

recipes_one_update: how alike the gradients of the recipes are on the same batch, at the first update, where every ratio
is 1, and after the policy has moved. Writes recipes-one-update.csv, .md and .png.

Both look at the gradient of the surrogate alone, without a KL penalty. d is the number of the policy's weights, M that
of batches, R that of recipes.
"""
import copy
import itertools
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min import grpo, ppo, variants
from grpo_min.compare import beside_each_other, train_or_reuse
from grpo_min.config import pick_device
from grpo_min.metrics import interval
from grpo_min.model import ScalarGPT
from grpo_min.plots import finish, plt
from grpo_min.report import table_row, write_study
from grpo_min.rewards import correct, score
from grpo_min.rollout import Prompts, sample, token_logprobs
from grpo_min.runs import (DATA, batch_rows, generator, load_checkpoint, load_model, load_weights, optimizer_for,
                           read_jsonl)

LONGEST = 40              # tokens of a completion, as in training
GROUP_MEAN = "group mean, leave-one-out"
BASELINES = {             # rewards (B,), group_size -> advantages (B,)
    GROUP_MEAN: grpo.group_advantages,
    "none": variants.none,
    "batch mean": lambda rewards, group_size: rewards - rewards.mean(),
    "mean and std": variants.mean_std,
}
BEST, CRITIC = "best constant", "critic"
SCORED = 8                # batches in which the score of every completion is looked at by itself
UPDATES = 3               # of the batch, before the recipes are compared again


def batch_at(policy, rows, Q, G, seed, step):
    """Sample G completions for each of Q prompts -> prompts, rollout, rewards (B,)."""
    batch = [rows[i] for i in batch_rows(len(rows), Q, seed, step)]
    prompts = Prompts.from_texts([row["prompt"] for row in batch], next(policy.parameters()).device)
    rollout = sample(policy, prompts, G, LONGEST, 1.0, generator(seed, step))
    return prompts, rollout, score(correct, batch, rollout, G)[0]


def gradient(loss, model):
    """d loss / d weights as one vector (d,). The graph is kept: one forward serves every loss."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])                                      # (d,)


# --- gradients ----------------------------------------------------------------------------------------------------

def gradients(config):
    """The noise of the gradient under each baseline at three moments of a PPO run, and what that says."""
    last = config.steps or (2 if config.quick else 80)
    moments = list(dict.fromkeys([0, max(1, last * 15 // 80), last]))                         # steps trained
    sizes = (4, 4, 8) if config.quick else (64, 8, 8)                                         # M, Q, G
    with beside_each_other(pick_device(config.device)) as begin:
        jobs = [begin(one_moment, config, steps, *sizes) for steps in reversed(moments)]      # the longest first
        found = [job.result() for job in jobs][::-1]
    rows = [row for of_moment in found for row in of_moment]
    lines = table_row(["advantage", *(f"{what}, {when(steps)}" for steps in moments
                                      for what in ("noise-to-signal", "cosine"))])
    lines += table_row(["---"] * (1 + 2 * len(moments)))
    for name in dict.fromkeys(row["advantage"] for row in rows):
        of_name = [row for row in rows if row["advantage"] == name]
        lines += table_row([name, *(cell for row in of_name for cell in (
            shown_noise(row["noise"]), shown(row["cosine"], "{:.2f}")))])
    M, Q, G = sizes
    heads = [of_moment[0] for of_moment in found]
    lines += ["", f"Noise-to-signal: trace of the gradient's covariance over the squared norm of its mean, in batches "
              f"of {Q} prompts x {G} completions; so many times as many completions bring the noise down to the "
              "signal. Cosine: of a batch's gradient to that of a large batch, the mean leave-one-out gradient of "
              f"{M} other batches. Means over {M} batches with 95% intervals over batches (jackknife, bootstrap). One "
              "training run of PPO with its defaults, seed 1. "
              + " ".join(f"{capital(when(row['steps']))}: accuracy {row['accuracy']:.0%}, explained variance of the "
                         f"critic {row['explained_variance']:.2f}, cosine of the large-batch gradient to the true one "
                         f"about {reliability(row['noise'][0], M):.2f}." for row in heads)
              + " Leave-one-out is the group mean times G / (G - 1), so that one row serves both; with it, with no "
              "baseline, with a constant and with a mean the gradient points to the same place on average, with the "
              f"standard deviation and with a critic at lambda below 1 it need not. {date.today()}.", "",
              gradients_in_words(rows) + " " + best_in_words(heads)]
    write_study(config, "baselines-gradients", lines, [flat(row) for row in rows])
    plot_gradients(rows, Path(config.out) / "baselines-gradients.png")


def one_moment(config, steps, M, Q, G):
    """Train PPO for so many steps, and measure the gradient of M batches under every baseline -> a row for each.

    Runs of the same seed are the same as far as they go, so that a run of 15 steps is the beginning of one of 80.
    """
    policy, critic = policy_and_critic(config, steps)
    rows = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q)
    large, found, accuracy, explained = 0, {name: [] for name in [*BASELINES, BEST, CRITIC]}, [], []
    all_rewards, scores = [], []
    for step in range(M):                                                     # batches that nothing below sees again
        prompts, rollout, rewards = batch_at(policy, rows, Q, G, "gradients", step)
        logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)   # (B, N)
        large = large + first_gradient(logprobs, variants.leave_one_out(rewards, G)[:, None], rollout.mask, policy) / M
        if step < SCORED:
            all_rewards += rewards.tolist()
            scores += squared_scores(policy, prompts, rollout, G)
    best = best_constant(all_rewards, scores)
    for step in range(M, 2 * M):
        prompts, rollout, rewards = batch_at(policy, rows, Q, G, "gradients", step)
        logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)   # (B, N)
        advantages = {name: of(rewards, G)[:, None] for name, of in BASELINES.items()}        # (B, 1) each
        with torch.no_grad():
            values = critic.values(prompts, rollout.completion_ids, rollout.mask)             # (B, N)
        charged = ppo.at_last_token(rewards, rollout.mask)                                    # (B, N)
        advantages[CRITIC], _ = ppo.gae(charged, values, rollout.mask, ppo.PPOConfig.gamma, ppo.PPOConfig.lam)
        advantages[BEST] = (rewards - best["best"][0])[:, None]                               # (B, 1)
        for name in found:
            found[name].append(first_gradient(logprobs, advantages[name], rollout.mask, policy).cpu())
        accuracy.append(rewards.mean().item())
        actual, _ = ppo.gae(charged, torch.zeros_like(values), rollout.mask, 1.0, 1.0)        # (B, N)
        explained.append(ppo.explained_variance(values, actual, rollout.mask))
    explained = [value for value in explained if value != ""]                 # "": all rewards of a batch were equal
    measured = dict(steps=steps, accuracy=np.mean(accuracy), explained_variance=np.mean(explained or [0]), **best)
    return [dict(measured, **row) for row in noise_and_cosine({name: torch.stack(of) for name, of in found.items()},
                                                              large.cpu())]


def policy_and_critic(config, steps):
    """The policy and the critic of PPO after so many steps; before the first, the critic says 0 everywhere."""
    device = pick_device(config.device)
    settings = ppo.PPOConfig(run=str(Path(config.run) / f"gradients-{steps}"), sft=config.sft, device=config.device,
                             steps=steps)
    if steps == 0:
        policy = load_model(config.sft, "GPT", device)
        return policy, ppo.start_critic(settings, policy, device)
    policy, _ = train_or_reuse(ppo.train, settings)
    critic, path = ScalarGPT(policy.config), Path(settings.run) / "checkpoint.pt"
    load_weights(critic, load_checkpoint(path)["critic"], path)
    return policy, critic.to(device)


def first_gradient(logprobs, advantages, mask, policy):
    """The gradient of the clipped surrogate at the first update of a batch: logprobs, mask (B, N), advantages (B, N) or
    (B, 1) -> (d,)."""
    return gradient(grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2), policy)


def squared_scores(policy, prompts, rollout, G):
    """|d log pi(completion) / d weights|^2 of each of the B completions, as a list."""
    found = []
    for b in range(len(rollout.mask)):
        logprobs, _ = token_logprobs(policy, prompts.rows(b // G, b // G + 1), rollout.completion_ids[b:b + 1],
                                     rollout.mask[b:b + 1])                                   # (1, N)
        found.append(gradient(logprobs.sum(), policy).square().sum().item())
    return found


def best_constant(rewards, scores):
    """Rewards and squared scores of n completions -> the constant baseline of least variance, E[R s^2] / E[s^2] (Weaver
    and Tao, 2001), with its interval, the mean reward, and the mean squared score of right and of wrong completions."""
    rewards, scores = np.array(rewards), np.array(scores)                                     # (n,) each
    best = jackknife(lambda kept: (rewards * scores)[kept].sum() / scores[kept].sum(), len(rewards))
    return dict(best=best, mean_reward=rewards.mean(),
                score_right=scores[rewards > 0].mean() if rewards.any() else None,
                score_wrong=scores[rewards == 0].mean() if not rewards.all() else None)


def noise_and_cosine(found, large):
    """{advantage: gradients (M, d)}, the first being compared with, and the large-batch gradient (d,) -> a row for each
    advantage, every figure with its 95% interval [value, low, high]. more_*: by how much above the first."""
    grams = {name: (of @ of.T).double().numpy() for name, of in found.items()}                # (M, M) each
    cosines = {name: F.cosine_similarity(of, large[None]).double().numpy() for name, of in found.items()}   # (M,) each
    first, rows = next(iter(found)), []
    for name, gram in grams.items():
        signal = jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)]), len(gram))
        more = jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)])
                         - signal_to_noise(grams[first][np.ix_(kept, kept)]), len(gram))
        rows.append(dict(advantage=name, noise=noise_to_signal(signal), more_signal=more,
                         cosine=interval(cosines[name]), more_cosine=interval(cosines[name] - cosines[first])))
    return rows


def signal_to_noise(gram):
    """Dot products (M, M) of M independent gradients -> |mean|^2 / trace of their covariance.

    Both parts unbiased: the product of two different gradients is |mean|^2 on average, the square of one is that and
    the trace. (The square of the mean of M would be too large by trace / M.)
    """
    M, squares = len(gram), np.trace(gram)
    signal = (gram.sum() - squares) / (M * (M - 1))
    noise = squares / M - signal
    return signal / noise if noise > 0 else 0.0                               # no noise: all of them are 0


def noise_to_signal(signal):
    """[signal-to-noise, low, high] -> [noise-to-signal, low, high]; infinite where no signal has been told from 0."""
    value, low, high = (1 / x if x > 0 else np.inf for x in signal)
    return [value, high, low]


def jackknife(statistic, M):
    """[value, low, high] with the 95% interval of the jackknife (Tukey, 1958): the statistic of all M, and of all but
    one. statistic: of an array of indices below M -> number. The bootstrap would draw a batch twice, and the product
    of a gradient with itself is not one of two."""
    everything = np.arange(M)
    without = np.array([statistic(np.delete(everything, i)) for i in everything])             # (M,)
    half = 1.96 * np.sqrt((M - 1) / M * ((without - without.mean()) ** 2).sum())
    value = statistic(everything)
    return [value, value - half, value + half]


def reliability(noise, M):
    """Expected cosine, nearly, of the mean of M gradients to the true one, from the noise-to-signal of one."""
    return 1 / np.sqrt(1 + noise / M)


def gradients_in_words(rows):
    """The rows of all moments -> what they say, in plain words."""
    first = rows[0]["advantage"]
    base = {row["steps"]: row for row in rows if row["advantage"] == first}
    others = [row for row in rows if row["advantage"] != first]

    def of(sign, key="more_signal"):
        return [row for row in others if sign_of(row[key]) == sign]

    def named(row):
        return f"`{row['advantage']}` {when(row['steps'])}"

    def numbers(row):
        return f"{named(row)} ({shown_noise(row['noise'])} against {shown_noise(base[row['steps']]['noise'])})"
    said = [f"More noise for its signal than `{first}`: {', '.join(map(numbers, of(-1)))}." if of(-1) else
            f"Nothing had more noise for its signal than `{first}`."]
    said += [f"Less: {', '.join(map(numbers, of(1)))}." if of(1) else "Nothing had less."]
    said += [f"No difference shown: {', '.join(map(named, of(0)))}."] if of(0) else []
    words = {-1: "smaller", 0: "no difference shown", 1: "larger"}
    otherwise = [f"{named(row)} ({words[sign_of(row['more_cosine'])]}: {shown(row['cosine'], '{:.2f}')} against "
                 f"{shown(base[row['steps']]['cosine'], '{:.2f}')})" for row in others
                 if sign_of(row["more_cosine"]) != sign_of(row["more_signal"])]
    said += [f"The cosine says otherwise of {', '.join(otherwise)}; of all else it says the same." if otherwise else
             "The cosine says the same of all of them."]
    return " ".join(said)


def best_in_words(heads):
    """A row of each moment -> what the best constant baseline is there, in plain words."""
    said = []
    for row in heads:
        value, low, high = row["best"]
        against = ("below" if high < row["mean_reward"] else "above" if low > row["mean_reward"] else
                   "not told apart from")
        said.append(f"{when(row['steps'])} {shown(row['best'], '{:.2f}')}, {against} the mean reward of "
                    f"{row['mean_reward']:.2f}" + ("" if row["score_right"] is None or row["score_wrong"] is None else
                    f" (squared score of a wrong completion {row['score_wrong'] / row['score_right']:.1f} times that "
                    "of a right one)"))
    return ("The constant baseline of least variance is the mean of the rewards weighted with the squared score, the "
            f"gradient of a completion's log-probability (Weaver and Tao, 2001): {'; '.join(said)}.")


def sign_of(difference):
    """[value, low, high] -> 1 or -1 where the interval lies on one side of 0, else 0."""
    return 1 if difference[1] > 0 else -1 if difference[2] < 0 else 0


def when(steps):
    return f"after {steps} step{'s' if steps > 1 else ''}" if steps else "at the start"


def capital(text):
    return text[0].upper() + text[1:]


def shown(figure, form):
    """[value, low, high] -> value (low to high)."""
    return "{} ({} to {})".format(*(form.format(x) for x in figure))


def shown_noise(noise):
    if not np.isfinite(noise[0]):
        return "no signal shown"
    value, low, high = (f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in noise)
    return f"{value} ({low} to {high})" if np.isfinite(noise[2]) else f"{value} ({low} or more)"


def flat(row):
    """Figures as three columns of a CSV: {noise: [value, low, high]} -> {noise, noise_low, noise_high}."""
    columns = {}
    for name, value in row.items():
        columns.update(dict(zip([name, f"{name}_low", f"{name}_high"], value)) if isinstance(value, list) else
                       {name: value})
    return columns


def plot_gradients(rows, path):
    """Noise-to-signal and cosine of every advantage at every moment, with their intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    names, moments = (list(dict.fromkeys(row[key] for row in rows)) for key in ("advantage", "steps"))
    for axis, key, label in zip(axes, ["noise", "cosine"], ["noise-to-signal of the gradient of a batch",
                                                            "cosine to the gradient of a large batch"]):
        for i, name in enumerate(names):
            of_name = [row for row in rows if row["advantage"] == name and np.isfinite(row[key][0])]
            x = [moments.index(row["steps"]) + (i - (len(names) - 1) / 2) * 0.13 for row in of_name]
            y, low, high = np.array([row[key] for row in of_name] or [[]] * 3).reshape(-1, 3).T
            high = np.where(np.isfinite(high), high, y)                       # no upper bound: no line upwards
            axis.errorbar(x, y, [y - low, high - y], fmt="o", ms=4, label=name)
        axis.set(xticks=range(len(moments)), xticklabels=[when(steps) for steps in moments], ylabel=label,
                 xlim=(-0.5, len(moments) - 0.5))
    axes[0].set_yscale("log")
    axes[1].legend(frameon=False, fontsize=8, title="advantage (95% intervals; no line up: no bound)", title_fontsize=8)
    finish(figure, path)


# --- recipes at the first update ----------------------------------------------------------------------------------

def recipes_one_update(config):
    """How alike the recipes' gradients are on the same batch: at its first update, and after UPDATES of them."""
    count, Q, G = (2, 4, 4) if config.quick else (8, 16, 8)
    policy = load_model(config.sft, "GPT", pick_device(config.device))
    rows = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q)
    settings = {name: grpo.GRPOConfig(**changes) for name, changes in {"no recipe": {}, **variants.RECIPES}.items()}
    found = [compare_recipes(policy, settings, *batch_at(policy, rows, Q, G, "recipes", step), G)
             for step in range(count)]
    names, moments = list(settings), ["with a ratio of 1", f"after {UPDATES} updates"]
    cosines, left_out = (np.array(of) for of in zip(*found))                  # (count, 2, R, R), (count, 2, R)
    pairs = [dict(when=moments[m], recipe=names[i], left_out=left_out[:, m, i].mean(), other=names[j],
                  **dict(zip(["cosine", "low", "high"], interval(cosines[:, m, i, j]))))
             for m in range(2) for i in range(len(names)) for j in range(len(names))]
    lines = []
    for m, moment in enumerate(moments):
        lines += [f"**{capital(moment)}**", ""]
        lines += table_row(["cosine", *names, "tokens left out"]) + table_row(["---"] * (len(names) + 2))
        for i, name in enumerate(names):
            lines += table_row([name, *(shown_cosine(cosines[:, m, i, j]) for j in range(len(names))),
                                f"{left_out[:, m, i].mean():.0%}"])
        lines += [""]
    lines += [f"Cosines between the recipes' gradients of the surrogate on the same {Q} x {G} completions of the SFT "
              f"model, means over {count} batches; =: the same direction in every batch. Intervals are 95% bootstrap "
              "intervals over batches. No KL penalty and no dynamic sampling. Tokens left out: share of the tokens "
              "with an advantage that have no gradient, because their ratio is clipped. The updates are those of plain "
              f"GRPO (`no recipe`). {date.today()}.", "",
              recipes_in_words(names, moments, cosines, left_out)]
    write_study(config, "recipes-one-update", lines, pairs)
    plot_recipes(names, moments, cosines, Path(config.out) / "recipes-one-update.png")


def compare_recipes(policy, settings, prompts, rollout, rewards, G):
    """Of one batch, before and after UPDATES of a copy of the policy: the cosines (2, R, R) between the gradients of
    the R recipes, and the share (2, R) of the tokens with an advantage that have no gradient."""
    policy, mask, plain = copy.deepcopy(policy), rollout.mask, grpo.GRPOConfig()

    def logprobs():
        return token_logprobs(policy, prompts, rollout.completion_ids, mask)[0]               # (B, N)
    old_logprobs = logprobs().detach()                                                        # (B, N)
    before = gradients_of_recipes(policy, settings, logprobs(), old_logprobs, rewards, mask, G)
    optimizer = optimizer_for(policy, plain.lr)
    advantages = grpo.group_advantages(rewards, G)[:, None]                                   # (B, 1)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        grpo.policy_loss(logprobs(), old_logprobs, advantages, mask, plain.clip_eps).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), plain.max_grad_norm)
        optimizer.step()
    after = gradients_of_recipes(policy, settings, logprobs(), old_logprobs, rewards, mask, G)
    return [[cosine_matrix(of) for of, _ in (before, after)], [left_out for _, left_out in (before, after)]]


def gradients_of_recipes(policy, settings, logprobs, old_logprobs, rewards, mask, G):
    """-> the gradient of each recipe's surrogate (R, d), and the share (R) of tokens that it leaves out."""
    found, left_out = [], []
    for config in settings.values():
        advantage = {"mean": grpo.group_advantages, **variants.ADVANTAGES}[config.advantage]
        loss = variants.make_loss(config.ratio, config.aggregation, config.clip_eps_high, config.max_new_tokens)
        advantages = advantage(rewards, G)[:, None].expand_as(mask)                           # (B, N)
        objective = loss(logprobs, old_logprobs, advantages, mask, config.clip_eps)
        found.append(gradient(objective, policy))
        by_token, = torch.autograd.grad(objective, logprobs, retain_graph=True)               # (B, N)
        counted = mask & (advantages != 0)                                                    # (B, N)
        left_out.append(((by_token == 0) & counted).sum().item() / max(counted.sum().item(), 1))
    return torch.stack(found), left_out


def cosine_matrix(vectors):
    """(R, d) -> (R, R), in float64, so that vectors which differ in scale alone have a cosine of 1. 0 for a vector of
    zeros, which has no direction."""
    unit = F.normalize(vectors.double(), dim=1)                                               # (R, d)
    return (unit @ unit.T).cpu().numpy()


SAME = 1 - 1e-5           # a cosine above this is 1 but for rounding


def shown_cosine(cosines):
    """Cosines of the batches (n,) -> their mean, or = where all of them are 1."""
    return "=" if cosines.min() > SAME else f"{cosines.mean():.3f}"


def alike(cosines):
    """Cosines (R, R) -> lists of those that have one direction: the numbers of R vectors, in their order."""
    groups = []
    for i in range(len(cosines)):
        group = next((group for group in groups if cosines[i, group[0]] > SAME), None)
        groups = groups if group else groups + [[]]
        (group or groups[-1]).append(i)
    return groups


def recipes_in_words(names, moments, cosines, left_out):
    """cosines (batches, 2, R, R), left_out (batches, 2, R) -> what they say, in plain words."""
    said = []
    for m, moment in enumerate(moments):
        groups = alike(cosines[:, m].min(0))
        together = [" = ".join(f"`{names[i]}`" for i in group) for group in groups]
        pairs = [(i, j) for (i, *_), (j, *_) in itertools.combinations(groups, 2)]
        said.append(f"{capital(moment)} the {len(names)} have {len(groups)} "
                    f"direction{'s' if len(groups) > 1 else ''}: {'; '.join(together)}.")
        if pairs:
            means = cosines[:, m].mean(0)
            i, j = min(pairs, key=lambda pair: means[pair])
            x, y = max(pairs, key=lambda pair: means[pair])
            said.append(f"Between directions, the cosine goes from {shown(interval(cosines[:, m, i, j]), '{:.3f}')}, "
                        f"`{names[i]}` and `{names[j]}`, to {shown(interval(cosines[:, m, x, y]), '{:.3f}')}, "
                        f"`{names[x]}` and `{names[y]}`.")
    most = left_out[:, 1].mean(0).argmax()
    said.append(f"Most tokens are then left out by `{names[most]}`: {shown(interval(left_out[:, 1, most]), '{:.0%}')}."
                if left_out[:, 1].max() > 0 else "No recipe leaves a token out.")
    return " ".join(said)


def plot_recipes(names, moments, cosines, path):
    """cosines (batches, 2, R, R) as two maps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5))
    for m, (axis, moment) in enumerate(zip(axes, moments)):
        means = cosines[:, m].mean(0)                                                         # (R, R)
        axis.imshow(means, vmin=-1, vmax=1, cmap="RdBu")
        for i, j in itertools.product(range(len(names)), repeat=2):
            axis.text(j, i, shown_cosine(cosines[:, m, i, j]), ha="center", va="center", fontsize=8,
                      color="white" if abs(means[i, j]) > 0.6 else "black")
        axis.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names,
                 xlabel=f"cosine of the gradients, {moment}")
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    finish(figure, path)
