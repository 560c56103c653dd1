"""The studies of gradients: their estimators on gradients whose noise is known, the identities that they rest on, and a
small run of each to the end.
"""
import numpy as np
import pytest
import torch

from grpo_min import grpo, variants
from grpo_min.critic import Critic
from grpo_min.lab.studies import gradients, recipes_one_update
from grpo_min.lab.studies.common import StudyConfig
from grpo_min.rollout import Prompts, sample, token_logprobs
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.files import DATA
from tests import tiny


@pytest.fixture
def batch():
    """A tiny policy, and 3 groups of 4 completions with rewards of 0 and 1, both in every group."""
    policy = tiny.gpt()
    prompts = Prompts.from_texts(tiny.PROMPTS[:3], policy.tokenizer)
    rollout = sample(policy, prompts, 4, 6, 1.0, torch.Generator().manual_seed(0))
    return policy, prompts, rollout, torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1])


def logprobs_of(policy, prompts, rollout):
    return token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)[0]


# --- the noise of gradients ---------------------------------------------------------------------------------------

def test_signal_to_noise_is_right_on_average_where_the_mean_of_few_gradients_is_far_off():
    """|mean|^2 = 1 and a trace of 100, from 16 gradients at a time. The squared norm of their mean is 1 + 100 / 16."""
    rng, mean = np.random.default_rng(0), np.eye(400)[0]
    estimates, naive = [], []
    for _ in range(300):
        vectors = mean + 0.5 * rng.standard_normal((16, 400))
        estimates.append(gradients.signal_to_noise(vectors @ vectors.T))
        naive.append((vectors.mean(0) ** 2).sum() / vectors.var(axis=0, ddof=1).sum())
    error = np.std(estimates) / np.sqrt(300)
    assert abs(np.mean(estimates) - 0.01) < 4 * error < 0.004 and np.mean(naive) > 0.06


def test_signal_to_noise_takes_apart_mean_and_covariance():
    vectors = np.random.default_rng(1).standard_normal((7, 5)) + 1
    trace = vectors.var(axis=0, ddof=1).sum()
    signal = (vectors.mean(0) ** 2).sum() - trace / 7
    assert gradients.signal_to_noise(vectors @ vectors.T) == pytest.approx(signal / trace, rel=1e-12)
    assert gradients.signal_to_noise(np.zeros((3, 3))) == 0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).standard_normal(30)
    value, low, high = gradients.jackknife(lambda kept: values[kept].mean(), 30)
    half = 1.96 * values.std(ddof=1) / np.sqrt(30)
    assert np.allclose([value, low, high], [values.mean(), values.mean() - half, values.mean() + half])


def test_noise_is_the_inverse_of_signal_and_has_no_bound_where_signal_is_not_told_from_0():
    assert gradients.noise_to_signal([0.02, 0.01, 0.04]) == [50, 25, 100]
    assert gradients.noise_to_signal([0.02, -0.01, 0.05]) == [50, 20, np.inf]
    assert gradients.noise_cell([50, 20, np.inf]) == "50 (20 or more)"
    assert gradients.noise_cell([np.inf, 20, np.inf]) == "no signal shown"
    assert gradients.noise_cell([50, 25, 100]) == "50 (25 to 100)"


def test_noise_and_cosine_do_not_depend_on_scale_and_see_noise():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(200, generator=generator)
    few = large + 3 * torch.randn(32, 200, generator=generator)
    noisy = few + 6 * torch.randn(32, 200, generator=generator)
    first, scaled, more = gradients.noise_and_cosine({"a": few, "b": 5 * few, "c": noisy}, large)
    assert scaled["noise"] == pytest.approx(first["noise"], rel=1e-4) and abs(scaled["more_signal"][0]) < 1e-6
    assert scaled["cosine"] == pytest.approx(first["cosine"], rel=1e-5)
    assert first["noise"][1] < 9 < first["noise"][2] and more["noise"][1] < 45 < more["noise"][2]
    assert more["more_signal"][2] < 0 and more["more_cosine"][2] < 0, "less than the first, beyond chance"
    expected = [torch.dot(row, large) / row.norm() / large.norm() for row in few]
    assert first["cosine"][0] == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_the_gradient_is_linear_in_the_advantages_and_leave_one_out_a_multiple_of_the_group_mean(batch):
    policy, prompts, rollout, rewards = batch
    logprobs = logprobs_of(policy, prompts, rollout)

    def gradient_with(advantages):
        return gradients.first_gradient(logprobs, advantages, rollout.mask, policy)
    mean, others, plain = (gradient_with(advantage(rewards, 4)[:, None])
                           for advantage in (grpo.group_advantages, variants.leave_one_out, variants.no_baseline))
    assert torch.allclose(others, mean * 4 / 3, atol=1e-6) and mean.norm() > 0.1
    group_means = rewards.view(3, 4).mean(1).repeat_interleave(4)[:, None]  # (B, 1)
    assert torch.allclose(mean, plain - gradient_with(group_means), atol=1e-6)
    by_token = torch.zeros_like(logprobs)
    by_token[5, 1] = 2.0                                                # of one token alone
    alone = torch.autograd.grad(-2 * logprobs[5, 1] / 12, list(policy.parameters()), retain_graph=True)
    assert torch.allclose(gradient_with(by_token), torch.cat([part.flatten() for part in alone]), atol=1e-6)


def test_the_score_of_each_completion(batch):
    policy, prompts, rollout, _ = batch
    logprobs = logprobs_of(policy, prompts, rollout)
    scores = gradients.squared_scores(policy, prompts, rollout, 4)
    expected = [gradients.gradient(row.sum(), policy).square().sum().item() for row in logprobs]
    assert scores == pytest.approx(expected, rel=1e-4) and max(scores) > 2 * min(scores)


def test_no_constant_has_less_variance_than_the_best():
    """Scores s in one dimension with mean 0; the variance of (R - b) s is least at the best b."""
    rng = np.random.default_rng(0)
    rewards = (rng.random(2000) < 0.7).astype(float)
    scores = rng.standard_normal(2000) * np.where(rewards > 0, 1, 3)
    best = gradients.best_constant(rewards, scores ** 2)
    squares = {b: np.mean(((rewards - b) * scores) ** 2) for b in np.arange(0, 1, 0.001)}
    assert best["best"][0] == pytest.approx(min(squares, key=squares.get), abs=0.001)
    assert best["best"][1] < 0.7 / (0.7 + 0.3 * 9) < best["best"][2] < best["mean_reward"] - 0.3
    assert best["score_wrong"] / best["score_right"] == pytest.approx(9, rel=0.1)
    assert gradients.best_constant([1, 1], [2, 3])["score_wrong"] is None


def test_a_line_for_each_moment():
    row = dict(noise=[5, 4, 6], best=[0.2, 0.1, 0.3], accuracy=0.5, explained_variance=0.25, mean_reward=0.4)
    lines = gradients.moments_table([dict(row, steps=0, score_right=2, score_wrong=6),
                                     dict(row, steps=1, score_right=2, score_wrong=None)], 15)
    assert lines[2:] == ["| at the start | 50% | 0.25 | 0.87 | 0.20 (0.10 to 0.30) | 0.40 | 3.0 |",
                         "| after 1 step | 50% | 0.25 | 0.87 | 0.20 (0.10 to 0.30) | 0.40 | - |"]


def test_gradients_to_the_end(tmp_path, run_study):
    rows, _, text = run_study("gradients", "baselines-gradients", steps=2)
    names = [*gradients.BASELINES, gradients.BEST, gradients.CRITIC]
    assert [(row["steps"], row["advantage"]) for row in rows] == [(steps, name) for steps in "012" for name in names]
    assert all(float(row["cosine_low"]) <= float(row["cosine"]) <= float(row["cosine_high"]) for row in rows)
    assert text.count("\n| after 2 steps |") == 1
    path = tmp_path / "runs/quick/gradients-2/checkpoint.pt"
    saved, written = load_checkpoint(path), path.stat().st_mtime_ns
    policy, critic = gradients.policy_and_critic(StudyConfig(run=str(tmp_path / "runs/quick"), device="cpu"), 2)
    assert path.stat().st_mtime_ns == written, "the run of PPO is used again"
    assert tiny.same(saved["critic"], critic.state_dict()) and tiny.same(saved["model"], policy.state_dict())
    _, untrained = gradients.policy_and_critic(StudyConfig(device="cpu"), 0)
    committed = load_model(DATA / "checkpoints/critic.pt", kind=Critic)
    assert tiny.same(untrained.state_dict(), committed.state_dict())
    assert not tiny.same(committed.state_dict(), critic.state_dict())


# --- recipes at one update ----------------------------------------------------------------------------------------

def directions(cosines):
    """Cosines (R, R) -> the names of the recipes, those of one direction together."""
    names, groups = list(recipes_one_update.SETTINGS), {}
    for name, row in zip(names, cosines > recipes_one_update.SAME):
        groups.setdefault(tuple(row), []).append(name)
    return list(groups.values())


def test_with_a_ratio_of_1_recipes_differ_in_advantage_and_divisor_alone(batch):
    policy, prompts, rollout, rewards = batch
    assert len(rollout.length.unique()) > 1, "or divisors would not matter"
    before = policy.state_dict()["norm.weight"].clone()
    (start, moved), (none_left_out, left_out) = recipes_one_update.compare_recipes(policy, prompts, rollout, rewards, 4)
    assert directions(start) == [["no recipe", "dr_grpo", "rloo"], ["grpo", "gspo"], ["dapo", "cispo"],
                                 ["reinforce++"]]
    left_out = dict(zip(recipes_one_update.SETTINGS, left_out))
    assert none_left_out == [0] * 8 and left_out["gspo"] > 0 == left_out["cispo"] and len(directions(moved)) > 4
    assert torch.equal(policy.state_dict()["norm.weight"], before), "a copy is moved"


def test_cosines_by_hand():
    cosines = recipes_one_update.cosine_matrix(torch.tensor([[1.0, 0], [5, 0], [1, 1], [0, 0], [-2, 0]]))
    half = 0.5 ** 0.5
    expected = [[1, 1, half, 0, -1], [1, 1, half, 0, -1], [half, half, 1, 0, -half], [0, 0, 0, 0, 0],
                [-1, -1, -half, 0, 1]]
    assert np.allclose(cosines, expected)
    assert recipes_one_update.cosine_cell(np.array([1, 1 - 1e-6])) == "="
    assert recipes_one_update.cosine_cell(np.array([1, 0.9])) == "0.950"


def test_recipes_to_the_end(run_study):
    rows, _, text = run_study("recipes_one_update", "recipes-one-update")
    assert len(rows) == 2 * 8 * 8 and "**With a ratio of 1**" in text and "**After 3 updates**" in text
    cosines = [float(row["cosine"]) for row in rows if (row["recipe"], row["other"]) == ("grpo", "gspo")]
    assert cosines[0] > 1 - 1e-6 and cosines[1] < 0.99
