"""The supervised stages minimise what they say: the mean cross-entropy of the next token in pretraining, of the
response's tokens, END included and the prompt's not, in fine-tuning, and the Bradley-Terry loss in reward modelling.

Each loss is taken from the stage at its second step and computed again row by row, on plain sequences, with its
gradient. How a reward model is judged is worked out on four pairs.
"""
import math

import pytest
import torch

from grpo_min import critic, pretrain, reward_model, sft
from grpo_min.model import GPT
from grpo_min.run import fit
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import batch_rows, read_jsonl
from grpo_min.run.rng import generator
from tests import tiny
from tests.tiny import END, TOKENIZER

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def loss_of(monkeypatch):
    """loss_of(stage, config) -> the loss of step 1, its metrics, the model and what else `fit` was called with."""
    def loss_of(stage, config):
        monkeypatch.setattr(stage, "fit", lambda config, model, inputs, loss_at, *rest: (loss_at(1), rest))
        model, ((loss, metrics), rest) = stage.train(config)
        return loss, metrics, model, rest
    return loss_of


def batch_of(path, fields, config):
    rows = read_jsonl(path, fields)
    return [rows[i] for i in batch_rows(len(rows), config.batch_size, config.seed, 1)]


def assert_same(loss, expected, model):
    """The same number, and the same gradient of every parameter."""
    assert abs(loss - expected) < 1e-12
    gradients = [torch.autograd.grad(each, list(model.parameters()), allow_unused=True) for each in (loss, expected)]
    for ours, theirs in zip(*gradients):
        assert (ours is None) == (theirs is None) and (ours is None or (ours - theirs).abs().max() < 1e-12)


def test_pretraining_loss_by_hand(loss_of, tmp_path):
    text = tiny.text_file(tmp_path / "text.txt")
    loss, _, model, rest = loss_of(pretrain, pretrain.PretrainConfig(
        text=text, layers=1, heads=2, width=16, context=16, batch_size=4, seed=2, device="cpu"))
    rows = pretrain.pack(pretrain.read_documents(text, TOKENIZER), 16, "2 0")[4:8]                          # (4, 17)
    logprobs = model.plain(rows[:, :16]).log_softmax(-1)
    expected = -sum(logprobs[b, t, rows[b, t + 1]] for b in range(4) for t in range(16)) / (4 * 16)
    assert_same(loss, expected, model)
    assert (rows[:, 1:] == END).any() and rest == ()


def test_sft_loss_by_hand(loss_of, tmp_path):
    path = tiny.demonstrations(tmp_path / "sft.jsonl")
    config = sft.SFTConfig(base=tiny.checkpoint(tmp_path / "base.pt"), demonstrations=path, batch_size=5, seed=2,
                           device="cpu")
    loss, _, model, rest = loss_of(sft, config)
    logprobs = []
    for row in batch_of(path, ["prompt", "response"], config):
        prompt, response = TOKENIZER.encode_prompt(row["prompt"]), TOKENIZER.encode_completion(row["response"])
        assert response[-1] == END
        all_logprobs = model.plain(torch.tensor([prompt + response]))[0].log_softmax(-1)
        logprobs += [all_logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    assert_same(loss, -sum(logprobs) / len(logprobs), model)
    assert rest == ()


def test_reward_model_loss_by_hand(loss_of, tmp_path, monkeypatch):
    """With a head that is not zero, or every margin would be; its trunk starts as the SFT model's."""
    path, sft_path = tiny.preferences(tmp_path / "pairs.jsonl"), tiny.checkpoint(tmp_path / "sft.pt", seed=4)
    config = reward_model.RewardModelConfig(sft=sft_path, preferences=path, batch_size=5, seed=2, weight_decay=0.25,
                                            device="cpu")
    with_head = GPT.with_head

    def with_a_head_that_is_not_zero(gpt, kind):
        model = with_head(gpt, kind)
        torch.nn.init.normal_(model.scalar.weight)
        return model
    monkeypatch.setattr(GPT, "with_head", with_a_head_that_is_not_zero)
    loss, metrics, model, rest = loss_of(reward_model, config)
    assert tiny.same(model.trunk.state_dict(), load_model(sft_path).state_dict()) and rest == (0.25,)

    def score(row, side):
        ids = torch.tensor([TOKENIZER.encode_prompt(row["prompt"]) + TOKENIZER.encode_completion(row[side])])
        assert ids[0, -1] == END
        return model.scalar(model.trunk.run(ids, torch.arange(ids.shape[1]))[0][0, -1])[0]
    margins = torch.stack([score(row, "chosen") - score(row, "rejected")
                           for row in batch_of(path, ["prompt", "chosen", "rejected"], config)])
    assert_same(loss, -margins.sigmoid().log().mean(), model)
    assert metrics == dict(accuracy=pytest.approx((margins > 0).double().mean().item())) and margins.std() > 0.1


# --- what changes from step to step -------------------------------------------------------------------------------

@pytest.mark.parametrize("warmup, shares", [(3, [1 / 3, 2 / 3, 0.75, 0.5, 0.25, 0.066987]),
                                            (1, [1, 0.933013, 0.75, 0.5, 0.25, 0.066987])])
def test_learning_rate_by_hand(warmup, shares, tmp_path, monkeypatch):
    """Up in equal parts, down along half a cosine: (1 + cos(180 degrees * step / 6)) / 2. At every step, in the row and
    in the optimizer alike; with a gradient of 1 Adam's first step is the learning rate."""
    used = []

    def update(run, model, optimizer, loss):
        used.append([group["lr"] for group in optimizer.param_groups])
        return 0.0
    monkeypatch.setattr(fit, "update", update)
    config = sft.SFTConfig(run="", steps=6, lr=0.3, warmup=warmup)
    rows = fit.fit(config, tiny.gpt(), [], lambda step: (torch.zeros(()), {}))
    assert [row["lr"] for row in rows] == pytest.approx([0.3 * share for share in shares], abs=1e-6)
    assert used == [[row["lr"]] for row in rows]


def distinct(things):
    """How many of them are different."""
    return len({str(thing) for thing in things})


def test_documents_have_another_order_in_each_epoch(tmp_path, monkeypatch):
    """And for each seed; within an epoch every document comes once."""
    orders = []

    def pack(documents, context, seed):
        orders.append(torch.cat(list(packed(documents, context, seed))).tolist())
        return packed(documents, context, seed)
    packed = pretrain.pack
    monkeypatch.setattr(pretrain, "pack", pack)
    monkeypatch.setattr(pretrain, "fit",
                        lambda config, model, inputs, loss_at: [loss_at(step) for step in range(config.steps)])
    for seed in 1, 2:
        pretrain.train(pretrain.PretrainConfig(text=tiny.text_file(tmp_path / "text.txt"), layers=1, heads=2, width=16,
                                               context=16, batch_size=16, steps=15, seed=seed, device="cpu"))
    assert len(orders) > 5 and distinct(orders) == len(orders)


def test_rows_have_another_order_in_each_epoch_and_for_each_seed():
    orders = [[batch_rows(12, 4, seed, 3 * epoch + index) for index in range(3)]
              for seed in (1, 2) for epoch in (0, 1, 2)]
    assert distinct(orders) == 6
    assert all(sorted(sum(order, [])) == list(range(12)) for order in orders)


def test_random_numbers_differ_between_seeds_steps_and_ranks():
    """And are the same for the same: a resumed run needs no states."""
    numbers = [torch.rand(3, generator=generator(seed, step, rank)).tolist()
               for seed in (1, 11) for step in (1, 11, "1 1") for rank in (0, 1, 2)]
    assert distinct(numbers) == len(numbers) == 18
    assert torch.rand(3, generator=generator(1, 1, 0)).tolist() == numbers[0]


def test_a_critic_sees_every_batch_once_in_an_epoch_and_each_epoch_in_another_order(tmp_path, monkeypatch):
    """Its batches are sampled once, the first time that they are needed: each has its own completions."""
    names, orders, experience = [], [], critic.experience

    def recorded(config, policy, reward, rows, group_size, name):
        names.append(name)
        found = experience(config, policy, reward, rows, group_size, name)
        found[1].number = name
        return found
    monkeypatch.setattr(critic, "experience", recorded)
    config = critic.CriticConfig(run="", sft=tiny.checkpoint(tmp_path / "sft.pt"), prompts=tiny.prompts(tmp_path / "p"),
                                 batches=5, steps=15, prompts_per_step=4, max_new_tokens=4, device="cpu")
    critic.train(config, reward=tiny.letter_e,
                 beside=lambda critic, prompts, rollout: orders.append(prompts.number) or torch.zeros(()))
    assert sorted(names[:-1]) == list(range(5)) and names[-1] == "held"
    epochs = [orders[:5], orders[5:10], orders[10:]]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and distinct(epochs) == 3


# --- judging a reward model ---------------------------------------------------------------------------------------

def test_judgement_by_hand(monkeypatch):
    """Four pairs: the model wins, loses, has a tie, and wins where the gold score has a tie."""
    fact = dict(prompt="what does a cow eat?", animal="cow", attribute="food")
    pairs = [dict(fact, chosen=chosen, rejected=rejected) for chosen, rejected in [
        ("grass.", "meat."), ("grass. ", "fish."), ("grass.  ", "meat. "), ("grass. a", "grass. b")]]
    scores = {"grass.": 2.0, "meat.": 0.0, "grass. ": 0.0, "fish.": 1.0, "grass.  ": 3.0, "meat. ": 3.0,
              "grass. a": 0.5, "grass. b": 0.0}
    monkeypatch.setattr(reward_model, "learned", lambda model: lambda prompts, texts: [scores[text] for text in texts])
    found = reward_model.judge(None, pairs)
    assert found["pairs"] == 4
    assert found["accuracy"][0] == (1 + 0 + 0.5 + 1) / 4                      # a tie counts half
    assert found["ceiling"][0] == (1 + 1 + 1 + 0.5) / 4                       # the gold score's own tie, too
    assert found["shortfall"][0] == pytest.approx(found["ceiling"][0] - found["accuracy"][0]) == 0.25
    sure = [1 / (1 + math.exp(-margin)) for margin in (0.0, 0.5, 1.0, 2.0)]   # 50, 62, 73 and 88%: a tenth for each
    assert found["calibration"] == [[pytest.approx(p), went_so, 1] for p, went_so in zip(sure, (0.5, 1, 0, 1))]
