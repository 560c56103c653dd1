"""How fast is fine-tuning with spinning threads, sleeping threads and one thread, alone and beside as many busy
processes as there are cores? Writes threads.md: steps per second.

Spinning threads are the fastest while each has a core, and the slowest where others want the cores, too: a run that
notices goes on with one thread.
"""
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date

import torch

from grpo_min.lab.report import machine
from grpo_min.lab.studies.common import sized, table, write_study
from grpo_min.rollout import Prompts, pad_completions, token_logprobs
from grpo_min.run.checkpoint import load_model
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.fit import fit
from grpo_min.sft import SFTConfig


def study(config):
    cores, rows = os.cpu_count(), []
    spawn = multiprocessing.get_context("spawn")
    for name, environment, adapts in [(f"{cores} threads, spinning", {}, False),
                                      (f"{cores} threads, sleeping", dict(OMP_WAIT_POLICY="PASSIVE"), False),
                                      ("1 thread", dict(OMP_NUM_THREADS="1"), False),
                                      (f"{cores} threads, spinning, until the run notices others", {}, True)]:
        cells = [name]
        for others in 0, cores:
            print(f"{name}, beside {others} busy processes", flush=True)
            busy = [spawn.Process(target=keep_busy, daemon=True) for _ in range(others)]
            for process in busy:
                process.start()
            os.environ.update(environment)             # what a new process starts with
            with ProcessPoolExecutor(1, spawn) as process:
                rate = process.submit(steps_per_second, sized(config, 150, 30), adapts).result()
            for variable in environment:
                del os.environ[variable]
            for process in busy:
                process.kill()
            cells.append(f"{rate:.0f}")
        rows.append(cells)
    lines = table(["", "alone", f"beside {cores} busy processes"], rows)
    lines += ["", f"Steps of fine-tuning per second, one run each; {machine(torch.device('cpu'))}, {date.today()}."]
    write_study(config, "threads", lines)


def keep_busy():
    torch.set_num_threads(1)
    a = torch.randn(500, 500)
    while True:
        a @ a


def steps_per_second(steps, adapts):
    """Fine-tune on one batch of demonstrations, the first third of the steps not counted. Unless it adapts, the number
    of threads is set again before each step, whatever the run has decided."""
    settings = SFTConfig(run="", steps=steps, device="cpu")
    model = load_model(settings.base)
    rows = read_jsonl(DATA / "sft.jsonl", ["prompt", "response"])[:settings.batch_size]
    prompts = Prompts.from_texts([row["prompt"] for row in rows], model.tokenizer)
    ids, mask = pad_completions([row["response"] for row in rows], model.tokenizer)
    threads, times = torch.get_num_threads(), []

    def loss_at(step):
        times.append(time.perf_counter())
        if not adapts:
            torch.set_num_threads(threads)
        return -token_logprobs(model, prompts, ids, mask)[0].sum() / mask.sum(), {}
    fit(settings, model, [], loss_at)
    return (len(times) - 1 - steps // 3) / (times[-1] - times[steps // 3])
