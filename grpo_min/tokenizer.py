"""Byte-pair encoding on tiktoken, with our own ranks (data/tokenizer.tiktoken) and six special tokens.

A conversation is USER prompt ASSISTANT completion END; a completion may hold THINK ... THINK_END.
Text is encoded by its bytes, so anything that UTF-8 can hold round-trips, and what a user types can never
become a special token: `encode` knows none.
"""
import base64
import functools
import math
from collections import Counter
from pathlib import Path

import regex
import tiktoken

RANKS_FILE = Path(__file__).parent.parent / "data" / "tokenizer.tiktoken"
# Words and numbers carry the space before them; numbers of up to two digits stay whole, longer ones are cut.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
PAD, END, USER, ASSISTANT, THINK, THINK_END = range(len(SPECIAL))
VOCAB_SIZE = 600    # 6 special tokens, 256 bytes, 338 merges


def encode(text):
    """Text to a list of token ids, none of them special."""
    return encoding().encode_ordinary(text)


def encode_prompt(text):
    """What the user said, up to the point where the assistant speaks: USER text ASSISTANT."""
    return [USER] + encode(text) + [ASSISTANT]


def encode_completion(text, finished=True):
    """The assistant's words, with <think> and </think> as single tokens, and END if it finished."""
    ids = encoding().encode(text, allowed_special={"<think>", "</think>"}, disallowed_special=())
    return ids + [END] if finished else ids


def decode(ids):
    """Token ids to text; special tokens show their names."""
    return encoding().decode(list(ids))


@functools.cache
def encoding(path=RANKS_FILE):
    """The tiktoken.Encoding of a file of ranks. Nothing is downloaded."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    special = {name: i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("grpo_min", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special,
                             explicit_n_vocab=VOCAB_SIZE)


def train_ranks(text):
    """Learn the ranks from a text (Sennrich et al., 1508.07909): {token bytes: id}, the 256 bytes first.

    Again and again the most frequent pair of neighbours becomes a token. A word counts by the square root of its
    frequency, so that the few words of arithmetic do not crowd out the many about animals. Ties go to the pair of
    smallest bytes, so that the result depends on the text alone.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    counts = Counter(regex.findall(PATTERN, text))
    words = {tuple(bytes([byte]) for byte in word.encode()): math.isqrt(count) for word, count in counts.items()}
    while len(SPECIAL) + len(tokens) < VOCAB_SIZE:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = {merge(word, best): count for word, count in words.items()}
    return {token: i for i, token in enumerate(tokens, start=len(SPECIAL))}


def merge(word, pair):
    """Join every occurrence of `pair` in a tuple of tokens."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def save_ranks(ranks, path):
    """Write tiktoken's own format: a line per token, its bytes in base64 and its id."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    Path(path).write_text("".join(lines), encoding="ascii")
