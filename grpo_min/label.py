"""You are the annotator: python -m grpo_min.label shows two sampled answers at a time, and you say which is better.

A choice is on the disk before the next pair appears: a row {"prompt", "chosen", "rejected"} of a file that grows from
sitting to sitting, and that `python -m grpo_min.reward_model --preferences FILE` learns from.

Some pairs come again half a sitting later, with the answers exchanged: a reward model cannot agree with you more
reliably than you do yourself. Second choices stay in memory, for the report at the end, and are never written.
"""
import itertools
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.metrics import agreement
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts, sample
from grpo_min.runs import DATA, generator, load_model, make_folder, read_jsonl, save_file
from grpo_min.tokenizer import encode_completion

FIELDS = ["prompt", "chosen", "rejected"]


@dataclass
class LabelConfig:
    """Choose the better of two answers, pair by pair, for a reward model to learn from."""
    preferences: str = option("runs/labels.jsonl", "JSONL that your choices are appended to")
    checkpoint: str = option(str(DATA / "checkpoints/sft.pt"), "checkpoint of the model that answers")
    prompts: str = option(str(DATA / "animals_train.jsonl"), "JSONL with the field prompt")
    pairs: int = option(20, "pairs to show in this sitting")
    repeat: float = option(0.1, "share of the pairs that come a second time, at most 0.5")
    pick: str = option("random", "any pairs, or those that the reward model is least sure of", ["random", "unsure"])
    reward_model: str = option(str(DATA / "checkpoints/reward_model.pt"), "checkpoint for --pick unsure")
    pool: int = option(8, "pairs sampled for each one shown, for --pick unsure")
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


def sample_pairs(policy, prompts, count, known, config, rng):
    """Up to `count` pairs (prompt, answer, answer), two samples that differ on the screen; no pair twice, and none of
    the rows `known`. Answers cut by the length limit are left out: the reward model would read END after them."""
    pairs, seen = [], {(row["prompt"], frozenset(on_screen(row[side]) for side in FIELDS[1:])) for row in known}
    order = itertools.cycle(torch.randperm(len(prompts), generator=rng).tolist())
    for _ in range(2 * count + 10):                          # an end, where the model always says the same
        batch = Prompts.from_texts([prompts[i] for i in itertools.islice(order, 32)], next(policy.parameters()).device)
        rollout = sample(policy, batch, 2, config.max_new_tokens, config.temperature, rng)
        # What is no UTF-8 may be longer when it is read again, and not fit into the context.
        answers = [text if ended and len(encode_completion(text)) <= config.max_new_tokens else None
                   for text, ended in zip(rollout.texts(), rollout.finished.tolist())]
        for prompt, a, b in zip(batch.texts, answers[::2], answers[1::2]):
            key = prompt, frozenset(on_screen(answer) for answer in (a, b) if answer is not None)
            if len(key[1]) == 2 and key not in seen and len(pairs) < count:
                seen.add(key)
                pairs.append((prompt, a, b))
    return pairs


def least_sure(reward, pairs, count):
    """The `count` pairs whose two scores are nearest to each other, the nearest first."""
    prompts, a, b = zip(*pairs)
    margin = [abs(x - y) for x, y in zip(reward(prompts, a), reward(prompts, b))]
    return [pairs[i] for i in sorted(range(len(pairs)), key=margin.__getitem__)[:count]]


def schedule(pairs, share, rng):
    """Turns (pair, None), and for a share of the pairs (pair with answers exchanged, its first turn), half the list
    later. The first time needs no shuffling: the answers are independent samples, in the order of their drawing."""
    half, turns = len(pairs) // 2, []
    again = torch.randperm(half, generator=rng)[:round(share * len(pairs))].tolist()
    for k, pair in enumerate(pairs):
        turns.append((pair, None))
        if k - half in again:
            prompt, a, b = pairs[k - half]
            turns.append(((prompt, b, a), k - half))         # before the first repeat, pair k is turn k
    return turns


def ask():
    """One of 1, 2, s, u and q, asked for until it comes; Ctrl-C and the end of the input are a q."""
    while True:
        try:
            key = input("better: 1, 2, s(kip), u(ndo), q(uit)? ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            print()
            return "q"
        except UnicodeDecodeError:
            key = ""
        if key in "1 2 s skip u undo q quit".split():
            return key[0]
        print("  please type 1, 2, s, u or q, then Enter")


def sit(path, turns):
    """Show the turns, write each choice at once -> {turn: (chosen answer, line written, empty for a repeat)}."""
    made, n = {}, 0
    while n < len(turns):
        (prompt, *answers), first = turns[n]
        if first is not None and first not in made:          # skipped the first time
            n += 1
            continue
        print(f"\n[{n + 1} of {len(turns)}, choices so far: {len(made)}]  {on_screen(prompt)}\n"
              f"  1: {on_screen(answers[0])}\n  2: {on_screen(answers[1])}")
        key = ask()
        if key == "q":
            break
        if key == "u" and made:
            n, (_, line) = made.popitem()                    # the last one made
            content = path.read_bytes()
            require(content.endswith(line), f"cannot undo: {path} has been changed meanwhile")
            save_file(path, content[:len(content) - len(line)])
        elif key == "u":
            print("  nothing to undo in this sitting")
        elif key in "12":
            chosen, rejected = answers if key == "1" else answers[::-1]
            line = json.dumps(dict(prompt=prompt, chosen=chosen, rejected=rejected)).encode() + b"\n"
            made[n] = chosen, line if first is None else b""
            with open(path, "ab") as file:
                file.write(made[n][1])
                file.flush()
                os.fsync(file.fileno())
        n += key in "12s"
    return made


def main(argv=None):
    config = parse(LabelConfig, argv)
    require_positive(config, "pairs", "pool", "temperature", "max_new_tokens")
    require(0 <= config.repeat <= 0.5, f"--repeat must be from 0 to 0.5, not {config.repeat}")
    device, path, unsure = pick_device(config.device), Path(config.preferences), config.pick == "unsure"
    policy = load_model(config.checkpoint, "GPT", device)
    reward = learned(load_model(config.reward_model, "ScalarGPT", device)) if unsure else None
    prompts = [row["prompt"] for row in read_jsonl(config.prompts, ["prompt"])]
    known = read_choices(path)
    rng = generator(config.seed, len(known))                 # other pairs in another sitting
    pairs = sample_pairs(policy, prompts, config.pairs * (config.pool if unsure else 1), known, config, rng)
    require(pairs, f"{config.checkpoint} gives no two different answers that end by themselves: try another "
            "--temperature or more --max-new-tokens")
    turns = schedule(least_sure(reward, pairs, config.pairs) if unsure else pairs, config.repeat, rng)
    make_folder(path.parent)
    open(path, "ab").close()                                 # what cannot be written should show before a choice
    print(f"{path} holds {len(known)} choices. Each one that you make is added at once.")
    made = sit(path, turns)
    same = [made[n][0] == made[first][0] for n, (_, first) in enumerate(turns) if first is not None and n in made]
    print(f"\nChoices in this sitting: {len(made)}, of which repeats: {len(same)}. {path} holds "
          f"{len(known) + len(made) - len(same)}.")
    print(f"Shown a pair again, you chose the same answer in {agreement(same)}." if same else
          "No pair was chosen from twice: nothing is known about how far you agree with yourself.")
    print(f"To learn from them: python -m grpo_min.reward_model --preferences {shlex.quote(str(path))} --holdout 0.2")


if __name__ == "__main__":
    run_command(main)
