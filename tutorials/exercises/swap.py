"""A reader's function in the real loop: a short run, and its curves beside those of the real function.

Where `train` has an argument for a part (advantage, loss, kl, reward), the function goes there. Otherwise it takes, for
the time of the run, the place of what the loop calls by that name.
"""
import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from grpo_min import grpo, ppo, reward_model, sft
from grpo_min.evaluate import evaluate, held_out
from grpo_min.plots import finish, plt
from grpo_min.rewards import correct, score
from grpo_min.rollout import Prompts, Rollout, sample
from grpo_min.runs import batch_rows, generator, make_folder, optimizer_for
from grpo_min.task import load_task

CONFIGS = {grpo: grpo.GRPOConfig, ppo: ppo.PPOConfig, reward_model: reward_model.RewardModelConfig}
SHORT = dict(prompts_per_step=16, group_size=8)       # 128 completions per step
LABELS = dict(reward="reward", accuracy="share of right answers", kl="KL to the reference (nats)", loss="loss",
              length="completion length (tokens)", grad_norm="gradient norm", dropped="groups replaced per step",
              equal_groups="share of all-equal groups", explained_variance="explained variance",
              value="mean value of a state",
              clip_high="share of ratios above the clip", clip_low="share of ratios below it", gap="gap "
               "(nats)", entropy="entropy (nats per token)")


@dataclass
class Swap:
    """Where the function of an exercise goes, and what is drawn."""
    loop: object                        # the module whose train() runs
    parts: object                       # module of the reader -> {argument of train, or name in the loop: part}
    settings: dict = field(default_factory=dict)
    panels: tuple = ("accuracy", "kl", "length", "grad_norm")
    both: dict = field(default_factory=dict)      # parts that the reference has, too
    pace: int = 1                       # updates for each step that was asked for


# --- functions that are no argument of train() ---------------------------------------------------------------------

def masking(completion_mask):
    """sample() whose mask is the reader's."""
    def sample_and_mask(*arguments):
        rollout = sample(*arguments)
        rollout.mask = completion_mask(rollout.completion_ids)
        return rollout
    return sample_and_mask


class Group(list):
    """The rewards of a group, and where they come from: row (a prompt), rollout, q (the group's place in it)."""


def refilling(fill_batch):
    """grpo.refill, in which the reader decides what is replaced. It draws what grpo.refill would."""
    def refill(config, policy, reward, rows, step, batch, rollout, rewards, clock):
        G, calls = config.group_size, []
        had = set(batch_rows(len(rows), config.prompts_per_step, config.seed, step))
        order = torch.randperm(len(rows), generator=generator(f"{config.seed} refill", step)).tolist()
        others = [rows[i] for i in order if i not in had]

        def groups_of(some, its_rollout, its_rewards):
            groups = [Group(values) for values in its_rewards.view(-1, G).tolist()]
            for q, group in enumerate(groups):
                group.row, group.rollout, group.q = some[q], its_rollout, q
            return groups

        def draw(n):
            fresh = [others.pop(0) for _ in range(min(n, len(others)))]
            if not fresh:
                return []
            calls.append(n)
            new = sample(policy, Prompts.from_texts([row["prompt"] for row in fresh]), G, config.max_new_tokens,
                         config.temperature, generator(f"{config.seed} refill {len(calls) - 1}", step))
            return groups_of(fresh, new, score(reward, fresh, new, G)[0])
        chosen, dropped = fill_batch(groups_of(batch, rollout, rewards), draw, grpo.REFILLS)
        for q, group in enumerate(chosen):
            if group.rollout is not rollout:
                at = slice(group.q * G, (group.q + 1) * G)
                new = Rollout(*(x[at] for x in (group.rollout.completion_ids, group.rollout.mask,
                                                group.rollout.logprobs, group.rollout.finished)))
                rollout = rollout.with_rows(torch.arange(q * G, (q + 1) * G), new)
        prompts = Prompts.from_texts([group.row["prompt"] for group in chosen])
        rewards = torch.tensor([reward for group in chosen for reward in group])                  # (B,)
        return [group.row for group in chosen], prompts, rollout, rewards, rollout.texts(), dropped
    return refill


def critic_from(critic_and_optimizer):
    """start_critic and optimizer_for, of which the critic gets the reader's."""
    made = {}

    def start_critic(config, policy, device):
        critic, made[critic] = critic_and_optimizer(policy, config.critic_lr)
        return critic

    def optimizer_of(model, lr):
        return made[model] if model in made else optimizer_for(model, lr)
    return dict(start_critic=start_critic, optimizer_for=optimizer_of)


def graded(prompts, completions, **columns):
    """0.7 for right answers, 0.1 for others."""
    return [0.1 + 0.6 * right for right in correct(prompts, completions, **columns)]


@contextmanager
def in_place(module, name, part):
    """module.name is `part` inside of the with block."""
    original = getattr(module, name)
    setattr(module, name, part)
    try:
        yield
    finally:
        setattr(module, name, original)


# --- the runs ------------------------------------------------------------------------------------------------------

SWAPS = {
    1: Swap(grpo, lambda m: dict(advantage=m.group_advantages)),
    2: Swap(grpo, lambda m: dict(sample=masking(m.completion_mask))),
    3: Swap(grpo, lambda m: dict(kl=lambda logprobs, ref_logprobs, kind: m.k3(logprobs, ref_logprobs)),
            dict(beta=0.1)),
    4: Swap(grpo, lambda m: dict(loss=m.policy_loss), dict(minibatches=4),
            ("accuracy", "kl", "clip_high", "grad_norm")),
    5: Swap(ppo, lambda m: dict(advantage=m.gae), {}, ("accuracy", "kl", "explained_variance", "grad_norm")),
    6: Swap(reward_model, lambda m: dict(preference_loss=m.preference_loss), dict(warmup=20),
            ("loss", "accuracy"), pace=5),
    7: Swap(grpo, lambda m: dict(advantage=lambda rewards, group_size, scale: m.leave_one_out(rewards, group_size)),
            dict(advantage="leave_one_out")),
    8: Swap(grpo, lambda m: dict(loss=lambda *arguments: m.dr_grpo_loss(*arguments, 40)), dict(aggregation="constant")),
    9: Swap(grpo, lambda m: dict(reward=m.reward), {}, ("reward", "accuracy", "length", "kl")),
    10: Swap(grpo, lambda m: dict(refill=refilling(m.fill_batch)), dict(dynamic_sampling=True),
             ("accuracy", "dropped", "equal_groups", "kl")),
    11: Swap(grpo, lambda m: dict(reward=m.reward), {}, ("reward", "accuracy", "length", "kl")),
    13: Swap(grpo, lambda m: dict(copy=SimpleNamespace(deepcopy=m.reference_of), kl=m.kl_estimate)),
    14: Swap(grpo, lambda m: dict(loss=m.policy_loss, kl=m.penalty), dict(beta=2.0)),
    15: Swap(grpo, lambda m: dict(advantage=m.group_advantages, loss=m.policy_loss)),
    16: Swap(ppo, lambda m: dict(advantage=m.gae, value_loss=m.value_loss), {},
             ("accuracy", "value", "explained_variance", "grad_norm")),
    17: Swap(grpo, lambda m: dict(advantage=m.group_advantages),
             dict(prompts_per_step=10, group_size=12, scale_advantages=True),
             ("accuracy", "equal_groups", "grad_norm", "kl"), dict(reward=graded)),
    18: Swap(grpo, lambda m: dict(loss=m.policy_loss), dict(epochs=2, minibatches=4, lr=1e-3),
             ("accuracy", "clip_high", "clip_low", "kl")),
    19: Swap(ppo, lambda m: critic_from(m.critic_and_optimizer), {},
             ("accuracy", "value", "explained_variance", "grad_norm")),
}
REFERENCE = {9: "the reward `correct`", 11: "the reward `correct`, whose own reward is drawn"}


def value_column(gae):
    """Arguments of ppo.train that add a column: the mean of what the critic says of the states of a batch."""
    seen = {}

    def advantage(rewards, values, mask, gamma, lam):
        seen.update(value=values[mask].mean().item())
        return gae(rewards, values, mask, gamma, lam)
    return dict(advantage=advantage, evaluate=lambda policy, step: dict(seen))


def run(swap, mine, steps):
    """Train with the parts of a reader's module, or with the real ones if it is None -> the policy, rows of metrics."""
    parts = {**swap.both, **(swap.parts(mine) if mine else {})}
    arguments = {name: part for name, part in parts.items() if name in inspect.signature(swap.loop.train).parameters}
    short = {} if swap.loop is reward_model else SHORT
    config = CONFIGS[swap.loop](**{**dict(run="", device="cpu", steps=swap.pace * steps), **short, **swap.settings})
    if "value" in swap.panels:
        arguments.update(value_column(arguments.get("advantage", ppo.gae)))
    with ExitStack() as stack:
        for name in parts.keys() - arguments.keys():
            stack.enter_context(in_place(swap.loop, name, parts[name]))
        return swap.loop.train(config, **arguments)


def beside_reference(number, mine, steps, folder):
    """Train with the reader's function and with the real one, draw both -> what there is to say, in words."""
    swap, path = SWAPS[number], Path(folder) / f"ex{number:02d}.png"
    policy, rows = run(swap, mine, steps)
    _, reference = run(swap, None, steps)
    make_folder(Path(folder))
    plot(rows, reference, swap.panels, path, "yours", "reference")
    said = [f"Reference: {REFERENCE[number]}."] if number in REFERENCE else []
    said += in_words(rows, reference, swap.panels) + [f"Curves: {path}"]
    return "\n".join(said + (shown(policy) if number == 11 else []))


def own_task(path, steps, folder):
    """Exercise 12, whose file is one for --task: fine-tune the base model on its demonstrations, then GRPO."""
    prompts, reward = load_task(str(path), "prompts", "reward")
    policy, _ = sft.train(sft.SFTConfig(run="", device="cpu", steps=4 * steps, warmup=steps, task=str(path)))
    test = held_out(prompts, "test", 200)
    before = evaluate(policy, reward, test)["reward"][0]
    config = grpo.GRPOConfig(run="", device="cpu", steps=steps, task=str(path), **SHORT)
    policy, rows = grpo.train(config, model=policy)
    make_folder(Path(folder))
    plot(rows, None, ("reward", "kl", "length", "equal_groups"), Path(folder) / "ex12.png", "yours", "")
    return (f"Mean reward on {len(test)} test prompts: {before:.3f} after fine-tuning, "
            f"{evaluate(policy, reward, test)['reward'][0]:.3f} after {steps} steps of GRPO. A task of your own has no "
            f"reference to be drawn beside it.\nCurves: {Path(folder) / 'ex12.png'}")


def shown(policy):
    """What the trained policy says, for the reader to judge."""
    texts = ["start with 3, times 9, plus 1.", "start with 40, minus 9.", "start with 7, plus 8, minus 2, times 3."]
    said = sample(policy, Prompts.from_texts(texts), 2, 40, 1.0, generator(1, 0)).texts()
    return ["What the trained policy says:"] + [f"  {texts[b // 2]}  ->{text}" for b, text in enumerate(said)]


# --- curves --------------------------------------------------------------------------------------------------------

def measured(rows, name):
    return [row[name] for row in rows if row.get(name, "") != ""]


def last(rows, name):
    return float(np.mean(measured(rows, name)[-10:]))


def in_words(rows, reference, panels):
    """Lines that compare the two runs: that they coincide, or the means of their last steps."""
    names = [name for name in panels if measured(rows, name) and measured(reference, name)]
    if all(np.allclose(measured(rows, name), measured(reference, name), rtol=1e-3, atol=1e-3) for name in names):
        return ["The curves coincide with the reference."]
    return [f"Mean of the last {min(10, len(rows))} steps:"] + [
        f"  {LABELS[name]}: {last(rows, name):.3g}, reference {last(reference, name):.3g}" for name in names]


def plot(rows, reference, panels, path, label, reference_label):
    """A panel for each column; the reference is the broad grey line, so that it can be seen under a curve that
    coincides."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels), 3), squeeze=False)
    for axis, name in zip(axes[0], panels):
        broad, thin = dict(color="0.75", lw=4, label=reference_label), dict(lw=1.3, label=label)
        for some, style in (reference, broad), (rows, thin):
            values = measured(some or [], name)
            if values:
                axis.plot(range(1, len(values) + 1), values, **style)
        axis.set(xlabel="step", ylabel=LABELS[name])
    axes[0][0].legend(frameon=False, fontsize=8)
    finish(figure, path)
