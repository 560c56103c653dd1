"""What is here for speed alone. Each piece has a plain twin that gives the same numbers.

| here | its twin | what it saves |
|---|---|---|
| softmax | F.scaled_dot_product_attention | half of its time on a CPU |
| run | GPT.run | work on padding: only the attention sees any of it |
| sample | rollout.sample_plainly | copies of the cache, and rows that have finished |
| GraphDecoder | the same loop, on CUDA | the time Python takes to launch kernels |

The twins are compared in tests/test_fast.py. Shapes as in model.py; n real tokens of B * T.
"""
import functools
import math

import torch
import torch.nn.functional as F

from grpo_min.model import autocast

CHUNK = 8  # tokens between two looks whether all rows have finished: the CPU waits for each


def softmax(q, k, v, hidden):
    """scaled_dot_product_attention by two products: on a CPU, for short texts, in half the
    time. Under 16 columns the CPU's softmax takes ten times as long: they are filled up.

    With fewer heads in k and v than in q (real/llama.py), a group of q's reads each."""
    group = q.shape[1] // k.shape[1]
    if group > 1:  # its queries stand below each other, as if they were of more tokens
        rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, H / group, group * T, E)
        return softmax(rows, k, v, hidden.repeat(1, 1, group, 1)).view(q.shape)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, hidden == 0)  # fits any type of q
    scores = torch.add(hidden, q @ k.transpose(2, 3), alpha=q.shape[-1] ** -0.5)
    S = scores.shape[3]
    scores = F.pad(scores, (0, max(0, 16 - S)), value=-math.inf)  # (B, H, T, S or 16)
    return scores.softmax(dim=-1)[..., :S] @ v


def with_room(x, new):
    """x (B, H, P, E) at the beginning of a cache (B, H, P + new, E)."""
    cache = x.new_empty(*x.shape[:2], x.shape[2] + new, x.shape[3])
    cache[:, :, :x.shape[2]] = x
    return cache


# --- training: nothing is computed on padding ---------------------------------------------

def pack(x, rows):
    """The real tokens' rows (n,) of x (B, T, D), B * T rows: (n, D)."""
    return x.flatten(0, 1).index_select(0, rows)


def unpack(x, rows, shape):
    """The reverse, with zeros elsewhere: x (n, D) -> (B, T, D). shape: B, T."""
    zeros = x.new_zeros(math.prod(shape), x.shape[-1])
    return zeros.index_copy(0, rows, x).view(*shape, x.shape[-1])


def run(gpt, mask, ids, positions, past, visible):
    """GPT.run on the real tokens of ids (B, T) alone, those where the mask is True."""
    rows = mask.flatten().nonzero().squeeze(1)  # (n,) once: the CPU waits for it
    x = pack(gpt.embed(ids, positions), rows)  # (n, D)
    hidden, present = visible.float().log(), []  # 0 where visible, -inf elsewhere
    with autocast(x.device):
        for layer, block in enumerate(gpt.blocks):
            attention = block.attention
            qkv = unpack(attention.qkv(block.norm1(x)), rows, ids.shape)  # (B, T, 3 D)
            q, *new = attention.split(qkv, positions)  # (B, H, T, E) each
            k, v = (torch.cat(pair, dim=2) for pair in zip(past[layer], new))
            y = softmax(q, k, v, hidden).transpose(1, 2).flatten(2)  # (B, T, D)
            x = x + attention.out(pack(y, rows))
            x = x + block.mlp(block.norm2(x))
            present.append((k, v))
    return unpack(gpt.norm(x), rows, ids.shape), present


# --- sampling: a cache with room for all tokens, and only rows that go on -----------------

def step(gpt, token, position, caches, hidden, column):
    """token, position (R,) -> states (R, D), with keys and values in this cache column."""
    x = gpt.embed(token, position)  # (R, D)
    hidden = hidden[:, None, None, :column + 1]  # (R, 1, 1, S)
    with autocast(x.device):
        for block, (keys, values) in zip(gpt.blocks, caches):
            attention = block.attention
            qkv = attention.qkv(block.norm1(x))[:, None]  # (R, 1, 3 D)
            q, k, v = attention.split(qkv, position[:, None])  # (R, H, 1, E) each
            keys[:, :, column], values[:, :, column] = k[:, :, 0], v[:, :, 0]
            y = softmax(q, keys[:, :, :column + 1], values[:, :, :column + 1],
                        hidden)  # (R, H, 1, E)
            x = x + attention.out(y.flatten(1))
            x = x + block.mlp(block.norm2(x))
    return gpt.norm(x)


@torch.no_grad()
def sample(policy, prompts, uniforms, temperature, choose):
    """As rollout.sample_plainly: uniforms (B, N) -> ids, mask, logprobs, finished."""
    (B, N), (Q, P) = uniforms.shape, prompts.ids.shape
    if uniforms.device.type == "cuda":
        settings = Q, B // Q, N, temperature, choose
        return graph_decoder(policy, *settings).sample(prompts, uniforms)
    pad, end = policy.tokenizer.pad, policy.tokenizer.end
    completion_ids = torch.full((B, N), pad, device=uniforms.device)
    mask = torch.zeros_like(uniforms, dtype=torch.bool)
    logprobs = torch.zeros_like(uniforms)
    finished = mask[:, 0].clone()
    state, past, seen = policy.read(prompts, B // Q)  # (B, D), .., (B, 1, P)
    caches = [(with_room(keys, N), with_room(values, N)) for keys, values in past]
    hidden = F.pad(seen[:, 0].float().log(), (0, N))  # (B, P + N): -inf on padding, else 0
    position = prompts.length.repeat_interleave(B // Q)  # (B,)
    rows = torch.arange(B, device=uniforms.device)  # (R,) those being decoded
    for t in range(N):
        going = ~finished[rows]  # (R,)
        token, logprob = choose(policy, state, temperature, uniforms[rows, t])  # (R,) each
        completion_ids[rows, t] = token.where(going, pad)
        mask[rows, t] = going
        logprobs[rows, t] = logprob * going
        finished[rows] = ~going | (token == end)
        left = (~finished[rows]).nonzero().squeeze(1)
        if t + 1 == N or len(left) == 0:
            break
        if len(left) < 0.8 * len(rows):  # each time costs a copy of the caches
            rows, position = rows[left], position[left]
            token, hidden = token[left], hidden[left]
            caches = [(keys[left], values[left]) for keys, values in caches]
        state = step(policy, token, position + t, caches, hidden, P + t)  # (R, D)
    return completion_ids[:, :t + 1], mask[:, :t + 1], logprobs[:, :t + 1], finished


class GraphDecoder:
    """The loop of sample() as CUDA graphs: Python alone launches kernels too slowly.

    What graphs use keeps its place and size: prompts are padded fully, finished rows stay.
    """

    @torch.no_grad()
    def __init__(self, policy, Q, group_size, N, temperature, choose):
        config, device = policy.config, policy.tokens.weight.device
        B, P = Q * group_size, config.context - N
        self.policy, self.choose, self.temperature = policy, choose, temperature
        self.group_size, self.N, self.P = group_size, N, P
        self.position = torch.ones(B, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(B, N, device=device)
        self.completion_ids = torch.full((B, N), policy.tokenizer.pad, device=device)
        self.mask = torch.zeros(B, N, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(B, N, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.state = torch.zeros(B, config.width, device=device)
        self.hidden = torch.zeros(B, P + N, device=device)
        with autocast(device):
            attention = policy.blocks[0].attention
            qkv = attention.qkv(self.state[:1])[None]  # (1, 1, 3 D)
            key = attention.split(qkv, self.position[:1])[1]  # (1, H, 1, E)
        empty = key.new_zeros(B, key.shape[1], P + N, key.shape[3])
        self.caches = [(empty.clone(), empty.clone()) for _ in policy.blocks]
        self.chunks = [functools.partial(self.steps, t, min(t + CHUNK, N))
                       for t in range(0, N, CHUNK)]
        if device.type == "cuda":
            self.chunks = [recorded(chunk) for chunk in self.chunks]

    def steps(self, start, stop):
        """Tokens start to stop - 1 of every row."""
        for t in range(start, stop):
            going = ~self.finished  # (B,)
            token, logprob = self.choose(self.policy, self.state, self.temperature,
                                         self.uniforms[:, t])  # (B,) each
            self.completion_ids[:, t] = token.where(going, self.policy.tokenizer.pad)
            self.mask[:, t] = going
            self.logprobs[:, t] = logprob * going
            self.finished |= token == self.policy.tokenizer.end
            if t + 1 < self.N:
                self.state.copy_(step(self.policy, token, self.position + t, self.caches,
                                      self.hidden, self.P + t))  # (B, D)

    @torch.no_grad()
    def sample(self, prompts, uniforms):
        """prompts (Q rows), uniforms (B, N) -> completion_ids, mask, logprobs, finished."""
        P = prompts.ids.shape[1]
        state, past, seen = self.policy.read(prompts, self.group_size)
        self.hidden[:, :self.P] = F.pad(seen[:, 0], (0, self.P - P)).float().log()
        for (keys, values), (new_keys, new_values) in zip(self.caches, past):
            keys[:, :, :P], values[:, :, :P] = new_keys, new_values
        self.state.copy_(state)
        self.position.copy_(prompts.length.repeat_interleave(self.group_size))  # (B,)
        self.uniforms.copy_(uniforms)
        self.completion_ids.fill_(self.policy.tokenizer.pad)
        for tensor in self.mask, self.logprobs, self.finished:
            tensor.zero_()
        for chunk in self.chunks:
            chunk()
            if bool(self.finished.all()):
                break
        used = int(self.mask.any(0).sum())
        parts = self.completion_ids, self.mask, self.logprobs
        return *(part[:, :used].clone() for part in parts), self.finished.clone()


@functools.lru_cache(maxsize=4)
def graph_decoder(*settings):
    """A GraphDecoder. Recording takes longer than a batch, so that four are kept."""
    return GraphDecoder(*settings)


def recorded(work):
    """Record what work() asks of the GPU -> a function that repeats it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # once for real: libraries set themselves up at the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
