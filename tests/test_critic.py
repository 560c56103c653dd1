"""PPO's critic: what its values are made of, how it is trained, and the ruler that says how much there is to explain.

Values by sampling and the ruler are held against the 15 completions of test_exact.py, whose true values can be summed.
"""
import functools
import json
import signal
import types
from contextlib import nullcontext

import pytest
import torch

from grpo_min import critic as stage, ppo
from grpo_min.critic import Critic, CriticConfig, Oracle, critic_metrics, explainable_share, sampled_values
from grpo_min.lab import compare
from grpo_min.rollout import Prompts, Rollout
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import UserError
from grpo_min.run.table import read_csv
from tests import tiny
from tests.test_exact import AT, COMPLETIONS, IDS, LONGEST, MASK, STATES, probabilities, true_values
from tests.test_exact import END as LAST

PROMPTS = Prompts.from_texts(tiny.PROMPTS[:2], tiny.TOKENIZER)


@pytest.fixture
def living(tmp_path):
    return load_model(tiny.critic_checkpoint(tmp_path / "critic.pt"), kind=Critic)


@pytest.fixture
def batch():
    """Ids and mask of two completions for each of two prompts."""
    ids = torch.randint(6, 500, (4, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return ids.masked_fill(~mask, tiny.PAD), mask


# --- values -------------------------------------------------------------------------------------------------------

def test_at_first_all_values_are_0(batch):
    assert (tiny.gpt().with_head(Critic).values(PROMPTS, *batch) == 0).all()


@torch.no_grad()
def test_a_value_is_the_prompt_s_and_the_gain_of_each_token_so_far(living, batch):
    ids, mask = batch
    values = living.values(PROMPTS, ids, mask)  # (4, 5)
    for b in range(4):
        prompt = PROMPTS.ids[b // 2, :PROMPTS.length[b // 2]]
        whole = torch.cat([prompt, ids[b]])[None]
        states = living.trunk.run(whole, torch.arange(whole.shape[1]))[0][0]
        value = living.scalar(states[len(prompt) - 1]).item()
        for t in range(int(mask[b].sum())):
            assert values[b, t].item() == pytest.approx(value, abs=1e-4)
            value += (living.gain(states[len(prompt) - 1 + t]) @ living.trunk.tokens.weight[ids[b, t]]).item()
    assert values[mask].std() > 0.1


@torch.no_grad()
def test_a_value_knows_the_tokens_before_it_and_no_other(living, batch):
    ids, mask = batch
    values, ids[0, 2] = living.values(PROMPTS, ids, mask), 77
    changed = (living.values(PROMPTS, ids, mask) - values).abs() > 1e-5  # (4, 5)
    assert changed[0].tolist() == [False] * 3 + [True] * 2 and not changed[1:].any()


# --- values by sampling, and the ruler ----------------------------------------------------------------------------

@pytest.fixture
def logits(double):
    return torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def rewards(double):
    return torch.randn(len(COMPLETIONS), generator=torch.Generator().manual_seed(4))


class Letters:
    """The tokenizer of the tree."""
    pad, end = 9, LAST

    def decode(self, ids):
        return "".join(map(str, ids))


def of_the_tree(logits, prompts, copies, max_new_tokens, temperature, generator):
    """In place of rollout.sample: prompts are one token and the letters so far."""
    rows = [tuple(row[1:n]) for row, n in zip(prompts.ids.tolist(), prompts.length.tolist()) for _ in range(copies)]
    ids = torch.full((len(rows), max_new_tokens), Letters.pad)
    for t in range(max_new_tokens):
        going = [b for b, row in enumerate(rows) if LAST not in row]
        chances = logits[[STATES.index(rows[b]) for b in going]].softmax(-1)  # (n, 3)
        ids[going, t] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        rows = [(*row, token) for row, token in zip(rows, ids[:, t].tolist())]
    return Rollout(ids, ids != Letters.pad, None, (ids == LAST).any(dim=1))


def rewards_of(rewards):
    """The tree's rewards as a reward function, that adds a column shift."""
    texts = {"".join(str(token) for token in completion if token != LAST): reward.item()
             for completion, reward in zip(COMPLETIONS, rewards)}

    def reward(prompts, completions, finished, shift):
        assert all(end == (len(text) < LONGEST) for text, end in zip(completions, finished))
        return [texts[text] + more for text, more in zip(completions, shift)]
    return reward


def visits(logits):
    """How often each state of each completion is visited: (15 * 3,)."""
    return (probabilities(logits)[:, None] * MASK).flatten()


def exact_share(logits, rewards):
    """Variance of the true values over the rewards', over all states as they are visited."""
    visited = visits(logits)
    values, returns = true_values(logits, rewards)[AT].flatten(), rewards[:, None].expand(-1, LONGEST).flatten()
    mean = (visited * returns).sum() / visited.sum()
    return ((visited * (values - mean) ** 2).sum() / (visited * (returns - mean) ** 2).sum()).item()


def test_values_by_sampling_are_the_true_ones_on_average(logits, rewards, monkeypatch):
    monkeypatch.setattr(stage, "sample", lambda policy, *rest: of_the_tree(logits, *rest))
    reward = rewards_of(rewards)
    rows, copies = [dict(prompt="a", shift=0.0), dict(prompt="b", shift=10.0)], 300
    prompts = Prompts(torch.tensor([[5], [6]]), torch.tensor([1, 1]), ["a", "b"])
    ids = IDS.masked_fill(~MASK, Letters.pad).repeat(2, 1)  # (30, 3): every completion of both prompts
    rollout = Rollout(ids, MASK.repeat(2, 1), torch.zeros(30, LONGEST), None)
    config = CriticConfig(max_new_tokens=LONGEST)
    policy = types.SimpleNamespace(tokenizer=Letters())
    values = sampled_values(config, policy, reward, rows, prompts, rollout, copies, "test").view(2, 15, LONGEST)
    expected = true_values(logits, rewards)[AT]  # (15, 3)
    error = 4 * rewards.std() / copies ** 0.5
    assert ((values[0] - expected)[MASK].abs() < error).all() and error < expected[MASK].std()
    assert ((values[1] - expected - 10)[MASK].abs() < error).all(), "of another prompt"
    assert (values[:, ~MASK] == 0).all()


def test_values_by_sampling_depend_on_seed_name_and_column_alone():
    """And so not on the policy's own random numbers, with which a second completion would be the first again."""
    policy, rows = tiny.gpt(), [dict(prompt=text) for text in PROMPTS.texts]
    ids, mask = torch.full((4, 3), 300), torch.ones(4, 3, dtype=torch.bool)

    def values(seed, name):
        config, rollout = CriticConfig(max_new_tokens=6, seed=seed), Rollout(ids, mask, torch.zeros(4, 3), None)
        return sampled_values(config, policy, length, rows, PROMPTS, rollout, 2, name)

    def length(prompts, completions, finished):
        return [float(len(text)) for text in completions]
    first = values(1, "a 7")
    torch.manual_seed(5)
    assert torch.equal(first, values(1, "a 7"))
    assert not torch.equal(first, values(1, "b 7")) and not torch.equal(first, values(2, "a 7"))


def test_what_can_be_explained_is_the_variance_of_the_true_values(logits, rewards):
    p, generator = probabilities(logits), torch.Generator().manual_seed(5)
    exact = exact_share(logits, rewards)
    drawn = torch.multinomial(visits(logits), 100_000, replacement=True, generator=generator)   # a state on its way
    first, states = rewards[drawn // LONGEST], AT.flatten()[drawn]
    second = torch.empty(len(drawn))
    for state in range(len(STATES)):                            # another completion that goes through the same state
        through = p * ((AT == state) & MASK).any(dim=1)
        here = states == state
        second[here] = rewards[torch.multinomial(through, int(here.sum()), replacement=True, generator=generator)]
    assert 0.1 < exact < 0.9 and explainable_share(first, second) == pytest.approx(exact, abs=0.02)
    assert explainable_share(first + 5, second + 5) == pytest.approx(exact, abs=0.02)


def test_the_ruler_measures_it_on_completions_and_second_ones(logits, rewards, monkeypatch):
    """The same share, from nothing but sampled completions."""
    monkeypatch.setattr(stage, "sample", lambda policy, *rest: of_the_tree(logits, *rest))
    count, numbers = 6000, torch.Generator().manual_seed(6)
    drawn = torch.multinomial(probabilities(logits), count, replacement=True, generator=numbers)
    rollout = Rollout(IDS.masked_fill(~MASK, Letters.pad)[drawn], MASK[drawn], torch.zeros(count, LONGEST), None)
    prompts, rows = Prompts(torch.tensor([[5]]), torch.tensor([1]), ["a"]), [dict(prompt="a", shift=0.0)]
    config, policy = CriticConfig(max_new_tokens=LONGEST), types.SimpleNamespace(tokenizer=Letters())
    found = stage.explainable_variance(config, policy, rewards_of(rewards), rows, prompts, rollout, rewards[drawn], 20)
    exact, error = exact_share(logits, rewards), 3 / count ** 0.5       # as if a completion's states all had one luck
    assert found == pytest.approx(exact, abs=error) and error < exact / 2


def test_luck_cannot_be_explained_and_what_is_known_can():
    first, second = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(1))
    assert abs(explainable_share(first, second)) < 0.02 and explainable_share(first, first) == pytest.approx(1)
    assert explainable_share(torch.ones(5), torch.ones(5)) == ""


def test_the_share_of_the_critic():
    values, mask = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.ones(2, 2, dtype=torch.bool)
    returns = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    row = critic_metrics(values, returns, mask, 0.8)
    assert row["explained_variance"] == pytest.approx(0.5) and row["critic_share"] == pytest.approx(0.625)
    for explainable in "", 0.0, -0.1:
        assert critic_metrics(values, returns, mask, explainable)["critic_share"] == ""


def test_every_twentieth_step_is_measured_and_a_dead_critic_is_noted(tmp_path, capsys):
    def by_prompt(prompts, completions, **columns):
        return [float(prompt in tiny.PROMPTS[:6]) for prompt in prompts]
    config = tiny.settings(ppo, tmp_path, steps=21, critic_epochs=0, prompts_per_step=12)
    _, rows = ppo.train(config, reward=by_prompt)
    assert [row["step"] for row in rows if row["explainable_variance"] != ""] == [19]
    assert rows[19]["explainable_variance"] == pytest.approx(1)
    assert rows[19]["critic_share"] == pytest.approx(0, abs=1e-6) and rows[18]["critic_share"] == ""
    assert "seconds_ruler" in rows[19]
    note = "note: critic_share is 0 in step 20: the critic explains less than a tenth"
    assert capsys.readouterr().out.count(note) == 1


def test_the_oracle_gives_values_by_sampling_and_leaves_the_policy_s_numbers_alone(tmp_path):
    seen = []

    def advantage(rewards, values, mask, *rest):
        seen.append(values.clone())
        return torch.zeros_like(values), values                                     # the policy has nothing to learn
    rewards = {}
    for name, more in ("oracle", dict(start_critic=functools.partial(Oracle, reward=tiny.letter_e))), ("fresh", {}):
        config = tiny.settings(ppo, tmp_path, critic_epochs=0, beta=0.0)
        _, rows = ppo.train(config, reward=tiny.letter_e, advantage=advantage, **more)
        rewards[name] = [row["reward"] for row in rows]
    assert rewards["oracle"] == rewards["fresh"] and len(seen) == 6
    assert all((values != 0).any() for values in seen[:3]) and not any((values != 0).any() for values in seen[3:])
    assert not torch.equal(seen[0], seen[1])


def test_the_oracle_s_values_are_those_by_sampling(tmp_path, monkeypatch):
    calls, values_of = [], stage.sampled_values

    def sampled_values(*arguments):
        calls.append((arguments, values_of(*arguments)))
        return calls[-1][1]
    monkeypatch.setattr(stage, "sampled_values", sampled_values)
    config, policy = tiny.settings(ppo, tmp_path), tiny.gpt()
    oracle, asked = Oracle(config, policy, torch.device("cpu"), reward=tiny.letter_e, copies=3), PROMPTS.texts
    ids, mask = torch.full((4, 3), 300), torch.tensor([[True, True, True], [True, True, False]] * 2)
    values = oracle.values(PROMPTS, ids, mask)
    (its_config, its_policy, reward, batch, prompts, rollout, copies, name), found = calls.pop()
    assert torch.equal(values, found) and (values[mask] != 0).any() and (values[~mask] == 0).all()
    assert its_config is config and its_policy is policy and prompts is PROMPTS and copies == 3
    assert reward is tiny.letter_e and [row["prompt"] for row in batch] == asked and "answer" in batch[0]
    assert rollout.completion_ids is ids and rollout.mask is mask
    oracle.values(PROMPTS, ids + 1, mask)
    assert calls[0][0][-1] != name, "other random numbers in the next batch"


def test_the_comparison_s_oracle_asks_the_reward_model_once_for_each_answer(tmp_path, monkeypatch):
    asked, found, config = [], [], tiny.settings(ppo, tmp_path, reward="learned")

    def reward(prompts, completions, finished, **columns):
        asked.extend(zip(prompts, completions, finished))
        return [len(text) + 0.5 * end for text, end in zip(completions, finished)]
    monkeypatch.setattr(compare, "load_reward", lambda *arguments: (reward, None, None))
    mask = torch.tensor([[True, True, True], [True, True, False]] * 2)
    for oracle in functools.partial(Oracle, reward=reward), compare.oracle:
        values = oracle(config, tiny.gpt(), torch.device("cpu")).values(PROMPTS, torch.full((4, 3), 300), mask)
        found.append((values, list(asked)))
        asked.clear()
    (plain, again), (values, once) = found
    assert torch.equal(values, plain) and (values[mask] > 0).all()
    assert set(once) == set(again) and len(once) == len(set(again)) < len(again)


# --- the training before RL ---------------------------------------------------------------------------------------

def settings(folder, **more):
    return CriticConfig(**dict(dict(run="", sft=tiny.checkpoint(folder / "sft.pt"), device="cpu", steps=60, batches=20,
                                    prompts=tiny.prompts(folder / "prompts.jsonl"), prompts_per_step=8, warmup=5,
                                    max_new_tokens=6, lr=1e-2, weight_decay=0.0), **more))


def first_letter(prompts, completions, **columns):
    return [float(text[:1] > "m") for text in completions]


def first_number(prompts, completions, **columns):
    return [float(prompt[len("start with ")] > "4") for prompt in prompts]


@pytest.mark.parametrize("reward", [first_letter, first_number])
def test_it_learns_what_can_be_known(reward, tmp_path):
    """The first token tells it, or the prompt alone. Beforehand nothing is explained."""
    rows = [dict(prompt=f"start with {i}, plus {j}.") for i in range(10) for j in range(13)]
    config = settings(tmp_path, steps=150, batches=40, prompts_per_step=64, lr=0.03,
                      prompts=tiny.jsonl(tmp_path / "many.jsonl", rows))
    critic, figures, metrics = stage.train(config, reward=reward)
    assert len(metrics) == 150 and figures["share"] == figures["explained"] / figures["explainable"]
    assert figures["share"] > 0.5, "of 13 prompts that it has not seen"
    known = stage.judge(config, tiny.gpt(), critic, reward, rows)
    assert known["share"] > 0.7 and (0.5 < known["explainable"] < 0.9 if reward is first_letter else
                                     known["explainable"] == pytest.approx(1))
    dead = stage.judge(config, tiny.gpt(), tiny.gpt().with_head(Critic), reward, rows)
    assert dead["explained"] == pytest.approx(0, abs=1e-6) and dead["explainable"] == known["explainable"]


def test_prompts_that_it_is_judged_on_are_not_trained_on(tmp_path):
    asked = []

    def reward(prompts, completions, **columns):
        asked.append(prompts)
        return first_letter(prompts, completions)
    stage.train(settings(tmp_path, steps=30, batches=30), reward=reward)
    held = set(asked[30])                                                           # after 30 batches of training
    trained = {prompt for prompts in asked[:30] for prompt in prompts}
    assert len(asked[30]) == 4 and len(held) == 1 and len(trained) == 11 and not held & trained


def test_each_batch_is_sampled_once(tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        return first_letter(prompts, completions)
    config = settings(tmp_path, steps=60, batches=3)
    _, _, rows = stage.train(config, reward=reward)
    assert calls[:4] == [8, 8, 8, 4], "three batches, then four completions of the prompt that was held out"
    assert stage.costs(config, rows)["completions"] == 24
    assert stage.costs(settings(tmp_path, steps=2, batches=3), rows[:2])["completions"] == 16


def test_a_loss_beside_and_another_class(tmp_path):
    calls = []

    def beside(critic, prompts, rollout):
        calls.append(rollout.mask.shape)
        return 0 * critic.scalar.weight.sum() + 5
    critic, _, rows = stage.train(settings(tmp_path, steps=3), reward=first_letter, kind=tiny.ScalarGPT, beside=beside)
    assert type(critic) is tiny.ScalarGPT and len(calls) == 3 and rows[0]["loss"] > 5


def test_what_the_command_says_and_writes(tmp_path, capsys):
    words = ["--run", tmp_path / "run", "--sft", tiny.checkpoint(tmp_path / "sft.pt"), "--prompts",
             tiny.prompts(tmp_path / "prompts.jsonl"), "--prompts-per-step", 4, "--steps", 3, "--batches", 2,
             "--max-new-tokens", 6, "--device", "cpu", "--reward", "well_formed"]
    stage.main([str(word) for word in words])
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert figures.keys() == {"explained", "explainable", "share", "completions", "seconds_sample", "seconds_update"}
    assert figures["completions"] == 8 and "8 completions in" in capsys.readouterr().out
    assert load_model(tmp_path / "run/checkpoint.pt", kind=Critic) and len(read_csv(tmp_path / "run/metrics.csv")) == 3


def test_resumed_it_goes_on_with_the_same_bits(tmp_path):
    def stopping(prompts, completions, calls=[], **columns):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return first_letter(prompts, completions)
    for name, resume, reward in [("whole", False, first_letter), ("again", False, stopping),
                                 ("again", True, first_letter)]:
        config = settings(tmp_path, run=str(tmp_path / name), steps=6, resume=resume)
        torch.manual_seed(len(name) + resume)                                           # not what decides
        with pytest.raises(UserError, match="Ctrl-C") if reward is stopping else nullcontext():
            stage.train(config, reward=reward)
        assert len(read_csv(tmp_path / name / "metrics.csv")) == (3 if reward is stopping else 6)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "again")


# --- in PPO -------------------------------------------------------------------------------------------------------

def test_the_default_critic_is_for_right_answers_to_arithmetic_alone(tmp_path):
    for more, function in (dict(reward="well_formed"), None), ({}, tiny.letter_e):
        config = tiny.settings(ppo, tmp_path, critic=ppo.PPOConfig.critic, **more)
        with pytest.raises(UserError, match="the default critic knows arithmetic alone"):
            ppo.train(config, reward=function)
