"""PPO's critic: what its values are made of, how it is trained, and the ruler that says how much there is to explain.

Values by sampling and the ruler are held against the 15 completions of test_exact.py, whose true values can be summed.
"""
import functools
import json
import types

import pytest
import torch

from grpo_min import critic as stage, ppo
from grpo_min.critic import Critic, CriticConfig, Oracle, critic_metrics, explainable_share, sampled_values
from grpo_min.rollout import Prompts, Rollout
from grpo_min.run.checkpoint import load_checkpoint, load_model
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
    rows = [row[1:n] for row, n in zip(prompts.ids.tolist(), prompts.length.tolist()) for _ in range(copies)]
    ids = torch.full((len(rows), max_new_tokens), Letters.pad)
    for b, before in enumerate(rows):
        for t in range(max_new_tokens):
            chances = logits[STATES.index((*before, *ids[b, :t].tolist()))].softmax(-1)
            ids[b, t] = torch.multinomial(chances, 1, generator=generator)
            if ids[b, t] == LAST:
                break
    return Rollout(ids, ids != Letters.pad, None, (ids == LAST).any(dim=1))


def test_values_by_sampling_are_the_true_ones_on_average(logits, rewards, monkeypatch):
    monkeypatch.setattr(stage, "sample", functools.partial(lambda policy, *rest: of_the_tree(logits, *rest)))
    texts = {"".join(str(token) for token in completion if token != LAST): reward.item()
             for completion, reward in zip(COMPLETIONS, rewards)}

    def reward(prompts, completions, finished, shift):
        assert all(end == (len(text) < LONGEST) for text, end in zip(completions, finished))
        return [texts[text] + more for text, more in zip(completions, shift)]
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


def test_what_can_be_explained_is_the_variance_of_the_true_values(logits, rewards):
    p, generator = probabilities(logits), torch.Generator().manual_seed(5)
    visited = (p[:, None] * MASK).flatten()                                         # how often, each state of each row
    values, returns = true_values(logits, rewards)[AT].flatten(), rewards[:, None].expand(-1, LONGEST).flatten()
    mean = (visited * returns).sum() / visited.sum()
    exact = (visited * (values - mean) ** 2).sum() / (visited * (returns - mean) ** 2).sum()
    drawn = torch.multinomial(visited, 100_000, replacement=True, generator=generator)      # a state on its way
    first, states = returns[drawn], AT.flatten()[drawn]
    second = torch.empty(len(drawn))
    for state in range(len(STATES)):                            # another completion that goes through the same state
        through = p * ((AT == state) & MASK).any(dim=1)
        here = states == state
        second[here] = rewards[torch.multinomial(through, int(here.sum()), replacement=True, generator=generator)]
    assert 0.1 < exact < 0.9 and explainable_share(first, second) == pytest.approx(exact.item(), abs=0.02)
    assert explainable_share(first + 5, second + 5) == pytest.approx(exact.item(), abs=0.02)


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
    config = tiny.settings(ppo, tmp_path, run=str(tmp_path / "run"), steps=21, critic_epochs=0, prompts_per_step=12)
    _, rows = ppo.train(config, reward=by_prompt)
    assert [row["step"] for row in rows if row["explainable_variance"] != ""] == [19]
    assert rows[19]["explainable_variance"] == pytest.approx(1) and rows[19]["critic_share"] == pytest.approx(0, abs=1e-6)
    assert capsys.readouterr().out.count("note: critic_share is 0 in step 20: the critic explains less than a tenth") == 1


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


# --- the training before RL ---------------------------------------------------------------------------------------

def settings(folder, **more):
    return CriticConfig(**dict(dict(run="", sft=tiny.checkpoint(folder / "sft.pt"), device="cpu", steps=60, batches=20,
                                    prompts=tiny.prompts(folder / "prompts.jsonl"), prompts_per_step=8, warmup=5,
                                    max_new_tokens=6, lr=1e-2, weight_decay=0.0), **more))


def first_letter(prompts, completions, **columns):
    return [float(text[:1] > "m") for text in completions]


def test_it_learns_what_the_first_token_tells(tmp_path):
    critic, figures, rows = stage.train(settings(tmp_path, steps=300, batches=60, lr=0.03), reward=first_letter)
    assert len(rows) == 300
    assert 0.4 < figures["explainable"] <= 1 and figures["share"] > 0.4
    assert figures["share"] == pytest.approx(figures["explained"] / figures["explainable"])
    dead = dict(stage.judge(settings(tmp_path), tiny.gpt(), tiny.gpt().with_head(Critic), first_letter,
                            [dict(prompt=text) for text in tiny.PROMPTS]))
    assert dead["explained"] == pytest.approx(0, abs=1e-6) and dead["explainable"] > 0.4


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
    def stopping(prompts, completions, calls=[]):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return first_letter(prompts, completions)
    for name, rewards in ("whole", [first_letter]), ("again", [stopping, first_letter]):
        for resume, reward in enumerate(rewards):
            config = settings(tmp_path, run=str(tmp_path / name), steps=6, resume=bool(resume))
            try:
                stage.train(config, reward=lambda prompts, completions, **columns: reward(prompts, completions))
            except KeyboardInterrupt:
                pass
    whole, again = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "again"))
    assert tiny.same(whole["model"], again["model"])


# --- in PPO -------------------------------------------------------------------------------------------------------

def test_the_default_critic_is_for_right_answers_to_arithmetic_alone(tmp_path):
    for more, function in (dict(reward="well_formed"), None), ({}, tiny.letter_e):
        config = tiny.settings(ppo, tmp_path, critic=ppo.PPOConfig.critic, **more)
        with pytest.raises(UserError, match="the default critic knows arithmetic alone"):
            ppo.train(config, reward=function)
