"""How long does the main job take alone, where another process uses a core, and where it has one core only? Writes
threads.md: seconds, each of one run from nothing.
"""
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from datetime import date

import torch

from grpo_min.lab.report import machine
from grpo_min.lab.studies.common import sized, table, write_study

CASES = [("alone", 0, False), ("beside a process that uses one core for 20 seconds of pretraining", 20, False),
         ("beside a process that always uses one core", math.inf, False), ("with one core only", 0, True)]


def study(config):
    rows, spawn = [], multiprocessing.get_context("spawn")
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {}          # macOS, Windows: all cores
    for name, busy, one_core in CASES:
        print(f"the main job {name}", flush=True)
        other = spawn.Process(target=use_a_core, args=(sized(config, 12, 1), busy), daemon=True)
        other.start()
        if own and one_core:
            os.sched_setaffinity(0, {min(own)})                                         # what it starts inherits that
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "grpo_min", "--run", f"{folder}/run", *["--quick"] * config.quick]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows.append([name, time.perf_counter() - start])
        if own:
            os.sched_setaffinity(0, own)
        other.kill()
    cells = [[name, f"{seconds:.0f}", f"{seconds / rows[0][1]:.2f}"] for name, seconds in rows]
    lines = table(["the main job", "seconds", "times as long"], cells)
    write_study(config, "threads", [*lines, "", f"One run each; {machine(torch.device('cpu'))}, {date.today()}."])


def use_a_core(after, seconds):
    """Wait so many seconds, then count for so many."""
    time.sleep(after)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
