"""Several processes, one to a GPU or core: torchrun --nproc_per_node=2 -m -- grpo_min.grpo

Every rank takes its share of each batch, whole groups, and gradients are averaged: an
update is that of one process with the whole batch, but for random numbers, minibatches and
PPO's whitening, of which each rank has its own. Metrics are means; rank 0 alone speaks.
"""
import os
import sys

import torch
import torch.distributed as dist

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other ranks -> the device of this one."""
    if RANKS > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def leave(code):
    """Exit. One of several waits for the others, then ends at once: gloo may abort it."""
    if dist.is_initialized():
        if code == 0:
            dist.barrier()
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
        dist.all_reduce(tensor)
        tensor /= RANKS
    return tensor


def mean_of_rows(row, device):
    """The mean over ranks of a row {name: number}; "" where none has measured it."""
    if RANKS == 1:
        return row
    measured = torch.tensor([float(value != "") for value in row.values()], device=device)
    total = torch.tensor([value or 0.0 for value in row.values()], device=device)
    values = mean(total) / mean(measured)
    return {name: "" if value.isnan() else value.item() for name, value in zip(row, values)}
