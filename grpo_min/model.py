"""A small GPT with GPT-2's architecture, and the same trunk with a scalar head for the critic and the reward model.

Two ways to run it:

* `gpt.plain(ids)` reads texts of equal length from position 0, as pretraining does;
* `gpt(prompts, completion_ids)` runs every prompt once and lets its G completions attend to the prompt's keys and
  values. Sampling uses it one token at a time with a cache, training all N tokens at once: one function, so that
  their log-probabilities agree. The gradient flows back through the shared keys and values.

Left out: dropout (the policy must be the same function when it samples and when it is trained), flash attention for
the completions, rotary positions, grouped-query attention, mixture of experts.

Shapes: Q prompts, G completions each, B = Q * G rows; P and N padded prompt and completion length; T any length;
D width, H heads, E = D / H; V vocabulary.
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from grpo_min.tokenizer import VOCAB_SIZE


@dataclass
class GPTConfig:
    vocab_size: int = VOCAB_SIZE
    context: int = 80      # positions
    layers: int = 3
    heads: int = 3
    width: int = 96


def autocast(device):
    """Matrix products in bfloat16 where a CUDA card computes in it itself; elsewhere, older cards included, float32.

    The residual stream, norms, softmax and head stay in float32. Without a cache of cast weights, which a CUDA graph
    would go on reading after the weights have changed.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def pack(x, mask):
    """The rows of x (B, T, D) where mask (B, T) is True, one after the other: (n, D). Without a mask: x."""
    return x if mask is None else x.flatten(0, 1).index_select(0, mask.flatten().nonzero().squeeze(1))


def unpack(x, mask):
    """The reverse, with zeros where the mask is False: x (n, D) -> (B, T, D)."""
    if mask is None:
        return x
    zeros = x.new_zeros(mask.numel(), x.shape[-1])
    return zeros.index_copy(0, mask.flatten().nonzero().squeeze(1), x).view(*mask.shape, x.shape[-1])


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, prompt=None, cache=None, mask=None):
        """x (B, T, D) -> (B, T, D) and its keys and values (B, H, T, E).

        prompt: None where x begins at position 0. Otherwise x continues prompts whose keys and values (Q, H, P, E)
        these are, and hidden (Q, P): -inf on padding, 0 elsewhere. cache: keys and values (Q, H, G, N, E) of the
        completion tokens before x, with room for x, and their number.
        mask (B, T): x holds the n real tokens alone, (n, D) -> (n, D).
        """
        qkv = unpack(self.qkv(x), mask)                                                           # (B, T, 3 D)
        B, T, D = qkv.shape[0], qkv.shape[1], x.shape[-1]
        Q, H = B if prompt is None else len(prompt[0]), self.heads
        # The G completions of a prompt stand together, as G * T queries to the prompt's keys.
        q, k, v = qkv.view(Q, B // Q, T, 3, H, D // H).permute(3, 0, 4, 1, 2, 5).contiguous()     # (Q, H, G, T, E) each
        if prompt is None:
            k, v = k[:, :, 0], v[:, :, 0]                                                         # G is 1: (B, H, T, E)
            y = F.scaled_dot_product_attention(q[:, :, 0], k, v, is_causal=True)[:, :, None]
        else:
            y = self.attend_to_both(q, k, v, prompt, cache)
        y = y.permute(0, 2, 3, 1, 4).reshape(B, T, D)                                  # from (Q, H, G, T, E)
        return self.out(pack(y, mask)), (k, v)

    def attend_to_both(self, q, k, v, prompt, cache):
        """Softmax over the prompt's keys and the completion's own: q, k, v (Q, H, G, T, E) -> (Q, H, G, T, E).

        The prompt's keys are never copied G times.
        """
        Q, H, G, T, E = q.shape
        prompt_k, prompt_v, prompt_hidden = prompt
        P = prompt_k.shape[2]
        if cache is not None:
            cache_k, cache_v, past = cache
            cache_k[:, :, :, past:past + T], cache_v[:, :, :, past:past + T] = k, v
            k, v = cache_k[:, :, :, :past + T], cache_v[:, :, :, :past + T]
        S = k.shape[3]                                                                   # completion tokens so far
        short = max(0, 16 - P - S)       # W = P + S + short: under 16 columns the CPU's softmax takes ten times as long
        to_prompt = (q.view(Q, H, G * T, E) @ prompt_k.transpose(2, 3)).view(Q, H, G, T, P)
        to_own = q @ k.transpose(3, 4)                                                            # (Q, H, G, T, S)
        scores = torch.cat([to_prompt, to_own, to_own.new_zeros(Q, H, G, T, short)], dim=-1)      # (Q, H, G, T, W)
        future = torch.full((T, S + short), -math.inf, device=q.device).triu(S - T + 1)           # (T, S + short)
        hidden = torch.cat([prompt_hidden[:, None].expand(-1, T, -1), future.expand(Q, -1, -1)], dim=-1)   # (Q, T, W)
        weights = torch.add(hidden[:, None, None], scores, alpha=1 / math.sqrt(E)).softmax(dim=-1)   # (Q, H, G, T, W)
        to_prompt, to_own, _ = weights.split([P, S, short], dim=-1)
        return (to_prompt.reshape(Q, H, G * T, P) @ prompt_v).view(Q, H, G, T, E) + to_own @ v


class Block(nn.Module):
    """Pre-norm: the residual stream is read through a LayerNorm and added to."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x, prompt=None, cache=None, mask=None):
        y, keys_values = self.attention(self.norm1(x), prompt, cache, mask)
        x = x + y
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x, keys_values


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks, tanh GELU, head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        std = 0.02 * math.sqrt(768 / config.width)     # GPT-2's 0.02 is for a width of 768; 0.02 here learns far slower
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "down.weight")):     # GPT-2: each layer adds twice to the stream
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.layers))
            elif "norm" not in name:
                nn.init.normal_(parameter, std=std)

    def head(self, states):
        """states (..., D) -> logits (..., V)."""
        return F.linear(states, self.tokens.weight)

    def plain(self, ids):
        """ids (B, T) from position 0 -> logits (B, T, V); those at column t are about token t + 1."""
        return self.head(self.run(ids, torch.arange(ids.shape[1], device=ids.device))[0])

    def forward(self, prompts, completion_ids):
        """prompts (Q rows), completion_ids (B, N) -> logits (B, N, V); those at column t are about token t."""
        return self.head(self.states(prompts, completion_ids[:, :-1]))

    def states(self, prompts, completion_ids, mask=None):
        """prompts (Q rows), completion_ids (B, N) -> states (B, N + 1, D).

        State t has read the prompt and the completion tokens before t; state N has read them all. With a mask (B, N),
        False on the padding at the right, nothing is computed there, and the states that have read padding are 0.
        """
        last, memory = self.read(prompts)                                                    # (Q, D)
        G, N = len(completion_ids) // len(prompts.ids), completion_ids.shape[1]
        positions = prompts.length.repeat_interleave(G)[:, None] + torch.arange(N, device=last.device)   # (B, N)
        positions = positions.clamp(max=self.config.context - 1)                        # only padding can be beyond
        states, _ = self.run(completion_ids, positions, memory, mask=mask)                        # (B, N, D)
        return torch.cat([last.repeat_interleave(G, dim=0)[:, None], states], dim=1)              # (B, N + 1, D)

    def read(self, prompts):
        """Run each prompt once -> the state of its last token (Q, D), and per layer its keys, values and mask."""
        P = prompts.ids.shape[1]
        positions = torch.arange(P, device=prompts.ids.device)
        mask = positions < prompts.length[:, None]                                                # (Q, P)
        states, keys_values = self.run(prompts.ids, positions, mask=mask)                         # (Q, P, D)
        last = states[torch.arange(len(states), device=states.device), prompts.length - 1]        # (Q, D)
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)        # (Q, P)
        return last, [(k, v, hidden) for k, v in keys_values]

    def run(self, ids, positions, memory=None, caches=None, mask=None):
        """ids (B, T) at positions (T,) or (B, T) -> states (B, T, D), and per layer the keys and values."""
        x = pack(self.tokens(ids) + self.positions(positions), mask)                   # (B, T, D), with a mask (n, D)
        keys_values = []
        with autocast(x.device):
            for i, block in enumerate(self.blocks):
                x, kv = block(x, memory and memory[i], caches and caches[i], mask)
                keys_values.append(kv)
        return unpack(self.norm(x), mask), keys_values


class ScalarGPT(nn.Module):
    """A GPT whose head is one number per state: the critic's value, or the reward model's score."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.scalar = nn.Linear(config.width, 1)
        nn.init.zeros_(self.scalar.weight)       # the first values are all 0, the mean of what is not known yet
        nn.init.zeros_(self.scalar.bias)

    def forward(self, prompts, completion_ids, mask=None):
        """prompts (Q rows), completion_ids (B, N) -> (B, N + 1): entry t has read the completion tokens before t."""
        return self.scalar(self.trunk.states(prompts, completion_ids, mask)).squeeze(-1)

    def values(self, prompts, completion_ids, mask):
        """The value of each column's state: (B, N), mask (B, N) -> (B, N). No state reads a completion's last token."""
        return self(prompts, completion_ids[:, :-1], mask[:, 1:])

    def last(self, prompts, completion_ids, mask):
        """The number at the last real token of each completion: (B, N), mask (B, N) -> (B,)."""
        return self(prompts, completion_ids, mask).gather(1, mask.sum(1, keepdim=True)).squeeze(1)

    def last_of(self, texts):
        """The number at the last real token of each text, prompt and completion in one: texts (B rows) -> (B,)."""
        return self.scalar(self.trunk.read(texts)[0]).squeeze(-1)
