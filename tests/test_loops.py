"""GRPO and PPO as wholes, on a random GPT of some 15,000 weights: they learn, they move only what they should, and they
resume to the bit. Whatever holds for both loops is tested on both, through the arguments that a reader may swap
(reward, collect, advantage, loss, kl, model, evaluate, start_critic): what these functions are called with tells what
the loop does.
"""
import dataclasses
import json
import os
import signal

import pytest
import torch

from grpo_min import dpo, grpo, ppo, pretrain, reward_model, sft
from grpo_min.critic import Critic
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, Rollout, pad_completions, token_logprobs
from grpo_min.run import fit, log
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import UserError
from grpo_min.run.metrics import explained_variance
from grpo_min.run.table import read_csv
from tests import tiny
from tests.tiny import LOOPS, TOKENIZER, assert_same_run, letter_e, recorded_rollouts, settings

pytestmark = pytest.mark.usefixtures("no_curves")


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def learner(loop, folder, **more):
    """A longer run of larger batches, from a model that hardly ever ends a completion and so has much to gain."""
    return settings(loop, folder, sft=tiny.checkpoint(folder / "plain.pt", ends=1), prompts_per_step=6, group_size=8,
                    **dict(dict(steps=20, lr=2e-2), **more))


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- learning -----------------------------------------------------------------------------------------------------

@LOOPS
@pytest.mark.parametrize("more", [dict(lr=2e-2), dict(lr=1e-2, epochs=2, minibatches=2)],
                         ids=["one update", "four updates"])
def test_reward_rises(loop, more, tmp_path):
    if "epochs" in more:
        more = {**more, "scale_advantages" if loop is grpo else "whiten": True}
    _, rows = loop.train(learner(loop, tmp_path, steps=25, **more), reward=letter_e)
    first, last = mean(rows[:3], "reward"), mean(rows[-3:], "reward")
    assert first < 0.1 and last > 2.5 * first, f"mean reward went from {first:.3f} to {last:.3f}"


@LOOPS
def test_a_penalty_keeps_the_policy_at_the_reference(loop, tmp_path):
    # The same reward, once with a KL penalty far larger than any reward: the KL must stay near 0.
    runs_of = [loop.train(learner(loop, tmp_path, beta=beta), reward=letter_e)[1] for beta in (0.001, 10.0)]
    drift = [mean(rows[-3:], "kl") for rows in runs_of]
    assert drift[1] < 0.1 * drift[0]


def standing_still(rewards, values, mask, gamma, lam):
    """The critic's targets as GAE gives them, and nothing for the policy to learn."""
    return torch.zeros_like(values), ppo.gae(rewards, values, mask, gamma, lam)[1]


def test_critic_learns_what_to_expect(tmp_path):
    # Every completion is worth 1, and the policy stands still: the value of every state is 1.
    config = settings(ppo, tmp_path, run=str(tmp_path / "run"), steps=60, beta=0.0, critic_lr=1e-2)
    ppo.train(config, reward=constant, advantage=standing_still)
    critic, ids = Critic(tiny.gpt().config), torch.full((12, 3), 300)
    critic.load_state_dict(load_checkpoint(tmp_path / "run/checkpoint.pt")["critic"])
    values = critic.values(Prompts.from_texts(tiny.PROMPTS, TOKENIZER), ids, ids > 0)
    assert values.mean().item() == pytest.approx(1, abs=0.1) and values.std() < 0.2


def test_explained_variance_is_measured_against_the_actual_return(tmp_path):
    # Rewards depend on the prompt alone, so a critic that has learned them explains nearly all of the variance.
    def by_prompt(prompts, completions, **columns):
        return [float(prompt in tiny.PROMPTS[:6]) for prompt in prompts]
    config = settings(ppo, tmp_path, steps=60, prompts_per_step=12, beta=0.0, critic_lr=1e-2)
    _, rows = ppo.train(config, reward=by_prompt, advantage=standing_still)
    assert abs(rows[0]["explained_variance"]) < 1e-6, "values of 0 explain nothing"
    assert mean(rows[-5:], "explained_variance") > 0.8
    seen = []

    def advantage(rewards, values, mask, gamma, lam):
        to_go = [[sum(gamma ** (l - t) * row[l] for l in range(t, len(row))) for t in range(len(row))]
                 for row in rewards.tolist()]
        seen.append(explained_variance(values, torch.tensor(to_go), mask))
        return ppo.gae(rewards, values, mask, gamma, lam)
    config = settings(ppo, tmp_path, steps=4, critic_lr=1e-2, gamma=0.8, lam=0.1)
    _, rows = ppo.train(config, reward=letter_e, advantage=advantage)
    assert [row["explained_variance"] for row in rows] == pytest.approx(seen, abs=1e-4)


# --- what one update is made of -----------------------------------------------------------------------------------

def record_ratios(loop, tmp_path, **more):
    """The largest |log ratio| of every update of two steps."""
    seen = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        seen.append((logprobs - old_logprobs).detach().abs().max().item())
        assert not old_logprobs.requires_grad and not advantages.requires_grad
        assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)

    _, rows = loop.train(settings(loop, tmp_path, steps=2, **more), reward=letter_e, loss=loss)
    return seen, rows


@LOOPS
def test_first_update_of_a_batch_has_ratio_one(loop, tmp_path):
    seen, rows = record_ratios(loop, tmp_path)
    assert seen == [0, 0] and all(row["clip_low"] == row["clip_high"] == 0 for row in rows)


@LOOPS
def test_later_epochs_have_other_ratios(loop, tmp_path):
    seen, rows = record_ratios(loop, tmp_path, epochs=2)
    assert len(seen) == 4 and seen[0] < 1e-6 and seen[2] < 1e-6 and seen[1] > 1e-3 and seen[3] > 1e-3
    seen, rows = record_ratios(loop, tmp_path, epochs=2, clip_eps=0.001)
    assert rows[0]["clip_low"] > 0 and rows[0]["clip_high"] > 0


@LOOPS
def test_minibatches_cover_every_row_once(loop, tmp_path):
    rows = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        rows.append(len(mask))
        return (logprobs * 0).sum()

    loop.train(settings(loop, tmp_path, steps=1, minibatches=4, epochs=2), reward=letter_e, loss=loss)
    assert rows == [3] * 8


@LOOPS
@pytest.mark.parametrize("where, minibatches", [("loss", 1), ("loss", 2), ("reward", 1)])
def test_reference_does_not_move(loop, where, minibatches, tmp_path, monkeypatch):
    # Read the sampled completions again with the untouched SFT model: that is what ref_logprobs must be in every step,
    # at the sampling temperature.
    rollouts, refs, policies = recorded_rollouts(loop, monkeypatch), [], []

    def kl(logprobs, ref_logprobs, kind):
        refs.append(ref_logprobs)
        policies.append(logprobs.detach())
        return loop.kl_estimate(logprobs, ref_logprobs, kind)

    config = settings(loop, tmp_path, steps=4, temperature=0.7, minibatches=minibatches, kl="k1", kl_in=where)
    loop.train(config, reward=letter_e, kl=kl)
    sft_model = load_model(config.sft)
    for step, (prompts, rollout) in enumerate(rollouts):
        expected, _ = token_logprobs(sft_model, prompts, rollout.completion_ids, rollout.mask, 0.7)
        assert torch.allclose(torch.cat(refs[step * minibatches:(step + 1) * minibatches]), expected, atol=1e-5)
    gap = (torch.cat(policies[-minibatches:]) - torch.cat(refs[-minibatches:])).abs().max()
    assert gap > 1e-2, "the policy has to have moved for this to prove anything"


@LOOPS
def test_trained_ids_are_the_sampled_ones(loop, tmp_path, monkeypatch):
    # Decoded and encoded again, the completions would mostly be other ids: the tokenizer never writes them this way.
    rollouts, trained, token_logprobs = [], [], loop.token_logprobs

    def sampled(*arguments, sample=loop.sample):
        rollouts.append(sample(*arguments))
        return dataclasses.replace(rollouts[-1])

    def recording(policy, prompts, completion_ids, mask, temperature):
        assert torch.equal(completion_ids, rollouts[-1].completion_ids) and torch.equal(mask, rollouts[-1].mask)
        trained.append(completion_ids)
        return token_logprobs(policy, prompts, completion_ids, mask, temperature)
    monkeypatch.setattr(loop, "sample", sampled)
    monkeypatch.setattr(loop, "token_logprobs", recording)
    loop.train(settings(loop, tmp_path), reward=letter_e)
    assert len(trained) == 3
    again, _ = pad_completions(rollouts[0].texts(TOKENIZER), TOKENIZER, finished=rollouts[0].finished.tolist())
    assert again.shape != trained[0].shape or not torch.equal(again, trained[0])


@LOOPS
def test_without_beta_there_is_no_reference_and_no_kl(loop, tmp_path):
    def kl(*_):
        raise AssertionError("nothing is charged")
    _, rows = loop.train(settings(loop, tmp_path, beta=0.0), reward=letter_e, kl=kl)
    assert [row["kl"] for row in rows] == ["", "", ""]
    _, rows = loop.train(settings(loop, tmp_path), reward=letter_e)
    assert abs(rows[0]["kl"]) < 1e-5 and rows[2]["kl"] > 1e-5


@pytest.mark.parametrize("more", [dict(), dict(minibatches=2, epochs=2)], ids=["one update", "four updates"])
def test_groups_of_equals_change_no_update(more, tmp_path, monkeypatch):
    """Without a KL penalty: leaving their tokens out of the loss gives the same policy."""
    def reward(prompts, completions, **columns):
        return [len(text) * (prompt not in tiny.PROMPTS[3:]) for prompt, text in zip(prompts, completions)]
    left_out = []

    def without_equals(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        taught = mask & (advantages != 0)
        left_out.append(1 - (taught.sum() / mask.sum()).item())
        return grpo.policy_loss(logprobs, old_logprobs, advantages, taught, clip_eps, penalty)
    config = settings(grpo, tmp_path, steps=2, prompts_per_step=12, group_size=3, beta=0.0, **more)
    # Not Adam, which makes a full step out of the rounding error of a gradient that is 0.
    monkeypatch.setattr(grpo, "optimizer_for", lambda model, lr: torch.optim.SGD(model.parameters(), lr=0.1))
    policy, rows = grpo.train(config, reward=reward, loss=without_equals)
    whole, whole_rows = grpo.train(config, reward=reward)
    assert 0.5 < sum(left_out) / len(left_out) < 1
    for a, b in zip(policy.parameters(), whole.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    for name in "loss", "grad_norm", "gap":
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole_rows], abs=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_groups_of_equals_are_read_as_all_others(beta, tmp_path, watch):
    calls, rollouts = watch(grpo, "token_logprobs"), watch(grpo, "sample")
    _, (row,) = grpo.train(settings(grpo, tmp_path, steps=1, beta=beta), reward=constant)
    assert torch.equal(calls[0][0][3], rollouts[0][1].mask) and row["entropy"] > 0 and row["equal_groups"] == 1


def test_a_batch_of_equals_changes_nothing_and_is_reported(tmp_path):
    config = settings(grpo, tmp_path, steps=1, beta=0.0)
    before = state(load_model(config.sft))
    policy, (row,) = grpo.train(config, reward=constant)
    assert tiny.same(before, state(policy)) and row["grad_norm"] == row["loss"] == 0


def charged_once(loop, tmp_path, where, minibatches=1):
    """One step with a KL of 0.5 per token, beta 0.1 -> calls of kl, what was charged, policy losses without a penalty,
    penalties, row, mask."""
    calls, losses, penalties, charged, masks = [], [], [], [], []

    def kl(logprobs, ref_logprobs, kind):
        calls.append((logprobs.requires_grad, kind))
        return 0 * logprobs + 0.5

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        losses.append(loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps))
        penalties.append(penalty)
        masks.append(mask)
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)

    def advantage(rewards, *rest):
        charged.append(rewards)
        return (grpo.group_advantages if loop is grpo else ppo.gae)(rewards, *rest)

    config = settings(loop, tmp_path, steps=1, beta=0.1, kl="k1", kl_in=where, minibatches=minibatches)
    _, rows = loop.train(config, reward=constant, advantage=advantage, loss=loss, kl=kl)
    return calls, charged[0], [value.item() for value in losses], penalties, rows[0], torch.cat(masks)


def ones_at_last_token(mask):
    return Rollout(None, mask, torch.zeros(mask.shape), None).at_last_token(torch.ones(len(mask)))


@LOOPS
@pytest.mark.parametrize("minibatches", [1, 2])
def test_kl_in_the_reward_is_charged_once(loop, minibatches, tmp_path):
    calls, charged, losses, penalties, row, mask = charged_once(loop, tmp_path, "reward", minibatches)
    assert 12 < mask.sum() < mask.numel(), "some completions have to end before others"
    assert calls == [(False, "k1")], "once per batch, and no gradient flows through a reward"
    assert penalties == [0.0] * minibatches
    assert row["loss"] == pytest.approx(sum(losses) / minibatches, abs=1e-7), "the loss has no KL term of its own"
    if loop is grpo:
        assert torch.allclose(charged, 1 - 0.1 * 0.5 * mask.sum(1))                        # one number per completion
    else:
        assert torch.allclose(charged, ones_at_last_token(mask) - 0.1 * 0.5 * mask)
    assert row["reward"] == 1, "the reward that is reported is the one the reader defined, before any charge"


@LOOPS
@pytest.mark.parametrize("minibatches", [1, 2])
def test_kl_in_the_loss_is_charged_once(loop, minibatches, tmp_path):
    calls, charged, losses, penalties, row, mask = charged_once(loop, tmp_path, "loss", minibatches)
    assert calls == [(True, "k1")] * minibatches
    assert torch.equal(charged, torch.ones(12) if loop is grpo else ones_at_last_token(mask))
    assert all(torch.equal(penalty, torch.full_like(penalty, 0.1 * 0.5)) for penalty in penalties), "beta times the KL"
    assert torch.cat(penalties).shape == mask.shape and all(penalty.requires_grad for penalty in penalties)
    penalty = 0.1 * 0.5 * mask.sum(1).double().mean().item()                    # summed over tokens, averaged over rows
    assert row["loss"] == pytest.approx(sum(losses) / minibatches + penalty, abs=1e-5)


@LOOPS
def test_kl_in_the_reward_trains_with_the_estimator_k1(loop, tmp_path):
    _, rows = loop.train(learner(loop, tmp_path, kl="k1", kl_in="reward", beta=0.001), reward=letter_e)
    assert mean(rows[-3:], "reward") > 2 * mean(rows[:3], "reward")


# --- the critic ---------------------------------------------------------------------------------------------------

def trained_critic(tmp_path, **more):
    """The policy and the critic after some steps of PPO, and the SFT model that both started from, as states."""
    config = settings(ppo, tmp_path, run=str(tmp_path / "run"), **more)
    policy, _ = ppo.train(config, reward=letter_e)
    critic = load_checkpoint(tmp_path / "run/checkpoint.pt")["critic"]
    return state(policy), critic, state(load_model(config.sft))


def test_critic_gets_a_gradient_everywhere(tmp_path):
    policy, critic, start = trained_critic(tmp_path)
    for name, value in start.items():
        trained = critic["trunk." + name]
        assert not torch.equal(trained, value), f"{name} of the critic has not moved"
        assert not torch.equal(trained, policy[name]), f"{name} of the critic is the policy's"
    assert (critic["scalar.weight"] != 0).all() and critic["scalar.bias"] != 0


def test_with_no_epochs_the_critic_stays_as_it_is(tmp_path):
    path = tiny.critic_checkpoint(tmp_path / "critic.pt")
    policy, critic, start = trained_critic(tmp_path, critic=path, critic_epochs=0)
    assert tiny.same(critic, load_checkpoint(path)["model"]) and not tiny.same(policy, start)


@pytest.mark.parametrize("start", ["sft", "checkpoint"])
def test_critic_starts_from(start, tmp_path, monkeypatch):
    path, seen, values = tiny.critic_checkpoint(tmp_path / "critic.pt"), recorded_rollouts(ppo, monkeypatch), []

    def advantage(rewards, old_values, *rest):
        values.append(old_values)
        return ppo.gae(rewards, old_values, *rest)

    config = settings(ppo, tmp_path, steps=1, critic=path if start == "checkpoint" else start)
    ppo.train(config, reward=letter_e, advantage=advantage)
    (prompts, rollout), = seen
    expected = load_model(path, kind=Critic).values(prompts, rollout.completion_ids, rollout.mask)
    values, expected = values[0][rollout.mask], expected[rollout.mask]
    assert torch.allclose(values, expected if start == "checkpoint" else 0 * expected, atol=1e-6)
    assert expected.std() > 0.1


# --- the same and not the same ------------------------------------------------------------------------------------

@LOOPS
def test_same_seed_same_run(loop, tmp_path):
    first, second, other = (loop.train(settings(loop, tmp_path, seed=seed), reward=letter_e) for seed in (1, 1, 2))
    assert tiny.same(state(first[0]), state(second[0])) and not tiny.same(state(first[0]), state(other[0]))
    assert tiny.same(tiny.without_clock(first[1]), tiny.without_clock(second[1]))
    assert [row["completions"] for row in first[1]] == [12, 24, 36]


def test_grpo_and_ppo_see_the_same_prompts_and_begin_with_the_same_completions(tmp_path):
    seen = {grpo: [], ppo: []}
    for loop in seen:
        def reward(prompts, completions, **columns):
            seen[loop].append((list(prompts), list(completions)))
            return letter_e(prompts, completions)
        loop.train(settings(loop, tmp_path, steps=5), reward=reward)
    assert [prompts for prompts, _ in seen[grpo]] == [prompts for prompts, _ in seen[ppo]]
    assert seen[grpo][0] == seen[ppo][0] and seen[grpo][-1][1] != seen[ppo][-1][1]
    epoch = [prompt for prompts, _ in seen[grpo][:3] for prompt in prompts[::3]]
    assert sorted(epoch) == sorted(tiny.PROMPTS), "three batches of 4 are one epoch of the 12 prompts"
    assert all(prompts == [prompt for prompt in prompts[::3] for _ in range(3)] for prompts, _ in seen[grpo])


def test_first_rows_of_grpo_and_ppo_agree(tmp_path):
    rows = [loop.train(settings(loop, tmp_path, steps=1), reward=letter_e)[1][0] for loop in (grpo, ppo)]
    for name in "reward", "reward_std", "accuracy", "thinking", "truncated", "length", "kl", "entropy", "equal_groups":
        assert rows[0][name] == rows[1][name], name


# --- the parts a reader may swap ----------------------------------------------------------------------------------

@LOOPS
def test_reward_function_gets_prompts_completions_and_columns(loop, tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [0.25] * len(completions)

    _, rows = loop.train(settings(loop, tmp_path, steps=1), reward=reward)
    (prompts, completions, columns), = calls
    assert len(prompts) == len(completions) == 12 and set(columns) == {"answer", "finished"}
    assert columns["answer"] == [str(4 * tiny.PROMPTS.index(prompt)) for prompt in prompts]
    assert all(isinstance(end, bool) for end in columns["finished"]) and len(columns["finished"]) == 12
    assert rows[0]["reward"] == 0.25 and rows[0]["reward_std"] == 0 and rows[0]["equal_groups"] == 1


@LOOPS
@pytest.mark.parametrize("wrong", [[1.0], [float("nan")] * 12, 1.0, [[1.0]] * 12, ["one"] * 12],
                         ids=["too few", "NaN", "a number", "nested", "text"])
def test_rewards_that_are_no_numbers_are_the_users_mistake(loop, wrong, tmp_path):
    with pytest.raises(UserError, match="reward function"):
        loop.train(settings(loop, tmp_path, steps=1), reward=lambda prompts, completions, **columns: wrong)


@LOOPS
def test_advantage_is_used(loop, tmp_path):
    # Advantages of zero and no KL: the gradient is exactly zero, and the policy stays as it is.
    def nothing(rewards, *rest):
        return torch.zeros_like(rewards) if loop is grpo else (torch.zeros_like(rewards), rewards)
    config = settings(loop, tmp_path, beta=0.0)
    policy, _ = loop.train(config, reward=letter_e, advantage=nothing)
    assert tiny.same(state(policy), state(load_model(config.sft)))


def test_advantage_gets_the_flag_that_scales(tmp_path):
    flags = []

    def advantage(rewards, group_size, scale):
        flags.append((group_size, scale))
        return rewards
    grpo.train(settings(grpo, tmp_path, steps=1, scale_advantages=True), reward=letter_e, advantage=advantage)
    grpo.train(settings(grpo, tmp_path, steps=1), reward=letter_e, advantage=advantage)
    assert flags == [(3, True), (3, False)]


def test_ppo_whitens_where_told(tmp_path):
    seen = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        seen.append(advantages[mask])
        return ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
    for whiten in False, True:
        ppo.train(settings(ppo, tmp_path, steps=1, whiten=whiten), reward=letter_e, loss=loss)
    assert seen[0].std() < 0.5 and seen[1].mean().abs() < 1e-5 and seen[1].std() == pytest.approx(1, abs=0.01)


@LOOPS
def test_loss_is_used(loop, tmp_path):
    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        assert clip_eps == 0.3
        return logprobs.sum() * 0 + 7
    config = settings(loop, tmp_path, beta=0.0, clip_eps=0.3)
    policy, rows = loop.train(config, reward=letter_e, loss=loss)
    assert [row["loss"] for row in rows] == [7, 7, 7] and tiny.same(state(policy), state(load_model(config.sft)))


@LOOPS
def test_collect_is_used(loop, tmp_path):
    # What it returns is what is trained on and reported; what it is given is what the loop has.
    seen = []

    def collect(config, policy, reward, rows, step, clock):
        batch, prompts, rollout, rewards, texts = loop.collect(config, policy, reward, rows, step, clock)
        seen.append((config, policy, reward, rows, step, rollout.mask))
        return batch, prompts, rollout, rewards + 5, texts

    masks = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        masks.append(mask)
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
    config = settings(loop, tmp_path, steps=2)
    policy, rows = loop.train(config, reward=constant, collect=collect, loss=loss)
    assert [row["reward"] for row in rows] == [6, 6] and [call[4] for call in seen] == [0, 1]
    for call, mask in zip(seen, masks):
        assert call[:3] == (config, policy, constant) and len(call[3]) == 12 and call[5] is not mask
        assert torch.equal(call[5], mask)


def test_start_critic_is_used(tmp_path):
    given, values = [], []

    def start_critic(config, policy, device):
        given.append((config, policy, device))
        model = tiny.gpt(ScalarGPT, seed=8)
        torch.nn.init.constant_(model.scalar.bias, 3.0)
        return model

    def advantage(rewards, old_values, *rest):
        values.append(old_values)
        return ppo.gae(rewards, old_values, *rest)
    config = settings(ppo, tmp_path, run=str(tmp_path / "run"), steps=1, critic_lr=1e-5)
    policy, _ = ppo.train(config, reward=letter_e, advantage=advantage, start_critic=start_critic)
    assert given == [(config, policy, torch.device("cpu"))]
    assert torch.equal(values[0], torch.full_like(values[0], 3.0)), "its scalar head is 0 but for the bias"
    saved = load_checkpoint(tmp_path / "run/checkpoint.pt")["critic"]["scalar.bias"].item()
    assert saved != 3 and saved == pytest.approx(3, abs=1e-4)


@LOOPS
def test_a_loss_that_is_no_number_stops_the_run_before_it_does_harm(loop, tmp_path):
    calls = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        calls.append(1)
        return logprobs.sum() * (float("nan") if len(calls) == 3 else 1.0)
    config, model = settings(loop, tmp_path, run=str(tmp_path / "run"), steps=5), tiny.gpt()
    with pytest.raises(UserError, match="loss is nan") as stopped:
        loop.train(config, reward=letter_e, loss=loss, model=model)
    assert stopped.value.exit_code == 1 and all(value.isfinite().all() for value in model.parameters())
    assert len(read_csv(tmp_path / "run/metrics.csv")) == 2


@LOOPS
def test_model_is_used_and_needs_no_file(loop, tmp_path):
    model = tiny.gpt(seed=5)
    before = state(model)
    config = settings(loop, tmp_path, run=str(tmp_path / "run"))
    (tmp_path / "sft.pt").unlink()
    policy, _ = loop.train(config, reward=letter_e, model=model)
    assert policy is model and not tiny.same(state(policy), before)
    assert tiny.same(state(load_model(tmp_path / "run/checkpoint.pt")), state(policy))


@LOOPS
def test_evaluate_joins_the_row_of_each_step(loop, tmp_path):
    policies = []

    def evaluate(policy, step):
        policies.append(policy)
        return dict(held_out=10.0 * step)
    policy, rows = loop.train(settings(loop, tmp_path, run=str(tmp_path / "run")), reward=letter_e, evaluate=evaluate)
    assert [row["held_out"] for row in rows] == [0, 10, 20] and all(seen is policy for seen in policies)
    assert [row["held_out"] for row in read_csv(tmp_path / "run/metrics.csv")] == [0, 10, 20]


@LOOPS
def test_evaluate_may_measure_only_now_and_then(loop, tmp_path):
    def evaluate(policy, step):
        return dict(held_out=0.5) if step % 2 else {}
    loop.train(settings(loop, tmp_path, run=str(tmp_path / "run"), steps=4), reward=letter_e, evaluate=evaluate)
    rows = read_csv(tmp_path / "run/metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(None not in row for row in rows)
    assert [row.get("held_out", "") for row in rows] == ["", 0.5, "", 0.5]
    assert [row["completions"] for row in rows] == [12, 24, 36, 48], "columns have slipped"


def test_scores_of_a_reward_model_do_not_depend_on_the_batch(tmp_path):
    # One prompt and one completion nearly fill the context of 64, though not those of the same row.
    reward = learned(load_model(tiny.reward_checkpoint(tmp_path / "reward_model.pt"), kind=ScalarGPT))
    prompts, completions = ["a cow " * 25, "hello"], ["hello", "a cow " * 25]
    alone = [reward([prompt], [text])[0] for prompt, text in zip(prompts, completions)]
    assert reward(prompts, completions) == pytest.approx(alone, abs=1e-5)


# --- what a run leaves behind -------------------------------------------------------------------------------------

@LOOPS
def test_run_folder(loop, tmp_path, curves):
    config = settings(loop, tmp_path, run=str(tmp_path / "run"))
    policy, rows = loop.train(config, reward=letter_e)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.csv", "samples.jsonl", "checkpoint.pt", "curves.png"}
    assert tiny.same(read_csv(tmp_path / "run/metrics.csv"), rows)
    assert tiny.same(state(load_model(tmp_path / "run/checkpoint.pt")), state(policy))
    for name in "reward reward_std equal_groups truncated kl entropy clip_low clip_high grad_norm length".split():
        assert isinstance(rows[0][name], float), name
    assert all(f"seconds_{phase}" in rows[0] for phase in ("sample", "score", "update")) and rows[0]["memory_mb"] > 0
    assert ("explained_variance" in rows[0]) == ("seconds_critic" in rows[0]) == (loop is ppo)


# --- stopping and going on ----------------------------------------------------------------------------------------

def stop_at(step, stop, reward=letter_e):
    """A reward function that calls stop() in that step, counted from 0."""
    calls = []

    def stopping(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == step + 1:
            stop()
        return reward(prompts, completions, **columns)
    return stopping


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("the power went out")


@LOOPS
@pytest.mark.parametrize("stop, error", [(interrupt, UserError), (crash, RuntimeError)], ids=["Ctrl-C", "crash"])
def test_resumed_run_is_the_uninterrupted_one(loop, stop, error, tmp_path, monkeypatch):
    whole, parts = (settings(loop, tmp_path, run=str(tmp_path / name), steps=6, epochs=2) for name in ("a", "b"))
    policy, rows = loop.train(whole, reward=letter_e)
    monkeypatch.setattr(log, "SAVE_EVERY", 0)                  # a checkpoint after every step but the last two
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error) as stopped:
        loop.train(parts, reward=stop_at(2 if stop is interrupt else 4, stop))
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C means what it meant before"
    assert stop is crash or stopped.value.exit_code == 130
    assert 0 < load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] <= 3
    resumed, resumed_rows = loop.train(dataclasses.replace(parts, resume=True), reward=letter_e)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert tiny.same(state(policy), state(resumed)) and tiny.same(*map(tiny.without_clock, (rows, resumed_rows)))


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\ud800", "\0"], ids=["U+2028", "U+0085", "half an emoji", "NUL"])
def test_odd_characters_in_prompts_and_completions_can_be_resumed(odd, tmp_path):
    # Python breaks lines at some characters at which JSON Lines does not, and half a surrogate pair has no UTF-8.
    path = tiny.jsonl(tmp_path / "odd.jsonl", [dict(prompt=f"{text}{odd} ok", answer="1") for text in tiny.PROMPTS])
    config = settings(grpo, tmp_path, run=str(tmp_path / "run"), prompts=path)
    with pytest.raises(UserError, match="Ctrl-C"):
        grpo.train(config, reward=stop_at(1, interrupt))
    grpo.train(dataclasses.replace(config, resume=True), reward=letter_e)
    lines = (tmp_path / "run/samples.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines if line] == [0] * 9 + [1] * 9 + [2] * 9


@pytest.mark.parametrize("moment", ["show", "save", "checkpoint"])
def test_ctrl_c_at_an_awkward_moment_loses_no_step(moment, tmp_path, monkeypatch, capsys):
    # The signal comes while a step is being recorded: what is said to be saved has to be what is saved.
    method, calls = getattr(log.Run, moment), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            interrupt()
        return method(*arguments)
    monkeypatch.setattr(log.Run, moment, interrupted)
    monkeypatch.setattr(log, "SAVE_EVERY", 0)
    with pytest.raises(UserError, match="Ctrl-C"):
        grpo.train(settings(grpo, tmp_path, run=str(tmp_path / "run"), steps=6), reward=letter_e)
    assert f"saved after step {load_checkpoint(tmp_path / 'run/checkpoint.pt')['step']};" in capsys.readouterr().err


@LOOPS
def test_resuming_a_finished_run_changes_nothing(loop, tmp_path):
    config = settings(loop, tmp_path, run=str(tmp_path / "run"))
    _, rows = loop.train(config, reward=letter_e)
    files = [tmp_path / "run" / name for name in ("checkpoint.pt", "metrics.csv", "samples.jsonl")]
    before = [path.read_bytes() for path in files]
    policy, again = loop.train(dataclasses.replace(config, resume=True), reward=crash)
    assert before == [path.read_bytes() for path in files]
    assert tiny.same(rows, again) and tiny.same(state(policy), state(load_model(tmp_path / "run/checkpoint.pt")))


@LOOPS
def test_threads_matter_while_a_run_goes_on_and_not_once_it_has_ended(loop, tmp_path, monkeypatch):
    begun, ended = (settings(loop, tmp_path, run=str(tmp_path / name), steps=6) for name in ("begun", "ended"))
    loop.train(ended, reward=letter_e)
    with pytest.raises(UserError, match="Ctrl-C"):
        loop.train(begun, reward=stop_at(2, interrupt))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    loop.train(dataclasses.replace(ended, resume=True), reward=crash)
    with pytest.raises(UserError, match="other settings: threads"):
        loop.train(dataclasses.replace(begun, resume=True), reward=letter_e)


STAGES = {
    "pretrain": (pretrain, lambda folder, **more: pretrain.PretrainConfig(
        text=tiny.text_file(folder / "text.txt"), layers=1, heads=2, width=16, context=16, warmup=2, **more)),
    "sft": (sft, lambda folder, **more: sft.SFTConfig(
        base=tiny.checkpoint(folder / "base.pt"), demonstrations=tiny.demonstrations(folder / "sft.jsonl"),
        batch_size=4, warmup=2, **more)),
    "reward_model": (reward_model, lambda folder, **more: reward_model.RewardModelConfig(
        sft=tiny.checkpoint(folder / "sft.pt"), preferences=tiny.preferences(folder / "pairs.jsonl"), batch_size=4,
        warmup=2, **more)),
    "dpo": (dpo, lambda folder, **more: dpo.DPOConfig(
        sft=tiny.checkpoint(folder / "sft.pt"), preferences=tiny.preferences(folder / "pairs.jsonl"), batch_size=4,
        warmup=2, lr=1e-3, **more)),
}


@pytest.mark.parametrize("name", STAGES)
def test_resumed_supervised_stage_is_the_uninterrupted_one(name, tmp_path, monkeypatch):
    stage, config = STAGES[name]
    whole, parts = (config(tmp_path, run=str(tmp_path / folder), steps=6, device="cpu") for folder in ("a", "b"))
    model, rows = stage.train(whole)
    assert len(rows) == 6 and rows[-1]["loss"] < rows[0]["loss"]
    update, calls = fit.update, []

    def interrupted_update(*arguments):
        calls.append(1)
        if len(calls) == 3:
            interrupt()
        return update(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "update", interrupted_update)
        with pytest.raises(UserError) as stopped:
            stage.train(parts)
    assert stopped.value.exit_code == 130 and load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] == 3
    resumed, _ = stage.train(dataclasses.replace(parts, resume=True))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert tiny.same(state(model), state(resumed))


# --- parts of an update -------------------------------------------------------------------------------------------

@LOOPS
@pytest.mark.parametrize("more", [dict(), dict(minibatches=2, epochs=2, kl="k2"), dict(kl="k1", kl_in="reward")],
                         ids=["one update", "four updates", "the KL in the reward"])
def test_microbatches_change_no_gradient(loop, more, tmp_path, monkeypatch, double):
    """Parts of whole groups: as many updates, each with the gradient of the whole; and the metrics are those."""
    clip, found, rows = torch.nn.utils.clip_grad_norm_, [], []

    def recording(parameters, max_norm):
        parameters = list(parameters)
        found[-1].append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    for parts in 1, 2, 4 // more.get("minibatches", 1):
        found.append([])
        config = settings(loop, tmp_path, steps=1, beta=0.3, microbatches=parts, **more)
        rows += loop.train(config, reward=letter_e)[1]
    for other, row in zip(found[1:], rows[1:]):
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other):
            assert all((x - y).abs().max() < 1e-12 for x, y in zip(a, b)) and any(x.abs().max() > 1e-6 for x in a)
        for name in "loss", "grad_norm", "kl", "reward":
            assert row[name] == pytest.approx(rows[0][name], rel=1e-9), name


@LOOPS
def test_prompts_that_do_not_divide_into_microbatches(loop, tmp_path):
    with pytest.raises(UserError, match="4 prompts do not divide into 8 parts: minibatches x microbatches"):
        loop.train(settings(loop, tmp_path, minibatches=2, microbatches=4), reward=letter_e)
