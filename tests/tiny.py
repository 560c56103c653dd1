"""What the tests of loops and commands run on: a GPT of some 15,000 weights, and data files of a few lines.

Nothing here is trained and nothing is read from data/checkpoints.
"""
import csv
import json
import math
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from grpo_min import grpo, ppo, tokenizer as tokenizers, variants
from grpo_min.critic import Critic
from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.run.checkpoint import load_checkpoint, serialise, weights
from grpo_min.run.files import save_file

torch.set_num_threads(1)      # of tensors this small, several threads only get in each other's way

TOKENIZER = tokenizers.own()
PAD, END, VOCAB_SIZE = TOKENIZER.pad, TOKENIZER.end, TOKENIZER.vocab_size
USER, ASSISTANT = TOKENIZER.special["<|user|>"], TOKENIZER.special["<|assistant|>"]
CONFIG = dict(vocab_size=VOCAB_SIZE, context=64, layers=1, heads=2, width=16)
PROMPTS = [f"start with {3 * i}, plus {i}." for i in range(12)]      # of different lengths, so that batches are padded
LOOPS = pytest.mark.parametrize("loop", [grpo, ppo], ids=["grpo", "ppo"])
WALL_CLOCK = ("seconds_", "memory_mb")                                  # columns of metrics.csv that no seed decides


def other_tokenizer():
    """One of bytes alone, in which every special token has another id than in the package's, and prompts other ends."""
    names = ["<|end|>", "<think>", "<|assistant|>", "<|pad|>", "</think>", "<|user|>"]
    ranks, special = {bytes([byte]): byte for byte in range(256)}, {name: 256 + i for i, name in enumerate(names)}
    return tokenizers.Tokenizer(ranks, special, prompt="<|user|>{}\n<|assistant|>")


def gpt(kind=GPT, seed=0, ends=7, tokenizer=TOKENIZER, **changes):
    """A GPT (or ScalarGPT) with random weights. With `ends` it ends some of its completions itself: END's weights are
    so many times as large."""
    torch.manual_seed(seed)
    model = kind(GPTConfig(**{**CONFIG, "vocab_size": tokenizer.vocab_size, **changes}), tokenizer)
    with torch.no_grad():
        (model if kind is GPT else model.trunk).tokens.weight[tokenizer.end] *= ends
    return model


def checkpoint(path, kind=GPT, seed=0, ends=7, **changes):
    """Write such a model as a checkpoint file -> its path as a string."""
    save_file(path, serialise(step=0, **weights(gpt(kind, seed, ends, **changes))))
    return str(path)


def reward_checkpoint(path, seed=1):
    """A reward model whose scores differ from text to text: its scalar head, which starts at zero, is random."""
    model = gpt(ScalarGPT, seed=seed)
    torch.nn.init.normal_(model.scalar.weight)
    save_file(path, serialise(step=0, **weights(model)))
    return str(path)


def critic_checkpoint(path, seed=1, **changes):
    """A critic whose values differ from state to state: its heads, which start at zero, are random."""
    model = gpt(Critic, seed, **changes)
    torch.nn.init.normal_(model.scalar.weight)
    torch.nn.init.normal_(model.gain.weight)
    save_file(path, serialise(step=0, **weights(model)))
    return str(path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(path, count=12):
    """Prompts with answers, for GRPO and PPO."""
    return jsonl(path, [dict(prompt=text, answer=str(4 * i)) for i, text in enumerate(PROMPTS[:count])])


def demonstrations(path, count=12):
    return jsonl(path, [dict(prompt=text, response=f"<think>{i} and {i}</think>{4 * i}")
                        for i, text in enumerate(PROMPTS[:count])])


def preferences(path, count=12):
    """Pairs, for the reward model."""
    return jsonl(path, [dict(prompt=f"what do {animal}s eat?", chosen="grass.", rejected="meat. go away.",
                             animal=animal, attribute="food") for animal in (["cow", "horse", "wolf"] * count)[:count]])


def text_file(path, lines=60):
    """A text to pretrain on."""
    path.write_text("".join(f"a cow eats grass and {i} plus {i} is {2 * i}.\n" for i in range(lines)))
    return str(path)


def settings(loop, folder, **more):
    """A config of that loop: 4 prompts, 3 completions of at most 6 tokens each; writes nothing unless run is given."""
    config_class = {grpo: grpo.GRPOConfig, ppo: ppo.PPOConfig, variants: variants.VariantConfig}[loop]
    more = dict(critic="sft", critic_lr=5e-3, critic_minibatches=1) | more if loop is ppo else more
    return config_class(**dict(dict(
        run="", sft=checkpoint(folder / "sft.pt"), prompts=prompts(folder / "prompts.jsonl"), steps=3,
        prompts_per_step=4, group_size=3, max_new_tokens=6, lr=1e-2, device="cpu"), **more))


def letter_e(prompts, completions, **columns):
    """A reward that a random policy already gets a little of: the share of the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def recorded_rollouts(loop, monkeypatch):
    """A list that will hold (prompts, rollout) of every step."""
    seen, sample = [], loop.sample

    def recording(policy, prompts, *rest):
        seen.append((prompts, sample(policy, prompts, *rest)))
        return seen[-1][1]
    monkeypatch.setattr(loop, "sample", recording)
    return seen


def without_clock(rows):
    """Rows of metrics without what the wall clock decides."""
    return [{name: value for name, value in row.items() if not name.startswith(WALL_CLOCK)} for row in rows]


def same(a, b):
    """True if two nested dicts, lists and tensors are equal bit for bit (a NaN equals a NaN)."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def cells(folder):
    """metrics.csv as text, cell by cell, without what the wall clock decides."""
    with open(folder / "metrics.csv", newline="") as file:
        return without_clock(csv.DictReader(file))


def assert_same_run(a, b):
    """Checkpoints, samples and metrics of two run folders are equal to the bit, but for the clock."""
    assert same(load_checkpoint(a / "checkpoint.pt"), load_checkpoint(b / "checkpoint.pt"))
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert cells(a) == cells(b) and [row["step"] for row in cells(a)] == [str(step) for step in range(len(cells(a)))]


@contextmanager
def one_after_the_other(device):
    """In place of beside_each_other: processes take longer to start than these runs to end."""
    def begin(function, *arguments):
        future = Future()
        future.set_result(function(*[each.result() if isinstance(each, Future) else each for each in arguments]))
        return future
    yield begin
