"""The GPT: causal, equal to torch's own transformer layers in values and gradients, and the same function however run.

Sampling with a cache, training with shared prompts and one plain sequence per row must agree to rounding, in float64
and with prompts of different lengths in a batch; padding must be as if it were not there.
"""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grpo_min.model import GPT, GPTConfig, ScalarGPT
from grpo_min.rollout import Prompts
from tests.tiny import END, PAD, TOKENIZER, VOCAB_SIZE

G, N = 2, 5
pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def completions():
    """(B, N) for the 3 prompts."""
    return torch.randint(0, VOCAB_SIZE, (3 * G, N), generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance


def gradients(model, output):
    """Of a random weighting of all the outputs, by the model's parameters."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((output * weight).sum(), list(model.parameters()), allow_unused=True)


def row_by_row(model, prompts, completions, head):
    """The states of the plain forward of prompt + completion, one row at a time, without any padding."""
    rows = []
    for b, completion in enumerate(completions):
        length = prompts.length[b // G].item()
        ids = torch.cat([prompts.ids[b // G, :length], completion])[None]
        states, _ = model.run(ids, torch.arange(ids.shape[1]))
        rows.append(head(states[0, length - 1:]))
    return torch.stack(rows)


# --- the plain forward --------------------------------------------------------------------------------------------

def test_causal(gpt):
    ids = torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = gpt.plain(ids)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB_SIZE
        difference = (gpt.plain(changed) - logits).abs().amax((0, 2))
        assert difference[:t].sum() == 0                       # nothing before t has seen token t
        assert difference[t:].min() > 1e-3                     # everything from t on depends on it


def test_depends_on_position(gpt):
    """What the other tests rest on: a shift by one position changes the logits by far more than rounding."""
    ids = torch.randint(0, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(0))
    shifted, _ = gpt.run(ids, torch.arange(1, 7))
    assert (gpt.head(shifted) - gpt.plain(ids)).abs().amax(-1).min() > 0.5


def test_equals_torch_layers(gpt):
    """nn.TransformerEncoderLayer with norm_first and the tanh GELU is GPT-2's block: copy the weights and compare."""
    D, H = gpt.config.width, gpt.config.heads
    tokens, positions, norm = (copy.deepcopy(module) for module in (gpt.tokens, gpt.positions, gpt.norm))
    pairs = [(gpt.tokens, tokens), (gpt.positions, positions), (gpt.norm, norm)]
    layers = []
    for block in gpt.blocks:
        layer = nn.TransformerEncoderLayer(D, H, 4 * D, dropout=0, activation=partial(F.gelu, approximate="tanh"),
                                           batch_first=True, norm_first=True)
        layer.self_attn.in_proj_weight.data = block.attention.qkv.weight.data.clone()
        layer.self_attn.in_proj_bias.data = block.attention.qkv.bias.data.clone()
        modules = [(block.attention.out, layer.self_attn.out_proj), (block.norm1, layer.norm1),
                   (block.norm2, layer.norm2), (block.up, layer.linear1), (block.down, layer.linear2)]
        for ours, theirs in modules:
            theirs.load_state_dict(ours.state_dict())
        layers.append(layer)
        pairs += modules
    ids = torch.randint(0, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(0))
    x = tokens(ids) + positions(torch.arange(9))
    for layer in layers:
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(9), is_causal=True)
    expected, logits = norm(x) @ tokens.weight.T, gpt.plain(ids)
    close(logits, expected)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in pairs:
        for p, q in zip(ours.parameters(), theirs.parameters()):
            close(p.grad, q.grad)
    for block, layer in zip(gpt.blocks, layers):
        close(block.attention.qkv.weight.grad, layer.self_attn.in_proj_weight.grad)
        close(block.attention.qkv.bias.grad, layer.self_attn.in_proj_bias.grad)


def test_head_is_tied(gpt):
    states = torch.randn(2, 16)
    close(gpt.head(states), states @ gpt.tokens.weight.T)
    assert [name for name, p in gpt.named_parameters() if VOCAB_SIZE in p.shape] == ["tokens.weight"]


def test_fills_its_context_and_no_more(gpt):
    assert gpt.plain(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, VOCAB_SIZE)
    with pytest.raises(IndexError):
        gpt.plain(torch.zeros(1, 33, dtype=torch.long))


def test_initial_logits_are_calm():
    """A fresh model is nearly uniform: its loss is close to log V, neither confident nor dead."""
    gpt = GPT(GPTConfig(VOCAB_SIZE, layers=2))
    ids = torch.randint(0, VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(gpt.plain(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - torch.tensor(VOCAB_SIZE).log()) < 0.5


# --- prompts and completions --------------------------------------------------------------------------------------

def test_two_parts_equal_one_sequence(gpt, prompts, completions):
    logits = gpt(prompts, completions)
    expected = row_by_row(gpt, prompts, completions, gpt.head)[:, :-1]
    close(logits, expected)
    for ours, plain in zip(gradients(gpt, logits), gradients(gpt, expected)):
        close(ours, plain)


def test_a_column_never_sees_its_own_token(gpt, prompts, completions):
    logits = gpt(prompts, completions)
    for t in range(N):
        changed = completions.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB_SIZE
        difference = (gpt(prompts, changed) - logits).abs().amax((0, 2))
        assert difference[:t + 1].sum() == 0
        assert t + 1 == N or difference[t + 1:].min() > 1e-3


def test_rows_belong_to_their_prompt(gpt, prompts, completions):
    logits = gpt(prompts, completions)
    for q in range(3):
        close(gpt(prompts.rows(q, q + 1), completions[q * G:(q + 1) * G]), logits[q * G:(q + 1) * G])


def test_cached_decoding_equals_the_full_forward(gpt, prompts, completions):
    """One token at a time against a cache, as the plain loop of sample() does."""
    expected = gpt.states(prompts, completions)
    state, past, visible = gpt.read(prompts, G)
    position = prompts.length.repeat_interleave(G)
    for t in range(N):
        close(state, expected[:, t])
        visible = F.pad(visible, (0, 1), value=True)                                         # (B, 1, P + t + 1)
        states, past = gpt.run(completions[:, t:t + 1], (position + t)[:, None], past, visible[:, None])
        state = states[:, 0]
    close(state, expected[:, N])


def test_several_tokens_at_a_time_equal_the_full_forward(gpt, prompts, completions):
    """What stands before may be any number of tokens: 2 of the completion, then the other 3."""
    expected, P = gpt.states(prompts, completions), prompts.ids.shape[1]
    _, past, visible = gpt.read(prompts, G)
    columns, done = prompts.length.repeat_interleave(G)[:, None] + torch.arange(N), 0
    for stop in 2, N:
        T = stop - done
        causal = torch.ones(T, stop, dtype=torch.bool).tril(done).expand(3 * G, -1, -1)
        seen = torch.cat([visible.expand(-1, T, -1), causal], dim=2)                         # (B, T, P + stop)
        states, past = gpt.run(completions[:, done:stop], columns[:, done:stop], past, seen[:, None])
        close(states, expected[:, done + 1:stop + 1])
        assert all(x.shape[2] == P + stop for keys_values in past for x in keys_values)
        done = stop


def test_reading_prompts_repeats_them_for_their_completions(gpt, prompts):
    last, past, visible = gpt.read(prompts, G)
    P = prompts.ids.shape[1]
    assert last.shape == (3 * G, 16) and visible.shape == (3 * G, 1, P)
    for b in range(3 * G):
        n = int(prompts.length[b // G])
        states, alone = gpt.run(prompts.ids[b // G:b // G + 1, :n], torch.arange(n))
        close(last[b], states[0, -1])
        assert visible[b, 0].tolist() == [True] * n + [False] * (P - n)
        for ours, theirs in zip(past, alone):
            for x, y in zip(ours, theirs):
                close(x[b, :, :n], y[0])


def test_padding_is_as_if_it_were_not_there(gpt, prompts, completions):
    logits = gpt(prompts, completions)
    gradient = gradients(gpt, logits)
    padding = torch.arange(prompts.ids.shape[1]) >= prompts.length[:, None]
    assert padding.any()
    other_ids = Prompts(torch.where(padding, 77, prompts.ids), prompts.length, prompts.texts)
    wider = Prompts(F.pad(prompts.ids, (0, 4), value=PAD), prompts.length, prompts.texts)
    for same in other_ids, wider:
        close(gpt(same, completions), logits)
        for a, b in zip(gradients(gpt, gpt(same, completions)), gradient):
            close(a, b)


def test_padding_of_completions_changes_nothing_before_it(gpt, prompts, completions):
    close(gpt(prompts, F.pad(completions, (0, 3), value=PAD))[:, :N], gpt(prompts, completions))


# --- the scalar head ----------------------------------------------------------------------------------------------

def test_scalar_equals_one_sequence(scalar, prompts, completions):
    values = scalar(prompts, completions)
    expected = row_by_row(scalar.trunk, prompts, completions, scalar.scalar).squeeze(-1)
    assert values.shape == (3 * G, N + 1)
    close(values, expected)
    for ours, plain in zip(gradients(scalar, values), gradients(scalar, expected)):
        close(ours, plain)


def test_last_reads_the_last_real_token(scalar, prompts, completions):
    length = torch.tensor([1, 5, 3, 2, 4, 5])
    mask = torch.arange(N) < length[:, None]
    completions[torch.arange(6), length - 1] = END
    completions = completions.masked_fill(~mask, PAD)
    scores = scalar.last(prompts, completions, mask)
    for b in range(6):
        prompt = prompts.ids[b // G, :prompts.length[b // G]]
        ids = torch.cat([prompt, completions[b, :length[b]]])[None]            # END is the last id
        states, _ = scalar.trunk.run(ids, torch.arange(ids.shape[1]))
        close(scores[b], scalar.scalar(states[0, -1])[0])
        without_end = scalar.scalar(states[0, -2])[0]
        assert (scores[b] - without_end).abs() > 1e-2
    close(scalar.last(prompts, completions.masked_fill(~mask, 77), mask), scores)


def test_a_completion_that_fills_the_context(scalar):
    """32 tokens with the prompt: the last one stands at the last position."""
    prompts = Prompts.from_texts(["a"], TOKENIZER)
    n = 32 - int(prompts.length)
    ids = torch.randint(6, VOCAB_SIZE, (1, n), generator=torch.Generator().manual_seed(3))
    states, _ = scalar.trunk.run(torch.cat([prompts.ids, ids], 1), torch.arange(32))
    close(scalar.last(prompts, ids, torch.ones(1, n, dtype=torch.bool)), scalar.scalar(states[:, -1])[:, 0])


def test_scalar_begins_at_zero(prompts, completions):
    assert (ScalarGPT(GPTConfig(VOCAB_SIZE, context=32))(prompts, completions) == 0).all()
