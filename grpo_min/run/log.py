"""A run: its folder, its checkpoints, its log line.

runs/NAME/ holds config.json, metrics.csv (a row per step), samples.jsonl, checkpoint.pt
and, from RL, curves.png. Resumed, it continues bit for bit (on a CPU, as many threads).
"""
import csv
import dataclasses
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import torch

from grpo_min.run.checkpoint import serialise, trained, weights
from grpo_min.run.config import UserError, require
from grpo_min.run.files import fingerprint, make_folder, move_aside, save_file
from grpo_min.run.ranks import RANK, RANKS, mean
from grpo_min.run.table import column_names, write_csv

SAVE_EVERY = 10      # seconds between checkpoints, more where they take long (see pause)


class Run:
    """The folder of one run, and its progress on the screen. A context manager, for Ctrl-C.

    config has run (the folder; "" writes nothing), resume and steps. inputs: the files it
    starts from. parts: {name: model or optimizer} to be saved, the model in question first.
    schedule: whether a step depends on how many there will be.
    """

    def __init__(self, config, inputs, parts, schedule=False):
        self.config, self.parts, self.rows, self.warned = config, parts, [], set()
        self.pending, self.stopped, self.schedule = None, False, schedule
        self.writing = 0.0  # seconds that the last checkpoint took
        self.folder = Path(config.run) if config.run else None
        # A process that another one has started shares its screen: lines have names, stay.
        self.shares_screen = multiprocessing.parent_process() is not None
        self.name = f"{self.folder.name}: " if self.shares_screen and self.folder else ""
        self.settings = dataclasses.asdict(config)
        del self.settings["run"], self.settings["resume"]
        inputs = [f"{Path(path).name} {fingerprint(path)}" for path in inputs]
        self.threads = torch.get_num_threads()
        self.settings.update(inputs=inputs, threads=self.threads, ranks=RANKS)

    def __enter__(self):
        self.first_step = 0
        if self.folder and (self.folder / "config.json").exists():
            if self.config.resume:
                from grpo_min.run.resume import restore
                restore(self)
            elif RANK == 0:
                move_aside(self.folder)
        require(mean(torch.tensor(float(self.first_step))) == self.first_step,
                f"--resume: not every rank finds the same run in {self.folder}")
        self.folder = self.folder if RANK == 0 else None          # the others write nothing
        if self.folder:
            make_folder(self.folder)
            if self.first_step == 0:
                for name in "metrics.csv", "samples.jsonl":
                    (self.folder / name).write_text("", encoding="utf-8")
                self.save(self.checkpoint(0))
            # Last, since it makes this a run: one killed before has nothing to resume.
            settings = json.dumps(self.settings, indent=1).encode()
            save_file(self.folder / "config.json", settings)
        self.started = self.shown = self.saved = time.perf_counter()
        self.usage, self.patience, self.retry = [0.0, 0.0, 0], 0, 0.0      # see run.cores
        try:
            self.old_handler = signal.signal(signal.SIGINT, self.interrupt)
        except ValueError:                  # not in the main thread: Ctrl-C stays as it is
            self.old_handler = None
        return self

    def __exit__(self, kind, error, *_):
        torch.set_num_threads(self.threads)
        if self.old_handler is not None:
            signal.signal(signal.SIGINT, self.old_handler)
        if kind is FloatingPointError:
            self.fail(error)

    def interrupt(self, *_):
        """First Ctrl-C: stop after this step. Second: at once."""
        self.stopped = True
        signal.signal(signal.SIGINT, self.old_handler)
        print("\nstopping after this step (Ctrl-C again: at once) ...", file=sys.stderr)

    def checkpoint(self, step):
        """The bytes of a checkpoint of the state after so many steps."""
        (_, model), *others = self.parts.items()
        trunk = getattr(model, "trunk", model)
        with torch.no_grad():       # finite weights may be too large to compute with
            logits = trunk.plain(torch.zeros_like(trunk.tokens.weight[:1, :1]).long())
        if not all(tensor.isfinite().all() for tensor in [*model.parameters(), logits]):
            self.fail("the weights, or what they compute, are no longer finite")
        states = {name: trained(part) if isinstance(part, torch.nn.Module)
                  else part.state_dict() for name, part in others}
        return serialise(step=step, **weights(model), **states)

    def save(self, content):
        start = time.perf_counter()
        save_file(self.folder / "checkpoint.pt", content)
        self.writing = time.perf_counter() - start

    def pause(self):
        """Seconds until the next checkpoint: writing them takes a fortieth of the time."""
        return SAVE_EVERY * max(1, 4 * self.writing)

    def step_done(self, step, row, line, samples=()):
        """Record a step: row {metric: number}, a line to show, dicts for samples.jsonl.

        A checkpoint of step k is written when step k + 1 has had a finite loss: it is good.
        """
        row = dict(step=step, **row)
        self.rows.append(row)
        done, stopped = step + 1, self.stopped              # Ctrl-C may come at any line
        last = done == self.config.steps
        if self.folder:
            self.write_row(row, samples)
            if self.pending:
                self.save(self.pending)
                self.pending = None
            if last or stopped:
                self.save(self.checkpoint(done))
            elif time.perf_counter() - self.saved > self.pause():
                self.saved = time.perf_counter()
                self.pending = self.checkpoint(done)
        self.show(done, line, last)
        if self.threads > 1:
            from grpo_min.run.cores import share_cores
            share_cores(self)
        if stopped and not last:
            if self.folder:
                from grpo_min.run.resume import resume_command
                print(f"\nsaved after step {done}; go on with: {resume_command()}",
                      file=sys.stderr)
            raise UserError("stopped by Ctrl-C", exit_code=130)

    def write_row(self, row, samples):
        path, names = self.folder / "metrics.csv", column_names(self.rows)
        if names != column_names(self.rows[:-1]):           # the first row, a new column
            write_csv(path, self.rows)
        else:
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, names).writerow(row)
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(dict(step=row["step"], **sample)) + "\n")

    def show(self, done, line, last):
        """The log line: on a terminal it rewrites itself, else one every five seconds."""
        now, terminal = time.perf_counter(), sys.stdout.isatty() and not self.shares_screen
        per_step = (now - self.started) / (done - self.first_step)
        left = per_step * (self.config.steps - done)
        if terminal or last or now - self.shown > 5 or done == self.first_step + 1:
            self.shown = now
            text = (f"{self.name}step {done}/{self.config.steps} | {line} | "
                    f"{per_step:.2f} s/step, {left:.0f} s left")
            print("\r\033[K" + text if terminal else text, flush=True,
                  end="\n" if last or not terminal else "")

    def fail(self, reason):
        kept = f"; the last good checkpoint is {self.folder}/checkpoint.pt"
        advice = "try a smaller learning rate" + (kept if self.folder else "")
        raise UserError(f"{reason}: {advice}", exit_code=1) from None
