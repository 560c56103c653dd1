"""A checkpoint of ours becomes a folder that Hugging Face's transformers read:

    python -m grpo_min.real.export --checkpoint runs/grpo/checkpoint.pt --out FOLDER

Policies are written as GPT2LMHeadModel, LlamaForCausalLM, .., reward models as classifiers
of one label. real.load makes the same checkpoint of the folder again.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.real import names
from grpo_min.real.tokens import FILLER, letters
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import UserError, option, parse, require, run_command
from grpo_min.run.files import DATA, make_folder, move_aside, save_file
from grpo_min.tokenizer import IN_COMPLETIONS

# What a user said between tokens of its own, and the answers to it.
TEMPLATE = ("{{% for message in messages %}}{{% if message['role'] == 'user' %}}{{{{ {} + "
            "message['content'] + {} }}}}{{% else %}}{{{{ message['content'] + {} }}}}"
            "{{% endif %}}{{% endfor %}}")


@dataclass
class ExportConfig:
    """Write a checkpoint as a folder for Hugging Face's transformers."""
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of a base, SFT, "
                             "GRPO, PPO or reward model")
    out: str = option("runs/export", "folder to write; what is there already is kept")


def tokenizer_json(tokenizer):
    """The tokenizer as tokenizer.json has it. Its merges are recovered: a pair of tokens
    becomes a third, if there is one, and pairs with a lower one come first, as in tiktoken.
    """
    letter = {byte: text for text, byte in letters().items()}
    ranks = {token: rank for token, rank in tokenizer.ranks.items()
             if rank < tokenizer.vocab_size}
    special = {name: rank for name, rank in tokenizer.special.items()
               if not name.startswith(FILLER)}

    def text(token):
        return "".join(letter[byte] for byte in token)
    vocab = special | {text(token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append([text(token[:cut]), text(token[cut:])])
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(id=rank, content=name, special=name not in IN_COMPLETIONS, **off)
             for name, rank in sorted(special.items(), key=lambda item: item[1])]
    split = dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated",
                 invert=False)
    bytewise = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                    use_regex=False)
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added,
        normalizer=dict(type=tokenizer.form) if tokenizer.form else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, bytewise]),
        post_processor=None, decoder=bytewise,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                   ignore_merges=True, vocab=vocab, merges=merges))


def tokenizer_config(tokenizer, context):
    """What else transformers want to know: names of special tokens, and the template."""
    special = {rank: name for name, rank in tokenizer.special.items()
               if not name.startswith(FILLER)}
    said = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context,
                clean_up_tokenization_spaces=False)
    if tokenizer.pad in special:
        said["pad_token"] = special[tokenizer.pad]
    if tokenizer.real:
        return dict(said, chat_template=tokenizer.template, **tokenizer.real["names"])
    before, after = tokenizer.prompt.split("{}")
    require(before.endswith(tuple(special.values())) and after.startswith(
        tuple(special.values())), "the tokenizer's prompts have text beside the user's, "
        "which others would join to it")
    end = special[tokenizer.end]
    template = TEMPLATE.format(*map(json.dumps, (before, after, end)))
    return dict(said, chat_template=template, eos_token=end,
                grpo_min_prompt=tokenizer.prompt)


def export(model, folder):
    """Write a GPT, Llama or ScalarGPT into a folder, all of it or nothing; or UserError."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("weights need safetensors: python -m pip install safetensors")
    folder, tokenizer = Path(folder), model.tokenizer
    words = names.GPT2 if isinstance(model.config, GPTConfig) else names.LLAMA
    ends = dict(eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    bos = tokenizer.special.get((tokenizer.real or dict(names={}))["names"].get("bos_token"))
    if bos is not None:
        ends["bos_token_id"] = bos
    config = names.write_config(model.config, isinstance(model, ScalarGPT)) | ends
    tensors = names.named(model, words)
    if "score.bias" in tensors and not tensors["score.bias"].any():
        del tensors["score.bias"]
    contents = {
        "config.json": config,
        "generation_config.json": dict(ends, do_sample=True, temperature=1.0, top_k=0),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, model.config.context)}
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    make_folder(new)
    try:
        for name, content in contents.items():
            save_file(new / name, json.dumps(content, indent=1, ensure_ascii=False).encode())
        save_file(new / "model.safetensors", save(tensors, metadata=dict(format="pt")))
        if folder.exists():
            move_aside(folder)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return tensors


def main(argv=None):
    config = parse(ExportConfig, argv)
    kind = load_checkpoint(config.checkpoint)["kind"]
    kinds = dict(GPT=GPT, Llama=GPT, ScalarGPT=ScalarGPT)
    require(kind in kinds, f"{config.checkpoint} holds a {kind}, for which others have no "
            "class: policies and reward models alone are exported")
    tensors = export(load_model(config.checkpoint, kind=kinds[kind]), config.out)
    print(f"wrote {config.out}: transformers' from_pretrained reads it")
    if "score.bias" in tensors:
        print("note: others' scores have no bias: theirs differ by "
              f"{tensors['score.bias'].item():.3g}, which no comparison of answers sees")


if __name__ == "__main__":
    run_command(main)
