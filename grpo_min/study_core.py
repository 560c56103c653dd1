"""Studies of what GRPO claims: python -m grpo_min.study is_rl_needed, or critic

is_rl_needed: GRPO against learning from right answers alone (filtered SFT: STaR, Zelikman et al., 2203.14465; RAFT,
2304.06767), at equally many completions. Online, each step learns from its own right completions; offline, all
completions are sampled from the SFT model before it is fine-tuned on the right ones. The control is fine-tuned as long
on the demonstrations again.

critic: PPO with the critic started and trained in several ways, and GRPO, which has none.

Both run on the arithmetic task with 40 steps of 16 prompts x 8 completions from the same SFT weights, 5 seeds, and are
judged on the validation prompts. Each writes NAME.csv (a row per run), NAME-curves.csv, NAME.md and NAME.png.
"""
import json
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np

from grpo_min import grpo, ppo, sft
from grpo_min.compare import beside_each_other, train_or_reuse
from grpo_min.config import pick_device, require
from grpo_min.evaluate import held_out
from grpo_min.metrics import thinks
from grpo_min.model import ScalarGPT
from grpo_min.plots import finish, plt
from grpo_min.report import (best_of, first_of, in_words, last_of, seconds_of, sides, smooth, spread, state_bytes,
                             table_row, write_study)
from grpo_min.rewards import correct, score
from grpo_min.rollout import Prompts, frozen_logprobs, sample
from grpo_min.runs import DATA, batch_rows, generator, load_model, make_folder, read_jsonl, save_file

Q, G = 16, 8              # prompts per step, completions per prompt


def size(config):
    """Seeds and steps of a study."""
    return config.seeds or (1 if config.quick else 5), config.steps or (3 if config.quick else 40)


def measure(policy, reference, rows, samples=4):
    """Answer each of the rows `samples` times -> accuracy, share of thinking, length (tokens), and the KL (policy ||
    reference) in nats per completion, estimated by k3."""
    device, found = next(policy.parameters()).device, []
    for i in range(0, len(rows), 250):
        part = rows[i:i + 250]
        prompts = Prompts.from_texts([row["prompt"] for row in part], device)
        rollout = sample(policy, prompts, samples, 40, 1.0, generator(0, i))                  # as evaluate.py does
        right, texts = score(correct, part, rollout, samples)                                 # (B,)
        ref_logprobs = frozen_logprobs(reference, prompts, rollout, 1.0, 1)                   # (B, N)
        kl = grpo.kl_estimate(rollout.logprobs, ref_logprobs, "k3") * rollout.mask            # (B, N)
        found += zip(right.tolist(), map(thinks, texts), rollout.length.tolist(), kl.sum(dim=1).tolist())
    return dict(zip(["accuracy", "thinking", "length", "kl"], map(float, np.mean(found, axis=0))))


def table(what, columns, found):
    """{label: rows of its seeds} as Markdown; columns: {heading: (key, form)}."""
    lines = table_row([what, *columns]) + table_row(["---"] * (len(columns) + 1))
    for label, rows in found.items():
        lines += table_row([label, *(spread([row[key] for row in rows], form) for key, form in columns.values())])
    return lines


def named(labels):
    return ", ".join(f"`{label}`" for label in labels)


def quoted(of_label, labels, form):
    return ", ".join(f"`{label}` ({spread(of_label[label], form)})" for label in labels)


# --- is_rl_needed -------------------------------------------------------------------------------------------------

ONLINE, OFFLINE, MORE, SFT = "filtered SFT, online", "filtered SFT, offline", "SFT for longer", "SFT"
EPOCHS, BATCH, LR = 4, 32, 1e-3                     # of the offline fine-tuning
SHARES = [0.25, 0.5, 1]                             # of the completions: what the offline curve is made of


def is_rl_needed(config):
    """GRPO, filtered SFT online and offline, and SFT for longer: what they reach, and what that says."""
    seeds, steps = size(config)
    with beside_each_other(pick_device(config.device)) as begin:
        ways = {"GRPO": online, ONLINE: online, OFFLINE: offline, MORE: offline}
        jobs = {way: [begin(train, config, way, seed, steps) for seed in range(1, seeds + 1)]
                for way, train in ways.items()}
        start = begin(sft_figures, config).result()
        results = {way: [job.result() for job in of_way] for way, of_way in jobs.items()}
    found = {way: [reached for reached, _ in of_way] for way, of_way in results.items()}
    curves = [row for of_way in results.values() for _, rows in of_way for row in rows]
    columns = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
               "KL (nats)": ("kl", "{:.2f}"), "length (tokens)": ("length", "{:.1f}"),
               "completions": ("completions", "{:.0f}"), "updates": ("updates", "{:.0f}")}
    lines = table("", columns, {SFT: [start], **found})
    lines += ["", f"{steps} steps of {Q} prompts x {G} completions, seeds 1 to {seeds}: mean (lowest to highest). "
              f"Without a KL penalty. {config.eval_prompts} validation prompts, 4 samples each; KL to the SFT model. "
              f"Offline: {EPOCHS} epochs over the right completions; {MORE}: as many updates of the same size on "
              f"the demonstrations. No learning rate was tuned for its way. Online filtered SFT is `--advantage none`: "
              "cross-entropy on the right completions is REINFORCE with rewards of 0 and 1 and no baseline. "
              f"{date.today()}.", "", rl_in_words(start, found)]
    write_study(config, "is_rl_needed", lines, [start, *(row for rows in found.values() for row in rows)], curves)
    plot_ways(start, found, curves, Path(config.out) / "is_rl_needed.png")


def sft_figures(config):
    policy = load_model(config.sft, "GPT", pick_device(config.device))
    return dict(setting=SFT, seed=0, completions=0, updates=0,
                **measure(policy, policy, held_out("arithmetic", "val", config.eval_prompts)))


def online(config, way, seed, steps):
    """Train GRPO, or filtered SFT online, with one seed -> what it reached, and the rows of its curve: accuracy against
    completions."""
    policy, metrics = train_or_reuse(grpo.train, grpo.GRPOConfig(
        run=str(Path(config.run) / f"is_rl_needed-{way}-{seed}".replace(" ", "_")), sft=config.sft, seed=seed,
        device=config.device, steps=steps, prompts_per_step=Q, group_size=G, beta=0.0,
        advantage="none" if way == ONLINE else "mean"))
    start = load_model(config.sft, "GPT", pick_device(config.device))
    rows = held_out("arithmetic", "val", config.eval_prompts)
    curve = [dict(setting=way, seed=seed, completions=row["completions"], accuracy=row["accuracy"]) for row in metrics]
    return dict(setting=way, seed=seed, completions=steps * Q * G, updates=steps, **measure(policy, start, rows)), curve


def offline(config, way, seed, steps):
    """Fine-tune on the right completions of the SFT model (or as long on the demonstrations) with one seed -> what that
    reached with all completions, and the rows of its curve: of the first quarter, the first half, and all."""
    start = load_model(config.sft, "GPT", pick_device(config.device))
    rows = held_out("arithmetic", "val", config.eval_prompts)
    right, curve = right_answers(start, seed, steps), []
    make_folder(Path(config.run))
    for share in SHARES if way == OFFLINE else [1]:
        sampled = max(1, int(share * steps))                                                  # steps
        chosen = [row for of_step in right[:sampled] for row in of_step]
        require(len(chosen) >= BATCH, f"only {len(chosen)} of {sampled * Q * G} answers are right: too few for batches "
                f"of {BATCH}")
        folder = Path(config.run) / f"is_rl_needed-{way}-{share}-{seed}".replace(" ", "_")
        file = Path(f"{folder}.jsonl") if way == OFFLINE else DATA / "sft.jsonl"
        if way == OFFLINE:
            save_file(file, "".join(json.dumps(row) + "\n" for row in chosen).encode())
        policy, metrics = train_or_reuse(sft.train, sft.SFTConfig(
            run=str(folder), base=config.sft, demonstrations=str(file), steps=EPOCHS * len(chosen) // BATCH,
            batch_size=BATCH, lr=LR, warmup=10, seed=seed, device=config.device))
        reached = dict(setting=way, seed=seed, completions=sampled * Q * G if way == OFFLINE else 0,
                       updates=len(metrics), **measure(policy, start, rows))
        curve.append({key: reached[key] for key in ("setting", "seed", "completions", "accuracy")})
    return reached, curve


def right_answers(policy, seed, steps):
    """What GRPO would sample in so many steps if the policy stayed as it is, and of it the right completions: for each
    step a list of {prompt, response}."""
    rows, found = read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"], Q), []
    for step in range(steps):
        batch = [rows[i] for i in batch_rows(len(rows), Q, seed, step)]
        prompts = Prompts.from_texts([row["prompt"] for row in batch], next(policy.parameters()).device)
        rollout = sample(policy, prompts, G, 40, 1.0, generator(seed, step))
        rewards, texts = score(correct, batch, rollout, G)                                    # (B,)
        found.append([dict(prompt=batch[b // G]["prompt"], response=texts[b]) for b in range(Q * G) if rewards[b] > 0])
    return found


def rl_in_words(start, found):
    """What the SFT model scored and {way: rows of its seeds}, GRPO first -> what that says, in plain words."""
    accuracy, kl = ({way: [row[key] for row in rows] for way, rows in found.items()} for key in ("accuracy", "kl"))
    completions = {way: np.mean([row["completions"] for row in rows]) for way, rows in found.items()}
    said, (first, *others) = [in_words(accuracy, completions)], found
    gains = {way: np.array(values) - start["accuracy"] for way, values in accuracy.items()}
    if min(gains[first]) > 0:
        shares = [f"`{way}` gains {spread(gains[way] / gains[first], '{:.0%}')}" for way in others]   # seed by seed
        said.append(f"Of what `{first}` gains over the SFT model ({start['accuracy']:.1%}), {', '.join(shares)}.")
    else:
        said.append(f"`{first}` did not gain over the SFT model ({start['accuracy']:.1%}) with every seed.")
    above, below, rest = sides(kl)
    said += [f"{words} the SFT model than `{first}` ({spread(kl[first], '{:.2f}')} nats) with every seed: "
             f"{quoted(kl, labels, '{:.2f}')}." for words, labels in [("Farther from", above), ("Nearer to", below)]
             if labels]
    said += [f"In KL, no difference from `{first}` shown: {named(rest)}."] if rest else []
    return " ".join(said)


def plot_ways(start, found, curves, path):
    """Accuracy against completions: in training where it is online, of validation prompts where it is not."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[3, 2])
    right.axvline(start["accuracy"], color="grey", lw=1)
    left.axhline(start["accuracy"], color="grey", lw=1, label=SFT)
    for position, (way, rows) in enumerate(found.items()):
        of_seeds = [[row for row in curves if row["setting"] == way and row["seed"] == seed]
                    for seed in [row["seed"] for row in rows]]
        window = 1 if way in (OFFLINE, MORE) else 5
        y = np.array([smooth([row["accuracy"] for row in of_seed], window) for of_seed in of_seeds])   # (seeds, points)
        x = [row["completions"] for row in of_seeds[0]]
        line, = left.plot(x, y.mean(0), "o-" if window == 1 else "-", label=way)
        left.fill_between(x, y.min(0), y.max(0), alpha=0.15, color=line.get_color(), lw=0)
        right.plot([row["accuracy"] for row in rows], [position] * len(rows), "o", color=line.get_color())
    left.set(xlabel="completions sampled", ylabel="accuracy (lines: in training; dots: validation)")
    left.legend(frameon=False, fontsize=8, title="mean, band: all seeds", title_fontsize=8)
    right.set(xlabel="validation accuracy after training (grey: SFT)", yticks=range(len(found)),
              yticklabels=list(found))
    right.invert_yaxis()
    finish(figure, path)


# --- critic -------------------------------------------------------------------------------------------------------

SHARED_TRUNK, NO_CRITIC = "shared trunk", "no critic (GRPO)"
CRITICS = {               # label: settings of PPO
    "separate": {},
    NO_CRITIC: {},
    "separate, warmed up 10 steps": dict(critic_warmup=10),
    "separate, from the reward model": dict(critic="reward_model"),
    "separate, lambda 1": dict(lam=1.0),
    SHARED_TRUNK: dict(critic_lr=grpo.GRPOConfig.lr),             # the trunk is the policy, and learns at its rate
}


def shared_trunk(config, policy, device):
    """In place of ppo.start_critic: a critic whose trunk is the policy itself. Only the scalar head is its own.

    Policy and critic then take turns in moving the trunk, each with its own optimizer.
    """
    critic = ScalarGPT(policy.config).to(device)
    critic.trunk = policy
    return critic


def critic(config):
    """PPO with every kind of critic, and GRPO: what they reach, and what that says."""
    seeds, steps = size(config)
    labels = ["separate", NO_CRITIC, SHARED_TRUNK] if config.quick else list(CRITICS)
    with beside_each_other(pick_device(config.device)) as begin:
        jobs = {label: [begin(one_critic, config, label, seed, steps) for seed in range(1, seeds + 1)]
                for label in labels}
        results = {label: [job.result() for job in of_label] for label, of_label in jobs.items()}
    found = {label: [reached for reached, _ in of_label] for label, of_label in results.items()}
    curves = [row for of_label in results.values() for _, rows in of_label for row in rows]
    columns = {"accuracy (validation)": ("accuracy", "{:.1%}"), "thinking": ("thinking", "{:.1%}"),
               "KL (nats)": ("kl", "{:.2f}"), "explained variance, first 10 steps": ("ev_first", "{:.2f}"),
               "best 10": ("ev_best", "{:.2f}"), "last 10": ("ev_last", "{:.2f}"), "all": ("ev_mean", "{:.2f}"),
               "model state (MB)": ("megabytes", "{:.1f}"), "seconds": ("seconds", "{:.0f}")}
    lines = table("critic", columns, found)
    lines += ["", f"{steps} steps of {Q} prompts x {G} completions, seeds 1 to {seeds}: mean (lowest to highest). "
              f"Explained variance: of the actual returns, 1 is perfect, 0 as good as a constant. "
              f"{config.eval_prompts} validation prompts, 4 samples each; KL to the SFT model. Model state: weights, "
              "gradients and Adam's moments, counted; with a shared trunk, each of the two optimizers has moments of "
              f"the trunk. The reward model has learned from the animals alone. {date.today()}.", "",
              critic_in_words(found)]
    write_study(config, "critic", lines, [row for rows in found.values() for row in rows], curves)
    plot_critics(found, curves, Path(config.out) / "critic.png")


def one_critic(config, label, seed, steps):
    """Train PPO with this critic (or GRPO) -> what it reached, and rows of how, one per step."""
    run = str(Path(config.run) / f"critic-{label}-{seed}".replace(", ", "-").replace(" ", "_"))
    settings = dict(run=run, sft=config.sft, device=config.device, seed=seed, steps=steps, prompts_per_step=Q,
                    group_size=G)
    start_critic = shared_trunk if label == SHARED_TRUNK else ppo.start_critic
    with mock.patch.object(ppo, "start_critic", start_critic):
        if label == NO_CRITIC:
            settings = grpo.GRPOConfig(**settings)
            policy, metrics = train_or_reuse(grpo.train, settings)
        else:
            settings = ppo.PPOConfig(**settings, **CRITICS[label])
            policy, metrics = train_or_reuse(ppo.train, settings)
    start = load_model(config.sft, "GPT", pick_device(config.device))
    reached = measure(policy, start, held_out("arithmetic", "val", config.eval_prompts))
    ev = [row["explained_variance"] for row in metrics if row.get("explained_variance", "") != ""]
    reached = dict(setting=label, seed=seed, **reached, ev_first=first_of(metrics, "explained_variance"),
                   ev_best=best_of(metrics, "explained_variance"), ev_last=last_of(metrics, "explained_variance"),
                   ev_mean=float(np.mean(ev)) if ev else None, megabytes=model_state(policy, settings, label) / 1e6,
                   seconds=seconds_of(metrics))
    kept = ["step", "completions", "accuracy", "explained_variance"]
    return reached, [dict(setting=label, seed=seed, **{key: row.get(key, "") for key in kept}) for row in metrics]


def model_state(policy, settings, label):
    """Bytes of the model state, as report.state_bytes counts them, but a shared trunk and its gradients once."""
    state = sum(state_bytes(policy, settings).values())
    trunk = sum(p.numel() * p.element_size() for p in policy.parameters())
    return state - (2 * trunk if label == SHARED_TRUNK else 0)


def critic_in_words(found):
    """{critic: rows of its seeds} -> what that says, in plain words."""
    accuracy = {label: [row["accuracy"] for row in rows] for label, rows in found.items()}
    said = [in_words(accuracy, {label: 1 for label in found})]
    explained = {label: [row["ev_mean"] for row in rows] for label, rows in found.items()
                 if all(row["ev_mean"] is not None for row in rows)}
    first = next(iter(found))
    if first in explained:
        above, below, rest = sides(explained)
        said.append(f"Along the run, `{first}` explains {spread(explained[first], '{:.2f}')} of the variance of the "
                    f"returns; more with every seed: {quoted(explained, above, '{:.2f}') or 'none'}; less: "
                    f"{quoted(explained, below, '{:.2f}') or 'none'}"
                    + (f"; no difference shown: {named(rest)}." if rest else "."))
    pairs = [(row["ev_mean"], row["accuracy"]) for label in explained for row in found[label]]
    if len(pairs) >= 5:
        value, low, high = correlation(pairs)
        said.append(f"Over the {len(pairs)} runs with a critic, explained variance and final accuracy have a "
                    f"correlation of {value:.2f} (95% interval {low:.2f} to {high:.2f}): "
                    + ("critics that explain more go with better policies." if low > 0 else
                       "critics that explain more go with worse policies." if high < 0 else
                       "that a better critic makes a better policy is not shown."))
    if SHARED_TRUNK in found:
        said.append(f"The model state has {found[first][0]['megabytes']:.1f} MB with a critic of its own, "
                    f"{found[SHARED_TRUNK][0]['megabytes']:.1f} MB with a shared trunk and "
                    f"{found[NO_CRITIC][0]['megabytes']:.1f} MB without a critic.")
    return " ".join(said)


def correlation(pairs, resamples=1000):
    """[correlation, low, high] of n pairs of numbers, with the 95% bootstrap interval over pairs."""
    pairs, rng = np.array(pairs), np.random.default_rng(0)

    def of(chosen):
        x, y = (chosen - chosen.mean(0)).T                                                    # (n,) each
        return (x * y).sum() / max(np.sqrt((x ** 2).sum() * (y ** 2).sum()), 1e-12)
    drawn = [of(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(resamples)]
    return [of(pairs), *np.percentile(drawn, [2.5, 97.5])]


def plot_critics(found, curves, path):
    """Explained variance along the runs, and with it, run by run, the accuracy at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for label, rows in found.items():
        if rows[0]["ev_mean"] is None:                                                        # no critic
            for row in rows:
                right.axhline(row["accuracy"], color="grey", lw=1, label=label if row is rows[0] else None)
            continue
        of_seeds = [[row for row in curves if row["setting"] == label and row["seed"] == of_seed["seed"]]
                    for of_seed in rows]
        y = np.array([smooth([row["explained_variance"] or 0 for row in of_seed]) for of_seed in of_seeds])
        x = [row["completions"] for row in of_seeds[0]]
        line, = left.plot(x, y.mean(0), label=label)                                          # y: (seeds, steps)
        left.fill_between(x, y.min(0), y.max(0), alpha=0.15, color=line.get_color(), lw=0)
        right.plot([row["ev_mean"] for row in rows], [row["accuracy"] for row in rows], "o", color=line.get_color(),
                   label=label)
    left.axhline(0, color="grey", lw=1)
    left.set(xlabel="completions sampled", ylabel="explained variance (mean of 5 steps; band: all seeds)")
    right.set(xlabel="explained variance, mean of the run", ylabel="validation accuracy after training, each seed")
    right.legend(frameon=False, fontsize=8)
    finish(figure, path)
