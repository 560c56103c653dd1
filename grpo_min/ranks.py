"""Several processes, one to a GPU or core: torchrun --nproc_per_node=2 -m -- grpo_min.grpo --run ... (or another stage)

Every rank takes its share of each batch, whole groups, and gradients are averaged: an update is that of one process
with the whole batch, but that each rank samples with random numbers of its own, splits its own share into minibatches,
and whitens PPO's advantages over its own tokens. Metrics are means over ranks. Rank 0 alone writes and speaks.
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
    """End this process with an exit code; if it is one of several, with 0 once all are here, and at once, since in an
    orderly exit gloo's threads may abort it."""
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
    """The mean over the ranks of a row of metrics {name: number}; "" where no rank has measured anything."""
    if RANKS == 1:
        return row
    measured = torch.tensor([float(value != "") for value in row.values()], device=device)
    values = mean(torch.tensor([value or 0.0 for value in row.values()], device=device)) / mean(measured)
    return {name: "" if value.isnan() else value.item() for name, value in zip(row, values)}
