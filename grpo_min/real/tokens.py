"""A tokenizer of elsewhere becomes ours: byte-pair encoding, and the template of its chats.

Others write bytes as GPT-2's letters and keep a list of merges. tiktoken wants ranks: the
lower id is merged first, which is the same where merges stand in the order of their ids.
A byte for which a model has no token is left out, as others do; they join what stands on
both sides of it, if one of their pieces holds both, and ours does not.
"""
import functools
import re

from grpo_min.real.names import refusing
from grpo_min.run.config import require
from grpo_min.tokenizer import Tokenizer

# Patterns that cut texts: GPT-2's own; with a token per digit (SmolLM2); the later ones.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# A GGUF names its pattern: that, and the Unicode form of texts.
KNOWN = {"gpt-2": (GPT2, ""), "smollm": (DIGITS, ""), "llama-bpe": (LLAMA3, ""),
         "qwen2": (QWEN2, "NFC")}
# Templates of a model that has none, and of our own models (tokenizer.PROMPT).
PLAIN = "{{ bos_token }}User: {{ messages[0]['content'] }}\nAssistant:"
OWN = ("{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
       "{{ message['content'] }}<|assistant|>{% else %}{{ message['content'] }}<|end|>"
       "{% endif %}{% endfor %}")
FILLER = "<|unused "  # and the id, for one without a token


@functools.cache
def letters():
    """The letter that GPT-2 writes for each byte: {letter: byte}."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)}


def make(source, vocab_size, vocab, merges, special, cut, template, named, end=None):
    """A Tokenizer for a model of that vocab_size, or a UserError.

    vocab {text in letters: id}, merges [(left, right), ..], special {name: id}. cut: a
    pattern, and the Unicode form. named {bos_token, eos_token, pad_token: name}, if there
    are any: the first two are for the template. end: END's id, for want of an eos_token.
    """
    ranks, letter = {}, letters()
    for text in vocab.keys() - special.keys():
        require(letter.keys() >= set(text), f"{source}: a tokenizer of an unknown kind: "
                f"its token {text!r} is not in GPT-2's letters for bytes")
        ranks[bytes(letter[each] for each in text)] = vocab[text]
    order = [vocab[left + right] for left, right in merges]
    require(order == sorted(order),
            f"{source}: its merges are not in the order of its ids, which is not built")
    if template == OWN:  # one of ours comes back
        return Tokenizer(ranks, special, cut[0])
    taken = [*ranks.values(), *special.values()]
    free = set(range(vocab_size)).difference(taken)
    require(len(taken) + len(free) == vocab_size, f"{source}: two tokens have the same id, "
            f"or there are more ids than the model's {vocab_size}")
    require(min(map(len, special), default=1) > 1,
            f"{source}: special tokens of one letter, or none, which is not built")
    fillers = {f"{FILLER}{rank}|>": rank for rank in free}
    missing = {bytes([byte]) for byte in range(256)} - ranks.keys()
    for rank, byte in enumerate(sorted(missing), start=vocab_size):
        ranks[byte] = rank  # encode leaves it out, as others do
    name = {rank: name for name, rank in special.items()}
    end = special.get(named.get("eos_token"), end)
    require(end in range(vocab_size), f"{source} does not say which token ends an answer")
    names = dict(bos_token=named.get("bos_token"), eos_token=name.get(end))
    spare = sorted(name.keys() - {special.get(word) for word in names.values()})
    pads = [special.get(named.get("pad_token"), end), *spare, 0, 1]
    real = dict(vocab_size=vocab_size, form=cut[1], template=template or PLAIN, end=end,
                pad=next(rank for rank in pads if rank != end),
                names={word: said for word, said in names.items() if said})
    return Tokenizer(ranks, special | fillers, cut[0], "{}", real)


@functools.lru_cache(maxsize=16)
def compiled(template):
    """A chat template, run in Jinja's sandbox: it reaches nothing but what it is given."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def encode_chat(tokenizer, text):
    """What the user said in the model's template -> ids. The template's tokens alone are
    special: while it is run, what looks like one in the text is broken up. It is not told
    the date, for which some ask, so that a prompt stays the same.
    """
    special = tokenizer.special
    longest_first = sorted(special, key=len, reverse=True)
    names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)
    hidden = names.sub(lambda found: mark.join(found[0]) + mark, text)
    with refusing("the model's chat template fails"):
        whole = compiled(tokenizer.template).render(
            messages=[dict(role="user", content=hidden)], add_generation_prompt=True,
            **tokenizer.real["names"])
    ids = []
    for i, part in enumerate(names.split(whole)):  # text, special token, text, ..
        ids += [special[part]] if i % 2 else tokenizer.encode(part.replace(mark, ""))
    return ids
