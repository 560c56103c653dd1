"""What a run does where other processes use the cores, too."""
import resource
import time

import torch


def share_cores(run):
    """One thread from here on: torch's threads wait for each other by spinning, the fastest
    way while each has a core; where one must wait for a core, the others burn theirs."""
    usage = [time.perf_counter(), time.process_time(),
             resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw]
    wall, cpu, preempted = (now - before for now, before in zip(usage, run.usage))
    if wall < 2:
        return
    threads, run.usage = torch.get_num_threads(), usage
    if cpu < 0.75 * threads * wall and preempted > 100 * wall:
        print("\nnote: other processes use the cores: on with 1 thread, not "
              f"{threads} (that changes last digits)")
        torch.set_num_threads(1)
