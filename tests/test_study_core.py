"""The studies of GRPO's core claims: their estimators on gradients whose noise is known, the identities that they rest
on, the words that follow from numbers, and small runs of each to the end.
"""
import csv
from unittest import mock

import numpy as np
import pytest
import torch

from grpo_min import grpo, ppo, sft, study, study_core, study_gradient, variants
from grpo_min.config import UserError
from grpo_min.report import sides, state_bytes
from grpo_min.rewards import correct
from grpo_min.rollout import Prompts, sample, token_logprobs
from grpo_min.runs import DATA, load_checkpoint, load_model, read_jsonl
from grpo_min.tokenizer import encode_completion
from tests import tiny

SFT = str(DATA / "checkpoints/sft.pt")
QUICK = ["--quick", "--device", "cpu", "--eval-prompts", "20"]


@pytest.fixture
def in_process(monkeypatch):
    """Runs one after the other in this process: starting others takes longer than the runs."""
    for module in study_core, study_gradient:
        monkeypatch.setattr(module, "beside_each_other", tiny.one_after_the_other)


@pytest.fixture
def batch():
    """A tiny policy, and 3 groups of 4 completions with rewards of 0 and 1, both in every group."""
    policy = tiny.gpt()
    prompts = Prompts.from_texts(tiny.PROMPTS[:3])
    rollout = sample(policy, prompts, 4, 6, 1.0, torch.Generator().manual_seed(0))
    return policy, prompts, rollout, torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1])


def logprobs_of(policy, prompts, rollout):
    return token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)[0]


def files(folder, name):
    assert (folder / f"{name}.png").stat().st_size > 5000
    return rows_of(folder / f"{name}.csv"), (folder / f"{name}.md").read_text()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the noise of gradients ---------------------------------------------------------------------------------------

def test_signal_to_noise_is_right_on_average_where_the_mean_of_few_gradients_is_far_off():
    """|mean|^2 = 1 and a trace of 100, from 16 gradients at a time. The squared norm of their mean is 1 + 100 / 16."""
    rng, mean = np.random.default_rng(0), np.eye(400)[0]
    estimates, naive = [], []
    for _ in range(300):
        gradients = mean + 0.5 * rng.standard_normal((16, 400))
        estimates.append(study_gradient.signal_to_noise(gradients @ gradients.T))
        naive.append((gradients.mean(0) ** 2).sum() / gradients.var(axis=0, ddof=1).sum())
    error = np.std(estimates) / np.sqrt(300)
    assert abs(np.mean(estimates) - 0.01) < 4 * error < 0.004 and np.mean(naive) > 0.06


def test_signal_to_noise_takes_apart_mean_and_covariance():
    gradients = np.random.default_rng(1).standard_normal((7, 5)) + 1
    trace = gradients.var(axis=0, ddof=1).sum()
    signal = (gradients.mean(0) ** 2).sum() - trace / 7
    assert study_gradient.signal_to_noise(gradients @ gradients.T) == pytest.approx(signal / trace, rel=1e-12)
    assert study_gradient.signal_to_noise(np.zeros((3, 3))) == 0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).standard_normal(30)
    value, low, high = study_gradient.jackknife(lambda kept: values[kept].mean(), 30)
    half = 1.96 * values.std(ddof=1) / np.sqrt(30)
    assert np.allclose([value, low, high], [values.mean(), values.mean() - half, values.mean() + half])


def test_noise_is_the_inverse_of_signal_and_has_no_bound_where_signal_is_not_told_from_0():
    assert study_gradient.noise_to_signal([0.02, 0.01, 0.04]) == [50, 25, 100]
    assert study_gradient.noise_to_signal([0.02, -0.01, 0.05]) == [50, 20, np.inf]
    assert study_gradient.shown_noise([50, 20, np.inf]) == "50 (20 or more)"
    assert study_gradient.shown_noise([np.inf, 20, np.inf]) == "no signal shown"
    assert study_gradient.shown_noise([50, 25, 100]) == "50 (25 to 100)"


def test_noise_and_cosine_do_not_depend_on_scale_and_see_noise():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(200, generator=generator)
    few = large + 3 * torch.randn(32, 200, generator=generator)
    noisy = few + 6 * torch.randn(32, 200, generator=generator)
    first, scaled, more = study_gradient.noise_and_cosine({"a": few, "b": 5 * few, "c": noisy}, large)
    assert scaled["noise"] == pytest.approx(first["noise"], rel=1e-4) and abs(scaled["more_signal"][0]) < 1e-6
    assert scaled["cosine"] == pytest.approx(first["cosine"], rel=1e-5)
    assert first["noise"][1] < 9 < first["noise"][2] and more["noise"][1] < 45 < more["noise"][2]
    assert study_gradient.sign_of(more["more_signal"]) == study_gradient.sign_of(more["more_cosine"]) == -1
    expected = [torch.dot(row, large) / row.norm() / large.norm() for row in few]
    assert first["cosine"][0] == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_the_gradient_is_linear_in_the_advantages_and_leave_one_out_a_multiple_of_the_group_mean(batch):
    policy, prompts, rollout, rewards = batch
    logprobs = logprobs_of(policy, prompts, rollout)

    def of(advantages):
        return study_gradient.first_gradient(logprobs, advantages, rollout.mask, policy)
    mean, others, plain = (of(f(rewards, 4)[:, None]) for f in (grpo.group_advantages, variants.leave_one_out,
                                                                 variants.none))
    assert torch.allclose(others, mean * 4 / 3, atol=1e-6) and mean.norm() > 0.1
    groups = rewards.view(3, 4).mean(1).repeat_interleave(4)[:, None]                         # (B, 1) the baselines
    assert torch.allclose(mean, plain - of(groups), atol=1e-6)
    by_token = torch.zeros_like(logprobs)
    by_token[5, 1] = 2.0                                                                      # of one token alone
    alone = torch.autograd.grad(-2 * logprobs[5, 1] / 12, list(policy.parameters()), retain_graph=True)
    assert torch.allclose(of(by_token), torch.cat([part.flatten() for part in alone]), atol=1e-6)


def test_words_about_gradients():
    def row(advantage, steps, noise, more_signal, more_cosine):
        return dict(advantage=advantage, steps=steps, noise=[noise, noise - 1, noise + 1], cosine=[0.5, 0.4, 0.6],
                    more_signal=more_signal, more_cosine=more_cosine)
    up, down, unknown = [2, 1, 3], [-2, -3, -1], [0, -1, 1]
    rows = [row("mean", 0, 10, unknown, unknown), row("none", 0, 20, down, down), row("std", 0, 5, up, unknown),
            row("mean", 15, 30, unknown, unknown), row("none", 15, 31, unknown, unknown), row("std", 15, 32, down, up)]
    said = study_gradient.gradients_in_words(rows)
    assert said.startswith("More noise for its signal than `mean`: `none` at the start (20 (19 to 21) against 10 (9.00 "
                           "to 11)), `std` after 15 steps (32 (31 to 33) against 30 (29 to 31)).")
    assert "Less: `std` at the start (5.00 (4.00 to 6.00) against 10 (9.00 to 11))." in said
    assert "No difference shown: `none` after 15 steps." in said
    assert said.endswith("The cosine says otherwise of `std` at the start (no difference shown: 0.50 (0.40 to 0.60) "
                         "against 0.50 (0.40 to 0.60)), `std` after 15 steps (larger: 0.50 (0.40 to 0.60) against "
                         "0.50 (0.40 to 0.60)); of all else it says the same.")
    said = study_gradient.gradients_in_words([row("mean", 0, 10, unknown, unknown), row("a", 1, 10, unknown, unknown)])
    assert said == ("Nothing had more noise for its signal than `mean`. Nothing had less. No difference shown: `a` "
                    "after 1 step. The cosine says the same of all of them.")


def test_the_score_of_each_completion(batch):
    policy, prompts, rollout, _ = batch
    logprobs = logprobs_of(policy, prompts, rollout)
    scores = study_gradient.squared_scores(policy, prompts, rollout, 4)
    expected = [study_gradient.gradient(row.sum(), policy).square().sum().item() for row in logprobs]
    assert scores == pytest.approx(expected, rel=1e-4) and max(scores) > 2 * min(scores)


def test_no_constant_has_less_variance_than_the_best():
    """Scores s in one dimension with mean 0; the variance of (R - b) s is least at the best b."""
    rng = np.random.default_rng(0)
    rewards = (rng.random(4000) < 0.7).astype(float)
    scores = rng.standard_normal(4000) * np.where(rewards > 0, 1, 3)
    found = study_gradient.best_constant(rewards, scores ** 2)
    squares = {b: np.mean(((rewards - b) * scores) ** 2) for b in np.arange(0, 1, 0.001)}
    assert found["best"][0] == pytest.approx(min(squares, key=squares.get), abs=0.001)
    assert found["best"][1] < 0.7 / (0.7 + 0.3 * 9) < found["best"][2] < found["mean_reward"] - 0.3
    assert found["score_wrong"] / found["score_right"] == pytest.approx(9, rel=0.1)
    assert study_gradient.best_constant([1, 1], [2, 3])["score_wrong"] is None


def test_words_about_the_best_constant():
    rows = [dict(steps=steps, best=best, mean_reward=0.5, score_right=2, score_wrong=wrong) for steps, best, wrong in
            [(0, [0.2, 0.1, 0.3], 6), (1, [0.4, 0.3, 0.5], None), (2, [0.9, 0.8, 1], 1)]]
    assert study_gradient.best_in_words(rows).endswith(
        "at the start 0.20 (0.10 to 0.30), below the mean reward of 0.50 (squared score of a wrong completion 3.0 "
        "times that of a right one); after 1 step 0.40 (0.30 to 0.50), not told apart from the mean reward of 0.50; "
        "after 2 steps 0.90 (0.80 to 1.00), above the mean reward of 0.50 (squared score of a wrong completion 0.5 "
        "times that of a right one).")


def test_gradients_to_the_end(tmp_path, in_process, capsys):
    command = ["gradients", *QUICK, "--steps", "2", "--run", str(tmp_path / "runs"), "--out", str(tmp_path)]
    study.main(command)
    rows, text = files(tmp_path, "baselines-gradients")
    names = [*study_gradient.BASELINES, study_gradient.BEST, study_gradient.CRITIC]
    assert [(row["steps"], row["advantage"]) for row in rows] == [(s, name) for s in "012" for name in names]
    assert all(float(row["cosine_low"]) <= float(row["cosine"]) <= float(row["cosine_high"]) for row in rows)
    assert text in capsys.readouterr().out + "\n" and "noise for its signal than" in text
    study.main(command)
    assert "step 1/" not in capsys.readouterr().out, "the runs of PPO are used again"
    policy, critic = study_gradient.policy_and_critic(study.StudyConfig(run=str(tmp_path / "runs"), device="cpu"), 2)
    saved = load_checkpoint(tmp_path / "runs/gradients-2/checkpoint.pt")
    assert tiny.same(saved["critic"], critic.state_dict()) and tiny.same(saved["model"], policy.state_dict())
    _, untrained = study_gradient.policy_and_critic(study.StudyConfig(device="cpu"), 0)
    assert (untrained.scalar.weight == 0).all() and (critic.scalar.weight != 0).any()


# --- recipes at one update ----------------------------------------------------------------------------------------

def test_with_a_ratio_of_1_recipes_differ_in_advantage_and_divisor_alone(batch):
    policy, prompts, rollout, rewards = batch
    assert len(rollout.length.unique()) > 1, "or divisors would not matter"
    recipes = {"no recipe": {}, **variants.RECIPES}
    settings = {name: grpo.GRPOConfig(**changes) for name, changes in recipes.items()}
    before = policy.state_dict()["norm.weight"].clone()
    (at_one, moved), (none_left_out, left_out) = study_gradient.compare_recipes(policy, settings, prompts, rollout,
                                                                                rewards, 4)
    names = list(settings)
    assert [[names[i] for i in group] for group in study_gradient.alike(at_one)] == [
        ["no recipe", "dr_grpo", "rloo"], ["grpo", "gspo"], ["dapo", "cispo"], ["reinforce++"]]
    assert none_left_out == [0] * 8 and left_out[names.index("gspo")] > 0 == left_out[names.index("cispo")]
    assert len(study_gradient.alike(moved)) > 4
    assert torch.equal(policy.state_dict()["norm.weight"], before), "a copy is moved"


def test_cosines_by_hand():
    cosines = study_gradient.cosine_matrix(torch.tensor([[1.0, 0], [5, 0], [1, 1], [0, 0], [-2, 0]]))
    half = 0.5 ** 0.5
    expected = [[1, 1, half, 0, -1], [1, 1, half, 0, -1], [half, half, 1, 0, -half], [0, 0, 0, 0, 0],
                [-1, -1, -half, 0, 1]]
    assert np.allclose(cosines, expected)
    assert study_gradient.alike(cosines) == [[0, 1], [2], [3], [4]]
    assert study_gradient.shown_cosine(np.array([1, 1 - 1e-6])) == "="
    assert study_gradient.shown_cosine(np.array([1, 0.9])) == "0.950"


def test_words_about_recipes():
    same, apart = np.ones((3, 3)), np.array([[1, 0.5, 0.9], [0.5, 1, 0.7], [0.9, 0.7, 1]])
    said = study_gradient.recipes_in_words(["a", "b", "c"], ["with a ratio of 1", "later"],
                                           np.array([[same, apart]] * 2), np.array([[[0, 0, 0], [0, 0.2, 0.1]]] * 2))
    assert said == ("With a ratio of 1 the 3 have 1 direction: `a` = `b` = `c`. Later the 3 have 3 directions: `a`; "
                    "`b`; `c`. Between directions, the cosine goes from 0.500 (0.500 to 0.500), `a` and `b`, to "
                    "0.900 (0.900 to 0.900), `a` and `c`. Most tokens are then left out by `b`: 20% (20% to 20%).")
    assert study_gradient.recipes_in_words(["a"], ["x", "y"], np.ones((1, 2, 1, 1)), np.zeros((1, 2, 1))).endswith(
        "No recipe leaves a token out.")


def test_recipes_to_the_end(tmp_path):
    study.main(["recipes_one_update", *QUICK, "--out", str(tmp_path)])
    rows, text = files(tmp_path, "recipes-one-update")
    assert len(rows) == 2 * 8 * 8 and "With a ratio of 1 the 8 have 4 directions" in text
    of_pair = [float(row["cosine"]) for row in rows if (row["recipe"], row["other"]) == ("grpo", "gspo")]
    assert of_pair[0] > 1 - 1e-6 and of_pair[1] < 0.99


# --- filtered SFT -------------------------------------------------------------------------------------------------

def test_online_filtered_sft_is_reinforce_without_a_baseline(tmp_path, monkeypatch):
    """The gradient of SFT's cross-entropy on the right completions is that of GRPO's loss with --advantage none, but
    for the divisor: all tokens of the right completions in the one, all B completions in the other."""
    policy, rows = load_model(SFT, "GPT"), read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"])[:8]
    prompts = Prompts.from_texts([row["prompt"] for row in rows])
    rollout = sample(policy, prompts, 4, 40, 1.0, torch.Generator().manual_seed(0))
    texts, answers = rollout.texts(), [row["answer"] for row in rows for _ in range(4)]
    rewards = torch.tensor(correct(texts, texts, answers, rollout.finished.tolist()))         # (32,)
    right = rewards.nonzero().flatten().tolist()
    assert 4 < len(right) < 32
    for b in right:                                                             # or SFT would train on other tokens
        assert encode_completion(texts[b]) == rollout.completion_ids[b][rollout.mask[b]].tolist()
    logprobs = logprobs_of(policy, prompts, rollout)
    online = study_gradient.first_gradient(logprobs, variants.none(rewards, 4)[:, None], rollout.mask, policy)
    kept = tiny.jsonl(tmp_path / "right.jsonl", [dict(prompt=prompts.texts[b // 4], response=texts[b])
                                                 for b in right])
    monkeypatch.setattr(sft, "fit", lambda config, model, inputs, loss_at: loss_at(0))
    model, (loss, _) = sft.train(sft.SFTConfig(base=SFT, demonstrations=kept, batch_size=len(right), device="cpu"))
    filtered = study_gradient.gradient(loss, model)
    assert torch.allclose(online * 32, filtered * rollout.mask[right].sum(), atol=1e-3 * online.norm().item())


def test_right_answers_are_those_of_grpos_first_batch(monkeypatch):
    seen = tiny.recorded_rollouts(grpo, monkeypatch)
    grpo.train(grpo.GRPOConfig(run="", steps=1, prompts_per_step=study_core.Q, group_size=study_core.G, device="cpu",
                               seed=3))
    found = study_core.right_answers(load_model(SFT, "GPT"), 3, 1)[0]
    prompts, rollout = seen[0]
    answers = {row["prompt"]: row["answer"] for row in read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt"])}
    sampled = [(prompts.texts[b // study_core.G], text) for b, text in enumerate(rollout.texts())]
    right = correct(sampled, rollout.texts(), [answers[prompt] for prompt, _ in sampled], rollout.finished.tolist())
    assert [tuple(row.values()) for row in found] == [pair for pair, is_right in zip(sampled, right) if is_right]
    assert 0 < len(found) < len(sampled)


def test_what_is_measured_of_a_policy():
    policy, rows = load_model(SFT, "GPT"), read_jsonl(DATA / "arithmetic_val.jsonl", ["prompt", "answer"])[:60]
    same = study_core.measure(policy, policy, rows)
    assert same["kl"] < 1e-6 and 0.3 < same["accuracy"] < 0.8 and 0.2 < same["thinking"] < 0.8
    other = study_core.measure(policy, load_model(DATA / "checkpoints/base.pt", "GPT"), rows)
    assert other["kl"] > 1 and dict(other, kl=0) == dict(same, kl=0)


def test_sides_and_words_about_ways():
    assert sides({"x": [1, 2], "a": [3, 4], "b": [0.1, 0.9], "c": [2, 9]}) == (["a"], ["b"], ["c"])

    def rows(accuracy, kl):
        return [dict(accuracy=a, kl=k, completions=100) for a, k in zip(accuracy, kl)]
    found = {"GRPO": rows([0.9, 0.9], [1, 2]), "on": rows([0.94, 0.9], [3, 4]), "off": rows([0.6, 0.8], [0.1, 1.5])}
    said = study_core.rl_in_words(dict(accuracy=0.5), found)
    assert said.startswith("Nothing was better than `GRPO` (90.0%) with every seed. Worse with every seed: `off` (70")
    assert ("Of what `GRPO` gains over the SFT model (50.0%), `on` gains 105% (100% to 110%), `off` gains 50% (25% to "
            "75%).") in said
    assert "Farther from the SFT model than `GRPO` (1.50 (1.00 to 2.00) nats) with every seed: `on` (3.50" in said
    assert said.endswith("In KL, no difference from `GRPO` shown: `off`.") and "Nearer" not in said
    assert "`GRPO` did not gain over the SFT model (95.0%) with every seed." in study_core.rl_in_words(
        dict(accuracy=0.95), found)


def test_is_rl_needed_to_the_end(tmp_path, in_process, capsys):
    command = ["is_rl_needed", *QUICK, "--run", str(tmp_path / "runs"), "--out", str(tmp_path)]
    study.main(command)
    rows, text = files(tmp_path, "is_rl_needed")
    assert [row["setting"] for row in rows] == ["SFT", "GRPO", study_core.ONLINE, study_core.OFFLINE, study_core.MORE]
    assert [row["completions"] for row in rows] == ["0", "384", "384", "384", "0"]
    assert text in capsys.readouterr().out + "\n"
    curves = rows_of(tmp_path / "is_rl_needed-curves.csv")
    assert [int(row["completions"]) for row in curves] == [128, 256, 384] * 2 + [128, 128, 384] + [0]
    kept = read_jsonl(next((tmp_path / "runs").glob("*offline-1-1.jsonl")), ["prompt", "response"])
    assert int(rows[3]["updates"]) == 4 * len(kept) // 32
    study.main(command)
    assert "step 1/" not in capsys.readouterr().out and files(tmp_path, "is_rl_needed")[1] == text


def test_too_few_right_answers_are_one_line(tmp_path):
    config = study.StudyConfig(sft=tiny.checkpoint(tmp_path / "sft.pt", context=128), run=str(tmp_path), device="cpu",
                               eval_prompts=2)
    with pytest.raises(UserError, match="only 0 of 128 answers are right: too few for batches of 32"):
        study_core.offline(config, study_core.OFFLINE, 1, 1)


# --- critics ------------------------------------------------------------------------------------------------------

def test_a_shared_trunk_is_the_policy_itself_and_the_value_loss_moves_it(tmp_path, watch):
    made = watch(study_core, "shared_trunk")
    with mock.patch.object(ppo, "start_critic", study_core.shared_trunk):
        settings = tiny.settings(ppo, tmp_path, steps=2, beta=0.0, critic_warmup=9, run=str(tmp_path / "run"))
        before = tiny.gpt()
        policy, _ = ppo.train(settings, reward=tiny.letter_e)
    critic = made[0][1]
    assert critic.trunk is policy and (critic.scalar.weight != 0).any()
    assert not torch.equal(policy.tokens.weight, before.tokens.weight), "in the warm-up, the value loss alone moves it"
    saved = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert torch.equal(saved["critic"]["trunk.tokens.weight"], saved["model"]["tokens.weight"])


def test_the_memory_of_a_shared_trunk():
    policy, config = tiny.gpt(), ppo.PPOConfig()
    trunk, head = 4 * sum(p.numel() for p in policy.parameters()), 4 * (16 + 1)
    assert study_core.model_state(policy, config, "separate") == sum(state_bytes(policy, config).values())
    # policy, reference and gradient; head and gradient; two optimizers with two moments of the trunk each
    shared = 3 * trunk + 2 * head + 4 * trunk + 2 * head
    assert study_core.model_state(policy, config, study_core.SHARED_TRUNK) == shared


def test_correlation_and_words_about_critics():
    value, low, high = study_core.correlation([(x, 2 * x + 1) for x in range(8)])
    assert value == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)
    pairs = np.random.default_rng(0).standard_normal((40, 2))
    value, low, high = study_core.correlation(pairs)
    assert value == pytest.approx(np.corrcoef(pairs.T)[0, 1]) and low < 0 < high

    def rows(accuracy, ev):
        return [dict(accuracy=a, ev_mean=e, megabytes=m) for a, e, m in zip(accuracy, ev, [8, 8])]
    found = {"separate": rows([0.5, 0.6], [0.1, 0.2]), study_core.NO_CRITIC: rows([0.9, 0.9], [None, None]),
             "warm": rows([0.7, 0.8], [0.3, 0.4]), study_core.SHARED_TRUNK: rows([0.3, 0.4], [-0.1, 0])}
    said = study_core.critic_in_words(found)
    assert "Better than `separate` (55.0% (50.0% to 60.0%)) with every seed: `no critic (GRPO)` (90.0%), `warm`" in said
    assert "`separate` explains 0.15 (0.10 to 0.20) of the variance of the returns; more with every seed: `w" in said
    assert "less: `shared trunk` (-0.05 (-0.10 to 0.00))." in said and "Over the 6 runs with a critic" in said
    assert "critics that explain more go with better policies." in said and said.endswith("8.0 MB without a critic.")
    worse = {label: [dict(row, accuracy=1 - row["accuracy"]) for row in of] for label, of in found.items()}
    assert "critics that explain more go with worse policies." in study_core.critic_in_words(worse)


def test_critic_to_the_end(tmp_path, in_process, capsys):
    command = ["critic", *QUICK, "--run", str(tmp_path / "runs"), "--out", str(tmp_path)]
    study.main(command)
    rows, text = files(tmp_path, "critic")
    assert [row["setting"] for row in rows] == ["separate", study_core.NO_CRITIC, study_core.SHARED_TRUNK]
    assert [row["ev_mean"] == "" for row in rows] == [False, True, False] and text in capsys.readouterr().out + "\n"
    assert float(rows[1]["megabytes"]) < float(rows[2]["megabytes"]) < float(rows[0]["megabytes"])
    assert len(rows_of(tmp_path / "critic-curves.csv")) == 9
    study.main(command)
    assert "step 1/" not in capsys.readouterr().out and files(tmp_path, "critic")[1] == text
