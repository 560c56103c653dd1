"""Several processes, one to a GPU or core: torchrun --nproc_per_node=2 -m -- grpo_min.grpo

Every rank takes its share of each batch, whole groups, and gradients are averaged: an
update is that of one process with the whole batch, but for random numbers, minibatches and
PPO's whitening, of which each rank has its own. Metrics are means; rank 0 alone speaks.
"""
import os
import re
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def others():
    """Around what needs the other ranks: an error of one line if one of them has ended."""
    try:
        yield
    except RuntimeError as error:       # gloo's, at once; for one that is slow it waits on
        if re.search("connection|broken pipe", str(error), re.IGNORECASE):
            raise ConnectionError("another rank has ended")
        raise


def meet():
    """Wait for all ranks: before one alone can make a mistake, and when all are done."""
    if RANKS == 1:
        return
    with others():
        if dist.is_initialized():
            dist.barrier()
            return
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def join(device):
    """Meet the other ranks, unless that is done -> the device of this one."""
    if RANKS > 1:
        if not dist.is_initialized():
            meet()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    return device


def leave(code):
    """Exit. One of several ends at once: gloo may abort it."""
    if dist.is_initialized():
        print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


def share(rows):
    """This rank's part of a batch's rows, of which every rank has equally many."""
    n = len(rows) // RANKS
    return rows[RANK * n:(RANK + 1) * n]


def mean(tensor):
    """The mean over the ranks, in place."""
    if RANKS > 1:
        with others():
            dist.all_reduce(tensor)
        tensor /= RANKS
    return tensor


def mean_of_rows(row, device):
    """The mean over ranks of a row {name: number}; "" where none has measured it."""
    if RANKS == 1:
        return row
    measured = torch.tensor([float(value != "") for value in row.values()], device=device)
    # float: with one of numpy in it, the tensor would be of another dtype than elsewhere.
    total = torch.tensor([float(value or 0) for value in row.values()], device=device)
    values = mean(total) / mean(measured)
    return {name: "" if value.isnan() else value.item() for name, value in zip(row, values)}
