"""Random numbers of seed and step alone, so that a resumed run needs no states."""
import hashlib

import torch

from grpo_min.run.ranks import RANK


def generator(seed, step, rank=RANK):
    """A CPU generator that depends on the seed, the step and the rank alone."""
    key = f"{seed} {step}" + (f" rank {rank}" if rank else "")
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
