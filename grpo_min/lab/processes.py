"""Training runs in processes of their own, one to a core; what was run before with the same settings is used again."""
import dataclasses
import multiprocessing
import signal
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from grpo_min.run.config import UserError
from grpo_min.run.cores import cores
from grpo_min.run.resume import OtherSettings


def train_or_reuse(train, config):
    """Train; go on with an unfinished run of the same settings; load a finished one. Other settings start anew."""
    try:
        return train(dataclasses.replace(config, resume=True))
    except OtherSettings:
        return train(dataclasses.replace(config, resume=False))


@contextmanager
def beside_each_other(device):
    """begin(function, *arguments) -> a future: each call in a process of its own, with one thread, as many at a time as
    there are cores for them; on a card one. An argument that is a future itself is waited for: begin that one first.

    Two runs of models as small as these, one thread each, take less time than one after the other with two, and what is
    computed does not depend on the number of cores. After an error or Ctrl-C those under way save what they have.
    """
    threads = torch.get_num_threads()
    waiting = ThreadPoolExecutor(cores() if device.type == "cpu" else 1)
    torch.set_num_threads(1)                                        # here too, or its threads get in the others' way
    try:
        yield lambda function, *arguments: waiting.submit(in_own_process, function, *arguments)
    finally:
        waiting.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_own_process(function, *arguments):
    """What the function returns, called in a new process. UserError, if that is killed."""
    arguments = [each.result() if isinstance(each, Future) else each for each in arguments]
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_process) as process:
            return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for lack of memory; the same command goes on", exit_code=1)


def begin_process():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches all: a run saves itself and stops
