"""A checkpoint, exported: in transformers the same logits, ids and answers, and read again it is what it was."""
import json

import pytest
import torch

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from grpo_min.critic import Critic  # noqa: E402
from grpo_min.model import GPT, ScalarGPT  # noqa: E402
from grpo_min.real import export as exporting  # noqa: E402
from grpo_min.real.export import export  # noqa: E402
from grpo_min.real.load import load  # noqa: E402
from grpo_min.rollout import Prompts, sample  # noqa: E402
from grpo_min.run.config import UserError  # noqa: E402
from tests import real_models, tiny  # noqa: E402
from tests.real_models import CUTS, texts  # noqa: E402
from tests.test_model import close  # noqa: E402

MODELS = ["ours", *real_models.FAMILIES]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> one of our models, and the folder it has been exported into; made once."""
    kept = {}

    def made(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("out")
            if name == "ours":
                model = real_models.randomised(tiny.gpt())
            else:
                real_models.save(folder / "in", name)
                model = load(str(folder / "in"))
            export(model, folder / "out")
            kept[name] = model, folder / "out"
        return kept[name]
    return made


def same_model(ours, again):
    return (type(again) is type(ours) and again.config == ours.config
            and tiny.same(again.state_dict(), ours.state_dict())
            and again.tokenizer.to_dict() == ours.tokenizer.to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_read_the_same_model(name, made):
    ours, folder = made(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    kind = "GPT2LMHeadModel" if type(ours) is GPT else f"{name[0].upper()}{name[1:5]}ForCausalLM"
    assert type(theirs).__name__ == kind and theirs.dtype == torch.float32
    ids = torch.randint(0, ours.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    close(theirs(ids).logits, ours.plain(ids), 1e-4)
    close(theirs.train()(ids).logits, ours.plain(ids), 1e-4)                        # without dropout, as here


@pytest.mark.parametrize("name", MODELS)
def test_the_same_ids_and_greedy_answers(name, made):
    ours, folder = made(name)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts(60, seed=3):
        assert tokenizer.encode(text) == ours.tokenizer.encode(text)
        asked = tokenizer.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True)
        assert asked["input_ids"] == ours.tokenizer.encode_prompt(text)
    for text in "what does a cow eat?", "a":
        asked = tokenizer.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True,
                                              return_tensors="pt", return_dict=True)
        answer = theirs.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1]:]
        rollout = sample(ours, Prompts.from_texts([text], ours.tokenizer), 1, 20, 0)
        assert rollout.completion_ids[0].tolist() == answer.tolist()
        text = rollout.texts(ours.tokenizer)[0]
        assert "<|unused" in text or tokenizer.decode(answer, skip_special_tokens=False).startswith(text)


@pytest.mark.parametrize("name", MODELS)
def test_read_again_it_is_what_it_was(name, made, tmp_path):
    ours, folder = made(name)
    again = load(str(folder))
    assert same_model(ours, again)
    export(again, tmp_path / "again")
    for path in folder.iterdir():
        twice = tmp_path / "again" / path.name
        read = json.loads if path.suffix == ".json" else bytes
        assert read(path.read_bytes()) == read(twice.read_bytes())


@pytest.mark.parametrize("alphabet", [True, False], ids=["all bytes", "bytes missing"])
@pytest.mark.parametrize("cut", CUTS)
def test_merges_are_recovered_from_the_ranks(cut, alphabet, tmp_path):
    made = real_models.tokenizer(cut, alphabet)
    real_models.save(tmp_path / "in", tokens_of=made)
    ours = load(str(tmp_path / "in"))
    export(ours, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same_model(ours, load(str(tmp_path / "out")))
    for text in texts():
        assert theirs.encode(text) == ours.tokenizer.encode(text) == made.encode(text)


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama", "qwen2, untied", "qwen3"])
@pytest.mark.parametrize("bias", [0.0, 0.25])
def test_a_reward_model_is_a_classifier_of_one_label(name, bias, made, tmp_path):
    policy = made(name)[0]
    ours = policy.with_head(ScalarGPT)
    torch.nn.init.normal_(ours.scalar.weight)
    torch.nn.init.constant_(ours.scalar.bias, bias)
    export(ours, tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    prompts = Prompts.from_texts(["what does a cow eat?", "a"], policy.tokenizer)
    end, pad = policy.tokenizer.end, policy.tokenizer.pad
    ids = torch.tensor([[70, 71, 72, end], [73, end, pad, pad]])
    scores = ours.last(prompts, ids, torch.tensor([[True] * 4, [True, True, False, False]]))
    rows = [torch.cat([prompts.ids[q, :prompts.length[q]], ids[q]]) for q in range(2)]
    rows[1] = torch.nn.functional.pad(rows[1], (0, len(rows[0]) - len(rows[1])), value=pad)
    logits = theirs(torch.stack(rows), attention_mask=torch.stack(rows) != pad).logits
    close(logits, (scores - bias)[:, None], 1e-4)
    assert same_model(ours, load(str(tmp_path / "out")))


def test_the_command(tmp_path, capsys):
    path = tiny.checkpoint(tmp_path / "c.pt")
    for _ in range(2):
        exporting.main(["--checkpoint", path, "--out", str(tmp_path / "out")])
    assert "from_pretrained" in capsys.readouterr().out and (tmp_path / "out.1/config.json").exists()
    exporting.main(["--checkpoint", tiny.reward_checkpoint(tmp_path / "r.pt"), "--out", str(tmp_path / "scores")])
    assert type(load(str(tmp_path / "scores"))) is ScalarGPT
    with pytest.raises(UserError, match="holds a Critic"):
        exporting.main(["--checkpoint", tiny.critic_checkpoint(tmp_path / "v.pt"), "--out", str(tmp_path / "values")])
    assert not (tmp_path / "values").exists() and Critic


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    exporting.export(tiny.gpt(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write = exporting.save_file

    def full(path, content):
        if str(path).endswith("safetensors"):
            raise UserError("no space", exit_code=1)
        write(path, content)
    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(UserError, match="no space"):
        exporting.export(tiny.gpt(seed=1), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_prompts_of_another_form_than_the_template_s(tmp_path):
    with pytest.raises(UserError, match="its prompts are not"):
        export(tiny.gpt(tokenizer=tiny.other_tokenizer()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
