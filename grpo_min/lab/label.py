"""You are the annotator: python -m grpo_min.lab.label shows two sampled answers at a time; you say which is better.

A choice is on the disk before the next pair appears: a row {"prompt", "chosen", "rejected"} of a file that grows from
sitting to sitting, and that `python -m grpo_min.reward_model --preferences FILE` learns from.

Some pairs come again half a sitting later, with the answers exchanged: a reward model cannot agree with you more
reliably than you do yourself. Second choices stay in memory, for the report at the end, and are never written.
"""
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_min.evaluate import agreement
from grpo_min.rollout import Prompts, sample
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA, make_folder, save_file
from grpo_min.run.resume import command_line
from grpo_min.run.rng import generator

FIELDS = ["prompt", "chosen", "rejected"]


@dataclass
class LabelConfig:
    """Choose the better of two answers, pair by pair, for a reward model to learn from."""
    preferences: str = option("runs/labels.jsonl", "JSONL that your choices are appended to")
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the model that answers")
    prompts: str = option(str(DATA / "animals_train.jsonl"), "JSONL with the field prompt")
    pairs: int = option(20, "pairs to show in this sitting")
    repeat: float = option(0.1, "share of the pairs that come a second time, at most 0.5")
    temperature: float = option(1.0, "sampling temperature")
    max_new_tokens: int = option(40, "longest answer, in tokens")
    seed: int = option(1, "seed of prompts, answers and repeats")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def read_choices(path):
    """The rows of a file of choices, [] where there is none; a last line that a crash tore is cut off. UserError, and
    the file stays as it is, if it holds anything else."""
    content = path.read_bytes() if path.exists() else b""
    last = content[content.rfind(b"\n") + 1:]                # not empty: torn, or written by another program
    if last and last[:12] == b'{"prompt": "'[:len(last)] and not last.endswith(b'"}'):
        print(f"note: a crash tore the last line of {path}, which is cut off: {last.decode(errors='replace')}")
        content = content[:-len(last)]
        save_file(path, content)
    rows = read_jsonl(path, FIELDS) if content else []
    require(not rows or rows[0].keys() == set(FIELDS), f"{path} has more fields than {', '.join(FIELDS)}")
    if rows and not content.endswith(b"\n"):
        save_file(path, content + b"\n")
    return rows


def on_screen(text):
    """An answer as one line, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split())) or "(nothing)"


def as_shown(prompt, *answers):
    """What tells one pair from another: the prompt, and its answers as the reader sees them, in either order."""
    return prompt, frozenset(map(on_screen, answers))


def sample_pairs(policy, prompts, count, choices, config, rng):
    """Up to `count` pairs (prompt, answer, answer), two samples that differ on the screen; no pair twice, and none of
    the rows `choices`. Answers cut by the length limit are left out: the reward model would read END after them."""
    pairs, seen = [], {as_shown(row["prompt"], row["chosen"], row["rejected"]) for row in choices}
    order = itertools.cycle(torch.randperm(len(prompts), generator=rng).tolist())
    tokenizer, device = policy.tokenizer, next(policy.parameters()).device
    for _ in range(2 * count + 10):                          # an end, where the model always says one thing
        texts = [prompts[i] for i in itertools.islice(order, 32)]
        batch = Prompts.from_texts(texts, tokenizer, device)
        rollout = sample(policy, batch, 2, config.max_new_tokens, config.temperature, rng)
        answers = []
        for answer, ended in zip(rollout.texts(tokenizer), rollout.finished.tolist()):
            # What is no UTF-8 may be longer when it is read again, and not fit into the context.
            fits = len(tokenizer.encode_completion(answer)) <= config.max_new_tokens
            answers.append(answer if ended and fits else None)
        for prompt, a, b in zip(texts, answers[::2], answers[1::2]):
            if a is None or b is None or on_screen(a) == on_screen(b):
                continue
            if as_shown(prompt, a, b) not in seen and len(pairs) < count:
                seen.add(as_shown(prompt, a, b))
                pairs.append((prompt, a, b))
    return pairs


def schedule(pairs, share, rng):
    """Turns (pair, None), and for a share of the pairs (pair with answers exchanged, its first turn), half the list
    later. The first time needs no shuffling: the answers are independent samples, in the order of their drawing."""
    half, turns = len(pairs) // 2, []
    repeated = torch.randperm(half, generator=rng)[:round(share * len(pairs))].tolist()
    for k, pair in enumerate(pairs):
        turns.append((pair, None))
        if k - half in repeated:
            prompt, a, b = pairs[k - half]
            turns.append(((prompt, b, a), k - half))         # before the first repeat, pair k is turn k
    return turns


def read_key():
    """One of 1, 2, s, u and q, asked for until it comes; Ctrl-C and the end of the input are a q."""
    while True:
        try:
            key = input("better: 1, 2, s(kip), u(ndo), q(uit)? ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            print()
            return "q"
        except UnicodeDecodeError:
            key = ""
        if key in "1 2 skip s undo u quit q".split():
            return key[0]
        print("  please type 1, 2, s, u or q, then Enter")


def sit(path, turns):
    """Show the turns, write each choice at once -> {turn: (chosen answer, line written, empty for a repeat)}."""
    choices, n = {}, 0
    while n < len(turns):
        (prompt, *answers), first_turn = turns[n]
        if first_turn is not None and first_turn not in choices:          # skipped the first time
            n += 1
            continue
        print(f"\n[{n + 1} of {len(turns)}, choices so far: {len(choices)}]  {on_screen(prompt)}\n"
              f"  1: {on_screen(answers[0])}\n  2: {on_screen(answers[1])}")
        key = read_key()
        if key == "q":
            break
        if key == "u" and choices:
            n, (_, line) = choices.popitem()                 # the last one made
            content = path.read_bytes()
            require(content.endswith(line), f"cannot undo: {path} has been changed meanwhile")
            save_file(path, content[:len(content) - len(line)])
        elif key == "u":
            print("  nothing to undo in this sitting")
        elif key in "12":
            chosen, rejected = answers if key == "1" else answers[::-1]
            line = json.dumps(dict(prompt=prompt, chosen=chosen, rejected=rejected)).encode() + b"\n"
            choices[n] = chosen, line if first_turn is None else b""
            with open(path, "ab") as file:
                file.write(choices[n][1])
                file.flush()
                os.fsync(file.fileno())
        n += key in "12s"
    return choices


def main(argv=None):
    config = parse(LabelConfig, argv)
    require_positive(config, "pairs", "temperature", "max_new_tokens")
    require(0 <= config.repeat <= 0.5, f"--repeat must be from 0 to 0.5, not {config.repeat}")
    path, policy = Path(config.preferences), load_model(config.checkpoint, pick_device(config.device))
    prompts = [row["prompt"] for row in read_jsonl(config.prompts, ["prompt"])]
    earlier = read_choices(path)
    rng = generator(config.seed, len(earlier))               # other pairs in another sitting
    pairs = sample_pairs(policy, prompts, config.pairs, earlier, config, rng)
    require(pairs, f"{config.checkpoint} gives no two different answers that end by themselves: try another "
            "--temperature or more --max-new-tokens")
    turns = schedule(pairs, config.repeat, rng)
    make_folder(path.parent)
    open(path, "ab").close()                                 # what cannot be written should show before a choice
    print(f"{path} holds {len(earlier)} choices. Each one that you make is added at once.")
    choices = sit(path, turns)
    agreed = [choices[n][0] == choices[first][0] for n, (_, first) in enumerate(turns)
              if first is not None and n in choices]
    print(f"\nChoices in this sitting: {len(choices)}, of which repeats: {len(agreed)}. {path} holds "
          f"{len(earlier) + len(choices) - len(agreed)}.")
    print(f"Shown a pair again, you chose the same answer in {agreement(agreed)}." if agreed else
          "No pair was chosen from twice: nothing is known about how far you agree with yourself.")
    to_learn = command_line("grpo_min.reward_model", "--preferences", str(path), "--holdout", "0.2")
    print(f"To learn from them: {to_learn}")


if __name__ == "__main__":
    run_command(main)
