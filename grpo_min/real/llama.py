"""Llama and its near relatives (SmolLM2, Qwen2, Qwen3): a GPT as people build it today.

It is read, sampled and trained as the GPT of model.py, and what is not here is GPT's. What
differs from GPT-2, and why people changed it:

- Positions: q and k are turned by angles that grow with the position, so that q . k knows
  the distance of two tokens (RoPE, 2104.09864), not where in the text they stand.
- Norms: RMSNorm (1910.07467) takes no mean off and has no bias. As good, and cheaper.
- MLP: SwiGLU (2002.05202), SiLU of one layer times another; better for as many weights.
- Heads: several of queries read one of keys and values (GQA, 2305.13245), so that the
  cache is smaller, which is what limits the sampling of long texts.
- Biases: none, they were not missed; but on q, k and v in Qwen2. In Qwen3 norms of q and k
  in their place, since large products made the training of large models unstable.
- Head: tied in small models only. In large ones its weights are few among many.

Shapes as in model.py; K heads of keys and values, each for H / K heads of queries; F the
width between the two layers of an MLP.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from grpo_min import model, tokenizer as tokenizers


@dataclass
class LlamaConfig:
    vocab_size: int
    context: int
    layers: int
    heads: int
    kv_heads: int      # K
    width: int
    head_size: int     # E
    hidden: int        # F
    theta: float       # the slowest angle grows by about 1 / theta per position
    eps: float         # of the norms
    bias: bool         # on q, k and v
    head_norm: bool    # on q and k
    tied: bool         # the head's weights are the embedding's

    def build(self, tokenizer=None):
        return Llama(self, tokenizer)


def turn(x, angles):
    """Turn the pairs (x_i, x_(i + E/2)) by their angles (RoPE, 2104.09864, eq. 34).

    x (B, H, T, E), angles (B or 1, 1, T, E / 2) -> (B, H, T, E)
    """
    (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, several heads of queries to one of keys and values."""

    def __init__(self, config):
        super().__init__()
        E, self.parts = config.head_size, [config.heads, config.kv_heads, config.kv_heads]
        self.qkv = nn.Linear(config.width, sum(self.parts) * E, bias=config.bias)
        self.out = nn.Linear(config.heads * E, config.width, bias=False)
        norm = (lambda: nn.RMSNorm(E, config.eps)) if config.head_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()
        speeds = config.theta ** -(torch.arange(0, E, 2) / E)  # (E / 2,) radians a position
        self.register_buffer("speeds", speeds, persistent=False)

    def forward(self, x, positions, past=None, visible=None):
        """x (B, T, D) -> (B, T, D), and the keys and values (B, K, S + T, E) so far."""
        q, k, v = self.split(self.qkv(x), positions)  # (B, H, T, E), (B, K, T, E) twice
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None,
                                           enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)

    def split(self, qkv, positions):
        """(B, T, (H + 2 K) E) -> queries (B, H, T, E), keys and values (B, K, T, E).

        positions (T,) or (B, T), by which queries and keys are turned: a past is, too.
        """
        heads = qkv.unflatten(2, (sum(self.parts), -1)).transpose(1, 2)  # (B, .., T, E)
        q, k, v = heads.split(self.parts, dim=1)
        angles = (positions[..., None] * self.speeds).unsqueeze(-3)  # (.., 1, T, E / 2)
        q, k = self.norm_q(q.to(angles)), self.norm_k(k.to(angles))  # bfloat16: too coarse
        return turn(q, angles).to(v), turn(k, angles).to(v), v


class Block(nn.Module):
    """Pre-norm, as GPT's."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, config.eps)
        self.up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x, positions, past=None, visible=None):
        y, keys_values = self.attention(self.norm1(x), positions, past, visible)
        x = x + y
        return x + self.mlp(self.norm2(x)), keys_values

    def mlp(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * value)


class Llama(model.GPT):
    """Llama (2302.13971) and its relatives, in place of a GPT."""

    def __init__(self, config, tokenizer=None):
        nn.Module.__init__(self)  # GPT's would make GPT-2's weights
        self.config, self.tokenizer = config, tokenizer or tokenizers.own()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        if not config.tied:
            self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)  # a tied head's logits begin calm

    def with_head(self, kind):
        """As GPT's, and without weights for logits, which nobody will ask it for."""
        scalar = super().with_head(kind)
        if not self.config.tied:
            scalar.config = scalar.trunk.config = replace(self.config, tied=True)
            del scalar.trunk.unembed
        return scalar

    def head(self, states):
        """states (..., D) -> logits (..., V)."""
        return F.linear(states, (self.tokens if self.config.tied else self.unembed).weight)

    def embed(self, ids, positions):
        """ids (B, T) -> (B, T, D): positions are the attention's business."""
        return self.tokens(ids)

    def run(self, ids, positions, past=None, visible=None):
        """As GPT's, but per layer the keys and values are (B, K, S, E)."""
        x, present = self.embed(ids, positions), []  # (B, T, D)
        with model.autocast(x.device):
            for layer, block in enumerate(self.blocks):
                x, keys_values = block(x, positions, past and past[layer], visible)
                present.append(keys_values)
        return self.norm(x), present
