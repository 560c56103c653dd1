"""The supervised stages minimise what they say: the mean cross-entropy of the next token in pretraining, of the
response's tokens, END included and the prompt's not, in fine-tuning, and the Bradley-Terry loss in reward modelling.

Each loss is taken from the stage at its first step and computed again row by row, on plain sequences.
"""
import pytest
import torch

from grpo_min import pretrain, reward_model, sft
from grpo_min.runs import batch_rows, load_model, read_jsonl
from grpo_min.tokenizer import END, encode_completion, encode_prompt
from tests import tiny

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def first_loss(monkeypatch):
    """first_loss(stage, config) -> the loss of step 0, and the model."""
    def first_loss(stage, config):
        monkeypatch.setattr(stage, "fit", lambda config, model, inputs, loss_at, *_: loss_at(0)[0])
        return stage.train(config)[::-1]
    return first_loss


def first_batch(path, fields, config):
    rows = read_jsonl(path, fields)
    return [rows[i] for i in batch_rows(len(rows), config.batch_size, config.seed, 0)]


def test_pretraining_loss_by_hand(first_loss, tmp_path):
    text = tiny.text_file(tmp_path / "text.txt")
    loss, model = first_loss(pretrain, pretrain.PretrainConfig(
        text=text, layers=1, heads=2, width=16, context=16, batch_size=4, device="cpu"))
    rows = pretrain.pack(pretrain.read_documents(text), 16, "1 0")[:4]                           # (4, 17)
    logprobs = model.plain(rows[:, :16]).log_softmax(-1)
    expected = -sum(logprobs[b, t, rows[b, t + 1]] for b in range(4) for t in range(16)) / (4 * 16)
    assert abs(loss - expected) < 1e-12 and (rows[:, 1:] == END).any()


def test_sft_loss_by_hand(first_loss, tmp_path):
    path = tiny.demonstrations(tmp_path / "sft.jsonl")
    config = sft.SFTConfig(base=tiny.checkpoint(tmp_path / "base.pt"), demonstrations=path, batch_size=5, device="cpu")
    loss, model = first_loss(sft, config)
    logprobs = []
    for row in first_batch(path, ["prompt", "response"], config):
        prompt, response = encode_prompt(row["prompt"]), encode_completion(row["response"])
        assert response[-1] == END
        all_logprobs = model.plain(torch.tensor([prompt + response]))[0].log_softmax(-1)
        logprobs += [all_logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    assert abs(loss + sum(logprobs) / len(logprobs)) < 1e-12


def test_reward_model_loss_by_hand(first_loss, tmp_path):
    path = tiny.preferences(tmp_path / "pairs.jsonl")
    start = tiny.reward_checkpoint(tmp_path / "reward_model.pt")
    config = reward_model.RewardModelConfig(sft=tiny.checkpoint(tmp_path / "sft.pt"), preferences=path, batch_size=5,
                                            device="cpu")
    model = load_model(start, "ScalarGPT")

    def score(row, side):
        ids = torch.tensor([encode_prompt(row["prompt"]) + encode_completion(row[side])])
        assert ids[0, -1] == END
        return model.scalar(model.trunk.run(ids, torch.arange(ids.shape[1]))[0][0, -1])
    margins = [score(row, "chosen") - score(row, "rejected")
               for row in first_batch(path, ["prompt", "chosen", "rejected"], config)]
    expected = -torch.stack(margins).sigmoid().log().mean()
    with pytest.MonkeyPatch.context() as patch:                        # its own head starts at 0: every margin would be
        patch.setattr(reward_model, "ScalarGPT", lambda _: model)
        patch.setattr(model.trunk, "load_state_dict", lambda _: None)
        loss, _ = first_loss(reward_model, config)
    assert abs(loss - expected) < 1e-12 and max(abs(margin) for margin in margins) > 0.1
