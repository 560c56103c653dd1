"""The tokenizer: any text survives the round trip, and nothing that a user types can become a special token.

Merging is compared with a slow reference written here, and loading is watched for attempts to reach a network.
"""
import random
import subprocess
import sys

import pytest

from grpo_min import tokenizer
from grpo_min.model import GPTConfig
from grpo_min.tokenizer import (ASSISTANT, END, PAD, SPECIAL, THINK, THINK_END, USER, VOCAB_SIZE, decode, encode,
                                encode_completion, encode_prompt, encoding)

TEXTS = ["", " ", "a cow eats grass.", "3 times 9 is 27", "  two  spaces\t\ttabs\r\n\nlines ", "Grüße, 世界, שלום",
         "🐄🐎👩‍👩‍👧‍👦🇩🇪 e\u0301", "\x00\x01\x1f\x7f\x80\u2028\ufeff\ufffe\U0010ffff", "1234567890 ٣٤ Ⅷ ½", "'\"\\{}<>|",
         "".join(SPECIAL), " ".join(SPECIAL), "<|end|>", "<think>", "x" * 5000, "7" * 5000]


def test_every_byte_has_an_id():
    ids = [encoding().encode_single_token(bytes([byte])) for byte in range(256)]
    assert len(set(ids)) == 256
    assert not set(ids) & set(range(len(SPECIAL)))


def test_vocabulary_is_consistent():
    assert encoding().n_vocab == VOCAB_SIZE == GPTConfig().vocab_size
    assert [PAD, END, USER, ASSISTANT, THINK, THINK_END] == list(range(6))
    assert [decode([i]) for i in range(6)] == SPECIAL
    tokens = [encoding().decode_single_token_bytes(i) for i in range(VOCAB_SIZE)]     # KeyError where an id is missing
    assert len(set(tokens)) == VOCAB_SIZE


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    assert decode(encode(text)) == text
    assert decode(encode_completion(text, finished=False)) == text


def test_round_trip_of_random_unicode():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(chr(rng.randrange(*rng.choice([(0, 128), (0, 0xD800), (0xE000, 0x110000)]))) for _ in range(40))
        assert decode(encode(text)) == text


@pytest.mark.parametrize("text", TEXTS + [f"ignore this{name}and{name}" for name in SPECIAL])
def test_text_never_becomes_special(text):
    ids = encode(text)
    assert all(i >= len(SPECIAL) for i in ids)
    assert encode_prompt(text) == [USER, *ids, ASSISTANT]


def test_completion_knows_thinking_and_nothing_else():
    ids = encode_completion("<think> 1<|end|><|user|><|pad|><|assistant|></think> 2")
    assert [i for i in ids if i < len(SPECIAL)] == [THINK, THINK_END, END]
    assert ids[0] == THINK and ids[-1] == END
    assert encode_completion(" 28") == encode(" 28") + [END]
    assert encode_completion(" 28", finished=False) == encode(" 28")


def test_numbers_are_single_tokens():
    assert sum(len(encode(f" {number}")) == 1 for number in range(50)) >= 45


def test_merges_like_the_reference():
    """Byte-pair encoding by the book: again and again join the neighbours whose union has the lowest rank."""
    ranks = {encoding().decode_single_token_bytes(i): i for i in range(len(SPECIAL), VOCAB_SIZE)}
    for word in [" elephant", "what", " mountains", " caterpillar", "tttt", " 四", " bananabanana"]:
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        assert encode(word) == [ranks[part] for part in parts]


def test_training_ranks_by_hand(monkeypatch):
    monkeypatch.setattr(tokenizer, "VOCAB_SIZE", len(SPECIAL) + 256 + 3)
    # ab is in 5 words and counts 5; z y and y a come 9 times and count 3: a tie, which goes to the smaller bytes
    ranks = tokenizer.train_ranks("zya\n" * 9 + "qq\n" + "abc\nabd\nabe\nabf\nabg")
    assert [token for token, i in ranks.items() if i >= len(SPECIAL) + 256] == [b"ab", b"ya", b"zya"]
    assert list(ranks.values()) == list(range(len(SPECIAL), len(SPECIAL) + 259))


def test_no_network(root):
    """In a fresh process in which every use of a socket is fatal."""
    code = ("import sys; sys.addaudithook(lambda event, _: event.startswith('socket.') and sys.exit(event)); "
            "from grpo_min.tokenizer import decode, encode; assert decode(encode('a cow')) == 'a cow'")
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
