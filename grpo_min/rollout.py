"""Prompts, and the completions sampled from a policy for each of them.

Prompts and completions never share a tensor: a batch is `Q` right-padded prompts, and `B = Q * G` right-padded
completions whose row `b` belongs to prompt `b // G`.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grpo_min.config import UserError, require
from grpo_min.tokenizer import END, PAD, decode, encode_completion, encode_prompt


@dataclass
class Prompts:
    ids: torch.Tensor       # (Q, P) right-padded with PAD
    length: torch.Tensor    # (Q,) real tokens
    texts: list             # Q strings

    @classmethod
    def from_texts(cls, texts, device="cpu"):
        ids, length = pad([encode_prompt(text) for text in texts], device)
        return cls(ids, length, list(texts))

    def rows(self, start, stop):
        """Prompts start to stop - 1."""
        return Prompts(self.ids[start:stop], self.length[start:stop], self.texts[start:stop])


@dataclass
class Rollout:
    completion_ids: torch.Tensor    # (B, N) the sampled ids themselves, END included, then PAD
    mask: torch.Tensor              # (B, N) True on every sampled token, END included
    logprobs: torch.Tensor          # (B, N) the sampler's own log-probabilities, 0 where the mask is False
    finished: torch.Tensor          # (B,) False where the length limit cut the completion

    @property
    def length(self):
        """Sampled tokens of each completion, END included: (B,)."""
        return self.mask.sum(1)

    def texts(self):
        """The completions as B strings, without END."""
        rows = zip(self.completion_ids.tolist(), self.length.tolist(), self.finished.tolist())
        return [decode(ids[:length - finished]) for ids, length, finished in rows]

    def with_rows(self, at, new):
        """This rollout with the n rows of another in place of its rows number at (n,)."""
        N = max(self.mask.shape[1], new.mask.shape[1])

        def put(old, new, filler):
            old, new = (F.pad(x, (0, N - x.shape[1]), value=filler) for x in (old, new))      # (B, N), (n, N)
            return old.index_copy(0, at, new)
        return Rollout(put(self.completion_ids, new.completion_ids, PAD), put(self.mask, new.mask, False),
                       put(self.logprobs, new.logprobs, 0.0), self.finished.index_copy(0, at, new.finished))


def pad(sequences, device="cpu"):
    """Lists of ids -> ids (n, longest) right-padded with PAD, and their lengths (n,)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([list(row) + [PAD] * (longest - len(row)) for row in sequences],
                       dtype=torch.long, device=device)
    return ids, torch.tensor([len(row) for row in sequences], device=device)


def require_fit(context, pairs, path, unit="line"):
    """A UserError unless every pair (tokens of the prompt, tokens of the completion) fits into the context."""
    for row, (prompt, completion) in enumerate(pairs, start=1):
        require(prompt + completion <= context, f"{path}, {unit} {row}: {prompt} prompt tokens and {completion} of the "
                f"completion do not fit into the model's context of {context}")


def pad_completions(texts, device="cpu", finished=None):
    """Completion texts -> ids (n, N) and mask (n, N), with END where finished (everywhere, unless told)."""
    finished = finished or [True] * len(texts)
    ids, length = pad([encode_completion(text, end) for text, end in zip(texts, finished)], device)
    return ids, torch.arange(ids.shape[1], device=device) < length[:, None]


def token_logprobs(policy, prompts, completion_ids, mask, temperature=1.0):
    """log pi(token t | prompt, tokens before t) at the sampling temperature, and the entropy of that distribution.

    completion_ids, mask (B, N) -> logprobs (B, N), entropy (B, N) without gradient; both 0 where the mask is False.
    """
    states = policy.states(prompts, completion_ids[:, :-1], mask[:, 1:])[mask]     # (n, D): none reads the last token
    all_logprobs = policy.head(states / temperature).log_softmax(dim=-1)                      # (n, V)
    logprobs = all_logprobs.gather(1, completion_ids[mask][:, None]).squeeze(1)               # (n,)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)                                # (n,)
    zeros = logprobs.new_zeros(mask.shape)                                                    # (B, N)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def frozen_logprobs(policy, prompts, rollout, temperature, minibatches):
    """The log-probabilities (B, N) of a policy that is not being trained, in the same minibatches as the update."""
    parts = [token_logprobs(policy, *part, temperature)[0] for part, _ in split(prompts, rollout, minibatches)]
    return torch.cat(parts)                                                                   # (B, N)


def split(prompts, rollout, minibatches):
    """Yield ((prompts, completion_ids, mask), rows) of each minibatch: whole groups, rows a slice of the B rows."""
    Q = len(prompts.ids) // minibatches
    B = len(rollout.mask) // minibatches
    for i in range(minibatches):
        rows = slice(i * B, (i + 1) * B)
        yield (prompts.rows(i * Q, (i + 1) * Q), rollout.completion_ids[rows], rollout.mask[rows]), rows


@torch.no_grad()
def sample(policy, prompts, group_size, max_new_tokens, temperature=1.0, generator=None):
    """Sample `group_size` completions of each prompt, token by token until END or `max_new_tokens` -> Rollout.

    temperature 0 takes the likeliest token. The uniform numbers (B, N) are drawn up front on the CPU, and each token
    is the first whose cumulative probability exceeds its number: the same run on every device, and a row's tokens
    do not depend on the other rows. UserError if prompt and completion do not fit into the context.
    """
    Q, P = prompts.ids.shape
    B, N, device = Q * group_size, max_new_tokens, prompts.ids.device
    if int(prompts.length.max()) + N > policy.config.context:
        raise UserError(f"{int(prompts.length.max())} prompt tokens and {N} new ones do not fit into the model's "
                         f"context of {policy.config.context}")
    uniforms = torch.rand(B, N, generator=generator).to(device)                         # (B, N)
    if device.type == "cuda":
        return graph_decoder(policy, Q, group_size, N, temperature, device).sample(prompts, uniforms)
    completion_ids = torch.full((B, N), PAD, device=device)
    mask = torch.zeros(B, N, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, N, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    last, memory = policy.read(prompts)                                                 # (Q, D)
    state = last.repeat_interleave(group_size, dim=0)                                   # (B, D)
    position = prompts.length.repeat_interleave(group_size)                             # (B,)
    caches = [[k.new_empty(Q, k.shape[1], group_size, N, k.shape[3]) for _ in "kv"] for k, _, _ in memory]
    rows = torch.arange(B, device=device)                                               # (R,) those being decoded
    for t in range(N):
        on = ~finished[rows]                                                            # (R,)
        token, logprob = choose(policy, state, temperature, uniforms[rows, t])          # (R,) each
        completion_ids[rows, t] = token.where(on, PAD)
        mask[rows, t] = on
        logprobs[rows, t] = logprob * on
        finished[rows] = ~on | (token == END)
        left = (~finished[rows]).nonzero().squeeze(1)
        if t + 1 == N or len(left) == 0:
            break
        if len(left) <= len(rows) / 2:        # go on without the finished rows; each of the others with its own prompt
            G = len(rows) // len(memory[0][0])
            memory = [[x[left // G] for x in layer] for layer in memory]
            caches = [[x.transpose(1, 2).flatten(0, 1)[left][:, :, None] for x in layer] for layer in caches]
            rows, position, token = rows[left], position[left], token[left]
        states, _ = policy.run(token[:, None], (position + t)[:, None], memory, [(k, v, t) for k, v in caches])
        state = states[:, 0]                                                            # (R, D)
    used = int(mask.any(0).sum())                                                       # drop columns nobody reached
    return Rollout(completion_ids[:, :used], mask[:, :used], logprobs[:, :used], finished)


def choose(policy, state, temperature, uniforms):
    """A token for each row from its state (R, D) and uniform number (R,) -> tokens and log-probabilities (R,)."""
    if temperature == 0:
        token = policy.head(state).argmax(-1)
        return token, torch.zeros_like(uniforms)
    probs = policy.head(state / temperature).softmax(dim=-1)                            # (R, V)
    token = inverse_cdf(probs, uniforms)                                                # (R,)
    return token, probs.gather(1, token[:, None]).squeeze(1).log()


def inverse_cdf(probs, uniforms):
    """Per row, the first index whose cumulative probability exceeds the uniform number: (B, V), (B,) -> (B,)."""
    cdf = probs.cumsum(-1)
    below = torch.nextafter(cdf[:, -1:], cdf[:, -1:] * 0)      # rounding must not take what has a probability of 0
    return torch.searchsorted(cdf, torch.minimum(uniforms[:, None] * cdf[:, -1:], below), right=True).squeeze(-1)


# --- the same on CUDA ---------------------------------------------------------------------------------------------

CHUNK = 8       # tokens between two looks whether all rows have finished, for which the CPU must wait


class GraphDecoder:
    """The loop of sample(), recorded once as CUDA graphs and replayed: launching the hundred small kernels of a token
    from Python takes longer than they do. What a graph reads and writes keeps its place and size: prompts are padded to
    the most that fits beside the completions, and rows that have finished stay.
    """

    @torch.no_grad()
    def __init__(self, policy, Q, group_size, N, temperature, device):
        B, P = Q * group_size, policy.config.context - N
        self.policy, self.group_size, self.N, self.temperature = policy, group_size, N, temperature
        self.prompt_ids = torch.full((Q, P), PAD, device=device)
        self.position = torch.ones(B, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(B, N, device=device)
        self.completion_ids = torch.full((B, N), PAD, device=device)
        self.mask = torch.zeros(B, N, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(B, N, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        last, self.memory = policy.read(Prompts(self.prompt_ids, self.position[:Q], []))
        self.state = last.repeat_interleave(group_size, dim=0)                                    # (B, D)
        self.caches = [[k.new_empty(Q, k.shape[1], group_size, N, k.shape[3]) for _ in "kv"] for k, _, _ in self.memory]
        self.chunks = [functools.partial(self.steps, t, min(t + CHUNK, N)) for t in range(0, N, CHUNK)]
        if device.type == "cuda":
            self.chunks = [recorded(chunk) for chunk in self.chunks]

    def steps(self, start, stop):
        """Tokens start to stop - 1 of every row."""
        for t in range(start, stop):
            on = ~self.finished                                                                   # (B,)
            token, logprob = choose(self.policy, self.state, self.temperature, self.uniforms[:, t])   # (B,) each
            self.completion_ids[:, t] = token.where(on, PAD)
            self.mask[:, t] = on
            self.logprobs[:, t] = logprob * on
            self.finished |= token == END
            if t + 1 < self.N:
                states, _ = self.policy.run(token[:, None], (self.position + t)[:, None], self.memory,
                                            [(k, v, t) for k, v in self.caches])                  # (B, 1, D)
                self.state.copy_(states[:, 0])

    @torch.no_grad()
    def sample(self, prompts, uniforms):
        """prompts (Q rows), uniforms (B, N) -> Rollout."""
        self.prompt_ids.copy_(F.pad(prompts.ids, (0, self.prompt_ids.shape[1] - prompts.ids.shape[1]), value=PAD))
        last, memory = self.policy.read(Prompts(self.prompt_ids, prompts.length, prompts.texts))
        for kept, new in zip(self.memory, memory):
            for old, x in zip(kept, new):
                old.copy_(x)
        self.state.copy_(last.repeat_interleave(self.group_size, dim=0))                          # (B, D)
        self.position.copy_(prompts.length.repeat_interleave(self.group_size))                    # (B,)
        self.uniforms.copy_(uniforms)
        self.completion_ids.fill_(PAD)
        for tensor in self.mask, self.logprobs, self.finished:
            tensor.zero_()
        for chunk in self.chunks:
            chunk()
            if bool(self.finished.all()):
                break
        used = int(self.mask.any(0).sum())
        return Rollout(self.completion_ids[:, :used].clone(), self.mask[:, :used].clone(),
                       self.logprobs[:, :used].clone(), self.finished.clone())


@functools.lru_cache(maxsize=4)
def graph_decoder(*settings):
    """A GraphDecoder of these settings; recording takes longer than a batch, so one is kept for the next."""
    return GraphDecoder(*settings)


def recorded(work):
    """Record what a function without arguments asks of the GPU -> a function that has it done again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()                                          # once for real: libraries set themselves up at the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
