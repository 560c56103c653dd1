"""Byte-pair encoding on tiktoken: a tokenizer belongs to a model, and is saved with it.

A conversation is USER prompt ASSISTANT completion END. Tags of thinking are tokens, too.
Text is encoded by its bytes, so that anything round-trips, and what a user types can never
become a special token: `encode` knows none. A tokenizer for a text of your own:

    python -m grpo_min.tokenizer --text FILE --vocab-size 1000 --run runs/mine
"""
import base64
import functools
import json
import unicodedata

import tiktoken

from grpo_min.run.config import UserError, run_command
from grpo_min.run.files import DATA, read_text, save_file

# Words and numbers carry the space before them; numbers of more than two digits are cut.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
PROMPT = "<|user|>{}<|assistant|>"
IN_COMPLETIONS = {"<think>", "</think>"}      # special tokens that its text may hold


class Tokenizer:
    """Text to ids and back. ranks {bytes: id} and special {name: id} are its vocabulary.

    pattern: the regular expression that cuts a text before its pieces are encoded. prompt:
    how a prompt is wrapped, {} stands for its text. Copies of a model share it. real: what
    else that of a model from elsewhere says of itself (real/tokens.py): vocab_size, pad,
    end, the names and the template of its chats, and the Unicode form of its texts.
    """

    def __init__(self, ranks, special, pattern=PATTERN, prompt=PROMPT, real=None):
        self.ranks, self.special, self.real = ranks, special, real
        self.pattern, self.prompt = pattern, prompt
        self.encoding = tiktoken.Encoding(
            "grpo_min", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        if real is None:
            real = dict(vocab_size=self.encoding.n_vocab, form="", template="",
                        pad=special["<|pad|>"], end=special["<|end|>"])
        self.vocab_size, self.form = real["vocab_size"], real["form"]
        self.pad, self.end, self.template = real["pad"], real["end"], real["template"]
        self.before, self.after = (self.encoding.encode(part, allowed_special="all")
                                   for part in prompt.split("{}"))

    def __deepcopy__(self, memo):
        return self

    def encode(self, text):
        """Text to a list of token ids, none of them special."""
        return self.known(self.encoding.encode_ordinary(self.composed(text)))

    def encode_prompt(self, text):
        """What the user said, up to where the assistant speaks: USER text ASSISTANT."""
        if self.template:
            from grpo_min.real.tokens import encode_chat
            return encode_chat(self, text)
        return self.before + self.encode(text) + self.after

    def encode_completion(self, text, finished=True):
        """The assistant's words, <think> and </think> as tokens, and END if it finished."""
        allowed = IN_COMPLETIONS & self.special.keys()
        ids = self.known(self.encoding.encode(
            self.composed(text), allowed_special=allowed, disallowed_special=()))
        return ids + [self.end] if finished else ids

    def composed(self, text):
        """The text in the Unicode form in which the model has read all texts."""
        return unicodedata.normalize(self.form, text) if self.form else text

    def known(self, ids):
        """Without the bytes for which a model from elsewhere has no token."""
        return [i for i in ids if i < self.vocab_size]

    def decode(self, ids):
        """Token ids to text; special tokens show their names."""
        return self.encoding.decode(list(ids))

    def to_dict(self):
        """The tokenizer as plain data, for a checkpoint or a file."""
        ranks = {base64.b64encode(token).decode(): n for token, n in self.ranks.items()}
        data = dict(pattern=self.pattern, prompt=self.prompt, special=self.special,
                    ranks=ranks)
        return data if self.real is None else dict(data, real=self.real)

    @classmethod
    def from_dict(cls, data):
        """The reverse. ValueError unless all bytes have ids, and the ids are 0, 1, 2, .."""
        ranks = {base64.b64decode(token): rank for token, rank in data["ranks"].items()}
        ids = sorted([*ranks.values(), *data["special"].values()])
        known = all(bytes([byte]) in ranks for byte in range(256))
        if ids != list(range(len(ids))) or not known:      # tiktoken would crash
            raise ValueError("not the ids of a tokenizer")
        return cls(ranks, data["special"], data["pattern"], data["prompt"],
                   data.get("real"))


def load(path):
    """The tokenizer of a file that save() has written."""
    text = read_text(path)
    try:
        return Tokenizer.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a tokenizer that grpo_min.tokenizer has written")


def save(tokenizer, path):
    save_file(path, json.dumps(tokenizer.to_dict(), indent=1).encode())


@functools.cache
def own():
    """The tokenizer of the committed models. Nothing is downloaded."""
    return load(DATA / "tokenizer.json")


if __name__ == "__main__":
    from grpo_min.run import bpe
    run_command(bpe.main)
