"""Studies of the learned reward: python -m grpo_min.study noise, overoptimisation, kl

noise: annotators who choose the answer of higher gold score in 60% to 100% of the pairs. What does a reward model learn
from them, and what does a policy reach that GRPO trains on it?

overoptimisation: reward models of few and of many choices, and policies that are pushed far towards what they like, by
GRPO and by taking the best of n answers. The reward model's score (the proxy) is followed beside the gold score, over
the square root of the KL to the SFT model, and Gao et al.'s forms (2210.10760) are fitted to the gold score.

kl: how much the KL counts, and where it is charged: by k3 in the loss, or by k1 in the reward.

All are about the animals, start from the SFT model and judge on the validation prompts. study.py has the command.
"""
import functools
import json
from datetime import date
from math import comb
from pathlib import Path

import numpy as np
import torch

from data import prepare
from grpo_min import grpo, reward_model
from grpo_min.compare import PER_REWARD, beside_each_other, train_or_reuse
from grpo_min.config import pick_device
from grpo_min.evaluate import answers, evaluate, held_out
from grpo_min.gold import MAXIMUM, gold_score
from grpo_min.plots import finish, plt
from grpo_min.report import seconds_of, sides, spread, table_row, write_study
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, frozen_logprobs, sample
from grpo_min.runs import DATA, columns, fingerprint, generator, load_model, make_folder, read_jsonl, save_file

RATES = [1.0, 0.9, 0.8, 0.7, 0.6]                   # share of the pairs in which the annotators follow the gold score
NOISY_PAIRS, NOISY_UPDATES = 4000, 800
PAIRS = [4000, 1000, 200, 50]                       # choices that a reward model learns from
BETAS = [0.0, 0.3]                                  # of the RL that over-optimises
EVERY, WATCHED, POOL = 10, 128, 256                 # steps between looks, prompts looked at, answers to choose from
BEST_OF_N = "best of n"
KL_BETAS = [0.01, 0.03, 0.1, 0.3]


def full(config, number, quick):
    """A size of the study, or of its smoke test."""
    return quick if config.quick else number


def seeds(config):
    return range(1, (config.seeds or full(config, 5, 1)) + 1)


def folder(config, name=""):
    """Where a run goes; those of the smoke test do not get in the way of the others."""
    return Path(config.run) / full(config, "", "quick") / name


# --- pairs and reward models --------------------------------------------------------------------------------------

def shuffled(rows, seed):
    order = torch.randperm(len(rows), generator=generator(seed, "pairs", rank=0)).tolist()
    return [rows[i] for i in order]


def relabel(pairs, rate, seed):
    """Pairs of answers -> rows of prompt, chosen and rejected, in which the answer of higher gold score is chosen with
    probability `rate`. Pairs of equal gold score are left out. With the same seed, who is right at a low rate is also
    right at a higher one."""
    asked = {row["prompt"]: row for row in prepare.animal_prompts("train")}
    rows = []
    for row, uniform in zip(pairs, np.random.default_rng(seed).random(len(pairs))):
        fact = asked[row["prompt"]]
        gold = gold_score([row["prompt"]] * 2, [row["chosen"], row["rejected"]], [fact["animal"]] * 2,
                          [fact["attribute"]] * 2)
        if gold[0] != gold[1]:
            first_is_chosen = (gold[0] > gold[1]) == (uniform < rate)
            chosen, rejected = ("chosen", "rejected") if first_is_chosen else ("rejected", "chosen")
            rows.append(dict(prompt=row["prompt"], chosen=row[chosen], rejected=row[rejected]))
    return rows


def margins(score, pairs):
    """The score of the chosen answer minus that of the rejected one: (pairs,)."""
    column = columns(pairs)
    chosen, rejected = (score(column["prompt"], column[side], animal=column["animal"], attribute=column["attribute"])
                        for side in ("chosen", "rejected"))
    return np.subtract(chosen, rejected)


def gold_agreement(score, pairs):
    """The share of held-out pairs that a reward puts into the order of their gold scores; gold's ties are left out."""
    gold = margins(gold_score, pairs)                                                         # (pairs,)
    return float(np.mean((margins(score, pairs) * gold > 0)[gold != 0]))


def train_reward_model(config, name, pairs, updates, seed):
    """Train a reward model on these pairs, or take the one that is there -> its checkpoint and its reward function."""
    run = folder(config, name)
    make_folder(run.parent)
    save_file(f"{run}.jsonl", "".join(json.dumps(row) + "\n" for row in pairs).encode())
    model, _ = train_or_reuse(reward_model.train, reward_model.RewardModelConfig(
        run=str(run), sft=config.sft, preferences=f"{run}.jsonl", steps=updates, warmup=min(100, updates // 4 + 1),
        seed=seed, device=config.device))
    return run / "checkpoint.pt", learned(model)


# --- policies -----------------------------------------------------------------------------------------------------

def train_policy(config, name, checkpoint, steps, seed, watch=None, **changes):
    """GRPO on a reward model, 16 prompts x 8 completions, or the run that is there -> the policy, its metrics."""
    settings = {**PER_REWARD["learned"], **dict(
        run=str(folder(config, name)), sft=config.sft, reward="learned", reward_model=str(checkpoint), seed=seed,
        steps=config.steps or steps, prompts_per_step=16, group_size=8, device=config.device), **changes}
    return train_or_reuse(functools.partial(grpo.train, evaluate=watch), grpo.GRPOConfig(**settings))


def measure(policy, sft, reward, rows, samples=4, batch=250):
    """Sample answers to R validation prompts, always with the same random numbers -> a row of figures, the answers.

    proxy is the reward model's score, gold the gold score, gold_even and gold_odd that of every second prompt. kl is
    KL(policy || SFT model) in nats per completion: the mean of k1, log pi - log pi_sft summed over the tokens, which is
    unbiased. The answers: [(prompt, text, proxy, gold)], R * samples of them.
    """
    device, texts, finished, kl = next(policy.parameters()).device, [], [], []
    for i in range(0, len(rows), batch):
        prompts = Prompts.from_texts([row["prompt"] for row in rows[i:i + batch]], device)
        rollout = sample(policy, prompts, samples, 40, 1.0, generator(0, i))
        k1 = (rollout.logprobs - frozen_logprobs(sft, prompts, rollout, 1.0, 1)) * rollout.mask         # (B, N)
        kl += k1.sum(dim=1).tolist()
        texts += rollout.texts()
        finished += rollout.finished.tolist()
    column = columns([row for row in rows for _ in range(samples)])
    proxy = reward(column["prompt"], texts, finished=finished)
    gold = gold_score(column["prompt"], texts, column["animal"], column["attribute"])
    of_prompt = np.reshape(gold, (len(rows), samples)).mean(axis=1)                           # (R,)
    return (dict(kl=float(np.mean(kl)), proxy=float(np.mean(proxy)), gold=float(np.mean(gold)),
                 gold_even=float(of_prompt[::2].mean()), gold_odd=float(of_prompt[1::2].mean())),
            list(zip(column["prompt"], texts, proxy, gold)))


# --- in words -----------------------------------------------------------------------------------------------------

def by(rows, key, figure):
    """Rows -> {value of key: [figure of each of its rows]}."""
    found = {}
    for row in rows:
        found.setdefault(row[key], []).append(row[figure])
    return found


def listed(values, form="{:.2f}"):
    """{label: values of the seeds} in words: label (mean (lowest to highest)), ..."""
    return ", ".join(f"{label} ({spread(of_label, form)})" for label, of_label in values.items())


def compared(what, values, form="{:.2f}"):
    """{label: values of the seeds}, the first the one to compare with -> which differ from it with every seed."""
    said = [(what, [next(iter(values))])]
    said += zip(["Higher with every seed", "Lower with every seed", "Not told from it by the seeds"], sides(values))
    return " ".join(f"{words}: {listed({label: values[label] for label in labels}, form)}."
                    for words, labels in said if labels)


def side_by_side(values, others, form="{:.2f}"):
    """Two {label: values of the seeds} of the same labels -> where the first is lower or higher with every seed."""
    parts, seen = [], 0
    for word, sign in ("lower", 1), ("higher", -1):
        apart = [f"{label} ({spread(of_label, form)} against {spread(others[label], form)})"
                 for label, of_label in values.items()
                 if max(sign * value for value in of_label) < min(sign * value for value in others[label])]
        parts, seen = parts + ([f"{word} with every seed at {', '.join(apart)}"] if apart else []), seen + len(apart)
    if not seen:
        return "not told apart by the seeds anywhere"
    return " and ".join(parts) + ("" if seen == len(values) else "; elsewhere the seeds overlap")


# --- noise --------------------------------------------------------------------------------------------------------

def noise(config):
    """Reward models of annotators who are more or less reliable, and what GRPO reaches on each."""
    with beside_each_other(pick_device(config.device)) as begin:
        start = begin(sft_gold, config)
        rows = [begin(one_noise_run, config, rate, seed) for rate in full(config, RATES, RATES[::len(RATES) - 1])
                for seed in seeds(config)]
        start, rows = start.result(), [row.result() for row in rows]
    for row in rows:
        row.update(way=(row["gold"] - start) / (MAXIMUM - start))
    forms = [("agreement", "{:.1%}"), ("gold", "{:.2f}"), ("way", "{:.1%}"), ("kl", "{:.2f}"), ("proxy", "{:.2f}")]
    lines = table_row(["annotators follow gold in", "reward model agrees with gold", "gold score after GRPO",
                       "way to the maximum", "KL (nats)", "reward model's score"]) + table_row(["---"] * 6)
    for rate in dict.fromkeys(row["rate"] for row in rows):
        lines += table_row([f"{rate:.0%}", *(spread(by(rows, "rate", key)[rate], form) for key, form in forms)])
    choices = np.sign(margins(gold_score, heldout()))
    lines += ["", f"Seeds 1 to {len(seeds(config))}: mean (lowest to highest). Each reward model: "
              f"{full(config, NOISY_PAIRS, 100)} pairs, less those of equal gold score; GRPO: {rows[0]['steps']} steps "
              f"of 16 x 8, judged on {len(validation(config))} validation prompts with 4 samples each. Gold score of "
              f"the SFT model: {start:.2f}, the maximum: {MAXIMUM:.2f}. The annotators of "
              f"data/preferences.jsonl, who are seldom wrong where much is at stake, follow gold in "
              f"{np.mean(choices[choices != 0] > 0):.1%} of the held-out pairs. {date.today()}.", "", noise_words(rows)]
    write_study(config, "noise", lines, rows)
    finish(plot_noise(rows), Path(config.out) / "noise.png")


def heldout():
    return reward_model.read_heldout(DATA / "preferences_heldout.jsonl")


def validation(config):
    return held_out("animals", "val", full(config, config.eval_prompts, 20))


def sft_gold(config):
    """The SFT model's mean gold score on the validation prompts."""
    return evaluate(load_model(config.sft, "GPT", pick_device(config.device)), "animals", validation(config))["gold"][0]


def one_noise_run(config, rate, seed):
    """A reward model of such annotators, and a policy trained on it -> a row of the table."""
    choices = read_jsonl(DATA / "preferences.jsonl", reward_model.FIELDS)
    pairs = relabel(shuffled(choices, seed)[:full(config, NOISY_PAIRS, 100)], rate, seed)
    checkpoint, reward = train_reward_model(config, f"noise-reward-{rate:.0%}-{seed}", pairs,
                                            full(config, NOISY_UPDATES, 4), seed)
    policy, metrics = train_policy(config, f"noise-{rate:.0%}-{seed}", checkpoint, full(config, 70, 2), seed)
    sft = load_model(config.sft, "GPT", pick_device(config.device))
    figures, _ = measure(policy, sft, reward, validation(config))
    return dict(rate=rate, seed=seed, pairs=len(pairs), steps=len(metrics),
                agreement=gold_agreement(reward, heldout()),
                **{name: figures[name] for name in ("gold", "kl", "proxy")}, seconds=seconds_of(metrics))


def noise_words(rows):
    """Rows with rate, agreement and way, the highest rate first -> what they say, in words."""
    def at(figure):
        return {f"{rate:.0%}": values for rate, values in by(rows, "rate", figure).items()}
    noisy = {rate: values for rate, values in by(rows, "rate", "agreement").items() if rate < 1}
    better = [f"{rate:.0%}" for rate, values in noisy.items() if min(values) > rate]
    return " ".join([
        compared("Agreement of the reward model with gold, by that of its annotators", at("agreement"), "{:.1%}"),
        f"It agrees with gold more often than its annotators with every seed at {', '.join(better)}." if better else
        "Nowhere does it agree with gold more often than its annotators with every seed.",
        compared("Way from the SFT model to the maximum of gold after GRPO", at("way"), "{:.1%}")])


def plot_noise(rows):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, name, label in zip(axes, ["agreement", "way"], ["reward model agrees with gold, held-out pairs",
                                                              "way to the maximum of gold after GRPO"]):
        means = {rate: np.mean(values) for rate, values in by(rows, "rate", name).items()}
        axis.plot(list(means), list(means.values()), label="mean of the seeds")
        axis.plot([row["rate"] for row in rows], [row[name] for row in rows], "o", color="C0", alpha=0.5, ms=4,
                  label="each seed")
        axis.set(xlabel="annotators agree with gold (share of pairs)", ylabel=label)
    axes[0].plot(list(means), list(means), color="grey", lw=1, ls=":", label="as often as its annotators")
    axes[0].legend(frameon=False)
    return figure


# --- over-optimisation --------------------------------------------------------------------------------------------

def overoptimisation(config):
    """Proxy and gold score over the square root of the KL, for reward models of few and of many choices."""
    with beside_each_other(pick_device(config.device)) as begin:
        begin(pool, config).result()                    # sampled once, before the others look for it
        runs = [begin(one_overoptimisation_run, config, pairs, seed)
                for pairs in full(config, PAIRS, PAIRS[::len(PAIRS) - 1]) for seed in seeds(config)]
        runs = [run.result() for run in runs]
    rows, curves = ([row for run in runs for row in run[part]] for part in ("rows", "curves"))
    forms = [("agreement", "{:.1%}"), ("kl", "{:.2f}"), ("proxy", "{:.2f}"), ("gold", "{:.2f}"), ("lost", "{:.2f}"),
             ("alpha", "{:.2f}"), ("fitted_beta", "{:.2f}"), ("r2", "{:.2f}")]
    lines = table_row(["", "pairs", "reward model agrees with gold", "KL at the end (nats)", "score gained",
                       "gold gained", "gold lost since its best", "fit: alpha", "fit: beta", "fit: R^2"])
    lines += table_row(["---"] * 10)
    for arm, pairs in dict.fromkeys((row["arm"], row["pairs"]) for row in rows):
        chosen = [row for row in rows if (row["arm"], row["pairs"]) == (arm, pairs)]
        lines += table_row([arm, str(pairs), *(spread([row[key] for row in chosen], form) for key, form in forms)])
    lines += ["", f"Seeds 1 to {len(seeds(config))}, each with pairs of its own: mean (lowest to highest). RL: "
              f"{rows[0]['at']} steps of 16 x 8; best of n: up to n = {full(config, POOL, 8)}, KL at most log n - "
              f"(n - 1) / n. {full(config, WATCHED, 8)} validation prompts; gains are over the SFT model. The best "
              "point is chosen on every second prompt, what is lost since is measured on the others, so that choosing "
              "does not flatter it. Fits: gold gained = d (alpha - beta log d) in RL, d (alpha - beta d) in best of n, "
              f"d = sqrt(KL), by least squares to each seed. {date.today()}.", "", overoptimisation_words(rows), "",
              *examples([example for run in runs for example in run["hacked"]])]
    write_study(config, "overoptimisation", lines, rows, curves)
    finish(plot_overoptimisation(rows, curves), Path(config.out) / "overoptimisation.png")


def watched(config):
    return held_out("animals", "val", full(config, WATCHED, 8))


def pool(config):
    """Many answers of the SFT model to each of the watched prompts, sampled once -> {texts, finished, settings}."""
    path, prompts = folder(config, "pool.json"), [row["prompt"] for row in watched(config)]
    settings = dict(sft=fingerprint(config.sft), prompts=len(prompts), samples=full(config, POOL, 8))
    if path.exists() and (kept := json.loads(path.read_text()))["settings"] == settings:
        return kept
    sft = load_model(config.sft, "GPT", pick_device(config.device))
    texts, finished, _ = answers(sft, prompts, settings["samples"], 1.0, batch=8)
    kept = dict(settings=settings, texts=texts, finished=finished)
    make_folder(path.parent)
    save_file(path, json.dumps(kept).encode())
    return kept


def one_overoptimisation_run(config, pairs, seed):
    """A reward model of so many pairs, GRPO on it with each beta, the best of n by it -> rows, curves, answers."""
    choices = shuffled(read_jsonl(DATA / "preferences.jsonl", reward_model.FIELDS), seed)[:pairs]
    updates = full(config, max(100, 5 * pairs // 24), 4)                    # five passes, and at least 100 updates
    checkpoint, reward = train_reward_model(config, f"overoptimisation-reward-{pairs}-{seed}", choices, updates, seed)
    sft, rows = load_model(config.sft, "GPT", pick_device(config.device)), watched(config)
    steps, every = config.steps or full(config, 120, 2), full(config, EVERY, 1)
    arms, hacked = {}, []

    def watch(policy, step):
        if (step + 1) % every and step + 1 < steps:
            return {}
        return {f"val_{name}": value for name, value in measure(policy, sft, reward, rows)[0].items()}
    start, _ = measure(sft, sft, reward, rows)
    for beta in BETAS:
        policy, metrics = train_policy(config, f"overoptimisation-{pairs}-beta-{beta}-{seed}", checkpoint, steps, seed,
                                       watch, beta=beta)
        looks = [row for row in metrics if row.get("val_gold", "") != ""]
        arms[f"RL, beta {beta:g}"] = [dict(start, at=0, kl=0.0)] + [
            dict(at=row["step"] + 1, **{name: row[f"val_{name}"] for name in start}) for row in looks]
        if beta == 0 and seed == 1:
            hacked = [dict(pairs=pairs, prompt=prompt, text=text, proxy=proxy, gold=gold)
                      for prompt, text, proxy, gold in liked_and_bad(measure(policy, sft, reward, rows)[1])]
    arms[BEST_OF_N] = best_of_n(config, reward, rows)
    agreement, found, curves = gold_agreement(reward, heldout()), [], []
    for arm, points in arms.items():
        points = gains(points)
        same = dict(arm=arm, pairs=pairs, seed=seed)
        alpha, beta, r2 = fit(points, arm)
        lost, rise = lost_since_best(points, 1 if arm == BEST_OF_N else 3)
        found.append(dict(same, agreement=agreement, **points[-1], lost=lost, proxy_since_best=rise, alpha=alpha,
                          fitted_beta=beta, r2=r2))
        curves += [dict(same, **point) for point in points]
    return dict(rows=found, curves=curves, hacked=hacked)


def best_of_n(config, reward, rows):
    """The expected scores of the best of n answers by the reward, for n = 1, 2, 4, .. -> a point for each n."""
    answered = pool(config)
    size = answered["settings"]["samples"]
    column = columns([row for row in rows for _ in range(size)])
    proxy = np.reshape(reward(column["prompt"], answered["texts"], finished=answered["finished"]), (len(rows), size))
    gold = np.reshape(gold_score(column["prompt"], answered["texts"], column["animal"], column["attribute"]),
                      (len(rows), size))                                                      # (R, size)
    points = []
    for n in (2 ** k for k in range(size.bit_length())):
        best = expected_best(proxy, gold, n)                                                  # (R,)
        points.append(dict(at=n, kl=float(np.log(n) - (n - 1) / n), proxy=float(expected_best(proxy, proxy, n).mean()),
                           gold=float(best.mean()), gold_even=float(best[::2].mean()),
                           gold_odd=float(best[1::2].mean())))
    return points


def expected_best(scores, values, n):
    """The mean value of the answer that scores highest among n of a prompt's N, over all choices of n from the N:
    scores, values (R, N) -> (R,). Of equal scores the later answer counts as the higher.

    Unbiased for the best of n fresh answers (Nakano et al., 2112.09332). The answer of rank i is the best in
    C(i - 1, n - 1) of the C(N, n) choices.
    """
    N = scores.shape[1]
    share = np.array([comb(i - 1, n - 1) / comb(N, n) for i in range(1, N + 1)])              # (N,) sums to 1
    return np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1) @ share


def gains(points):
    """Points -> the same, with scores as gains over the first point, which is the SFT model. An estimate of KL below 0
    is noise and becomes 0."""
    names = ["proxy", "gold", "gold_even", "gold_odd"]
    return [dict(point, kl=max(point["kl"], 0.0), **{name: point[name] - points[0][name] for name in names})
            for point in points]


def form(d, arm):
    """Gao et al.'s forms (2210.10760): gold = alpha a - beta b, with a = d, and b = d^2 in best of n, d log d in RL;
    d = sqrt(KL) > 0 -> a, b."""
    return d, d * d if arm == BEST_OF_N else d * np.log(d)


def fit(points, arm):
    """Least squares of the form to gains in gold -> alpha, beta, R^2; None for each with fewer than three points, since
    two fit always, and for R^2 where gold does not change."""
    moved = [point for point in points if point["kl"] > 0]
    d, gold = np.sqrt([point["kl"] for point in moved]), np.array([point["gold"] for point in moved])
    if len(set(d)) < 3:
        return None, None, None
    a, b = form(d, arm)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([a, -b], axis=1), gold, rcond=None)
    total = ((gold - gold.mean()) ** 2).sum()
    rest = ((gold - alpha * a + beta * b) ** 2).sum()
    return float(alpha), float(beta), float(1 - rest / total) if total > 0 else None


def lost_since_best(points, window):
    """How much gold has fallen, and the proxy risen, from the point with the most gold to the last one; each a mean of
    `window` points in a row. The point is chosen on the even prompts, the fall measured on the odd ones."""
    even, odd, proxy = (np.convolve([point[name] for point in points], np.ones(window) / window, "valid")
                        for name in ("gold_even", "gold_odd", "proxy"))
    best = int(even.argmax())
    return float(odd[best] - odd[-1]), float(proxy[-1] - proxy[best])


def liked_and_bad(answered, count=3):
    """[(prompt, text, proxy, gold)] -> of the quarter that the reward model likes best, those with the least gold, each
    text once."""
    line = np.quantile([proxy for _, _, proxy, _ in answered], 0.75)
    liked = sorted((gold, -proxy, text, prompt) for prompt, text, proxy, gold in answered if proxy >= line)
    chosen = {}
    for gold, proxy, text, prompt in liked:
        chosen.setdefault(text, (prompt, text, -proxy, gold))
    return list(chosen.values())[:count]


def examples(hacked):
    lines = ["What the reward models came to like, after RL without a KL penalty (seed 1): of the quarter of the "
             "answers with the highest score, those with the least gold.", ""]
    lines += table_row(["pairs", "prompt", "answer", "reward model's score", "gold score"]) + table_row(["---"] * 5)
    for row in hacked:
        prompt, text = (" ".join(row[name].split()).replace("|", "\\|").replace("`", "'")
                        for name in ("prompt", "text"))
        lines += table_row([str(row["pairs"]), prompt, f"`{text or '(nothing)'}`", f"{row['proxy']:.2f}",
                            f"{row['gold']:.2f}"])
    return lines


def overoptimisation_words(rows):
    """Rows with arm, pairs, lost, proxy_since_best, gold and r2, a seed each -> what they say, in words.

    Over-optimised: gold has fallen from its best while the proxy rose.
    """
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in by(rows, "arm", "pairs")}
    of_arm, seen_at_all = [], False
    for arm, chosen in arms.items():
        found = {"with every seed": {}, "with some seeds": {}, "with no seed": {}}
        for pairs, lost in by(chosen, "pairs", "lost").items():
            fell = [row["lost"] > 0 and row["proxy_since_best"] > 0 for row in chosen if row["pairs"] == pairs]
            how_many = "with every seed" if all(fell) else "with some seeds" if any(fell) else "with no seed"
            found[how_many][f"{pairs} pairs"] = lost
        seen_at_all = seen_at_all or bool(found["with every seed"])
        of_arm.append(f"* {arm}: " + "; ".join(f"{how_many} {listed(of)}" for how_many, of in found.items() if of))
    seeds = len(lost)
    gold = {arm: {f"{pairs} pairs": values for pairs, values in by(chosen, "pairs", "gold").items()}
            for arm, chosen in arms.items()}
    plain, *penalised = [arm for arm in arms if arm != BEST_OF_N]
    fits = {arm: [row["r2"] for row in chosen if row["r2"] is not None] for arm, chosen in arms.items()}
    fits = {arm: r2 for arm, r2 in fits.items() if r2}
    return "\n".join([
        "Over-optimisation was seen: gold fell from its best while the reward model's score rose further."
        if seen_at_all else
        "Over-optimisation was not seen: in no setting did gold, with every seed, fall from its best while the reward "
        "model's score rose further.",
        "In brackets the gold lost; where gold has merely stopped rising, chance alone lets it fall with all of "
        f"{seeds} seeds about once in {2 ** seeds} times.", "", *of_arm, "",
        compared(f"Gold gained at the end of {plain}", gold[plain]),
        *(f"With {arm} in place of {plain}, gold at the end is {side_by_side(gold[arm], gold[plain])}."
          for arm in penalised),
        *([f"R^2 of Gao et al.'s forms, over single runs: {listed(fits)}."] if fits else [])])


def plot_overoptimisation(rows, curves):
    """Proxy (dashed) and gold (solid) over d, means of the seeds at the same step or n; each seed's gold as dots; the
    fitted form with the means of alpha and beta as a thin line."""
    arms = list(by(rows, "arm", "pairs"))
    figure, axes = plt.subplots(1, len(arms), figsize=(4.6 * len(arms), 4.6))
    for axis, arm in zip(axes, arms):
        for colour, pairs in enumerate(sorted(by(rows, "pairs", "arm"))):
            of = [point for point in curves if (point["arm"], point["pairs"]) == (arm, pairs)]
            means = {name: np.array([np.mean(values) for values in by(of, "at", name).values()])
                     for name in ("proxy", "gold")}
            d = np.array([np.mean(np.sqrt(values)) for values in by(of, "at", "kl").values()])
            axis.plot(d, means["proxy"], ls="--", color=f"C{colour}")
            axis.plot(d, means["gold"], color=f"C{colour}", label=f"{pairs} pairs")
            axis.plot([np.sqrt(point["kl"]) for point in of], [point["gold"] for point in of], ".", ms=2, alpha=0.5,
                      color=f"C{colour}")
            fits = [row for row in rows if (row["arm"], row["pairs"]) == (arm, pairs) and row["alpha"] is not None]
            if fits and d.max() > 0:
                x = np.linspace(d.max() / 100, d.max(), 100)
                a, b = form(x, arm)
                axis.plot(x, np.mean([row["alpha"] for row in fits]) * a - np.mean([row["fitted_beta"] for row in fits])
                          * b, lw=0.7, color=f"C{colour}")
        axis.set(title=arm, xlabel="sqrt(KL to the SFT model)" + (", bound" if arm == BEST_OF_N else ""),
                 ylabel="gain over the SFT model")
    axes[-1].plot([], [], color="grey", ls="--", label="reward model's score")
    axes[-1].plot([], [], color="grey", label="gold score (dots: each seed)")
    axes[-1].plot([], [], color="grey", lw=0.7, label="fitted form")
    axes[-1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


# --- where the KL is charged --------------------------------------------------------------------------------------

def kl_penalty(config):
    """GRPO with more and less KL penalty, charged in the loss or in the reward."""
    settings = [(0.0, "nowhere"), *((beta, where) for beta in full(config, KL_BETAS, KL_BETAS[-1:])
                                    for where in ("loss", "reward"))]
    with beside_each_other(pick_device(config.device)) as begin:
        runs = [begin(one_kl_run, config, beta, where, seed) for beta, where in settings for seed in seeds(config)]
        runs = [run.result() for run in runs]
    rows, curves = [row for row, _ in runs], [row for _, of_run in runs for row in of_run]
    forms = [("proxy", "{:.2f}"), ("kl", "{:.2f}"), ("gold", "{:.2f}"), ("length", "{:.1f}"), ("seconds", "{:.0f}")]
    lines = table_row(["beta", "KL charged in", "reward model's score", "KL (nats)", "gold score", "length (tokens)",
                       "seconds"]) + table_row(["---"] * 7)
    for beta, where in settings:
        chosen = [row for row in rows if (row["beta"], row["charged_in"]) == (beta, where)]
        lines += table_row([f"{beta:g}", where, *(spread([row[key] for row in chosen], form) for key, form in forms)])
    lines += ["", f"{rows[0]['steps']} steps of 16 x 8, seeds 1 to {len(seeds(config))}: mean (lowest to highest), on "
              f"{len(validation(config))} validation prompts with 4 samples each; KL by k1, which is unbiased. Length: "
              f"of the last ten steps. {date.today()}.", "", kl_words(rows)]
    write_study(config, "kl", lines, rows, curves)
    finish(plot_kl(rows), Path(config.out) / "kl.png")


def one_kl_run(config, beta, where, seed):
    """GRPO on the committed reward model -> a row of the table, and a row per step."""
    device = pick_device(config.device)
    policy, metrics = train_policy(config, f"kl-{beta}-{where}-{seed}", config.reward_model, full(config, 60, 2), seed,
                                   beta=beta, **(dict(kl="k1", kl_in="reward") if where == "reward" else {}))
    reward = learned(load_model(config.reward_model, "ScalarGPT", device))
    figures, _ = measure(policy, load_model(config.sft, "GPT", device), reward, validation(config))
    same = dict(beta=beta, charged_in=where, seed=seed)
    row = dict(same, steps=len(metrics), **{name: figures[name] for name in ("proxy", "kl", "gold")},
               length=float(np.mean([row["length"] for row in metrics[-10:]])), seconds=seconds_of(metrics))
    return row, [dict(same, **{name: row.get(name, "") for name in ("step", "reward", "kl", "length", "entropy")})
                 for row in metrics]


def kl_words(rows):
    """Rows with beta, charged_in, kl and gold, a seed each, beta 0 first -> what they say, in words."""
    def of(figure, where):
        return by([row for row in rows if row["charged_in"] in ("nowhere", where)], "beta", figure)
    said = []
    for where in "loss", "reward":
        drift = of("kl", where)
        steps = list(zip(drift.values(), list(drift.values())[1:]))
        falls = sum(max(more) < min(less) for less, more in steps)
        said.append(f"Charged in the {where}, KL goes from {spread(steps[0][0], '{:.2f}')} at beta 0 to "
                    f"{spread(steps[-1][1], '{:.2f}')} at beta {list(drift)[-1]:g}; it falls with every seed from one "
                    f"beta to the next in {falls} of {len(steps)} cases.")
    for figure, name in ("kl", "KL"), ("gold", "gold"):
        loss, reward = ({f"beta {beta:g}": values for beta, values in of(figure, where).items() if beta > 0}
                        for where in ("loss", "reward"))
        said.append(f"Charged in the loss, against in the reward, {name} is {side_by_side(loss, reward)}.")
    labels = {f"beta {beta:g} in the {where}" if beta else "beta 0": values for where in ("loss", "reward")
              for beta, values in of("gold", where).items()}
    return " ".join([*said, compared("Gold score", labels)])


def plot_kl(rows):
    """Gold and proxy of each run against its KL: a colour for each beta, a marker for where the KL is charged."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    betas = list(by(rows, "beta", "kl"))
    markers = {"nowhere": "D", "loss": "o", "reward": "^"}
    for axis, name, label in zip(axes, ["gold", "proxy"], ["gold score", "reward model's score"]):
        for row in rows:
            axis.plot(row["kl"], row[name], markers[row["charged_in"]], color=f"C{betas.index(row['beta'])}", ms=6,
                      alpha=0.75, mew=0)
        axis.set(xlabel="KL to the SFT model (nats per completion)", ylabel=label)
    for i, beta in enumerate(betas):
        axes[1].plot([], [], "s", color=f"C{i}", mew=0, label=f"beta {beta:g}")
    for where in "loss", "reward":
        axes[1].plot([], [], markers[where], color="grey", mew=0, label=f"charged in the {where}")
    axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


STUDIES = {"noise": noise, "overoptimisation": overoptimisation, "kl": kl_penalty}
