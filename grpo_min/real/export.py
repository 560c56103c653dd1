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
from grpo_min.run.config import option, parse, require, run_command
from grpo_min.run.files import DATA, make_folder, move_aside, save_file
from grpo_min.tokenizer import IN_COMPLETIONS

# Of our own models: what a user said between the tokens of a prompt, and answers.
TEMPLATE = ("{{% for message in messages %}}{{% if message['role'] == 'user' %}}{{{{ {} + "
            "message['content'] + {} }}}}{{% else %}}{{{{ message['content'] + {} }}}}"
            "{{% endif %}}{{% endfor %}}")


@dataclass
class ExportConfig:
    """Write a checkpoint as a folder for Hugging Face's transformers."""
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of a base, SFT, "
                             "GRPO, PPO or reward model")
    out: str = option("runs/export", "folder to write; what is there already is kept")


def tokenizer_json(tokenizer, special):
    """A tokenizer as tokenizer.json has it, with its special tokens {name: id}.

    Merges are recovered: two tokens become a third if there is one, the lowest id first.
    """
    letter = {byte: text for text, byte in letters().items()}
    ranks = {token: rank for token, rank in tokenizer.ranks.items()
             if rank < tokenizer.vocab_size}
    text = {token: "".join(map(letter.get, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [[text[left], text[right]] for left, right in pairs
                   if left in ranks and right in ranks]
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(id=special[name], content=name, special=name not in IN_COMPLETIONS, **off)
             for name in sorted(special, key=special.get)]
    split = dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated",
                 invert=False)
    bytewise = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                    use_regex=False)
    vocab = special | {text[token]: rank for token, rank in ranks.items()}
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added,
        normalizer=dict(type=tokenizer.form) if tokenizer.form else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, bytewise]),
        post_processor=None, decoder=bytewise,
        model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges))


def tokenizer_config(tokenizer, special, context):
    """What else transformers want to know: names of special tokens, and the template."""
    name = {rank: name for name, rank in special.items()}
    said = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context,
                clean_up_tokenization_spaces=False)
    if tokenizer.pad in name:
        said["pad_token"] = name[tokenizer.pad]
    if tokenizer.real:
        return dict(said, chat_template=tokenizer.template, **tokenizer.real["names"])
    before, after = tokenizer.prompt.split("{}")
    require(before.endswith(tuple(special)) and after.startswith(tuple(special)), "its "
            "prompts have text beside the user's, which others would join to it")
    template = TEMPLATE.format(*map(json.dumps, (before, after, name[tokenizer.end])))
    return dict(said, chat_template=template, eos_token=name[tokenizer.end],
                grpo_min_prompt=tokenizer.prompt)


def export(model, folder):
    """Write a GPT, Llama or ScalarGPT into a folder, all of it or nothing; or UserError.

    -> the bias of its scores: others' have none, so that theirs are lower by that.
    """
    with names.refusing("weights cannot be written"):
        from safetensors.torch import save
    folder, tokenizer = Path(folder), model.tokenizer
    special = {name: rank for name, rank in tokenizer.special.items()
               if not name.startswith(FILLER)}
    ids = dict(eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    if tokenizer.real and tokenizer.real["names"].get("bos_token") in special:
        ids["bos_token_id"] = special[tokenizer.real["names"]["bos_token"]]
    own = isinstance(model.config, GPTConfig)
    tensors = names.named(model, names.GPT2 if own else names.LLAMA)
    bias = tensors["score.bias"].item() if "score.bias" in tensors else 0
    if bias == 0:
        tensors.pop("score.bias", None)
    contents = {
        "config.json": names.write_config(model.config, isinstance(model, ScalarGPT)) | ids,
        "generation_config.json": dict(ids, do_sample=True, temperature=1.0, top_k=0),
        "tokenizer.json": tokenizer_json(tokenizer, special),
        "tokenizer_config.json": tokenizer_config(tokenizer, special, model.config.context)}
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    make_folder(new)
    try:
        for name, content in contents.items():
            save_file(new / name, json.dumps(content, indent=1).encode())
        save_file(new / "model.safetensors", save(tensors, metadata=dict(format="pt")))
        if folder.exists():
            move_aside(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return bias


def main(argv=None):
    config = parse(ExportConfig, argv)
    kind = load_checkpoint(config.checkpoint)["kind"]
    require(kind in ("GPT", "Llama", "ScalarGPT"), f"{config.checkpoint} holds a {kind}: "
            "only policies and reward models can be exported")
    kind = ScalarGPT if kind == "ScalarGPT" else GPT
    bias = export(load_model(config.checkpoint, kind=kind), config.out)
    print(f"wrote {config.out}: transformers' from_pretrained reads it" + (
        f"; their scores have no bias and are {bias:.3g} lower" if bias else ""))


if __name__ == "__main__":
    run_command(main)
