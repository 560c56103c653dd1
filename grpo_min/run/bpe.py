"""Learning a tokenizer from a text: what `python -m grpo_min.tokenizer` does."""
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import regex

from grpo_min.run.config import option, parse, require
from grpo_min.run.files import DATA, make_folder, move_aside, read_text
from grpo_min.tokenizer import PATTERN, SPECIAL, Tokenizer, save


def train(text, vocab_size):
    """Learn a tokenizer (Sennrich et al., 1508.07909): special tokens, 256 bytes, merges.

    The most frequent pair becomes a token, until vocab_size or no pair is left; ties go to
    smaller bytes. A word counts by the square root of its frequency: rare ones matter, too.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    started = shown = time.perf_counter()
    words = {}
    for word, count in Counter(regex.findall(PATTERN, text)).items():
        words[tuple(tokens[byte] for byte in word.encode())] = math.isqrt(count)
    merges = vocab_size - len(SPECIAL) - len(tokens)
    for done in range(1, merges + 1):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = {merge(word, best): count for word, count in words.items()}
        if time.perf_counter() - shown > 5:
            shown = time.perf_counter()
            left = (shown - started) / done * (merges - done)
            print(f"merge {done}/{merges} | {left:.0f} s left", flush=True)
    ranks = {token: rank for rank, token in enumerate(tokens, start=len(SPECIAL))}
    return Tokenizer(ranks, {name: rank for rank, name in enumerate(SPECIAL)})


def merge(word, pair):
    """Join every occurrence of `pair` in a tuple of tokens."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


@dataclass
class TokenizerConfig:
    """Learn a tokenizer from a text of your own, into the file tokenizer.json in --run."""
    run: str = option("runs/tokenizer", "folder to write into")
    text: str = option(str(DATA / "pretrain.txt"), "text in UTF-8, a document per line")
    vocab_size: int = option(1000, "tokens: 6 special ones, 256 bytes, and merges")


def main(argv=None):
    config = parse(TokenizerConfig, argv)
    require(config.vocab_size >= len(SPECIAL) + 256, "--vocab-size must be at least "
            f"{len(SPECIAL) + 256}: the special tokens and the bytes")
    text, path = read_text(config.text), Path(config.run) / "tokenizer.json"
    require(text.strip(), f"{config.text} is empty")
    tokenizer = train(text, config.vocab_size)
    if path.exists():
        move_aside(path.parent)
    make_folder(config.run)
    save(tokenizer, path)
    tokens = len(tokenizer.encode(text))
    print(f"wrote {path}: {tokenizer.vocab_size} tokens; the text's {len(text)} characters "
          f"are {tokens} tokens, {len(text) / tokens:.1f} characters each")

