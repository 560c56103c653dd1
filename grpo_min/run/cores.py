"""Cores and memory of this process, and what a run does where others use the cores, too."""
import ctypes
import math
import os
import time
from pathlib import Path

import torch

from grpo_min.run.metrics import resource

THREADS = 2      # of one process: more were not measured to help models as small as these
PATIENCE = 10    # seconds with one thread before more are tried; doubled up to 80


def cores(groups=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Cores for this process: those it may run on, less what its control groups (as of a
    container with --cpus=2 on a machine with 64) withhold; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else []:
        _, names, path = line.split(":", 2)
        if names == "" or "cpu" in names.split(","):  # version 2, or 1's for cores
            top = groups / "cpu" if names else groups
            folder = top / path.strip("/")
            for group in folder, *folder.parents:
                if group.is_relative_to(top):
                    count = min(count, granted(group))
    return max(1, int(count))


def granted(group):
    """Cores that one control group grants; inf without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
                             for name in ["quota", "period"])
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such file, or the word max
        return math.inf


def limit_threads():
    """No more threads than help, unless OMP_NUM_THREADS asks for more."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores(), THREADS))


def keep_memory(keep=True):
    """Linux: what a tensor leaves is kept for the next one; False: as glibc does by itself.

    glibc gives blocks of over 32 MB, as a real model's logits are, back to the system at
    once, which then fills every page of the next one with zeros. Kept, they leave gaps: a
    tenth more memory, for updates of SmolLM2 in about five sixths of the time.
    """
    malloc = getattr(ctypes.CDLL(None), "mallopt", None) if resource else None
    if malloc:  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        malloc(-4, 0 if keep else 65536)
        malloc(-1, -1 if keep else 128 * 1024)


def share_cores(run):
    """One thread while others use the cores, and all again when these may be free.

    torch's threads wait for each other by spinning, the fastest way while each has a core;
    where one must wait for a core, the others burn theirs.
    """
    if resource is None:  # on Windows a run does not notice others
        return
    usage = [time.perf_counter(), time.process_time(),
             resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw]
    wall, cpu, preempted = (now - before for now, before in zip(usage, run.usage))
    if wall < 2:
        return
    run.usage, threads = usage, torch.get_num_threads()
    if threads == 1 and usage[0] > run.retry:
        torch.set_num_threads(run.threads)
    elif threads > 1 and cpu < 0.75 * threads * wall and preempted > 100 * wall:
        if run.patience == 0:
            print("\nnote: other processes use the cores: on with 1 thread, not "
                  f"{threads}, while they do (that changes last digits)")
        run.patience = min(max(2 * run.patience, PATIENCE), 80)
        run.retry = usage[0] + run.patience
        torch.set_num_threads(1)
