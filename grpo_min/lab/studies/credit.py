"""When does a critic pay? GRPO and PPO on a task with dials: how long a completion is, how noisy its reward, how large
a group.

The prompt has n digits, and each is to be answered by the digit after it. The reward is the share of right answers (or
1 if all are right, else 0), and noise may be added to it. The SFT model is right in 55% of the positions. A critic that
sees which digits went wrong can tell every token what it was worth; the mean of a group cannot.

Every run has 40 steps of 128 completions. Writes credit.csv (a row per run), credit-noise.csv (the gradient's noise at
the start), credit.md and credit.png, the map.
"""
import functools
import json
import random
from datetime import date
from pathlib import Path

import numpy as np
import torch

from grpo_min import critic, grpo, ppo, sft, variants
from grpo_min.lab.processes import train_or_reuse
from grpo_min.lab.report import smooth, spread, step_seconds
from grpo_min.lab.studies.common import column_by, grouped, run_jobs, seeds_of, sized, table, write_study
from grpo_min.lab.studies.gradients import first_gradient, jackknife, noise_to_signal, signal_to_noise
from grpo_min.model import ScalarGPT
from grpo_min.rollout import token_logprobs
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import pick_device
from grpo_min.run.files import make_folder, save_file
from grpo_min.run.metrics import Clock
from grpo_min.run.plots import finish, plt
from grpo_min.run.table import write_csv

COMPLETIONS, STEPS = 128, 40                      # of a step, of a run
LENGTHS, NOISES = [2, 4, 8, 16, 32], [0, 1, 3]    # noise: times the standard deviation of the SFT model's reward
GROUPS = [2, 4, 8, 16, 32, 64]
GOALS = {"share": 0.75, "all": 0.5}                # the reward without its noise, mean of 5 steps
GRPO, PPO, PPO_0, ORACLE = "GRPO", "PPO", "PPO, lambda 0", "PPO, oracle"
ARMS = {                                          # label: settings
    GRPO: {}, "no baseline": {}, PPO: {},
    "PPO, one completion per prompt": {},
    "PPO, lambda 1": dict(lam=1.0), "PPO, lambda 0.5": dict(lam=0.5), PPO_0: dict(lam=0.0),
    # As people start one: values of 0 from a scalar head, one update for a batch.
    "PPO, untrained critic": dict(critic="sft", critic_lr=5e-3, critic_minibatches=1),
    ORACLE: dict(critic="sft", critic_epochs=0), "PPO, oracle, lambda 0": dict(critic="sft", critic_epochs=0, lam=0.0),
}


def study(config):
    cells = [(n, "share", noise) for n in sized(config, LENGTHS, [2]) for noise in sized(config, NOISES, [0])]
    dials = sized(config, [(8, "share", 0), (8, "share", 3)], cells)
    whole = sized(config, [(2, "all", 0), (4, "all", 0)], [])
    jobs = [(cell, arm, 8) for cell in cells for arm in (GRPO, PPO, PPO_0)]
    jobs += [(cell, arm, 8) for cell in dials for arm in ARMS]
    jobs += [(dials[0], arm, G) for G in sized(config, GROUPS, [2]) for arm in (GRPO, PPO)]
    jobs += [(cell, arm, 8) for cell in whole for arm in (GRPO, "no baseline", PPO, ORACLE)]
    jobs = list(dict.fromkeys(jobs))
    every = list(dict.fromkeys(cell for cell, _, _ in jobs))
    lengths = list(dict.fromkeys(n for n, _, _ in every))
    models = dict(zip(lengths, run_jobs(config, fine_tuned, [(n,) for n in lengths])))
    critics = dict(zip(every, run_jobs(config, train_critic, [(cell, models[cell[0]]) for cell in every])))
    quiet = [cell for cell in cells if cell[2] in (0, NOISES[-1])]
    noise = sum(run_jobs(config, gradient_noise, [(cell, models[cell[0]], critics[cell]) for cell in quiet]), [])
    rows = sum(run_jobs(config, run_seeds, [(*job, models[job[0][0]], critics[job[0]]) for job in jobs]), [])
    lines = ["Completions to the goal, and with how many seeds PPO needs fewer than GRPO:", ""]
    lines += map_table(rows, critics) + ["", "All that was tried, with groups of 8:", ""]
    lines += arms_table([row for row in rows if row["G"] == 8 and cell_of(row) in dials + whole])
    lines += ["", "Group size, at 8 digits and without noise:", ""]
    lines += groups_table([row for row in rows if cell_of(row) == dials[0]])
    lines += ["", "Noise-to-signal of the gradient of a batch, at the start:", ""] + noise_table(noise)
    lines += ["", f"{sized(config, STEPS, 2)} steps of {COMPLETIONS} completions, beta 0, seeds 1 to "
              f"{len(seeds_of(config))}: mean (lowest to highest). Goal: a reward of {GOALS['share']} if it is the "
              f"share of right answers, of {GOALS['all']} if all have to be right; mean of five steps, without the "
              "noise. A run that does not get there counts as if it had with the next step. Noise: its standard "
              "deviation, in those of the SFT model's reward. Before PPO its critic has learned from "
              f"{next(iter(critics.values()))['completions']} completions. Oracle: means of 4 sampled continuations of "
              "each state. Noise-to-signal: trace of the gradient's covariance over the squared norm of its mean, with "
              f"its 95% interval (jackknife over the batches). {date.today()}."]
    write_study(config, "credit", lines, rows)
    write_csv(Path(config.out) / "credit-noise.csv", noise)
    plot_map(rows, critics, Path(config.out) / "credit.png")


# --- the task -----------------------------------------------------------------------------------------------------

def prompts_file(config, n):
    """JSONL of 2,000 prompts with n digits, and the right answers."""
    rng, rows, path = random.Random(n), [], Path(config.run) / f"credit-{n}.jsonl"
    for _ in range(2000):
        digits = [rng.randrange(10) for _ in range(n)]
        rows.append(dict(prompt=question(digits), right=[str((digit + 1) % 10) for digit in digits]))
    write_jsonl(path, rows)
    return path


def question(digits):
    return "add one: " + " ".join(map(str, digits))


def demonstrations_file(config, n):
    """JSONL of 8,000 answers that are right in 55% of the positions: half are right, the others drawn at random."""
    rng, rows, path = random.Random(-n), [], Path(config.run) / f"credit-{n}-sft.jsonl"
    for _ in range(8000):
        digits = [rng.randrange(10) for _ in range(n)]
        answers = [(digit + 1) % 10 if rng.random() < 0.5 else rng.randrange(10) for digit in digits]
        rows.append(dict(prompt=question(digits), response=" " + " ".join(map(str, answers))))
    write_jsonl(path, rows)
    return path


def write_jsonl(path, rows):
    make_folder(path.parent)
    save_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def right_share(text, right):
    """The share of right answers; 0 if their number differs."""
    given = text.split()
    return sum(map(str.__eq__, given, right)) / len(right) if len(given) == len(right) else 0.0


def reward_of(cell, seed, without_noise=None):
    """The reward function of a cell (n, kind, noise); the rewards without noise are appended to a list."""
    n, kind, noise = cell
    deviation, rng = noise * (0.55 * 0.45 / n) ** 0.5, random.Random(seed)

    def reward(prompts, completions, right, **columns):
        scores = [right_share(text, wanted) for text, wanted in zip(completions, right)]
        if kind == "all":
            scores = [float(score == 1) for score in scores]
        if without_noise is not None:
            without_noise.append(float(np.mean(scores)))
        return [score + rng.gauss(0, deviation) for score in scores]
    return reward


# --- running ------------------------------------------------------------------------------------------------------

def fine_tuned(config, n):
    """The SFT model of n digits -> its checkpoint."""
    run = Path(config.run) / f"credit-sft-{n}"
    train_or_reuse(sft.train, sft.SFTConfig(run=str(run), demonstrations=str(demonstrations_file(config, n)),
                                            steps=sized(config, 1500, 4), batch_size=32, device=config.device))
    return str(run / "checkpoint.pt")


def train_critic(config, cell, model):
    """PPO's critic of a cell -> its checkpoint, what it explains, and its costs."""
    n, kind, noise = cell
    steps = sized(config, 300, 4)
    settings = critic.CriticConfig(run=str(Path(config.run) / f"credit-critic-{n}-{kind}-{noise}"), sft=model,
                                   prompts=str(prompts_file(config, n)), steps=steps, batches=min(steps, 125),
                                   max_new_tokens=n + 2, device=config.device)
    train = functools.partial(critic.train, reward=reward_of(cell, "critic"))
    _, figures, rows = train_or_reuse(train, settings)
    return dict(figures, **critic.costs(settings, rows), checkpoint=f"{settings.run}/checkpoint.pt")


def run_seeds(config, cell, arm, G, model, warm):
    """Train an arm with every seed, or take what is there -> a row for each."""
    n, kind, noise = cell
    steps, seeds = config.steps or sized(config, STEPS, 2), list(seeds_of(config))
    path = Path(config.run) / f"credit-{n}-{kind}-{noise}-{arm}-{G}.json".replace(", ", "-").replace(" ", "-")
    settings = dict(steps=steps, seeds=seeds)
    if path.exists() and json.loads(path.read_text("utf-8"))["settings"] == settings:
        return json.loads(path.read_text("utf-8"))["rows"]
    rows = [train_arm(config, cell, arm, G, model, warm, seed, steps) for seed in seeds]
    save_file(path, json.dumps(dict(settings=settings, rows=rows), indent=1).encode())
    return rows


def train_arm(config, cell, arm, G, model, warm, seed, steps):
    """One run -> a row of the table."""
    n, kind, noise = cell
    G = 1 if "one completion" in arm else G
    without_noise, rewards = [], []
    reward = reward_of(cell, seed, without_noise)

    def evaluate(policy, step):
        """The first rewards of a step are those of its completions; later ones, of the ruler or the oracle."""
        rewards.append(without_noise[0])
        without_noise.clear()
        return {}
    settings = dict(run="", sft=model, prompts=str(prompts_file(config, n)), device=config.device, seed=seed,
                    steps=steps, prompts_per_step=COMPLETIONS // G, group_size=G, beta=0.0, max_new_tokens=n + 2)
    if "PPO" not in arm:
        advantage = variants.no_baseline if arm == "no baseline" else grpo.group_advantages
        _, metrics = grpo.train(grpo.GRPOConfig(**settings), reward, advantage=advantage, evaluate=evaluate)
    else:
        settings = ppo.PPOConfig(**{**settings, "critic": warm["checkpoint"], **ARMS[arm]})
        settings.critic_minibatches = min(settings.critic_minibatches, settings.prompts_per_step)
        start_critic = critic_of(arm, reward_of((n, kind, 0), seed))
        _, metrics = ppo.train(settings, reward, evaluate=evaluate, start_critic=start_critic)
    reached = [mean >= GOALS[kind] for mean in smooth(rewards)]
    needed = reached.index(True) + 1 if any(reached) else steps + 1
    explained = [row["explained_variance"] for row in metrics if row.get("explained_variance", "") != ""]
    return dict(n=n, kind=kind, noise=noise, arm=arm, G=G if G > 1 else 8, seed=seed, reached=any(reached),
                completions=needed * COMPLETIONS, seconds=sum(map(step_seconds, metrics[:needed])),
                end=float(np.mean(rewards[-5:])), explained=float(np.mean(explained)) if explained else "")


def plain(config, policy, device):
    """A critic with a number per state, all of them 0 at first."""
    return policy.with_head(ScalarGPT)


def critic_of(arm, true_reward):
    """Which critic an arm starts with."""
    if "oracle" in arm:
        return functools.partial(critic.Oracle, reward=true_reward)
    if "untrained" in arm:
        return plain
    return ppo.start_critic


# --- the gradient's noise -----------------------------------------------------------------------------------------

def gradient_noise(config, cell, model, warm):
    """Noise-to-signal of the gradient of the SFT model under each baseline, over M batches -> a row for each."""
    n, kind, noise = cell
    M, device, gradients = sized(config, 32, 3), pick_device(config.device), {}
    policy, reward = load_model(model, device), reward_of(cell, "gradient")
    settings = grpo.GRPOConfig(prompts_per_step=16, group_size=8, max_new_tokens=n + 2, seed="gradient")
    rows = [json.loads(line) for line in prompts_file(config, n).read_text("utf-8").splitlines()]
    living = load_model(warm["checkpoint"], device, critic.Critic)
    for step in range(M):
        batch, prompts, rollout, rewards, _ = grpo.collect(settings, policy, reward, rows, step, Clock(device))
        logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)  # (B, N)
        with torch.no_grad():
            values = {"PPO": living.values(prompts, rollout.completion_ids, rollout.mask)}  # (B, N)
        if n <= 8:
            values["oracle"] = critic.sampled_values(settings, policy, reward_of((n, kind, 0), 0), batch, prompts,
                                                     rollout, 4, f"oracle {step}")  # (B, N)
        advantages = {"group mean": grpo.group_advantages(rewards, 8)[:, None], "none": rewards[:, None]}  # (B, 1)
        for name, lam in [("PPO", 1.0), ("PPO", 0.95), ("PPO", 0.5), ("PPO", 0.0), ("oracle", 0.95), ("oracle", 0.0)]:
            if name in values:
                charged = rollout.at_last_token(rewards)  # (B, N)
                advantages[f"{name}, lambda {lam:g}"], _ = ppo.gae(charged, values[name], rollout.mask, 1.0, lam)
        for name, advantage in advantages.items():
            gradients.setdefault(name, []).append(first_gradient(logprobs, advantage, rollout.mask, policy).cpu())
    found = []
    for name, batches in gradients.items():
        stacked = torch.stack(batches)  # (M, weights)
        gram = (stacked @ stacked.T).double().numpy()  # (M, M)
        value, low, high = noise_to_signal(jackknife(lambda kept: signal_to_noise(gram[np.ix_(kept, kept)]), M))
        found.append(dict(n=n, noise=noise, advantage=name, value=value, low=low, high=high))
    return found


# --- tables and the map -------------------------------------------------------------------------------------------

def completions_of(rows):
    """{(n, noise): {arm: completions of each seed}}, where the reward is a share, with groups of 8."""
    rows = [row for row in rows if row["kind"] == "share" and row["G"] == 8]
    return {cell: column_by(group, "arm", "completions") for cell, group in grouped(rows, "n", "noise").items()}


def fewer(first, second):
    """With how many seeds the second needs fewer."""
    return sum(b < a for a, b in zip(first, second))


def map_table(rows, critics):
    lines = []
    for (n, noise), arms in completions_of(rows).items():
        warm, cells = critics[n, "share", noise], [str(n), str(noise), spread(arms[GRPO], "{:.0f}")]
        for arm in (PPO, PPO_0):
            cells += [spread(arms[arm], "{:.0f}"), f"{fewer(arms[GRPO], arms[arm])} of {len(arms[arm])}"]
        lines.append([*cells, str(warm["completions"]), f"{warm['explained']:.2f}", f"{warm['explainable']:.2f}"])
    return table(["digits", "noise", GRPO, PPO, "fewer", PPO_0, "fewer", "before PPO, for its critic", "which explains",
                  "of an explainable"], lines)


def cell_of(row):
    return row["n"], row["kind"], row["noise"]


def arms_table(rows):
    lines = []
    for (n, kind, noise, arm), group in grouped(rows, "n", "kind", "noise", "arm").items():
        explained = [row["explained"] for row in group if row["explained"] != ""]
        lines.append([str(n), kind, str(noise), arm, spread([row["completions"] for row in group], "{:.0f}"),
                      f"{sum(row['reached'] for row in group)} of {len(group)}",
                      spread([row["end"] for row in group], "{:.2f}"), spread(explained, "{:.2f}"),
                      spread([row["seconds"] for row in group], "{:.0f}")])
    return table(["digits", "reward", "noise", "", "completions to the goal", "reached", "reward at the end",
                  "explained variance (mean of the run)", "seconds to the goal"], lines)


def groups_table(rows):
    lines = []
    for (G,), group in sorted(grouped([row for row in rows if row["arm"] in (GRPO, PPO)], "G").items()):
        completions = column_by(group, "arm", "completions")
        lines.append([str(G), *(spread(completions[arm], "{:.0f}") for arm in (GRPO, PPO))])
    return table(["completions in a group", "GRPO", "PPO"], lines)


def noise_table(rows):
    names, lines = list(dict.fromkeys(row["advantage"] for row in rows)), []
    for (n, noise), group in grouped(rows, "n", "noise").items():
        found = {row["advantage"]: "{value:.1f} ({low:.1f} to {high:.1f})".format(**row) for row in group}
        lines.append([str(n), str(noise), *(found.get(name, "-") for name in names)])
    return table(["digits", "noise", *names], lines)


def plot_map(rows, critics, path):
    """Which needs fewer completions, over digits and noise: of RL alone, and with those that the critic saw before."""
    cells = completions_of(rows)
    lengths, noises = (list(dict.fromkeys(keys)) for keys in zip(*cells))
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2), sharey=True)
    for axis, arm, counted in zip(axes, (PPO, PPO_0, PPO_0), (False, False, True)):
        ratios = np.full((len(noises), len(lengths)), np.nan)
        for (n, noise), arms in cells.items():
            before = critics[n, "share", noise]["completions"] if counted else 0
            first, second = arms[GRPO], [number + before for number in arms[arm]]
            x, y = lengths.index(n), noises.index(noise)
            ratio = ratios[y, x] = np.log2(np.mean(first) / np.mean(second))
            better, wins = ("PPO", fewer(first, second)) if ratio > 0 else ("GRPO", fewer(second, first))
            axis.text(x, y, f"{better if ratio else 'alike'}\n{2 ** abs(ratio):.2f} x\n{wins} of {len(first)}",
                      ha="center", va="center", color="white" if abs(ratio) > 1.2 else "black")
        image = axis.imshow(ratios, cmap="PuOr", vmin=-2, vmax=2, aspect="auto", origin="lower")
        axis.set(xticks=range(len(lengths)), xticklabels=lengths, yticks=range(len(noises)), yticklabels=noises,
                 xlabel="digits to answer",
                 title="the same, with its critic's completions" if counted else f"GRPO and {arm}")
    axes[0].set(ylabel="noise (standard deviations of the reward)")
    bar = figure.colorbar(image, ax=axes[2], ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["GRPO needs\na quarter", "GRPO needs\nhalf", "as many", "PPO needs\nhalf",
                            "PPO needs\na quarter"])
    finish(figure, path)
