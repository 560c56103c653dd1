"""--preset gpu: every option reaches its stage, the data fit into the model, and it is as large as is said."""
import json
import shutil
from pathlib import Path

import pytest

from grpo_min import __main__ as main_job
from grpo_min import dpo, evaluate, pretrain, reward_model, sft, tokenizer
from grpo_min.lab import compare
from grpo_min.model import GPT, GPTConfig
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import read_jsonl
from grpo_min.variants import as_options
from tests import tiny

GPU = main_job.PRESETS["gpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    main_job.write_data(folder, GPU["operations"])
    return folder


def test_data_of_the_gpu_preset_fit_its_model(data):
    """The longest chains, thought through, fit into the completions that are sampled, and these into the context."""
    prompts = {name: read_jsonl(data / f"arithmetic_{name}.jsonl", ["prompt"]) for name in ("train", "test", "longer")}
    for name, more in ("train", 0), ("test", 0), ("longer", 1):
        chains = {row["prompt"].count(",") for row in prompts[name]}
        assert chains == ({7} if more else {3, 4, 5, 6})
    own, new, context = tokenizer.own(), GPU["compare"]["max_new_tokens"], GPU["pretrain"]["context"]
    assert max(len(own.encode_prompt(row["prompt"])) for rows in prompts.values() for row in rows) + new <= context
    thoughts = [len(own.encode_completion(row["response"])) for row in read_jsonl(data / "sft.jsonl", ["response"])]
    assert 30 < max(thoughts) <= new


def test_the_gpu_preset_is_as_large_as_help_says(capsys):
    shape = {name: GPU["pretrain"][name] for name in ("layers", "heads", "width", "context")}
    millions = sum(p.numel() for p in GPT(GPTConfig(tokenizer.own().vocab_size, **shape)).parameters()) / 1e6
    with pytest.raises(SystemExit):
        main_job.main(["--help"])
    assert f"{millions:.1f} million" in " ".join(capsys.readouterr().out.split()) and 10 <= millions <= 30


def test_a_preset_reaches_every_stage(data, tmp_path, monkeypatch):
    """The stages are stopped before they compute; what they were asked for is the preset's, with files of its data."""
    seen = {}

    class Stop(Exception):
        pass

    def stage(train, config):
        seen[type(config)] = config
        if isinstance(config, sft.SFTConfig):
            raise Stop
        return None, []

    def write_data(folder, operations):                              # as before, and sooner
        assert operations == GPU["operations"]
        shutil.copytree(data, folder)
    monkeypatch.setattr(main_job, "train_or_reuse", stage)
    monkeypatch.setattr(main_job, "write_data", write_data)
    monkeypatch.setattr(main_job, "show_answers", lambda *_: None)
    with pytest.raises(Stop):
        main_job.main(["--preset", "gpu", "--run", str(tmp_path / "main"), "--device", "cpu"])
    text, tuned = seen[pretrain.PretrainConfig], seen[sft.SFTConfig]
    assert (text.layers, text.width, text.batch_size, text.steps) == (6, 384, 64, 2000)
    assert (tuned.batch_size, tuned.lr) == (64, 1e-3)
    for path in text.text, tuned.demonstrations:
        assert Path(path).parent == tmp_path / "main/data" and Path(path).exists()
    fields = {name: config.__dataclass_fields__ for name, config in [("reward_model", reward_model.RewardModelConfig),
                                                                     ("compare", compare.CompareConfig)]}
    assert all(option in fields[name] for name in fields for option in GPU[name])


def test_the_comparison_hands_its_settings_to_the_loops(tmp_path, monkeypatch):
    asked = []

    def train(config):
        asked.append(config)
        raise KeyError
    for name, (_, config_class, more) in compare.ALGORITHMS.items():
        monkeypatch.setitem(compare.ALGORITHMS, name, (train, config_class, more))
    config = compare.CompareConfig(run=str(tmp_path), data="elsewhere", max_new_tokens=56, lr_factor=0.5)
    for name in "GRPO", "PPO":
        with pytest.raises(KeyError):
            compare.one_run(config, name, "learned", 1, dict(checkpoint="c.pt") if name == "PPO" else None)
        settings = asked[-1]
        assert (settings.prompts, settings.max_new_tokens) == (str(Path("elsewhere/animals_train.jsonl")), 56)
        assert settings.lr == 3e-4 and getattr(settings, "critic_lr", 5e-5) == 5e-5
        assert getattr(settings, "critic", "c.pt") == "c.pt"


def test_dpo_in_the_comparison_learns_from_the_choices_by_its_own_settings(tmp_path):
    config = compare.CompareConfig(run=str(tmp_path), sft="sft.pt", data="elsewhere", lr_factor=0.5, device="cpu")
    train, settings = compare.settings_of_run(config, "DPO", "learned", 3, None)
    assert train is dpo.train and settings == dpo.DPOConfig(
        run=str(tmp_path / "dpo-learned-3"), sft="sft.pt", preferences=str(Path("elsewhere/preferences.jsonl")), seed=3,
        lr=dpo.DPOConfig.lr / 2, device="cpu")


@pytest.mark.parametrize("algorithms", ["GRPO,DPO", "DPO"])
def test_dpo_has_a_row_among_the_others_and_is_judged_as_they_are(algorithms, tmp_path, monkeypatch, no_curves):
    monkeypatch.setattr(compare, "beside_each_other", tiny.one_after_the_other)
    names, file = algorithms.split(","), tiny.checkpoint(tmp_path / "sft.pt", context=128)
    compare.main(as_options(dict(
        run=tmp_path, algorithms=algorithms, rewards="learned" if len(names) == 1 else "correct,learned", steps=1,
        eval_prompts=3, sft=file, reward_model=tiny.reward_checkpoint(tmp_path / "reward.pt"), device="cpu")).split())
    tables = [[line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
              for table in (tmp_path / "comparison-learned.md").read_text().split("\n\n")[1:]]
    assert [[row[0] for row in table] for table in tables] == [["SFT", *names], names, names]
    quality, cost, goal = (table[-1] for table in tables)
    weights = sum(p.numel() for p in load_model(file).parameters()) * 4
    assert "-" not in quality and goal == ["DPO", *["-"] * 6]
    assert cost == ["DPO", *["-"] * 5, f"{5 * weights / 1e6:.1f}", "-"], "policy, reference, gradients, two moments"
    record = json.loads((tmp_path / "comparison-learned.json").read_text())[-1]
    policy = load_model(tmp_path / "dpo-learned-1/checkpoint.pt")
    expected = evaluate.evaluate(policy, "animals", evaluate.held_out("animals", "test", 3), load_model(file))
    assert {name: record["figures"]["animals_test"][name] for name in expected} == expected
    assert record["completions"] == 0
    correct = tmp_path / "comparison-correct.md"
    assert "DPO" not in correct.read_text() if len(names) > 1 else not correct.exists()
    assert "DPO" not in (tmp_path / "comparison-learned.csv").read_text(), "its rows are of pairs, not of completions"


def test_chains_of_other_lengths_are_asked_for(data):
    rows = [json.loads(line) for line in (data / "arithmetic_longer.jsonl").read_text().splitlines()]
    assert {row["operations"] for row in rows} == {7}
