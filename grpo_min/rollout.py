"""Prompts, and the completions sampled from a policy for each of them.

A batch is Q right-padded prompts, and B = Q * G right-padded completions whose row b
belongs to prompt b // G.
"""
from dataclasses import dataclass

import torch

from grpo_min.run.config import require


@dataclass
class Prompts:
    ids: torch.Tensor  # (Q, P) right-padded
    length: torch.Tensor  # (Q,) real tokens
    texts: list  # Q strings

    @classmethod
    def from_texts(cls, texts, tokenizer, device="cpu"):
        rows = [tokenizer.encode_prompt(text) for text in texts]
        return cls(*pad(rows, tokenizer.pad, device), list(texts))

    def rows(self, start, stop):
        """Prompts start to stop - 1."""
        rows = slice(start, stop)
        return Prompts(self.ids[rows], self.length[rows], self.texts[rows])


@dataclass
class Rollout:
    completion_ids: torch.Tensor  # (B, N) the sampled ids, END included, then PAD
    mask: torch.Tensor  # (B, N) True on every sampled token, END included, if judged
    logprobs: torch.Tensor  # (B, N) the sampler's own, 0 where the mask is False
    finished: torch.Tensor  # (B,) False where the length limit cut the completion

    @property
    def length(self):
        """Sampled tokens of each completion, END included: (B,)."""
        return self.mask.sum(1)

    def at_last_token(self, scores):
        """Each completion's score on its last real token, else 0: (B,) -> (B, N)."""
        last = (self.length[:, None] - 1).clamp(min=0)  # (B, 1)
        return torch.zeros_like(self.logprobs).scatter(1, last, scores[:, None])

    def texts(self, tokenizer):
        """The completions as B strings, without END."""
        lengths = (self.length - self.finished.long()).tolist()
        rows = zip(self.completion_ids.tolist(), lengths)
        return [tokenizer.decode(ids[:length]) for ids, length in rows]


def pad(sequences, padding, device="cpu"):
    """Lists of ids -> ids (n, longest) padded at the right, and their lengths (n,)."""
    longest = max(map(len, sequences))
    ids = [list(row) + [padding] * (longest - len(row)) for row in sequences]
    lengths = torch.tensor([len(row) for row in sequences], device=device)
    return torch.tensor(ids, dtype=torch.long, device=device), lengths


def pad_completions(texts, tokenizer, device="cpu", finished=None):
    """Completion texts -> ids, mask (n, N), with END where finished (default: all)."""
    finished = finished or [True] * len(texts)
    rows = [tokenizer.encode_completion(text, end) for text, end in zip(texts, finished)]
    ids, length = pad(rows, tokenizer.pad, device)
    return ids, torch.arange(ids.shape[1], device=device) < length[:, None]


def require_fit(context, pairs, path, unit="line"):
    """A UserError unless each pair (tokens of prompt, completion) fits into the context."""
    for row, (prompt, completion) in enumerate(pairs, start=1):
        require(prompt + completion <= context,
                f"{path}, {unit} {row}: {prompt} prompt tokens and {completion} of the "
                f"completion do not fit into the model's context of {context}")


def token_logprobs(policy, prompts, completion_ids, mask, temperature=1.0):
    """log pi(token t | prompt, tokens before t) at the sampling temperature: (B, N).

    And without gradient the entropy (B, N) of the distribution; both 0 where mask is False.
    """
    real = mask.nonzero(as_tuple=True)  # rows and columns (n,) of the n real tokens
    states = policy.states(prompts, completion_ids[:, :-1], mask[:, 1:])[real]  # (n, D)
    all_logprobs = policy.head(states / temperature).log_softmax(dim=-1)  # (n, V)
    logprobs = all_logprobs.gather(1, completion_ids[real][:, None]).squeeze(1)  # (n,)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)  # (n,)
    zeros = logprobs.new_zeros(mask.shape)  # (B, N)
    return zeros.index_put(real, logprobs), zeros.index_put(real, entropy)


@torch.no_grad()
def frozen_logprobs(policy, prompts, rollout, temperature, minibatches):
    """Log-probabilities (B, N) without gradient, in the minibatches of the update."""
    parts = [token_logprobs(policy, *part, temperature)[0]
             for part, _ in split(prompts, rollout, minibatches)]
    return torch.cat(parts)  # (B, N)


def split(prompts, rollout, minibatches):
    """Yield ((prompts, completion_ids, mask), slice of the B rows): whole groups each."""
    Q, B = len(prompts.ids) // minibatches, len(rollout.mask) // minibatches
    for i in range(minibatches):
        some, rows = prompts.rows(i * Q, (i + 1) * Q), slice(i * B, (i + 1) * B)
        yield (some, rollout.completion_ids[rows], rollout.mask[rows]), rows


@torch.no_grad()
def sample(policy, prompts, group_size, max_new_tokens, temperature=1.0, generator=None,
           plain=False):
    """Sample group_size completions of each prompt, until END or max_new_tokens -> Rollout.

    temperature 0 takes the likeliest token. Uniform numbers (B, N) are drawn up front on
    the CPU, and a token is the first whose cumulative probability exceeds its number: the
    same run on every device, and no row depends on the others. UserError if it does not fit
    into the context, FloatingPointError where the policy has diverged. plain: by
    sample_plainly, else by a faster loop.
    """
    B, N, device = len(prompts.ids) * group_size, max_new_tokens, prompts.ids.device
    longest, context = int(prompts.length.max()), policy.config.context
    require(longest + N <= context, f"{longest} prompt tokens and {N} new ones (--max-new-"
            f"tokens) do not fit into the model's context of {context}")
    uniforms = torch.rand(B, N, generator=generator).to(device)  # (B, N)
    loop = sample_plainly
    if not plain:
        from grpo_min.run import fast
        loop = fast.sample
    rollout = Rollout(*loop(policy, prompts, uniforms, temperature, choose))
    if not rollout.logprobs.isfinite().all():
        raise FloatingPointError("the policy's probabilities are no longer finite")
    return rollout


def sample_plainly(policy, prompts, uniforms, temperature, choose):
    """The loop of sample: uniforms (B, N) -> completion_ids, mask, logprobs, finished."""
    B, N, device = *uniforms.shape, uniforms.device
    pad, end = policy.tokenizer.pad, policy.tokenizer.end
    completion_ids = torch.full((B, N), pad, device=device)
    mask = torch.zeros(B, N, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, N, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    G = B // len(prompts.ids)
    position = prompts.length.repeat_interleave(G)  # (B,)
    state, past, visible = policy.read(prompts, G)  # (B, D), .., (B, 1, P)
    for t in range(N):
        going = ~finished  # (B,)
        token, logprob = choose(policy, state, temperature, uniforms[:, t])  # (B,) each
        completion_ids[:, t] = token.where(going, pad)
        mask[:, t] = going
        logprobs[:, t] = logprob * going
        finished = finished | (token == end)
        if finished.all() or t + 1 == N:
            break
        visible = torch.cat([visible, visible.new_ones(B, 1, 1)], dim=2)  # one column more
        states, past = policy.run(token[:, None], (position + t)[:, None], past,
                                  visible[:, None])  # (B, 1, D)
        state = states[:, 0]  # (B, D)
    used = t + 1  # columns that somebody reached
    return completion_ids[:, :used], mask[:, :used], logprobs[:, :used], finished


def choose(policy, state, temperature, uniforms):
    """A token per row from its state (B, D) and uniform number -> tokens, logprobs (B,)."""
    if temperature == 0:
        token = policy.head(state).argmax(-1)
        return token, torch.zeros_like(uniforms)
    probs = policy.head(state / temperature).softmax(dim=-1)  # (B, V)
    token = inverse_cdf(probs, uniforms)  # (B,)
    return token, probs.gather(1, token[:, None]).squeeze(1).log()


def inverse_cdf(probs, uniforms):
    """The first index whose cumulative probability exceeds the number: (B, V) -> (B,)."""
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, total * 0)   # rounding must not choose what has none
    target = torch.minimum(uniforms[:, None] * total, below)  # (B, 1)
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)  # (B,)
    return index.clamp(max=cdf.shape[-1] - 1)  # beyond, if no number is finite
