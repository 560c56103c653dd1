"""A checkpoint of ours becomes a folder that Hugging Face's transformers read:

    python -m grpo_min.real.export --checkpoint runs/grpo/checkpoint.pt --out FOLDER

Policies are written as GPT2LMHeadModel, LlamaForCausalLM, .., reward models as classifiers
of one label, whose scores have no bias there. real.load makes the same checkpoint of it.
Learned positions: TRL's training counts the left padding of shorter prompts among them.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.real import names
from grpo_min.real.tokens import FILLER, OWN, letters
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import option, parse, require, run_command
from grpo_min.run.files import DATA, make_folder, move_aside, save_file
from grpo_min.tokenizer import IN_COMPLETIONS, PROMPT


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
        version="1.0", added_tokens=added, decoder=bytewise,
        normalizer=dict(type=tokenizer.form) if tokenizer.form else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, bytewise]),
        model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges))


def export(model, folder):
    """Write a GPT, Llama or ScalarGPT into a folder, all of it or nothing; or UserError."""
    with names.refusing("weights cannot be written"):
        from safetensors.torch import save
    folder, tokenizer, config = Path(folder), model.tokenizer, model.config
    require(tokenizer.real or tokenizer.prompt == PROMPT, f"its prompts are not {PROMPT}")
    special = {name: rank for name, rank in tokenizer.special.items()
               if not name.startswith(FILLER)}
    name = {rank: name for name, rank in special.items()}
    said = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.context,
                clean_up_tokenization_spaces=False, pad_token=name.get(tokenizer.pad),
                eos_token=name.get(tokenizer.end), chat_template=tokenizer.template or OWN)
    ids = dict(eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    words = names.GPT2 if isinstance(config, GPTConfig) else names.LLAMA
    weights = save(names.named(model, words), metadata=dict(format="pt"))
    contents = {
        "config.json": names.write_config(config, isinstance(model, ScalarGPT)) | ids,
        "generation_config.json": dict(ids, do_sample=True, temperature=1.0, top_k=0),
        "tokenizer.json": tokenizer_json(tokenizer, special),
        "tokenizer_config.json": said | (tokenizer.real or dict(names={}))["names"]}
    make_folder(folder.parent)
    with TemporaryDirectory(dir=folder.parent) as place:
        new = Path(place, folder.name)
        make_folder(new)
        save_file(new / "model.safetensors", weights)
        for name, content in contents.items():
            save_file(new / name, json.dumps(content, indent=1).encode())
        if folder.exists():
            move_aside(folder)
        new.rename(folder)


def main(argv=None):
    config = parse(ExportConfig, argv)
    scores = load_checkpoint(config.checkpoint)["kind"] == "ScalarGPT"
    export(load_model(config.checkpoint, kind=ScalarGPT if scores else GPT), config.out)
    print(f"wrote {config.out}: transformers' from_pretrained reads it")


if __name__ == "__main__":
    run_command(main)
