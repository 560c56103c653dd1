"""tutorials/with_trl.py: TRL goes on from what we export, with the same ids, and a reward of ours gets the same texts.
Skipped where TRL is not installed.
"""
import builtins
import json

import pytest
import torch

for package in "trl", "datasets", "safetensors":
    pytest.importorskip(package)

from grpo_min.real.export import export  # noqa: E402
from grpo_min.real.load import load  # noqa: E402
from grpo_min.run.config import UserError  # noqa: E402
from tests import real_models  # noqa: E402
from tutorials import with_trl  # noqa: E402

TASK = '''import json
from pathlib import Path

def prompts(split):
    return [dict(prompt=text, words=[text[:2], split]) for text in
            ["a cow", "what does a cow eat?", "Gr\\u00fc\\u00dfe \\u4e16", "12345"]]

def reward(prompts, completions, words, finished, **columns):
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        for row in zip(prompts, completions, words, finished, strict=True):
            file.write(json.dumps([*row, sorted(columns)]) + chr(10))
    return [float(len(text) % 7) for text in completions]
'''


@pytest.fixture
def model(tmp_path):
    """An exported Llama with random weights that ends about every eighth completion at a token."""
    real_models.save(tmp_path / "in")
    model = load(str(tmp_path / "in"))
    with torch.no_grad():
        model.tokens.weight[model.tokenizer.end] *= 3
    export(model, tmp_path / "model")
    (tmp_path / "task.py").write_text(TASK)
    return model


def test_trl_goes_on_with_the_same_ids_texts_and_reward(model, tmp_path, monkeypatch):
    from trl import GRPOTrainer
    generate, seen = GRPOTrainer._generate, []

    def watched(trainer, prompts):
        result = generate(trainer, prompts)
        seen.append(([messages[-1]["content"] for messages in prompts], *result[:2]))
        return result
    monkeypatch.setattr(GRPOTrainer, "_generate", watched)
    words = ["--task", tmp_path / "task.py", "--out", tmp_path / "out", "--steps", 2, "--prompts-per-step", 4,
             "--group-size", 3, "--max-new-tokens", 8, "--lr", 0.01]
    with_trl.main([str(tmp_path / "model"), *map(str, words)])
    told = [json.loads(line) for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    tokenizer, expected = model.tokenizer, []
    for asked, prompt_ids, completion_ids in seen:
        assert len(asked) == 12 and prompt_ids == [tokenizer.encode_prompt(text) for text in asked]
        for text, ids in zip(asked, completion_ids):
            finished = ids[-1] == tokenizer.end
            shown = [i for i in (ids[:-1] if finished else ids) if i < 422]       # others have no token in theirs
            expected.append([text, tokenizer.decode(shown), [text[:2], "train"], finished, []])
    assert told == expected and len(seen) == 2
    assert 0 < sum(finished for *_, finished, _ in told) < len(told)
    trained = load(str(tmp_path / "out"))
    assert type(trained) is type(model) and trained.tokenizer.encode_prompt("a cow") == tokenizer.encode_prompt("a cow")
    assert not torch.equal(trained.blocks[0].up.weight, model.blocks[0].up.weight)


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    for folder in str(tmp_path), "":
        with pytest.raises(UserError, match="no config.json"):
            with_trl.main([folder] if folder else [])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        with_trl.main([str(tmp_path)])
    importing = builtins.__import__

    def without_trl(name, *rest, **more):
        if name == "trl":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return importing(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", without_trl)
    with pytest.raises(UserError, match="it takes trl"):
        with_trl.main([str(tmp_path)])
