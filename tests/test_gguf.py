"""GGUF files written here from small models: read, they are the models of the folders; and those that are refused."""
import json

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from grpo_min.real import names  # noqa: E402
from grpo_min.real.load import by_halves, load  # noqa: E402
from tests import real_models, tiny  # noqa: E402
from tests.test_real import bad  # noqa: E402


def side_by_side(weight, size):
    """The reverse of by_halves: how files of the llama family keep the rows of q and k."""
    return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path, ours, folder, pre, arch=None, **more):
    """Write our model, of that folder, as a GGUF file; more: other fields."""
    config, data = ours.config, json.loads((folder / "tokenizer.json").read_text())
    arch = arch or ("qwen2" if config.bias else "qwen3" if config.head_norm else "llama")
    writer = gguf.GGUFWriter(str(path), arch)
    for theirs, name in names.GGUF_FIELDS.items():
        ours_name = next(key for key, value in names.LLAMA_FIELDS.items() if value == name)
        value = getattr(config, ours_name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{theirs}", value)
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    vocab = {**data["model"]["vocab"], **added}
    texts = sorted(vocab, key=vocab.get)
    kinds = [3 if text in added else 1 for text in texts] + [5] * (config.vocab_size - len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts + [f"[PAD{i}]" for i in range(len(texts), config.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, value in more.items():
        writer.add_string(name.replace("__", "."), value)
    for name, weight in names.named(ours, names.GGUF).items():
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = side_by_side(weight, config.head_size)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family) -> our model, and the folder that it was read from; made once."""
    kept = {}

    def made(family):
        if family not in kept:
            folder = tmp_path_factory.mktemp("model")
            real_models.save(folder, family)
            kept[family] = load(str(folder)), folder
        return kept[family]
    return made


@pytest.mark.parametrize("family", [name for name in real_models.FAMILIES if name != "gpt2"])
def test_it_is_the_model_of_the_folder(family, made, tmp_path):
    ours, folder = made(family)
    write(tmp_path / "a.gguf", ours, folder, "qwen2" if family.startswith("qwen") else "gpt-2")
    again = load(str(tmp_path / "a.gguf"))
    assert tiny.same(again.state_dict(), ours.state_dict())
    assert again.tokenizer.to_dict() == ours.tokenizer.to_dict()
    assert again.config.eps == pytest.approx(ours.config.eps) and again.config.theta == ours.config.theta
    ids = torch.arange(40)[None]
    assert (again.plain(ids) - ours.plain(ids)).abs().max() < 1e-4


def test_turned_pairs():
    weight = torch.arange(8.0)[:, None].repeat(1, 3)
    assert by_halves(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(by_halves(side_by_side(weight, 4), 4), weight)


@pytest.mark.parametrize("options, words", [
    (dict(arch="mamba"), "mamba not built"), (dict(pre="falcon"), "unknown kind falcon"),
    (dict(llama__rope__scaling__type="yarn"), "rope.scaling.type yarn not built"),
    (dict(llama__attention__sliding_window="7"), "sliding_window not built")])
def test_what_is_not_built_is_refused(options, words, made, tmp_path):
    ours, folder = made("llama")
    write(tmp_path / "a.gguf", ours, folder, options.pop("pre", "gpt-2"), **options)
    bad(tmp_path / "a.gguf", words)


def test_a_damaged_file(made, tmp_path):
    ours, folder = made("llama")
    path = tmp_path / "a.gguf"
    write(path, ours, folder, "gpt-2")
    whole = path.read_bytes()
    for content in b"", b"GGUF", whole[:200], whole[:-1000], b"x" * 5000:
        path.write_bytes(content)
        bad(path, "no GGUF file, is damaged or cut short")
