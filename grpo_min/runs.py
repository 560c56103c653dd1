"""Run folders: settings, metrics, checkpoints, the log line; data files; and the loop of the supervised stages.

runs/NAME/ holds config.json, metrics.csv (a row per step), samples.jsonl, checkpoint.pt and, from RL, curves.png.
Random numbers depend on the seed and the step alone, so a resumed run needs no random states: it continues bit for
bit (on a CPU with the same number of threads).
"""
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from grpo_min.config import UserError, require
from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.ranks import RANK, RANKS, mean, share
from grpo_min.tokenizer import VOCAB_SIZE

DATA = Path(__file__).parent.parent / "data"
SAVE_EVERY = 10      # seconds between checkpoints
beside_others = False      # in a process that shares the screen: log lines name their run, and stay


# --- data ---------------------------------------------------------------------------------------------------------

def read_jsonl(path, fields, at_least=1):
    """Rows of a JSONL file, each a dict in which the named fields are strings. UserError names file and line."""
    try:
        with open(path, "rb") as file:
            rows = (parse_json(line, f"{path}, line {number}") for number, line in enumerate(file, start=1))
            return checked_rows(rows, fields, path, "line", at_least)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")


def checked_rows(rows, fields, path, unit, at_least=1):
    """The rows as a list, dicts of the same fields, of which those named are strings. UserError names path and row."""
    found = []
    for number, row in enumerate(rows, start=1):
        place = f"{path}, {unit} {number}"
        require(isinstance(row, dict), f"{place}: not an object with named fields")
        for field in fields:
            require(isinstance(row.get(field), str), f"{place}: the field \"{field}\" is missing or not a string")
        found.append(row)
        require(row.keys() == found[0].keys(), f"{place}: other fields than in {unit} 1")
    require(len(found) >= at_least, f"{path} has {len(found) or 'no'} {unit}s, where {at_least} are needed")
    return found


def parse_json(line, place):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})")


def columns(rows):
    """[{prompt: .., answer: ..}, ..] -> {prompt: [..], answer: [..]}."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def batch_rows(count, batch_size, seed, step):
    """The rows of a step's batch (of this rank's share): each epoch in an order of its own, its last incomplete batch
    left out."""
    require(batch_size <= count, f"a batch of {batch_size} from only {count} rows")
    require(batch_size % RANKS == 0, f"a batch of {batch_size} does not divide among {RANKS} ranks")
    epoch, index = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=generator(seed, epoch, rank=0))
    return share(order[index * batch_size:(index + 1) * batch_size].tolist())


def generator(seed, step, rank=RANK):
    """A CPU generator that depends on the seed, the step and the rank alone."""
    digest = hashlib.sha256(f"{seed} {step}{f' rank {rank}' if rank else ''}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


# --- checkpoints --------------------------------------------------------------------------------------------------

def save_file(path, content):
    """Write to a temporary file and rename it: a reader sees the old file or the new one, never half of one."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = " (the last good one is intact)" if Path(path).exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror}{kept}", exit_code=1)


def serialise(**content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weights(model):
    """What is needed to build a model again, and what it is: {kind, config, model}."""
    return dict(kind=type(model).__name__, config=dataclasses.asdict(model.config), model=model.state_dict())


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(checkpoint, dict) and "kind" in checkpoint, f"{path} is not a checkpoint of grpo_min")
        return checkpoint
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}")
    except UserError:
        raise
    except Exception:       # torch.load fails in many ways
        raise UserError(f"{path} is not a checkpoint, is damaged, or holds code, which is never run")


def load_model(path, kind, device="cpu"):
    """The GPT or ScalarGPT (that is the kind) of a checkpoint file."""
    checkpoint = load_checkpoint(path)
    require(checkpoint["kind"] == kind, f"{path} holds a {checkpoint['kind']}, where a {kind} is needed")
    try:
        config, state = GPTConfig(**checkpoint["config"]), checkpoint["model"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this version of grpo_min")
    require(config.vocab_size == VOCAB_SIZE,
            f"{path} has a vocabulary of {config.vocab_size}, the tokenizer one of {VOCAB_SIZE}")
    model = {"GPT": GPT, "ScalarGPT": ScalarGPT}[kind](config)
    load_weights(model, state, path)
    return model.to(device)


def load_weights(model, state, path):
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"{path}: the checkpoint is of another model shape than {model.config}")


def fingerprint(path):
    """Eight hex digits of a file's contents, so that a run knows which files it started from."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")


# --- a run --------------------------------------------------------------------------------------------------------

class OtherSettings(UserError):
    """A run cannot be resumed, because it was begun with other settings."""


class Run:
    """The folder of one run, and its progress on the screen. A context manager, so that Ctrl-C ends it cleanly.

    config: the stage's config, with `run` (the folder; "" writes nothing), `resume` and `steps`.
    inputs: the files the run starts from; parts: {name: model or optimizer} whose states a checkpoint holds, the
    first of which is the model that the run is about.
    """

    def __init__(self, config, inputs, parts):
        self.config, self.parts, self.rows, self.warned = config, parts, [], set()
        self.pending, self.stopped = None, False
        self.folder = Path(config.run) if config.run else None
        self.name = f"{self.folder.name}: " if beside_others and self.folder else ""
        self.settings = {name: value for name, value in dataclasses.asdict(config).items()
                         if name not in ("run", "resume")}
        self.settings["inputs"] = [f"{Path(path).name} {fingerprint(path)}" for path in inputs]
        self.settings.update(dict(threads=torch.get_num_threads()), **(dict(ranks=RANKS) if RANKS > 1 else {}))

    def __enter__(self):
        self.first_step = 0
        if self.folder:
            if (self.folder / "config.json").exists():
                if self.config.resume:
                    try:
                        self.restore()
                    except UserError:
                        raise
                    except (OSError, ValueError, KeyError, TypeError) as error:
                        raise UserError(f"--resume: what is in {self.folder} is damaged ({error})")
                elif RANK == 0:
                    move_aside(self.folder)
            self.folder = self.folder if RANK == 0 else None          # the others write nothing
        if self.folder:
            make_folder(self.folder)
            if self.first_step == 0:
                for name in "metrics.csv", "samples.jsonl":
                    (self.folder / name).write_text("")
                self.save(self.checkpoint(0))
            # Last, because it is what makes the folder a run: one that is killed before this has nothing to resume.
            save_file(self.folder / "config.json", json.dumps(self.settings, indent=1).encode())
        self.started = self.shown = self.saved = time.perf_counter()
        self.usage = [0.0, 0.0, 0]
        try:
            self.old_handler = signal.signal(signal.SIGINT, self.interrupt)
        except ValueError:                       # not in the main thread: Ctrl-C stays as it is
            self.old_handler = None
        return self

    def __exit__(self, *_):
        if self.old_handler is not None:
            signal.signal(signal.SIGINT, self.old_handler)

    def interrupt(self, *_):
        """First Ctrl-C: stop after this step. Second: at once."""
        self.stopped = True
        signal.signal(signal.SIGINT, self.old_handler)
        print("\nstopping after this step (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def restore(self):
        """Load the checkpoint into the parts, and cut metrics and samples back to its step."""
        path = self.folder / "checkpoint.pt"
        old, checkpoint = json.loads((self.folder / "config.json").read_text()), load_checkpoint(path)
        ignored = ["threads"] if checkpoint["step"] == self.config.steps else []              # of a run that has ended
        changed = [name for name in self.settings if name not in ignored and old.get(name) != self.settings[name]]
        if changed:
            raise OtherSettings(f"--resume: {self.folder} was run with other settings: {', '.join(changed)}")
        for name, part in self.parts.items():
            if name == next(iter(self.parts)):
                load_weights(part, checkpoint["model"], path)
            else:
                part.load_state_dict(checkpoint[name])
        self.first_step = checkpoint["step"]
        self.rows = read_csv(self.folder / "metrics.csv", self.first_step)
        require(len(self.rows) == self.first_step, f"--resume: {self.folder}/metrics.csv lacks rows")
        if RANK > 0:
            return
        write_csv(self.folder / "metrics.csv", self.rows)
        # What a crash has torn stands behind the lines of these steps: a line that has no step yet is left out.
        lines = (self.folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
        steps = [re.match(rb'{"step": (\d+), ', line) for line in lines]
        kept = [line for line, step in zip(lines, steps) if step and int(step[1]) < self.first_step]
        save_file(self.folder / "samples.jsonl", b"".join(kept))

    def checkpoint(self, step):
        """The bytes of a checkpoint of the state after `step` steps; the first part is the model."""
        model, *others = self.parts
        if not all(parameter.isfinite().all() for parameter in self.parts[model].parameters()):
            self.fail("the weights are no longer finite")
        return serialise(step=step, **weights(self.parts[model]),
                         **{name: self.parts[name].state_dict() for name in others})

    def save(self, content):
        save_file(self.folder / "checkpoint.pt", content)

    def step_done(self, step, row, line, samples=()):
        """Record a step: row {metric: number} goes to metrics.csv, line to the screen, samples to samples.jsonl.

        A checkpoint of step k is written when step k + 1 has had a finite loss, which shows that it is a good one.
        """
        row = dict(step=step, **row)
        self.rows.append(row)
        done, last, stopped = step + 1, step + 1 == self.config.steps, self.stopped      # Ctrl-C may come at any line
        if self.folder:
            names = column_names(self.rows)
            if names != column_names(self.rows[:-1]):              # the first row, or one with a new column
                write_csv(self.folder / "metrics.csv", self.rows)
            else:
                with open(self.folder / "metrics.csv", "a", newline="") as file:
                    csv.DictWriter(file, names).writerow(row)
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(dict(step=step, **sample)) + "\n" for sample in samples)
            if self.pending:
                self.save(self.pending)
                self.pending = None
            if last or stopped:
                self.save(self.checkpoint(done))
            elif time.perf_counter() - self.saved > SAVE_EVERY:
                self.saved = time.perf_counter()
                self.pending = self.checkpoint(done)
        self.show(done, line, last)
        self.share_cores()
        if stopped and not last:
            print(f"\nsaved after step {done}; go on with: {resume_command()}" if self.folder else "", file=sys.stderr)
            raise UserError("stopped by Ctrl-C", exit_code=130)

    def show(self, done, line, last):
        """The log line: on a terminal it rewrites itself, elsewhere it is printed every five seconds."""
        now, terminal = time.perf_counter(), sys.stdout.isatty() and not beside_others
        per_step = (now - self.started) / (done - self.first_step)
        left = per_step * (self.config.steps - done)
        if terminal or last or now - self.shown > 5 or done == self.first_step + 1:
            self.shown = now
            text = f"{self.name}step {done}/{self.config.steps} | {line} | {per_step:.2f} s/step, {left:.0f} s left"
            print("\r\033[K" + text if terminal else text, end="\n" if last or not terminal else "", flush=True)

    def share_cores(self):
        """One thread from here on where other processes use the cores: torch's threads wait for each other by spinning,
        the fastest way while each has a core; where one must wait for a core, the others burn theirs."""
        usage = [time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw]
        wall, cpu, preempted = (now - before for now, before in zip(usage, self.usage))
        if wall < 2:
            return
        threads, self.usage = torch.get_num_threads(), usage
        if threads > 1 and cpu < 0.75 * threads * wall and preempted > 100 * wall:
            print(f"\nnote: other processes use the cores: on with 1 thread, not {threads} (that changes last digits)")
            torch.set_num_threads(1)

    def fail(self, what):
        kept = f"; the last good checkpoint is {self.folder / 'checkpoint.pt'}" if self.folder else ""
        raise UserError(f"{what}: try a smaller learning rate{kept}", exit_code=1)


def number(text):
    """A cell of metrics.csv as it was: int, float, or "" where nothing was measured."""
    return text and (int(text) if text.lstrip("-").isdigit() else float(text))


def column_names(rows):
    """The columns of a list of rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path, rows):
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, column_names(rows))
        writer.writeheader()
        writer.writerows(rows)
    save_file(path, file.getvalue().encode())


def read_csv(path, count=None):
    """The first `count` rows (all, unless told)."""
    with open(path, newline="") as file:
        rows = itertools.islice(csv.DictReader(file), count)
        return [{name: number(text) for name, text in row.items()} for row in rows]


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}")


def move_aside(folder):
    """Rename a folder to the first free NAME.1, NAME.2, ...: what was there is kept."""
    n = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
    try:
        folder.rename(f"{folder}.{n}")
    except OSError as error:
        raise UserError(f"cannot keep the earlier run as {folder}.{n}: {error.strerror}")
    print(f"{folder} was there already: kept as {folder}.{n}")


def resume_command():
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    module = getattr(sys.modules["__main__"].__spec__, "name", "grpo_min").removesuffix(".__main__")
    goes_on_by_itself = module in ("grpo_min", "grpo_min.compare", "grpo_min.study")
    return shlex.join(["python", "-m", module, *arguments, *([] if goes_on_by_itself else ["--resume"])])


# --- the supervised stages ----------------------------------------------------------------------------------------

def optimizer_for(model, lr, weight_decay=0.0):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def update(run, model, optimizer, loss, max_norm=1.0):
    """Backward, clip the gradient to a norm of at most `max_norm`, one step of the optimizer -> the norm before."""
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        mean(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        run.fail(f"the loss is {loss.item()} and the gradient's norm {norm}")
    optimizer.step()
    return norm


def fit(config, model, inputs, loss_at, weight_decay=0.0):
    """Train on `loss_at(step)` with AdamW, linear warm-up and cosine decay -> rows of metrics.

    loss_at returns the loss and a dict of further metrics. config has run, resume, steps, lr, warmup.
    """
    optimizer = optimizer_for(model, config.lr, weight_decay)
    with Run(config, inputs, dict(model=model, optimizer=optimizer)) as run:
        for step in range(run.first_step, config.steps):
            lr = config.lr * min((step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, metrics = loss_at(step)
            norm = update(run, model, optimizer, loss)
            run.step_done(step, dict(loss=loss.item(), **metrics, lr=lr, grad_norm=norm), f"loss {loss.item():.3f}")
        return run.rows
