"""A tokenizer of elsewhere becomes ours: byte-pair encoding, and the template of its chats.

Others write bytes as GPT-2's letters and keep a list of merges. tiktoken wants ranks: the
lower id is merged first, which is the same where merges stand in the order of their ids.
What a user types is never a special token: while the template, a program in Jinja, is run,
what looks like one in the text is broken up.

A byte for which a model has no token is left out, as others do; they join what stands on
both sides of it, if one of their pieces holds both, and ours does not.
"""
import functools
import re

from grpo_min.real.names import refusing
from grpo_min.run.config import UserError, require
from grpo_min.tokenizer import Tokenizer

WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2's own; with a token per digit, whatever stands before it (SmolLM2); the later ones.
GPT2 = f"{SUFFIXES}|{WORDS}"
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3 = rf"(?i:{SUFFIXES})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{LINES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
# A GGUF, and a tokenizer without tokenizer.json, name theirs: pattern, Unicode form.
KNOWN = {"gpt-2": (GPT2, ""), "smollm": (DIGITS, ""), "llama-bpe": (LLAMA3, ""),
         "qwen2": (QWEN2, "NFC"), "GPT2Tokenizer": (GPT2, ""),
         "GPT2TokenizerFast": (GPT2, ""), "Qwen2Tokenizer": (QWEN2, "NFC"),
         "Qwen2TokenizerFast": (QWEN2, "NFC")}
PLAIN = "User: {{ messages[0]['content'] }}\nAssistant:"
FILLER = "<|unused "  # and the id, for one without a token


@functools.cache
def letters():
    """The letter that GPT-2 writes for each byte: {letter: byte}."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)}


def ranks_of(source, vocab, merges, special):
    """{text in letters: id}, [(left, right), ..], {name: id} -> {bytes: id}; UserError."""
    require(min(map(len, special), default=2) > 1,
            f"{source}: a special token of one letter, which is not built")
    ranks, letter = {}, letters()
    for text in vocab.keys() - special.keys():
        require(letter.keys() >= set(text), f"{source}: a tokenizer of an unknown kind: "
                f"its token {text!r} is not in GPT-2's letters for bytes")
        ranks[bytes(letter[each] for each in text)] = vocab[text]
    order = [vocab.get(left + right, -1) for left, right in merges]
    require(order == sorted(order) and -1 not in order[:1],
            f"{source}: its merges are not in the order of its ids, which is not built")
    return ranks


def make(source, vocab, merges, special, vocab_size, cut, template, begins, named, ends,
         pads):
    """A Tokenizer of what ranks_of takes, or a UserError.

    cut: pattern and Unicode form. begins: whether a text begins with BOS, for want of a
    template. named {bos_token, eos_token}: what a template may ask for. ends, pads: ids or
    names, the likeliest first: the first that there is becomes END; PAD is another.
    """
    ranks = ranks_of(source, vocab, merges, special)
    taken = {*ranks.values(), *special.values()}
    require(max(taken) < vocab_size,
            f"{source}: a tokenizer of more ids than the model's {vocab_size}")
    fillers = {f"{FILLER}{rank}|>": rank for rank in set(range(vocab_size)) - taken}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    for rank, byte in enumerate(missing, start=vocab_size):
        ranks[bytes([byte])] = rank  # encode leaves it out, as others do
    named = {name: token for name, token in named.items() if token}
    template = template or ("{{ bos_token }}" if begins else "") + PLAIN
    ends = [turn_end(template, named, special), named.get("eos_token"), *ends]
    ends = [special.get(end, end) for end in ends]
    ends = [rank for rank in ends if type(rank) is int]
    require(ends, f"{source} does not say which token ends an answer")
    others = sorted(special[name] for name in special.keys() - named.values())
    pads = [special.get(pad, pad) for pad in (*pads, *others, 0, 1)]
    pads = [rank for rank in pads if type(rank) is int and rank != ends[0]]
    ids = sorted([*ranks.values(), *special.values(), *fillers.values()])
    require(ids == list(range(len(ids))) and {pads[0], ends[0]} <= set(range(vocab_size)),
            f"{source}: two of its tokens have the same id, or END has none of the model's")
    real = dict(vocab_size=vocab_size, form=cut[1], template=template, names=named,
                pad=pads[0], end=ends[0])
    return Tokenizer(ranks, special | fillers, cut[0], "{}", real)


@functools.lru_cache(maxsize=16)
def compiled(template):
    """A chat template, run in Jinja's sandbox: it reaches nothing but what it is given."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def render(template, named, *messages):
    """What a template makes of messages (role, content), and the assistant's turn begins.

    Without the date, which some templates ask for if they can: a prompt stays the same.
    """
    messages = [dict(role=role, content=content) for role, content in messages]
    with refusing("the model's chat template fails"):
        return compiled(template).render(messages=messages, **named,
                                         add_generation_prompt=len(messages) == 1)


def turn_end(template, named, special):
    """The name of the special token that follows an assistant's answer, or None."""
    try:
        text = render(template, named, ("user", "question"), ("assistant", "the-answer"))
    except UserError:
        return None
    found = splitter(tuple(special)).search(text.partition("the-answer")[2])
    return found and found[0]


@functools.lru_cache(maxsize=16)
def splitter(names):
    """A regular expression of all these names, the longest first."""
    names = [name for name in names if not name.startswith(FILLER)]
    names = map(re.escape, sorted(names, key=len, reverse=True))
    return re.compile("|".join(names) or "(?!)")  # or nothing, ever


def encode_chat(tokenizer, text):
    """What the user said in the model's template -> ids. Its tokens alone are special."""
    names = splitter(tuple(tokenizer.special))
    mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)
    hidden = names.sub(lambda found: mark.join(found[0]) + mark, text)
    whole = render(tokenizer.template, tokenizer.real["names"], ("user", hidden))
    ids, done = [], 0
    for found in names.finditer(whole):
        ids += tokenizer.encode(whole[done:found.start()].replace(mark, ""))
        ids.append(tokenizer.special[found[0]])
        done = found.end()
    return ids + tokenizer.encode(whole[done:].replace(mark, ""))
