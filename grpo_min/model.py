"""A small GPT with GPT-2's architecture, and the same trunk with a head for numbers.

`gpt.plain(ids)` reads texts from position 0, as pretraining does. `gpt(prompts,
completion_ids)` runs every prompt once, and its G completions attend to copies of its keys
and values: the two never share a tensor, so that no padding stands between them. Sampling
goes the same way one token at a time, with a cache. There is no dropout: the policy must be
the same function when it samples and when it is trained.

Shapes: Q prompts, G completions each, B = Q * G rows; P and N padded prompt and completion
length; T any length, S what stands before; D width, H heads, E = D / H; V vocabulary.
"""
import contextlib
import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from grpo_min import tokenizer as tokenizers


@dataclass
class GPTConfig:
    vocab_size: int
    context: int = 80      # positions
    layers: int = 3
    heads: int = 3
    width: int = 96

    def build(self, tokenizer=None):
        """The model of this config; that of real/llama.py builds another."""
        return GPT(self, tokenizer)


class Attention(nn.Module):
    """Causal self-attention with several heads (Vaswani et al., 1706.03762)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, past=None, visible=None):
        """x (B, T, D) -> (B, T, D), and the keys and values (B, H, S + T, E) so far.

        past: keys and values (B, H, S, E) of what stands before x; None: nothing does.
        visible (B, 1, T, S + T): where a token may look; None: at itself and before it.
        """
        q, k, v = self.split(self.qkv(x))  # (B, H, T, E) each
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)

    def split(self, qkv, positions=None):
        """(B, T, 3 D) -> queries, keys and values of every head, (3, B, H, T, E).

        positions: unused here, where x knows them (real/llama.py turns q and k by them).
        """
        B, T, width = qkv.shape
        qkv = qkv.view(B, T, 3, self.heads, width // 3 // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Pre-norm: the residual stream is read through a LayerNorm and added to."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x, past=None, visible=None):
        y, keys_values = self.attention(self.norm1(x), past, visible)
        x = x + y
        return x + self.mlp(self.norm2(x)), keys_values

    def mlp(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, tanh GELU, tied head."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer or tokenizers.own()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        std = 0.02 * math.sqrt(768 / config.width)     # GPT-2's 0.02 is for a width of 768
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "down.weight")):     # what layers add
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.layers))
            elif "norm" not in name:
                nn.init.normal_(parameter, std=std)

    def with_head(self, kind):
        """A copy as a ScalarGPT or Critic, whose numbers are 0: to be trained."""
        model = kind(self.config, self.tokenizer).to(self.tokens.weight.device)
        model.trunk = copied(self)
        return model

    def head(self, states):
        """states (..., D) -> logits (..., V)."""
        return F.linear(states, self.tokens.weight)

    def plain(self, ids):
        """ids (B, T) from position 0 -> logits (B, T, V), column t about token t + 1."""
        positions = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        return self.head(self.run(ids, positions)[0])

    def forward(self, prompts, completion_ids):
        """prompts (Q), completion_ids (B, N) -> logits (B, N, V), t about token t."""
        return self.head(self.states(prompts, completion_ids[:, :-1]))

    def states(self, prompts, completion_ids, mask=None):
        """prompts (Q rows), completion_ids (B, N) -> states (B, N + 1, D).

        State t has read the prompt and the completion tokens before t; state N all of them.
        With a mask (B, N) of tokens to read, False at the right, the states behind are 0.
        """
        run = self.run
        if mask is not None:
            from grpo_min.run import fast
            run = functools.partial(fast.run, self, mask)
        (B, N), G = completion_ids.shape, len(completion_ids) // len(prompts.ids)
        last, past, visible = self.read(prompts, G)  # (B, D), .., (B, 1, P)
        columns = torch.arange(N, device=last.device)  # (N,)
        positions = prompts.length.repeat_interleave(G)[:, None] + columns  # (B, N)
        positions = positions.clamp(max=self.config.context - 1)  # only padding is beyond
        causal = columns <= columns[:, None]  # (N, N)
        visible = torch.cat([visible.expand(B, N, -1), causal.expand(B, N, N)], dim=2)
        states, _ = run(completion_ids, positions, past, visible[:, None])  # (B, N, D)
        return torch.cat([last[:, None], states], dim=1)  # (B, N + 1, D)

    def read(self, prompts, group_size):
        """Run each prompt once, and repeat what comes of it for its completions.

        -> state of its last token (B, D), per layer keys and values (B, H, P, E), and
        visible (B, 1, P): True on its tokens, False on padding.
        """
        columns = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)  # (P,)
        states, past = self.run(prompts.ids, columns)  # no token sees what stands behind it
        rows = torch.arange(len(states), device=columns.device)  # (Q,)
        visible = columns < prompts.length[:, None]  # (Q, P)

        def repeat(x):
            return x[:, None].expand(-1, group_size, *x.shape[1:]).flatten(0, 1)
        past = [(repeat(k), repeat(v)) for k, v in past]
        return repeat(states[rows, prompts.length - 1]), past, repeat(visible)[:, None]

    def embed(self, ids, positions):
        """ids (B, T) at positions (T,) or (B, T) -> what the blocks read, (B, T, D)."""
        return self.tokens(ids) + self.positions(positions)

    def run(self, ids, positions, past=None, visible=None):
        """ids (B, T) at positions (T,) or (B, T) -> states (B, T, D), and past with them.

        past: per layer the keys and values of what stands before, as Attention takes them.
        """
        x, present = self.embed(ids, positions), []  # (B, T, D)
        with autocast(x.device):
            for layer, block in enumerate(self.blocks):
                x, keys_values = block(x, past and past[layer], visible)
                present.append(keys_values)
        return self.norm(x), present


class ScalarGPT(nn.Module):
    """A GPT with one number per state for a head: a reward model, or a plain critic."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config = config
        self.trunk = config.build(tokenizer)
        self.tokenizer = self.trunk.tokenizer
        self.scalar = nn.Linear(config.width, 1)
        nn.init.zeros_(self.scalar.weight)      # all values are 0: nothing is known yet
        nn.init.zeros_(self.scalar.bias)

    def forward(self, prompts, completion_ids, mask=None):
        """prompts, completion_ids (B, N) -> (B, N + 1): t has read the tokens before t."""
        return self.scalar(self.trunk.states(prompts, completion_ids, mask)).squeeze(-1)

    def values(self, prompts, completion_ids, mask):
        """The value of each column's state: (B, N). No state has read the last token."""
        return self(prompts, completion_ids[:, :-1], mask[:, 1:])

    def last(self, prompts, completion_ids, mask):
        """The number at the last real token of each completion: (B,)."""
        scores = self(prompts, completion_ids, mask)  # (B, N + 1)
        return scores.gather(1, mask.sum(1, keepdim=True)).squeeze(1)


def copied(model):
    """A copy, whose weights that are not trained (real/lora.py) are the same tensors."""
    shared = {id(each): each for each in model.parameters() if not each.requires_grad}
    return copy.deepcopy(model, shared)


def autocast(device):
    """Matrix products in bfloat16 where a CUDA card computes in it itself; else float32.
    Without a cache of cast weights, which CUDA graphs would read after an update."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
