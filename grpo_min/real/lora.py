"""LoRA (2106.09685): large matrices stay as they are, and small ones beside them learn.

Beside a frozen matrix W stands a product B A of two thin ones, of a rank that --lora says:
y = W x + (alpha / rank) B A x (section 4.1). B begins at 0, so that nothing is changed yet,
and a copy made then is the reference, or a critic's trunk: the frozen weights are shared.
Gradients and AdamW's two moments are kept for A and B alone, which is what it saves.

q, k and v are one matrix here, and so are gate and value of a SwiGLU: each shares its A.
A checkpoint holds A and B, and names the one that they stand on; read again, they are
added to its matrices, so that whoever reads it has an ordinary model.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from grpo_min.run.checkpoint import load_model, load_weights
from grpo_min.run.config import require

ALPHA = 32  # the same for all ranks, so that they are fit for about the same learning rate


class Adapted(nn.Module):
    """A frozen linear layer, with an adapter: x (.., in) -> (.., out)."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        weight, self.linear, self.scale = linear.weight, linear, ALPHA / rank
        A = torch.randn(rank, linear.in_features, generator=generator)
        self.A = nn.Parameter(A.to(weight) / linear.in_features ** 0.5)  # (rank, in)
        self.B = nn.Parameter(weight.new_zeros(linear.out_features, rank))  # (out, rank)

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self):
        """The layer alone, with W + (alpha / rank) B A."""
        self.linear.weight += self.scale * self.B @ self.A
        return self.linear


def layers(model):
    """The module and the name of every linear layer of attention and MLP."""
    for block in model.blocks:
        yield from [(block.attention, "qkv"), (block.attention, "out")]
        yield from [(block, "up"), (block, "down")]


def adapt(model, rank, base):
    """Freeze a GPT or Llama, and give each of its linear layers an adapter: in place.

    base: the checkpoint that its weights are from. UserError if the rank is not above 0.
    """
    require(rank > 0, f"--lora must be at least 0, not {rank}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module, name in layers(model):
        setattr(module, name, Adapted(getattr(module, name), rank, generator))
    model.lora = dict(rank=rank, base=str(Path(base).resolve()))
    return model


def with_adapters(lora, state, path):
    """What a checkpoint's adapters stand on, with them added to it: a GPT or Llama."""
    base = lora["base"]
    require(Path(base).exists(), f"{path} holds adapters for {base}, which is not there")
    model = adapt(load_model(base), lora["rank"], base)
    load_weights(model, state, path)
    for module, name in layers(model):
        setattr(module, name, getattr(module, name).merged())
    del model.lora
    return model.requires_grad_(True)
