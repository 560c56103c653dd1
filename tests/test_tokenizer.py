"""The tokenizer: any text survives the round trip, and nothing that a user types can become a special token.

Merging is compared with a slow reference written here, and loading is watched for attempts to reach a network. A
tokenizer belongs to its model: at the end, texts in other scripts go through all the commands with one of their own.
"""
import base64
import copy
import json
import random
import subprocess
import sys

import pytest
import torch

from grpo_min import critic, grpo, ppo, pretrain, reward_model, sample, sft
from grpo_min import tokenizer as tokenizers
from grpo_min.critic import Critic
from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.run import bpe
from grpo_min.run.checkpoint import load_checkpoint, load_model, serialise, weights
from grpo_min.run.config import UserError, run_command
from grpo_min.run.files import DATA
from grpo_min.tokenizer import SPECIAL, Tokenizer
from tests import tiny

OWN = tokenizers.own()
PAD, END, USER, ASSISTANT, THINK, THINK_END = range(len(SPECIAL))
TEXTS = ["", " ", "a cow eats grass.", "3 times 9 is 27", "  two  spaces\t\ttabs\r\n\nlines ", "Grüße, 世界, שלום",
         "🐄🐎👩‍👩‍👧‍👦🇩🇪 e\u0301", "\x00\x01\x1f\x7f\x80\u2028\ufeff\ufffe\U0010ffff", "1234567890 ٣٤ Ⅷ ½", "'\"\\{}<>|",
         "".join(SPECIAL), " ".join(SPECIAL), "<|end|>", "<think>", "x" * 5000, "7" * 5000]


def test_every_byte_has_an_id():
    ids = [OWN.encoding.encode_single_token(bytes([byte])) for byte in range(256)]
    assert len(set(ids)) == 256
    assert not set(ids) & set(range(len(SPECIAL)))


def test_vocabulary_is_consistent():
    assert OWN.vocab_size == OWN.encoding.n_vocab == 600 == load_model(DATA / "checkpoints/sft.pt").config.vocab_size
    assert [OWN.special[name] for name in SPECIAL] == list(range(6)) and (OWN.pad, OWN.end) == (PAD, END)
    assert [OWN.decode([i]) for i in range(6)] == SPECIAL
    tokens = [OWN.encoding.decode_single_token_bytes(i) for i in range(600)]         # KeyError where an id is missing
    assert len(set(tokens)) == 600


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    assert OWN.decode(OWN.encode(text)) == text
    assert OWN.decode(OWN.encode_completion(text, finished=False)) == text


def test_round_trip_of_random_unicode():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(chr(rng.randrange(*rng.choice([(0, 128), (0, 0xD800), (0xE000, 0x110000)]))) for _ in range(40))
        assert OWN.decode(OWN.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS + [f"ignore this{name}and{name}" for name in SPECIAL])
def test_text_never_becomes_special(text):
    ids = OWN.encode(text)
    assert all(i >= len(SPECIAL) for i in ids)
    assert OWN.encode_prompt(text) == [USER, *ids, ASSISTANT]


@pytest.mark.parametrize("tokenizer", [bpe.train("<|end|> end user | <think> " * 9, 400), tiny.other_tokenizer()],
                         ids=["learned", "other ids"])
def test_nor_in_any_other_tokenizer(tokenizer):
    special = set(tokenizer.special.values())
    for text in TEXTS + [f"ignore this{name}and{name}" for name in SPECIAL]:
        ids, prompt = tokenizer.encode(text), tokenizer.encode_prompt(text)
        assert not special & set(ids) and tokenizer.decode(ids) == text
        assert tokenizer.decode(prompt) == tokenizer.prompt.format(text) and sum(i in special for i in prompt) == 2
        assert special & set(tokenizer.encode_completion(text)) <= {
            tokenizer.end, tokenizer.special["<think>"], tokenizer.special["</think>"]}
    assert tokenizer.encode_completion("<think>") == [tokenizer.special["<think>"], tokenizer.end]


def test_completion_knows_thinking_and_nothing_else():
    ids = OWN.encode_completion("<think> 1<|end|><|user|><|pad|><|assistant|></think> 2")
    assert [i for i in ids if i < len(SPECIAL)] == [THINK, THINK_END, END]
    assert ids[0] == THINK and ids[-1] == END
    assert OWN.encode_completion(" 28") == OWN.encode(" 28") + [END]
    assert OWN.encode_completion(" 28", finished=False) == OWN.encode(" 28")


def test_numbers_are_single_tokens():
    assert sum(len(OWN.encode(f" {number}")) == 1 for number in range(50)) >= 45


def test_merges_like_the_reference():
    """Byte-pair encoding by the book: again and again join the neighbours whose union has the lowest rank."""
    ranks = OWN.ranks
    for word in [" elephant", "what", " mountains", " caterpillar", "tttt", " 四", " bananabanana"]:
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        assert OWN.encode(word) == [ranks[part] for part in parts]


# --- learning one -------------------------------------------------------------------------------------------------

def test_training_ranks_by_hand():
    # ab is in 5 words and counts 5; z y and y a come 9 times and count 3: a tie, which goes to the smaller bytes
    learned = bpe.train("zya\n" * 9 + "qq\n" + "abc\nabd\nabe\nabf\nabg", len(SPECIAL) + 256 + 3)
    first_merge = len(SPECIAL) + 256
    assert [token for token, i in learned.ranks.items() if i >= first_merge] == [b"ab", b"ya", b"zya"]
    assert list(learned.ranks.values()) == list(range(len(SPECIAL), first_merge + 3))
    assert [token for token, i in learned.ranks.items() if i < first_merge] == [bytes([byte]) for byte in range(256)]
    assert learned.vocab_size == first_merge + 3 and list(learned.special) == SPECIAL
    assert learned.encode("zyad") == [learned.ranks[token] for token in (b"zya", b"d")]
    assert learned.encode("zyab") == [learned.ranks[token] for token in (b"z", b"y", b"ab")], "the first merge wins"


def test_the_result_depends_on_the_text_alone():
    text = "einmal ist keinmal, zweimal ist einmal zu viel\n" * 4 + "кот видит кита 世界 🐄"
    assert bpe.train(text, 330).to_dict() == bpe.train(text, 330).to_dict()
    assert bpe.train(text, 330).to_dict() != bpe.train(text + " und noch ein Wort", 330).to_dict()
    fewer, more = bpe.train(text, 290).ranks, bpe.train(text, 330).ranks
    assert list(more.items())[:len(fewer)] == list(fewer.items()), "the first merges are the same"


def test_a_text_with_too_few_pairs_stays_smaller():
    learned = bpe.train("abab ab", 1000)
    assert [token for token in learned.ranks if len(token) > 1] == [b"ab", b" ab", b"abab"]
    assert learned.vocab_size == len(SPECIAL) + 256 + 3
    assert bpe.train("", 1000).vocab_size == bpe.train("a b", 262).vocab_size == 262
    assert bpe.train("", 1000).decode(bpe.train("", 1000).encode("Grüße, 世界")) == "Grüße, 世界"


def refused(capsys, command, *words):
    """Run a command that must end with code 2 and one line -> the line."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: command.main([str(word) for word in words]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500
    return error


@pytest.mark.parametrize("size", [261, 6, 0, -1])
def test_a_vocabulary_without_room_for_the_bytes(size, tmp_path, capsys):
    text = tiny.text_file(tmp_path / "text.txt")
    error = refused(capsys, bpe, "--text", text, "--vocab-size", size, "--run", tmp_path / "run")
    assert "--vocab-size" in error and "262" in error and not (tmp_path / "run").exists()


def test_an_earlier_tokenizer_is_kept(tmp_path, capsys):
    text, run = tiny.text_file(tmp_path / "text.txt"), tmp_path / "run"
    for size in "270", "280":
        bpe.main(["--text", text, "--vocab-size", size, "--run", str(run)])
    assert f"kept as {run}.1" in capsys.readouterr().out
    assert [tokenizers.load(folder / "tokenizer.json").vocab_size for folder in (run, tmp_path / "run.1")] == [280, 270]


def test_texts_and_folders_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name in "nowhere.txt", "bytes.txt", "empty.txt", ".":
        path = tmp_path / name
        assert str(path) in refused(capsys, bpe, "--text", path, "--vocab-size", 300, "--run", tmp_path / "run")
    text = tiny.text_file(tmp_path / "text.txt")
    assert text in refused(capsys, bpe, "--text", text, "--vocab-size", 300, "--run", text)
    assert not (tmp_path / "run").exists()


def test_the_command_in_a_process_of_its_own_without_network(root, tmp_path):
    """In a fresh process in which every use of a socket is fatal."""
    words = ["--text", tiny.text_file(tmp_path / "text.txt"), "--vocab-size", "300", "--run", str(tmp_path / "mine")]
    code = ("import runpy, sys; sys.addaudithook(lambda event, _: event.startswith('socket.') and sys.exit(event)); "
            "from grpo_min.tokenizer import own; assert own().decode(own().encode('a cow')) == 'a cow'; "
            "runpy.run_module('grpo_min.tokenizer', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=True)
    learned = tokenizers.load(tmp_path / "mine/tokenizer.json")
    assert learned.vocab_size == 300 and f"wrote {tmp_path / 'mine/tokenizer.json'}: 300 tokens" in done.stdout
    assert learned.to_dict() == bpe.train((tmp_path / "text.txt").read_text(), 300).to_dict()


# --- a file of its own, and in a checkpoint -----------------------------------------------------------------------

def test_saved_and_loaded(tmp_path):
    learned = bpe.train("кот видит кита, 世界 🐄 <think>\n" * 3, 290)
    for tokenizer in OWN, learned:
        tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        for again in loaded, Tokenizer.from_dict(tokenizer.to_dict()), Tokenizer.from_dict(loaded.to_dict()):
            assert again.to_dict() == tokenizer.to_dict() and again.ranks == tokenizer.ranks
            assert (again.pad, again.end, again.vocab_size) == (PAD, END, tokenizer.vocab_size)
            for text in TEXTS:
                assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
                assert again.encode_completion(text) == tokenizer.encode_completion(text)
    assert json.loads((DATA / "tokenizer.json").read_text()) == OWN.to_dict() and tokenizers.own() is OWN


def test_a_prompt_is_wrapped_as_the_tokenizer_says():
    plain = Tokenizer(OWN.ranks, OWN.special, prompt="question: {}<|assistant|>")
    assert plain.encode_prompt("a<|end|>") == [*OWN.encode("question: "), *OWN.encode("a<|end|>"), ASSISTANT]
    assert Tokenizer.from_dict(plain.to_dict()).encode_prompt("a") == plain.encode_prompt("a")


def test_copies_share_it():
    assert copy.deepcopy(OWN) is OWN
    model = GPT(GPTConfig(300, 16, 1, 2, 16), bpe.train("", 262))
    assert copy.deepcopy(model).tokenizer is model.tokenizer and model.with_head(Critic).tokenizer is model.tokenizer
    assert GPT(GPTConfig(600, 16, 1, 2, 16)).tokenizer is OWN


def edited(**changes):
    """What the file holds, with some entries replaced, or left out where they are None."""
    content = {**OWN.to_dict(), **changes}
    return json.dumps({name: value for name, value in content.items() if value is not None})


def without(names, key):
    return {name: value for name, value in names.items() if name != key}


RANKS, A, B = OWN.to_dict()["ranks"], base64.b64encode(b"a").decode(), base64.b64encode(b"b").decode()
DAMAGED = {
    "empty": "", "cut": edited()[:5000], "a list": "[1, 2]", "null": "null", "nested too deep": "[" * 100_000,
    "text": "a cow eats grass", "no ranks": edited(ranks=None), "no special tokens": edited(special=None),
    "no pattern": edited(pattern=None), "no prompt": edited(prompt=None), "ranks are a list": edited(ranks=[1, 2]),
    "special tokens are a list": edited(special=SPECIAL), "no end": edited(special=without(OWN.special, "<|end|>")),
    "no padding": edited(special=without(OWN.special, "<|pad|>")), "pattern is none": edited(pattern="(("),
    "pattern is a number": edited(pattern=3), "prompt without a place": edited(prompt="<|user|>"),
    "prompt with two places": edited(prompt="{}{}"), "prompt is a number": edited(prompt=3),
    "a byte without an id": edited(ranks=without(RANKS, A)), "one id twice": edited(ranks={**RANKS, A: RANKS[B]}),
    "the id of a special token": edited(ranks={**RANKS, A: END}), "an id below 0": edited(ranks={**RANKS, A: -5}),
    "an id that is text": edited(ranks={**RANKS, A: "5"}), "an id that is missing": edited(ranks={**RANKS, A: 9000}),
    "a fraction": edited(ranks={**RANKS, A: 1.5}), "not base 64": edited(ranks={**RANKS, "Y": 600}),
    "no bytes at all": edited(ranks={}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    text = tiny.text_file(tmp_path / "text.txt")
    error = refused(capsys, pretrain, "--text", text, "--tokenizer", path, "--run", tmp_path / "run")
    assert str(path) in error and "tokenizer" in error and not (tmp_path / "run").exists()
    if content.startswith("{") and not content.startswith(edited()[:5000]):         # the same in a checkpoint
        with pytest.raises(UserError, match="sft.pt"):
            load_model(changed(tmp_path, tokenizer=json.loads(content)))


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in "nowhere.json", ".", "bytes.json":
        error = refused(capsys, pretrain, "--tokenizer", tmp_path / name, "--run", tmp_path / "run")
        assert str(tmp_path / name) in error


def changed(folder, **changes):
    """A checkpoint with some entries changed, or left out where they are None -> its path."""
    checkpoint = {**torch.load(tiny.checkpoint(folder / "sft.pt"), weights_only=True), **changes}
    torch.save({name: value for name, value in checkpoint.items() if value is not None}, folder / "sft.pt")
    return folder / "sft.pt"


@pytest.mark.parametrize("kind", [GPT, ScalarGPT, Critic])
def test_a_checkpoint_holds_it(kind, tmp_path):
    tokenizer = bpe.train("кот видит кита\n" * 3, 280)
    model = kind(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 16), tokenizer)
    (tmp_path / "model.pt").write_bytes(serialise(step=0, **weights(model)))
    loaded = load_model(tmp_path / "model.pt", kind=kind)
    assert loaded.tokenizer.to_dict() == tokenizer.to_dict() and loaded.config.vocab_size == tokenizer.vocab_size
    assert load_checkpoint(tmp_path / "model.pt")["tokenizer"] == tokenizer.to_dict()
    if kind is not GPT:
        assert loaded.trunk.tokenizer is loaded.tokenizer


def test_the_committed_checkpoints_hold_the_committed_one():
    for name, kind in ("base", GPT), ("sft", GPT), ("reward_model", ScalarGPT), ("critic", Critic):
        assert load_model(DATA / f"checkpoints/{name}.pt", kind=kind).tokenizer.to_dict() == OWN.to_dict()


@pytest.mark.parametrize("tokenizer", [None, 3, [], {}, "tokenizer.json"], ids=repr)
def test_a_checkpoint_without_one_is_refused_in_one_line(tokenizer, tmp_path, capsys):
    # None: left out, as in the checkpoints of earlier versions.
    path = changed(tmp_path, tokenizer=tokenizer)
    assert f"{path} is not a checkpoint of this version" in refused(capsys, sample, "--checkpoint", path)


def test_a_model_too_small_for_its_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="sft.pt has a vocabulary of 50, its tokenizer one of 600"):
        load_model(tiny.checkpoint(tmp_path / "sft.pt", vocab_size=50))


# --- texts in other scripts, from the tokenizer to RL -------------------------------------------------------------

SCRIPTS = {     # name: what to pretrain on, pairs of question and answer, a word that must have become one token
    "Cyrillic": ("кошка ест рыбу, а корова ест траву. два плюс {} будет много.\n",
                 [("что ест корова?", "траву"), ("что ест кошка?", "рыбу"), ("сколько будет 2 + 2?", "4")], " корова"),
    "Chinese": ("猫吃鱼，牛吃草。二加{}等于很多。熊住在森林里。\n",
                [("牛吃什么？", "草"), ("猫吃什么？", "鱼"), ("2 + 2 等于多少？", "4")], "等于很多"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_in_another_script_goes_all_the_way(script, tmp_path, capsys, no_curves):
    line, pairs, word = SCRIPTS[script]
    text, mine = tmp_path / "text.txt", tmp_path / "mine/tokenizer.json"
    text.write_text("".join(line.format(i) for i in range(60)), encoding="utf-8")
    demonstrations = tiny.jsonl(tmp_path / "sft.jsonl", [
        dict(prompt=prompt, response=f"<think>{answer}?</think>{answer}") for prompt, answer in pairs])
    prompts = tiny.jsonl(tmp_path / "prompts.jsonl", [dict(prompt=prompt, answer=answer) for prompt, answer in pairs])
    choices = tiny.jsonl(tmp_path / "choices.jsonl", [dict(prompt=prompt, chosen=answer, rejected="нет 不")
                                                      for prompt, answer in pairs])
    short = ["--steps", 3, "--batch-size", 2, "--device", "cpu"]
    asked = ["--sft", tmp_path / "sft/checkpoint.pt", "--prompts", prompts, "--steps", 2, "--prompts-per-step", 2,
             "--max-new-tokens", 6, "--device", "cpu"]
    rl = [*asked, "--group-size", 2]

    def run(command, name, *words):
        command.main([str(word) for word in ("--run", tmp_path / name, *words)])
        return tmp_path / name / "checkpoint.pt"
    run(bpe, "mine", "--text", text, "--vocab-size", 400)
    paths = [run(pretrain, "base", "--text", text, "--tokenizer", mine, "--layers", 1, "--heads", 2, "--width", 16,
                 "--context", 48, *short),
             run(sft, "sft", "--base", tmp_path / "base/checkpoint.pt", "--demonstrations", demonstrations, *short),
             run(grpo, "grpo", *rl), run(ppo, "ppo", *rl, "--critic", "sft", "--critic-minibatches", 1)]
    model = reward_model.train(reward_model.RewardModelConfig(
        run=str(tmp_path / "reward"), sft=str(paths[1]), preferences=choices, steps=2, batch_size=2, device="cpu"))[0]
    rewarded = ["--reward", "learned", "--reward-model", tmp_path / "reward/checkpoint.pt"]
    run(critic, "critic", *asked, *rewarded)
    paths.append(run(ppo, "learned", *rl, *rewarded, "--critic", tmp_path / "critic/checkpoint.pt",
                     "--critic-minibatches", 1))
    learned = tokenizers.load(mine)
    assert learned.vocab_size <= 400 and len(learned.encode(word)) == 1 and len(OWN.encode(word)) > 4
    for loaded in [load_model(path) for path in paths] + [model]:
        assert loaded.tokenizer.to_dict() == learned.to_dict() and loaded.config.vocab_size == learned.vocab_size
    capsys.readouterr()
    sample.main(["--checkpoint", str(paths[2]), "--prompt", pairs[0][0], "--answers", "3", "--max-new-tokens", "8",
                 "--device", "cpu"])
    assert capsys.readouterr().out.count("\n") >= 3
    rows = (tmp_path / "grpo/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["prompt"] for row in rows} <= {prompt for prompt, _ in pairs} and len(rows) == 8


def test_critic_and_reward_model_must_read_what_the_policy_reads(tmp_path):
    for name, kind in ("reward", ScalarGPT), ("other", Critic):
        other = kind(GPTConfig(262, 64, 1, 2, 16), bpe.train("", 262))
        (tmp_path / f"{name}.pt").write_bytes(serialise(step=0, **weights(other)))
    config = tiny.settings(ppo, tmp_path, steps=1, reward="learned", reward_model=str(tmp_path / "reward.pt"))
    config.prompts = tiny.prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="reward.pt.*tokenizer"):
        ppo.train(config)
    config.critic, config.reward_model = str(tmp_path / "other.pt"), tiny.reward_checkpoint(tmp_path / "ours.pt")
    with pytest.raises(UserError, match="other.pt.*tokenizer"):
        ppo.train(config)


def test_nor_may_the_critic_s_context_be_shorter(tmp_path):
    """Its positions would run out before the policy's, and the last ones stand for all that follow."""
    config = tiny.settings(ppo, tmp_path, steps=1)
    for context in 64, 63:                               # tiny's policy has 64
        config.critic = tiny.checkpoint(tmp_path / f"critic-{context}.pt", Critic, context=context)
        if context == 64:
            ppo.train(config)
    with pytest.raises(UserError, match="critic-63.pt.*context"):
        ppo.train(config)
