"""A reader's function in the real loop: a short run, and its curves beside those of the real function.

Where `train` has an argument for a part, the function goes there. The few parts that are no argument take, for the time
of the run, the place of what the loop calls by that name.
"""
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from grpo_min import dpo, grpo, ppo, reward_model, sft, variants
from grpo_min.evaluate import evaluate, held_out
from grpo_min.model import ScalarGPT
from grpo_min.rewards import correct, score
from grpo_min.rollout import Prompts, Rollout, sample, token_logprobs
from grpo_min.run.data import batch_rows
from grpo_min.run.files import make_folder
from grpo_min.run.optim import optimizer_for
from grpo_min.run.plots import finish, plt
from grpo_min.run.rng import generator
from grpo_min.task import load_task

CONFIGS = {grpo: grpo.GRPOConfig, ppo: ppo.PPOConfig, variants: variants.VariantConfig,
           reward_model: reward_model.RewardModelConfig, dpo: dpo.DPOConfig}
SHORT = dict(prompts_per_step=16, group_size=8)       # 128 completions per step
LONGEST = grpo.GRPOConfig.max_new_tokens
LABELS = dict(reward="reward", accuracy="share of right answers", kl="KL to the reference (nats)", loss="loss",
              length="completion length (tokens)", grad_norm="gradient norm", dropped="groups replaced per step",
              equal_groups="share of all-equal groups", explained_variance="explained variance",
              value="mean value of a state", margin="implicit reward, chosen - rejected",
              chosen="implicit reward, chosen",
              clip_high="share of ratios above the clip", clip_low="share of ratios below it", gap="gap (nats)",
              entropy="entropy (nats per token)")


def nothing(module):
    return {}


@dataclass
class Swap:
    """Where the function of an exercise goes, and what is drawn."""
    loop: object                        # the module whose train() runs
    arguments: object = nothing         # module of the reader -> {argument of train: part}
    settings: dict = field(default_factory=dict)
    panels: tuple = ("accuracy", "kl", "length", "grad_norm")
    in_place: object = nothing          # module of the reader -> {name in the loop: part}, for what is no argument
    both: dict = field(default_factory=dict)      # arguments that the reference gets, too
    pace: int = 1                       # updates for each step that was asked for


# --- from a reader's function to an argument of train() -----------------------------------------------------------

def with_mask(completion_mask):
    """grpo.collect, and then the reader's mask."""
    def collect(config, policy, *arguments):
        batch, prompts, rollout, rewards, texts = grpo.collect(config, policy, *arguments)
        rollout.mask = completion_mask(rollout.completion_ids, policy.tokenizer.end)
        return batch, prompts, rollout, rewards, texts
    return collect


def with_penalty(policy_loss, divisor=1):
    """A reader's loss, which knows no KL penalty, and the penalty: its sum over a completion's tokens / divisor."""
    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        surrogate = policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps)
        return surrogate + (penalty * mask).sum(dim=1).mean() / divisor
    return loss


def with_constant(dr_grpo_loss):
    """The same for a loss that divides by the longest completion."""
    return with_penalty(lambda *arguments: dr_grpo_loss(*arguments, LONGEST), LONGEST)


class Group(list):
    """The rewards of a group, and where they come from: row (of its prompt), rollout (its G completions)."""


def groups_of(rows, rollout, rewards):
    """Rows of Q prompts, their rollout and rewards (B,) -> Q Groups."""
    G, groups = len(rewards) // len(rows), []
    for q, row in enumerate(rows):
        part = slice(q * G, (q + 1) * G)
        group = Group(rewards[part].tolist())
        group.row, group.rollout = row, Rollout(rollout.completion_ids[part], rollout.mask[part],
                                                rollout.logprobs[part], rollout.finished[part])
        groups.append(group)
    return groups


def refilling(fill_batch):
    """variants.refilled, in which the reader decides what is replaced. It draws what variants.refilled would."""
    dropped = []

    def collect(config, policy, reward, rows, step, clock):
        G, tokenizer, draws = config.group_size, policy.tokenizer, []
        batch, _, rollout, rewards, _ = grpo.collect(config, policy, reward, rows, step, clock)
        taken = set(batch_rows(len(rows), config.prompts_per_step, config.seed, step))
        order = torch.randperm(len(rows), generator=generator(f"{config.seed} refill", step)).tolist()
        others = [rows[i] for i in order if i not in taken]

        def draw(n):
            fresh = [others.pop(0) for _ in range(min(n, len(others)))]
            if not fresh:
                return []
            prompts = Prompts.from_texts([row["prompt"] for row in fresh], tokenizer)
            new = sample(policy, prompts, G, config.max_new_tokens, config.temperature,
                         generator(f"{config.seed} refill {len(draws)}", step))
            draws.append(n)
            return groups_of(fresh, new, score(reward, fresh, new, G, tokenizer)[0])
        groups, number = fill_batch(groups_of(batch, rollout, rewards), draw, variants.REFILLS)
        dropped.append(number)
        for q, group in enumerate(groups):
            rollout = variants.replace_rows(rollout, torch.arange(q * G, (q + 1) * G), group.rollout, tokenizer.pad)
        batch = [group.row for group in groups]
        prompts = Prompts.from_texts([row["prompt"] for row in batch], tokenizer)
        rewards = torch.tensor([reward for group in groups for reward in group])  # (B,)
        return batch, prompts, rollout, rewards, rollout.texts(tokenizer)
    return dict(collect=collect, evaluate=lambda policy, step: dict(dropped=dropped[-1]))


def with_dpo_loss(dpo_loss):
    """dpo.token_logprobs that keeps what it has computed, and dpo.dpo_loss that hands it to the reader's."""
    kept = []

    def keep(model, prompts, completion_ids, mask):
        result = token_logprobs(model, prompts, completion_ids, mask)
        kept.append((result[0], mask))
        return result

    def loss(chosen, rejected, label_smoothing):
        (logprobs, mask), (ref_logprobs, _) = kept[-2:]
        kept.clear()
        return dpo_loss(logprobs, ref_logprobs, mask, dpo.DPOConfig.beta)
    return dict(token_logprobs=keep, dpo_loss=loss)


def with_state_values(state_values):
    """ppo.collect that keeps the batch, and ppo.gae on the reader's values of its states in place of the critic's."""
    kept = []

    def collect(config, *arguments):
        batch, prompts, rollout, rewards, texts = ppo.collect(config, *arguments)
        kept[:] = rollout.completion_ids, rollout.mask, rewards, config.group_size
        return batch, prompts, rollout, rewards, texts

    def advantage(rewards, values, mask, gamma, lam):
        return ppo.gae(rewards, state_values(*kept).to(rewards), mask, gamma, lam)
    return dict(collect=collect, advantage=advantage)


def plain_critic(config, policy, device):
    """ppo.start_critic for the bug hunts: a number per state, values of 0 at first."""
    return policy.with_head(ScalarGPT)


def critic_with_optimizer(critic_and_optimizer):
    """ppo.start_critic, whose critic brings the reader's optimizer along."""
    def start_critic(config, policy, device):
        critic, optimizer = critic_and_optimizer(policy, config.critic_lr)
        critic.optimizer = optimizer
        return critic
    return start_critic


def optimizer_brought(model, lr):
    """The optimizer that a model has brought along, or one as always."""
    return getattr(model, "optimizer", None) or optimizer_for(model, lr)


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


# --- the runs -----------------------------------------------------------------------------------------------------

# The policy moves slowly enough for a critic that starts from values of 0, which gets four updates per step.
FRESH_CRITIC = dict(critic="sft", critic_lr=1e-3, lr=1e-4)
OF_CRITICS = ("accuracy", "value", "explained_variance", "grad_norm")       # panels
SWAPS = {
    1: Swap(grpo, lambda m: dict(advantage=m.group_advantages)),
    2: Swap(grpo, lambda m: dict(collect=with_mask(m.completion_mask))),
    3: Swap(grpo, lambda m: dict(kl=lambda logprobs, ref_logprobs, kind: m.k3(logprobs, ref_logprobs)),
            dict(beta=0.1)),
    4: Swap(grpo, lambda m: dict(loss=with_penalty(m.policy_loss)), dict(minibatches=4),
            ("accuracy", "kl", "clip_high", "grad_norm")),
    5: Swap(ppo, lambda m: dict(advantage=m.gae), panels=("accuracy", "kl", "explained_variance", "grad_norm")),
    6: Swap(reward_model, settings=dict(warmup=20), panels=("loss", "accuracy"),
            in_place=lambda m: dict(preference_loss=m.preference_loss), pace=5),
    7: Swap(variants, lambda m: dict(advantage=lambda rewards, group_size, scale: m.leave_one_out(rewards, group_size)),
            dict(advantage="leave_one_out")),
    8: Swap(variants, lambda m: dict(loss=with_constant(m.dr_grpo_loss)), dict(aggregation="constant")),
    9: Swap(grpo, lambda m: dict(reward=m.reward), panels=("reward", "accuracy", "length", "kl")),
    10: Swap(variants, lambda m: refilling(m.fill_batch), dict(dynamic_sampling=True),
             ("accuracy", "dropped", "equal_groups", "kl")),
    11: Swap(grpo, lambda m: dict(reward=m.reward), panels=("reward", "accuracy", "length", "kl")),
    13: Swap(grpo, lambda m: dict(kl=m.kl_estimate),
             in_place=lambda m: dict(frozen_copy=m.reference_of)),
    14: Swap(grpo, lambda m: dict(loss=with_penalty(m.policy_loss), kl=m.penalty), dict(beta=2.0)),
    15: Swap(grpo, lambda m: dict(advantage=m.group_advantages, loss=with_penalty(m.policy_loss))),
    16: Swap(ppo, lambda m: dict(advantage=m.gae), FRESH_CRITIC, OF_CRITICS,
             in_place=lambda m: dict(value_loss=m.value_loss), both=dict(start_critic=plain_critic)),
    17: Swap(grpo, lambda m: dict(advantage=m.group_advantages),
             dict(prompts_per_step=10, group_size=12, scale_advantages=True),
             ("accuracy", "equal_groups", "grad_norm", "kl"), both=dict(reward=graded)),
    18: Swap(grpo, lambda m: dict(loss=with_penalty(m.policy_loss)), dict(epochs=2, minibatches=4, lr=1e-3),
             ("accuracy", "clip_high", "clip_low", "kl")),
    19: Swap(ppo, lambda m: dict(start_critic=critic_with_optimizer(m.critic_and_optimizer)), FRESH_CRITIC, OF_CRITICS,
             in_place=lambda m: dict(optimizer_for=optimizer_brought), both=dict(start_critic=plain_critic)),
    20: Swap(dpo, panels=("loss", "accuracy", "margin", "chosen"), in_place=lambda m: with_dpo_loss(m.dpo_loss),
             pace=2),
    21: Swap(ppo, lambda m: with_state_values(m.state_values)),
}
REFERENCE = {9: "the reward `correct`", 11: "the reward `correct`, whose own reward is drawn",
             21: "the values of PPO's critic"}


def value_column(gae):
    """Arguments of ppo.train that add a column: the mean of what the critic says of the states of a batch."""
    means = []

    def advantage(rewards, values, mask, gamma, lam):
        means.append(values[mask].mean().item())
        return gae(rewards, values, mask, gamma, lam)
    return dict(advantage=advantage, evaluate=lambda policy, step: dict(value=means[-1]))


def run(swap, mine, steps):
    """Train with the parts of a reader's module, or with the real ones if it is None -> the policy, rows of metrics."""
    short = {} if swap.loop in (reward_model, dpo) else SHORT
    config = CONFIGS[swap.loop](**{**dict(run="", device="cpu", steps=swap.pace * steps), **short, **swap.settings})
    arguments = {**swap.both, **(swap.arguments(mine) if mine else {})}
    if "value" in swap.panels:
        arguments.update(value_column(arguments.get("advantage", ppo.gae)))
    with ExitStack() as stack:
        for name, part in (swap.in_place(mine) if mine else {}).items():
            stack.enter_context(in_place(swap.loop, name, part))
        return swap.loop.train(config, **arguments)


def beside_reference(number, mine, steps, folder):
    """Train with the reader's function and with the real one, draw both -> what there is to say, in words."""
    swap, path = SWAPS[number], Path(folder) / f"ex{number:02d}.png"
    policy, rows = run(swap, mine, steps)
    _, reference = run(swap, None, steps)
    make_folder(Path(folder))
    plot(rows, reference, swap.panels, path, "yours", "reference")
    lines = [f"Reference: {REFERENCE[number]}."] if number in REFERENCE else []
    lines += in_words(rows, reference, swap.panels) + [f"Curves: {path}"]
    return "\n".join(lines + (some_answers(policy) if number == 11 else []))


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


def some_answers(policy):
    """What the trained policy says, for the reader to judge."""
    questions = ["start with 3, times 9, plus 1.", "start with 40, minus 9.",
                 "start with 7, plus 8, minus 2, times 3."]
    prompts = Prompts.from_texts(questions, policy.tokenizer)
    answers = sample(policy, prompts, 2, 40, 1.0, generator(1, 0)).texts(policy.tokenizer)
    return ["What the trained policy says:"] + [f"  {questions[b // 2]}  ->{text}" for b, text in enumerate(answers)]


# --- curves -------------------------------------------------------------------------------------------------------

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
        for run_rows, style in (reference, broad), (rows, thin):
            values = measured(run_rows or [], name)
            if values:
                axis.plot(range(1, len(values) + 1), values, **style)
        axis.set(xlabel="step", ylabel=LABELS[name])
    axes[0][0].legend(frameon=False, fontsize=8)
    finish(figure, path)
