"""DPO is the reward model's loss for the implicit reward, beta log(policy / reference) of whole completions.

Worked out by hand on two pairs and against the closed form of its gradient; each completion is read again on a plain
sequence. Settings that make no sense, and files that cannot be read, are in test_cli.py; resuming is in test_loops.py.
"""
import math

import pytest
import torch

from grpo_min import dpo, evaluate, reward_model, sample
from grpo_min.dpo import DPOConfig, ImplicitReward, dpo_loss
from grpo_min.model import GPT
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, pad, pad_completions
from grpo_min.run.checkpoint import frozen_copy, load_checkpoint, load_model
from grpo_min.run.data import batch_rows, read_jsonl
from tests import tiny
from tests.conftest import randomise
from tests.tiny import END, PAD, TOKENIZER

FIELDS = ["prompt", "chosen", "rejected"]
CHOSEN, REJECTED = [0.3, -0.2], [-0.1, 0.6]                     # two pairs, with margins of 0.4 and -0.8


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(path):
    """Prompts and answers of different lengths, so that both are padded; the longer answer is chosen now and then."""
    answers = [(" 7" * (i % 4 + 1), " a cow" * (5 - i % 3)) for i in range(len(tiny.PROMPTS))]
    return tiny.jsonl(path, [dict(prompt=text, chosen=answers[i][i % 2], rejected=answers[i][1 - i % 2])
                             for i, text in enumerate(tiny.PROMPTS)])


def settings(folder, **more):
    return DPOConfig(**dict(dict(
        run="", sft=tiny.checkpoint(folder / "sft.pt"), preferences=pairs(folder / "pairs.jsonl"), steps=3,
        batch_size=5, warmup=1, seed=2, beta=0.3, device="cpu"), **more))


@pytest.fixture
def begun(monkeypatch):
    """begun(config) -> loss_at, with which `fit` was called, and the policy, which is no longer the reference."""
    def begun(config):
        monkeypatch.setattr(dpo, "fit", lambda config, model, inputs, loss_at, **more: loss_at)
        policy, loss_at = dpo.train(config)
        randomise(policy, std=0.3)
        return loss_at, policy
    return begun


def logprob(model, prompt, text):
    """log pi(text and END | prompt), token by token on a plain sequence -> a sum over the completion alone."""
    asked, said = TOKENIZER.encode_prompt(prompt), TOKENIZER.encode_completion(text)
    assert said[-1] == END
    logprobs = model.plain(torch.tensor([asked + said]))[0].log_softmax(-1)                       # (T, V)
    return sum(logprobs[len(asked) - 1 + t, token] for t, token in enumerate(said))


def implicit(policy, reference, row, side, beta):
    return beta * (logprob(policy, row["prompt"], row[side]) - logprob(reference, row["prompt"], row[side]))


def test_it_is_watched_after_each_update(tmp_path):
    seen = []

    def look(policy, step):
        seen.append((step, policy.tokens.weight.detach().clone()))
        return dict(seen=len(seen)) if step else {}
    policy, rows = dpo.train(settings(tmp_path), evaluate=look)
    start, weights = load_model(settings(tmp_path).sft).tokens.weight, [weight for _, weight in seen]
    assert [step for step, _ in seen] == [0, 1, 2] and [row.get("seen", "") for row in rows] == ["", 2, 3]
    assert all(not torch.equal(a, b) for a, b in zip([start, *weights], weights))
    assert torch.equal(weights[-1], policy.tokens.weight)


# --- the loss -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_of_two_pairs_by_hand(smoothing, double):
    chosen, rejected = (torch.tensor(side, requires_grad=True) for side in (CHOSEN, REJECTED))
    loss = dpo_loss(chosen, rejected, smoothing)
    right, wrong = (sum(-math.log(sigmoid(sign * margin)) for margin in (0.4, -0.8)) / 2 for sign in (1, -1))
    assert loss.item() == pytest.approx((1 - smoothing) * right + smoothing * wrong, abs=1e-12)
    loss.backward()
    slope = [(sigmoid(margin) - (1 - smoothing)) / 2 for margin in (0.4, -0.8)]       # of each margin; half of the mean
    assert chosen.grad.tolist() == pytest.approx(slope, abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-each for each in slope], abs=1e-12)
    assert smoothing or all(each < 0 for each in slope), "more for the chosen ones is better"


def test_with_label_smoothing_the_best_margin_is_finite(double):
    margin = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)                  # where the sigmoid is 0.8
    dpo_loss(margin, torch.zeros(1), 0.2).backward()
    assert margin.grad.abs() < 1e-12
    assert dpo_loss(margin + 9, torch.zeros(1)) < dpo_loss(margin, torch.zeros(1)), "without it there is none"


def test_the_stage_s_loss_and_gradient_are_eq_7(begun, double, tmp_path):
    """Row by row. The gradient is that under eq. 7 of the paper: each pair weighs as much as it is judged wrongly."""
    config = settings(tmp_path)
    loss_at, policy = begun(config)
    loss, metrics = loss_at(1)
    rows, reference = read_jsonl(config.preferences, FIELDS), load_model(config.sft)
    batch = [rows[i] for i in batch_rows(len(rows), 5, 2, 1)]
    chosen, rejected = (torch.stack([implicit(policy, reference, row, side, 0.3) for row in batch])
                        for side in ("chosen", "rejected"))
    margins = (chosen - rejected).detach()
    assert 0 < (margins > 0).sum() < 5 and margins.abs().min() > 0.01
    assert loss.item() == pytest.approx(-margins.sigmoid().log().mean().item(), abs=1e-9)
    assert metrics == {name: pytest.approx(value.item(), abs=1e-6) for name, value in dict(
        accuracy=(margins > 0).double().mean(), margin=margins.mean(), chosen=chosen.mean(),
        rejected=rejected.mean()).items()}
    expected = -((-margins).sigmoid() * (chosen - rejected)).mean()
    gradients = [torch.autograd.grad(each, list(policy.parameters())) for each in (loss, expected)]
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).abs().max() < 1e-9


def test_label_smoothing_reaches_the_loss(begun, double, tmp_path):
    losses = []
    for smoothing in 0.0, 0.25:
        loss_at, _ = begun(settings(tmp_path, label_smoothing=smoothing))
        loss, metrics = loss_at(1)
        losses.append(loss.item())
    # -log sigmoid(-m) = m - log sigmoid(m): a quarter of the labels exchanged adds a quarter of the margin.
    assert losses[1] - losses[0] == pytest.approx(0.25 * metrics["margin"], abs=1e-9) != 0


def test_at_the_start_nothing_is_preferred(tmp_path):
    _, rows = dpo.train(settings(tmp_path, steps=1))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [rows[0][name] for name in ("accuracy", "margin", "chosen", "rejected")] == [0, 0, 0, 0]


# --- the implicit reward ------------------------------------------------------------------------------------------

ASKED = ["what does a cow eat?", "a", "start with 3, times 9."]
SAID = [" grass.", " one two three four five", " <think>3 times 9 is 27</think> 27"] * 2


@pytest.fixture
def reward(make):
    """Of a policy and a reference that agree in nothing."""
    return ImplicitReward(make(GPT, context=64), frozen_copy(make(GPT, context=64, seed=1)), 0.3)


def test_it_is_the_sum_over_the_completion_and_the_prompt_does_not_count(double, reward):
    ids, mask = pad_completions(SAID, TOKENIZER)
    found = reward.last(Prompts.from_texts(ASKED, TOKENIZER), ids, mask)                                    # (6,)
    expected = [implicit(reward.policy, reward.reference, dict(prompt=ASKED[i // 2], said=said), "said", 0.3)
                for i, said in enumerate(SAID)]
    assert found.tolist() == pytest.approx([each.item() for each in expected], abs=1e-9)
    assert mask.sum(1).unique().numel() == 3 and min(map(abs, found.tolist())) > 0.01


def test_padding_of_prompts_and_of_completions_changes_nothing(double, reward):
    prompts, (ids, mask) = Prompts.from_texts(ASKED, TOKENIZER), pad_completions(SAID, TOKENIZER)
    whole = reward.last(prompts, ids, mask)
    wider = Prompts(torch.nn.functional.pad(prompts.ids, (0, 7), value=PAD), prompts.length, prompts.texts)
    longer = [torch.nn.functional.pad(each, (0, 5), value=value) for each, value in ((ids, 9), (mask, False))]
    assert (reward.last(wider, *longer) - whole).abs().max() < 1e-12
    for q, text in enumerate(ASKED):
        ids, lengths = pad([TOKENIZER.encode_completion(said) for said in SAID[2 * q:2 * q + 2]], PAD)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        alone = reward.last(Prompts.from_texts([text], TOKENIZER), ids, mask)
        assert (alone - whole[2 * q:2 * q + 2]).abs().max() < 1e-12


def test_it_is_read_like_a_reward_model_s(double, reward):
    """So that held-out pairs are judged by the same code: texts in, numbers out."""
    rows = [dict(prompt=text, chosen=SAID[2 * q], rejected=SAID[2 * q + 1]) for q, text in enumerate(ASKED)]
    for side in "chosen", "rejected":
        found = learned(reward)([row["prompt"] for row in rows], [row[side] for row in rows])
        assert found == pytest.approx([implicit(reward.policy, reward.reference, row, side, 0.3).item()
                                       for row in rows], abs=1e-9)


def test_no_gradient_reaches_the_reference(double, make):
    reward = ImplicitReward(make(context=64), make(context=64, seed=1), 0.3)        # not even where it could be trained
    reward.last(Prompts.from_texts(ASKED, TOKENIZER), *pad_completions(SAID, TOKENIZER)).sum().backward()
    assert all(each.grad is None for each in reward.reference.parameters())
    assert all(each.grad is not None for each in reward.policy.parameters())


# --- the stage ----------------------------------------------------------------------------------------------------

def test_the_reference_does_not_move(tmp_path, monkeypatch):
    """After three updates the margin is still measured against the SFT model."""
    config, last, seen = settings(tmp_path, lr=0.01), ImplicitReward.last, []

    def recording(reward, *batch):
        with torch.no_grad():
            found = last(ImplicitReward(reward.policy, load_model(config.sft), reward.beta), *batch)
        seen.append(found.view(-1, 2).diff().neg().mean().item())
        return last(reward, *batch)
    monkeypatch.setattr(ImplicitReward, "last", recording)
    policy, rows = dpo.train(config)
    assert [row["margin"] for row in rows] == pytest.approx(seen, abs=1e-5)
    assert seen[0] == 0 and seen[2] > 0.05
    assert not tiny.same(policy.state_dict(), load_model(config.sft).state_dict())


def test_it_learns_what_was_chosen(tmp_path, capsys):
    """On a tiny model, from choices alone; and the implicit reward says so on pairs kept back."""
    path = tiny.preferences(tmp_path / "choices.jsonl", count=24)
    words = ["--run", tmp_path / "run", "--sft", tiny.checkpoint(tmp_path / "sft.pt"), "--preferences", path, "--steps",
             "25", "--batch-size", "8", "--lr", "0.005", "--warmup", "2", "--holdout", "0.4", "--device", "cpu"]
    dpo.main([str(word) for word in words])
    assert "it agrees in 8 of 8, " in capsys.readouterr().out
    policy, sft = load_model(tmp_path / "run/checkpoint.pt"), load_model(tmp_path / "sft.pt")
    for row in read_jsonl(path, FIELDS)[:3]:
        before, after = (logprob(model, row["prompt"], row["chosen"]) - logprob(model, row["prompt"], row["rejected"])
                         for model in (sft, policy))
        assert after > before + 1


def test_held_out_pairs_are_judged_by_the_implicit_reward_of_what_was_trained(tmp_path, watch, capsys):
    reports = watch(dpo, "report_unseen")
    path = tiny.preferences(tmp_path / "choices.jsonl")
    dpo.main(["--run", str(tmp_path / "run"), "--sft", tiny.checkpoint(tmp_path / "sft.pt"), "--preferences", path,
              "--heldout", path, "--steps", "6", "--lr", "0.01", "--warmup", "1", "--beta", "0.2", "--device", "cpu"])
    ((judged, *_), _), = reports
    assert judged.beta == 0.2
    assert tiny.same(judged.policy.state_dict(), load_model(tmp_path / "run/checkpoint.pt").state_dict())
    assert tiny.same(judged.reference.state_dict(), load_model(tmp_path / "sft.pt").state_dict())
    accuracy, *_ = reward_model.judge(judged, read_jsonl(path, FIELDS))["accuracy"]
    assert f"| 12 | {accuracy:.1%} (95%" in capsys.readouterr().out and accuracy > 0.9


def test_its_checkpoint_is_an_ordinary_policy(tmp_path, capsys):
    dpo.train(settings(tmp_path, run=str(tmp_path / "run")))
    path = str(tmp_path / "run/checkpoint.pt")
    assert load_checkpoint(path)["kind"] == "GPT"
    sample.main(["--checkpoint", path, "--prompt", "a", "--max-new-tokens", "4", "--device", "cpu"])
    rows = read_jsonl(tiny.prompts(tmp_path / "prompts.jsonl", 2), ["prompt"])
    assert evaluate.evaluate(load_model(path), "arithmetic", rows, max_new_tokens=4)["length"][0] > 0
    capsys.readouterr()
