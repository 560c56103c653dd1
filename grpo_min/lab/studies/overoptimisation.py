"""Is a learned reward over-optimised? Reward models of few and of many choices, and policies that are pushed far
towards what they like, by GRPO and PPO and by taking the best of n answers, or by DPO on the same choices.

The reward model's score (the proxy) is followed beside the gold score, over the square root of the KL to the SFT model,
and Gao et al.'s forms (2210.10760) are fitted to the gold score; that of RL suits DPO, too (Rafailov et al.,
2406.02900). On the animals, from the SFT model, 5 seeds, judged on the validation prompts. Writes overoptimisation.csv
(a row per run and arm), -curves.csv, .md and .png.
"""
import functools
import json
from datetime import date
from math import comb
from pathlib import Path

import numpy as np

from grpo_min import critic, dpo, reward_model
from grpo_min.evaluate import answers, held_out
from grpo_min.gold import gold_score
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.studies.common import (column_by, gold_agreement, grouped, heldout_pairs, load_sft, measure_animals,
                                         run_jobs, seed_table, seeds_of, shuffled, sized, table, train_policy,
                                         train_reward_model, write_study)
from grpo_min.run.data import columns, read_jsonl
from grpo_min.run.files import DATA, fingerprint, make_folder, save_file
from grpo_min.run.plots import finish, plt

PAIRS = [4000, 1000, 200, 50]          # choices that a reward model learns from
BETAS = [0.0, 0.3]                     # of the RL that over-optimises
DPO_BETAS = [0.5, 0.1]                 # the default, and that of its authors
ALL_ARMS = 1000                        # pairs of which PPO and DPO with its authors' beta learn, too
BEST_OF_N = "best of n"
EQUAL_KL = [1.5, 4]                    # nats at which the arms are compared
LABELS = {"": ("arm", "{}"), "pairs": ("pairs", "{}")}
NUMBERS = {"reward model agrees with gold": ("agreement", "{:.1%}"), "KL at the end (nats)": ("kl", "{:.2f}"),
           "score gained": ("proxy", "{:.2f}"), "gold gained": ("gold", "{:.2f}"),
           **{f"at {kl} nats": (f"gold_at_{kl}", "{:.2f}") for kl in EQUAL_KL},
           "gold lost since its best": ("lost", "{:.2f}"), "fit: alpha": ("alpha", "{:.2f}"),
           "fit: beta": ("fitted_beta", "{:.2f}"), "fit: R^2": ("r2", "{:.2f}")}


def study(config):
    run_jobs(config, pool, [()])                        # sampled once, before the others look for it
    jobs = [(pairs, seed) for pairs in sized(config, PAIRS, [ALL_ARMS, PAIRS[-1]]) for seed in seeds_of(config)]
    rows, curves, hacked = [], [], []
    for run_rows, run_curves, run_hacked in run_jobs(config, over_optimise, jobs):
        rows, curves, hacked = rows + run_rows, curves + run_curves, hacked + run_hacked
    for runs in grouped(rows, "arm", "pairs").values():
        for name in (f"gold_at_{kl}" for kl in EQUAL_KL):
            if None in column_by(runs, "arm", name)[runs[0]["arm"]]:      # a mean of some seeds would mislead
                for run in runs:
                    run[name] = None
    lines = seed_table(LABELS, NUMBERS, rows)
    lines += ["", f"Seeds 1 to {len(seeds_of(config))}, each with pairs of its own: mean (lowest to highest). RL and "
              f"PPO: {rows[0]['at']} steps of 16 x 8, PPO with a critic that was trained before on the reward model; "
              "DPO: on the reward model's pairs, as many updates of as many pairs as that had, but at most "
              f"{dpo.DPOConfig.steps}; best of n: up to n = {pool_size(config)}, KL at most log n - (n - 1) / n. The "
              f"score is always the reward model's. {len(watched(config))} validation prompts; gains are over the SFT "
              "model, at so many nats on a straight line over d = sqrt(KL) between two looks, - where a seed does not "
              "get there. The best point is chosen on every second prompt, what is lost since is measured on the "
              "others, so that choosing does not flatter it. Fits: gold gained = d (alpha - beta log d), d (alpha - "
              f"beta d) in best of n, by least squares to each seed. {date.today()}.", "",
              "Answers after RL without a KL penalty (seed 1): of the quarter that the reward model scores highest, "
              "those with the lowest gold score.", "", *hacked_table(hacked)]
    write_study(config, "overoptimisation", lines, rows, curves)
    plot_overoptimisation(rows, curves, Path(config.out) / "overoptimisation.png")


def watched(config):
    """The rows of the prompts that are looked at along the way."""
    return held_out("animals", "val", sized(config, 128, 8))


def over_optimise(config, pairs, seed):
    """A reward model of so many pairs, RL on it, DPO on the pairs, the best of n by it -> rows, rows of curves, and
    answers that the reward model likes."""
    choices = shuffled(read_jsonl(DATA / "preferences.jsonl", reward_model.FIELDS), seed)[:pairs]
    updates = sized(config, max(100, 5 * pairs // 24), 4)      # five passes, and at least 100 updates
    checkpoint, reward = train_reward_model(config, f"overoptimisation-reward-{pairs}-{seed}", choices, updates, seed)
    sft, prompts = load_sft(config), watched(config)
    steps, folder = config.steps or sized(config, 120, 2), Path(config.run) / f"overoptimisation-{pairs}"

    def watch(policy, step, steps=steps):
        if (step + 1) % max(1, steps // 12) and step + 1 < steps:      # twelve looks
            return {}
        figures, _ = measure_animals(policy, sft, reward, prompts)
        return {f"val_{name}": value for name, value in figures.items()}
    start, _ = measure_animals(sft, sft, reward, prompts)
    arms, hacked = {}, []
    for beta in BETAS:
        policy, arms[f"RL, beta {beta:g}"] = train_policy(config, f"{folder.name}-beta-{beta}-{seed}", checkpoint,
                                                          steps, seed, watch, beta=beta)
        if beta == 0 and seed == 1:
            _, answered = measure_animals(policy, sft, reward, prompts)
            hacked = [dict(answer, pairs=pairs) for answer in liked_and_bad(answered)]
    if pairs == ALL_ARMS:
        settings = critic.CriticConfig(run=f"{folder}-critic-{seed}", sft=config.sft, reward="learned", seed=seed,
                                       reward_model=str(checkpoint), device=config.device)
        settings.batches, settings.steps = sized(config, (settings.batches, settings.steps), (2, 2))
        train_or_reuse(critic.train, settings)
        _, arms["PPO, beta 0"] = train_policy(config, f"{folder.name}-ppo-{seed}", checkpoint, steps, seed, watch,
                                              beta=0.0, critic=f"{settings.run}/checkpoint.pt")
    for beta in DPO_BETAS if pairs == ALL_ARMS else DPO_BETAS[:1]:
        settings = dpo.DPOConfig(run=f"{folder}-dpo-{beta}-{seed}", sft=config.sft, beta=beta, seed=seed, batch_size=24,
                                 preferences=f"{checkpoint.parent}.jsonl", device=config.device)
        settings.steps = config.steps or min(updates, settings.steps)
        look = functools.partial(watch, steps=settings.steps)
        _, arms[f"DPO, beta {beta:g}"] = train_or_reuse(functools.partial(dpo.train, evaluate=look), settings)
    for arm, metrics in arms.items():
        looks = [row for row in metrics if row.get("val_gold", "") != ""]
        arms[arm] = [dict(start, at=0, kl=0.0)]
        for row in looks:
            arms[arm].append(dict(at=row["step"] + 1, **{name: row[f"val_{name}"] for name in start}))
    arms[BEST_OF_N] = best_of_n(config, reward, prompts)
    agreement, rows, curves = gold_agreement(reward, heldout_pairs()), [], []
    for arm, points in arms.items():
        points, label = gains(points), dict(arm=arm, pairs=pairs, seed=seed)
        alpha, beta, r2 = fit(points, arm)
        lost, rise = lost_since_best(points, 1 if arm == BEST_OF_N else 3)
        rows.append(dict(label, agreement=agreement, **points[-1], lost=lost, proxy_since_best=rise, alpha=alpha,
                         fitted_beta=beta, r2=r2, **{f"gold_at_{kl}": gold_at(points, kl) for kl in EQUAL_KL}))
        curves += [dict(label, **point) for point in points]
    return rows, curves, hacked


# --- best of n ----------------------------------------------------------------------------------------------------

def pool_size(config):
    return sized(config, 256, 8)


def pool(config):
    """Many answers of the SFT model to each of the watched prompts, sampled once -> {texts, finished, settings}."""
    path, prompts = Path(config.run) / "pool.json", [row["prompt"] for row in watched(config)]
    settings = dict(sft=fingerprint(config.sft), prompts=len(prompts), samples=pool_size(config))
    if path.exists() and (kept := json.loads(path.read_text("utf-8")))["settings"] == settings:
        return kept
    texts, finished, _ = answers(load_sft(config), prompts, settings["samples"], 1.0, batch=8)
    kept = dict(settings=settings, texts=texts, finished=finished)
    make_folder(path.parent)
    save_file(path, json.dumps(kept).encode())
    return kept


def best_of_n(config, reward, rows):
    """The expected scores of the best of n answers by the reward, for n = 1, 2, 4, .. -> a point for each n."""
    answered, size = pool(config), pool_size(config)
    column = columns([row for row in rows for _ in range(size)])
    proxy = reward(column["prompt"], answered["texts"], finished=answered["finished"])
    gold = gold_score(column["prompt"], answered["texts"], column["animal"], column["attribute"])
    proxy, gold = np.reshape(proxy, (len(rows), size)), np.reshape(gold, (len(rows), size))  # (R, size) each
    points = []
    for n in (2 ** k for k in range(size.bit_length())):
        best = expected_best(proxy, gold, n)  # (R,)
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
    share = np.array([comb(i - 1, n - 1) / comb(N, n) for i in range(1, N + 1)])  # (N,) sums to 1
    return np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1) @ share


# --- gains, fits and losses ---------------------------------------------------------------------------------------

def gains(points):
    """Points -> the same, with scores as gains over the first point, which is the SFT model. An estimate of KL below 0
    is noise and becomes 0."""
    start, gained = points[0], []
    for point in points:
        scores = {name: point[name] - start[name] for name in ("proxy", "gold", "gold_even", "gold_odd")}
        gained.append(dict(point, kl=max(point["kl"], 0.0), **scores))
    return gained


def gold_at(points, kl):
    """Gold gained where the KL first reaches this one, between two points linear in sqrt(KL); None if it never does."""
    for before, after in zip(points, points[1:]):
        if before["kl"] < kl <= after["kl"]:
            share = (kl ** 0.5 - before["kl"] ** 0.5) / (after["kl"] ** 0.5 - before["kl"] ** 0.5)
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


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
    unexplained = ((gold - alpha * a + beta * b) ** 2).sum()
    return float(alpha), float(beta), float(1 - unexplained / total) if total > 0 else None


def lost_since_best(points, window):
    """How much gold has fallen, and the proxy risen, from the point with the most gold to the last one; each a mean of
    `window` points in a row. The point is chosen on the even prompts, the fall measured on the odd ones."""
    def means(name):
        return np.convolve([point[name] for point in points], np.ones(window) / window, "valid")
    even, odd, proxy = means("gold_even"), means("gold_odd"), means("proxy")
    best = int(even.argmax())
    return float(odd[best] - odd[-1]), float(proxy[-1] - proxy[best])


# --- answers ------------------------------------------------------------------------------------------------------

def liked_and_bad(answered, count=3):
    """[(prompt, text, proxy, gold)] -> of the quarter that the reward model likes best, those with the least gold, each
    text once, as dicts."""
    line = np.quantile([proxy for _, _, proxy, _ in answered], 0.75)
    liked = sorted((gold, -proxy, text, prompt) for prompt, text, proxy, gold in answered if proxy >= line)
    distinct = {}
    for gold, minus_proxy, text, prompt in liked:
        distinct.setdefault(text, dict(prompt=prompt, text=text, proxy=-minus_proxy, gold=gold))
    return list(distinct.values())[:count]


def hacked_table(hacked):
    lines = []
    for row in hacked:
        prompt, text = (" ".join(row[name].split()).replace("|", "\\|").replace("`", "'")
                        for name in ("prompt", "text"))
        lines.append([str(row["pairs"]), prompt, f"`{text or '(nothing)'}`", f"{row['proxy']:.2f}",
                      f"{row['gold']:.2f}"])
    return table(["pairs", "prompt", "answer", "reward model's score", "gold score"], lines)


def plot_overoptimisation(rows, curves, path):
    """A panel for each arm that learned from every number of pairs, and one for all arms at ALL_ARMS pairs.

    Proxy (dashed) and gold (solid) over d, means of the seeds at the same step or n; each seed's gold as dots; the
    fitted form with the means of alpha and beta as a thin line.
    """
    panels = {arm: points for (arm,), points in grouped(curves, "arm").items() if len(grouped(points, "pairs")) > 1}
    panels[f"all at {ALL_ARMS} pairs"] = [point for point in curves if point["pairs"] == ALL_ARMS]
    figure, axes = plt.subplots(2, 3, figsize=(13.8, 9.2))
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        for colour, ((arm, pairs), line) in enumerate(grouped(panel, "arm", "pairs").items()):
            d = [np.mean(np.sqrt(values)) for values in column_by(line, "at", "kl").values()]
            axis.plot(d, [np.mean(values) for values in column_by(line, "at", "proxy").values()], ls="--", lw=1,
                      color=f"C{colour}")
            axis.plot(d, [np.mean(values) for values in column_by(line, "at", "gold").values()], color=f"C{colour}",
                      label=f"{pairs} pairs" if title == arm else arm)
            axis.plot(np.sqrt([point["kl"] for point in line]), [point["gold"] for point in line], ".", ms=2, alpha=0.5,
                      color=f"C{colour}")
            fits = [row for row in rows if (row["arm"], row["pairs"]) == (arm, pairs) and row["alpha"] is not None]
            if fits and max(d) > 0 and title == arm:
                x = np.linspace(max(d) / 100, max(d), 100)
                a, b = form(x, arm)
                alpha, beta = np.mean([(row["alpha"], row["fitted_beta"]) for row in fits], axis=0)
                axis.plot(x, alpha * a - beta * b, lw=0.7, color=f"C{colour}")
        axis.set(title=title, xlabel="sqrt(KL to the SFT model)" + (", bound" if title == BEST_OF_N else ""),
                 ylabel="gain over the SFT model")
        axis.legend(frameon=False, fontsize=8)
    for label, style in {"reward model's score": dict(ls="--", lw=1), "gold score (dots: each seed)": {},
                         "fitted form": dict(lw=0.7)}.items():
        axes[1, 2].plot([], [], color="grey", label=label, **style)
    axes[1, 2].axis("off")
    axes[1, 2].legend(frameon=False, loc="center")
    finish(figure, path)
