"""What is there for speed alone gives what its plain twin gives: run/fast.py against model.py and rollout.py.

With a mask nothing is computed on padding, and states, values and gradients of the real tokens stay as they are. The
fast sampler leaves finished rows behind, and draws the very tokens of the plain loop. The decoder that CUDA graphs
record runs here step by step on the CPU, and bfloat16 through the CPU's autocast.
"""
import copy

import pytest
import torch
import torch.nn.functional as F

from grpo_min import model
from grpo_min.rollout import Prompts, Rollout, choose, sample, token_logprobs
from grpo_min.run import fast
from grpo_min.run.rng import generator
from tests import tiny
from tests.test_model import close, gradients
from tests.tiny import END, LOOPS, TOKENIZER, VOCAB_SIZE

LENGTHS = {       # of 6 completions for 3 prompts, of at most 5 tokens
    "ragged": [1, 5, 3, 2, 4, 5], "whole": [5] * 6, "empty rows": [0, 5, 0, 2, 0, 0], "one token": [0, 0, 0, 0, 1, 0],
    "none": [0] * 6,
}
RAGGED = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@pytest.fixture
def completions():
    """(6, 5) for the 3 prompts."""
    return torch.randint(0, VOCAB_SIZE, (6, 5), generator=torch.Generator().manual_seed(1))


def mask_of(lengths):
    """mask (B, 5), and which states have read no padding: (B, 6)."""
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return mask, F.pad(mask, (1, 0), value=True)


# --- training -----------------------------------------------------------------------------------------------------

def test_unpack_is_the_reverse_of_pack():
    mask, x = mask_of([1, 5, 0, 2])[0], torch.randn(4, 5, 3)
    rows = mask.flatten().nonzero().squeeze(1)
    packed = fast.pack(x, rows)
    assert torch.equal(packed, x[mask]) and packed.shape == (8, 3)
    assert torch.equal(fast.unpack(packed, rows, mask.shape), x * mask[:, :, None])


@RAGGED
def test_with_a_mask_the_states_of_real_tokens_stay_as_they_are(lengths, double, gpt, prompts, completions):
    mask, read = mask_of(lengths)
    everywhere, packed = gpt.states(prompts, completions), gpt.states(prompts, completions, mask)
    assert packed.shape == everywhere.shape
    close(packed[read], everywhere[read])
    assert (packed[~read] == 0).all() and (mask.all() or (everywhere[~read] != 0).any())
    for ours, plain in zip(gradients(gpt, packed[read]), gradients(gpt, everywhere[read])):
        close(ours, plain)


@RAGGED
def test_with_a_mask_values_and_scores_stay_as_they_are(lengths, double, scalar, prompts, completions):
    mask, read = mask_of(lengths)
    plain, packed = scalar(prompts, completions), scalar(prompts, completions, mask)
    close(packed[read], plain[read])
    for ours, theirs in zip(gradients(scalar, packed[read]), gradients(scalar, plain[read])):
        close(ours, theirs)
    last = plain.gather(1, torch.tensor(lengths)[:, None]).squeeze(1)
    close(scalar.last(prompts, completions, mask), last)
    close(scalar.values(prompts, completions, mask) * mask, plain[:, :-1] * mask)


@pytest.mark.parametrize("garbage", [0, 77])
def test_with_a_mask_padding_is_never_read(garbage, double, gpt, prompts, completions):
    mask, _ = mask_of(LENGTHS["ragged"])
    expected = gpt.states(prompts, completions, mask)
    close(gpt.states(prompts, completions.masked_fill(~mask, garbage), mask), expected)


def test_a_batch_of_one_token_each_has_no_column_to_compute(gpt, scalar, prompts):
    ids, mask = torch.full((6, 1), END), torch.ones(6, 1, dtype=torch.bool)
    assert torch.equal(gpt.states(prompts, ids[:, :-1], mask[:, 1:]), gpt.states(prompts, ids)[:, :1])
    assert scalar.values(prompts, ids, mask).shape == (6, 1)


def test_a_completion_beyond_the_context_is_padding_alone(double, make):
    """A short prompt's padding may stand where the context has no position any more."""
    gpt = make(context=16)
    prompts = Prompts.from_texts(["a", "what does a cow eat?"], TOKENIZER)
    ids = torch.randint(6, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < 16 - prompts.length[:, None]
    assert mask[0].all() and not mask[1].all()
    packed = gpt.states(prompts, ids, mask)
    for q in range(2):
        n = int(mask[q].sum())
        close(packed[q, :n + 1], gpt.states(prompts.rows(q, q + 1), ids[q:q + 1, :n])[0])


# --- sampling -----------------------------------------------------------------------------------------------------

def assert_same_rollout(ours, plain, tolerance):
    """Ids, mask and ends to the bit."""
    assert torch.equal(ours.completion_ids, plain.completion_ids) and torch.equal(ours.mask, plain.mask)
    assert torch.equal(ours.finished, plain.finished)
    assert ours.logprobs.shape == plain.logprobs.shape
    assert (ours.logprobs - plain.logprobs).abs().max() < tolerance


def both(policy, prompts, group_size, new, temperature, seed=0):
    """The same random numbers in the fast sampler and in the plain loop -> two rollouts."""
    return [sample(policy, prompts, group_size, new, temperature, generator(seed, 0), plain=plain)
            for plain in (False, True)]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("group_size, new", [(1, 24), (5, 1), (40, 24)])
def test_the_fast_sampler_draws_the_tokens_of_the_plain_one(temperature, group_size, new, small, small_prompts, watch):
    steps = watch(fast, "step")
    ours, plain = both(small, small_prompts, group_size, new, temperature)
    assert_same_rollout(ours, plain, 1e-5)
    rows = [len(token) for (_, token, *_), _ in steps]
    assert rows == sorted(rows, reverse=True) and len(rows) == ours.mask.shape[1] - 1
    if group_size == 40 and temperature:
        assert ours.finished.any() and not ours.finished.all()
        assert len(set(rows)) > 4, "rows are left behind several times"


@pytest.mark.parametrize("seed", range(8))
def test_whenever_rows_end(seed, double, small, small_prompts):
    """Other random numbers, other rows that end; in float64, where no rounding can change a token."""
    assert_same_rollout(*both(small, small_prompts.rows(seed % 3, 3), 3, 20, 1.0, seed), 1e-12)


def test_prompts_that_are_padded_wider_than_they_need_be(double, small, small_prompts):
    """As those of a part of a batch: with the completion's limit, their columns are more than the context."""
    alone = small_prompts.rows(2, 3)
    assert alone.ids.shape[1] + 29 > small.config.context == int(alone.length) + 29
    ours, plain = both(small, alone, 40, 29, 1.0)
    assert_same_rollout(ours, plain, 1e-10)
    assert_same_rollout(decode(small, alone, 40, 29, 1.0, seed=0)[1], plain, 1e-10)
    narrow = Prompts(alone.ids[:, :3], alone.length, alone.texts)
    assert_same_rollout(ours, both(small, narrow, 40, 29, 1.0)[1], 1e-10)


def test_a_whole_batch_may_end_at_once(small, small_prompts):
    small.head = lambda states: torch.eye(12)[END].expand(len(states), 12) * 1e3
    for rollout in both(small, small_prompts, 2, 12, 1.0):
        assert rollout.completion_ids.tolist() == [[END]] * 6 and rollout.finished.all() and rollout.mask.all()


def test_a_tokenizer_of_its_own_stops_both(prompts):
    policy = tiny.gpt(tokenizer=tiny.other_tokenizer())
    prompts = Prompts.from_texts(prompts.texts, policy.tokenizer)
    ours, plain = both(policy, prompts, 20, 12, 1.0)
    assert_same_rollout(ours, plain, 1e-5)
    assert_same_rollout(decode(policy, prompts, 20, 12, 1.0, seed=0)[1], plain, 1e-5)
    assert ours.finished.any() and not ours.finished.all()


def test_rows_that_ended_are_left_behind(small, small_prompts, watch):
    """Never are far more rows decoded than still run, and what the others sample is what training reads."""
    steps = watch(fast, "step")
    rollout = sample(small, small_prompts, 40, 24, 1.0, generator(0, 0))
    decoded = [len(token) for (_, token, *_), _ in steps]
    running = rollout.mask[:, 1:].sum(0).tolist()                       # after the first token, the second, ...
    assert decoded[0] in (120, running[0]) and len(set(decoded)) > 2, "rows are left behind more than once"
    assert all(left <= rows <= left / 0.8 for rows, left in zip(decoded, running, strict=True))
    again, _ = token_logprobs(small, small_prompts, rollout.completion_ids, rollout.mask)
    assert torch.allclose(again, rollout.logprobs, atol=1e-5)


def test_one_step_is_one_token_of_the_plain_forward(double, gpt, prompts, completions):
    """The states, and what is written into the caches: one column. Those after it are not read."""
    expected, P = gpt.states(prompts, completions), prompts.ids.shape[1]
    state, past, visible = gpt.read(prompts, 2)
    caches = [tuple(F.pad(x, (0, 0, 0, 5), value=float("nan")) for x in keys_values) for keys_values in past]
    hidden, position = F.pad(visible[:, 0].float().log(), (0, 5)), prompts.length.repeat_interleave(2)
    for t in range(5):
        close(state, expected[:, t])
        state = fast.step(gpt, completions[:, t], position + t, caches, hidden, P + t)
        for cache in [cache for keys_values in caches for cache in keys_values]:
            assert not cache[:, :, :P + t + 1].isnan().any() and cache[:, :, P + t + 1:].isnan().all()
    close(state, expected[:, 5])
    _, kept = gpt.run(completions, position[:, None] + torch.arange(5), past, torch.cat(
        [visible[:, None].expand(-1, 1, 5, -1), torch.ones(6, 1, 5, 5).bool().tril()], dim=3))
    for ours, plain in zip(caches, kept):
        for cache, x in zip(ours, plain):
            close(cache, x)


@pytest.mark.parametrize("columns", [3, 15, 16, 17, 40])
def test_the_softmax_of_two_products_is_torch_s(double, columns):
    """With hidden columns, fewer columns than are filled up to, as many, and more: values and gradients."""
    torch.manual_seed(columns)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, columns, 8), torch.randn(2, 3, columns, 8)
    visible = torch.rand(2, 1, 4, columns) < 0.6
    visible[..., 0] = True
    outputs, gradients = [], []
    for attention, mask in (fast.softmax, visible.float().log()), (F.scaled_dot_product_attention, visible):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        outputs.append(attention(*inputs, mask))
        outputs[-1].square().sum().backward()
        gradients.append([x.grad for x in inputs])
    close(*outputs)
    for ours, theirs in zip(*gradients):
        close(ours, theirs)


# --- the steps that CUDA graphs record ----------------------------------------------------------------------------

def decode(policy, prompts, group_size, N, temperature, seed):
    """A decoder, and what it samples with the random numbers of that seed."""
    decoder = fast.GraphDecoder(policy, len(prompts.ids), group_size, N, temperature, choose)
    return decoder, decoded(decoder, prompts, group_size * len(prompts.ids), N, seed)


def decoded(decoder, prompts, B, N, seed):
    return Rollout(*decoder.sample(prompts, torch.rand(B, N, generator=generator(seed, 0))))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_the_recorded_steps_sample_what_the_plain_loop_does(double, small, small_prompts, temperature):
    _, ours = decode(small, small_prompts, 5, 20, temperature, seed=3)
    plain = sample(small, small_prompts, 5, 20, temperature, generator(3, 0), plain=True)
    assert_same_rollout(ours, plain, 1e-10)
    assert temperature == 0 or (plain.finished.any() and not plain.finished.all()), "or nothing has ended early"


def test_a_decoder_is_used_again_for_other_prompts_and_after_the_weights_have_changed(double, small, small_prompts):
    decoder, _ = decode(small, small_prompts, 4, 12, 1.0, seed=1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.8)
    shorter = Prompts(small_prompts.ids[[2, 0, 2], :4], small_prompts.length[[2, 0, 2]], ["a", "b", "c"])
    ours = decoded(decoder, shorter, 12, 12, 9)
    kept = copy.deepcopy(ours)
    assert_same_rollout(ours, sample(small, shorter, 4, 12, 1.0, generator(9, 0), plain=True), 1e-10)
    longer = decoded(decoder, small_prompts, 12, 12, 10)
    assert_same_rollout(longer, sample(small, small_prompts, 4, 12, 1.0, generator(10, 0), plain=True), 1e-10)
    assert_same_rollout(ours, kept, 1e-30)          # what was handed out is not what the next batch is written into


def test_a_stop_is_seen_after_a_few_tokens(small, small_prompts, monkeypatch):
    """Once all rows have finished, the chunks that are left are not decoded."""
    ran, steps = [], fast.GraphDecoder.steps
    monkeypatch.setattr(fast.GraphDecoder, "steps", lambda self, *part: (ran.append(part), steps(self, *part)))
    decode(small, small_prompts, 2, 24, 1.0, seed=0)
    assert len(ran) > 1, "or it stops without reason"
    del ran[:]
    small.head = lambda states: torch.eye(12)[END].expand(len(states), 12) * 1e3
    _, ours = decode(small, small_prompts, 2, 24, 1.0, seed=0)
    assert ran == [(0, 8)] and ours.length.tolist() == [1] * 6


def test_a_decoder_is_kept_for_the_same_settings(small, make):
    other = make(vocab_size=12)
    first = fast.graph_decoder(small, 3, 2, 8, 1.0, choose)
    assert fast.graph_decoder(small, 3, 2, 8, 1.0, choose) is first
    for settings in [(other, 3, 2, 8, 1.0), (small, 3, 2, 8, 0.7), (small, 3, 2, 9, 1.0), (small, 2, 3, 8, 1.0)]:
        assert fast.graph_decoder(*settings, choose) is not first


# --- bfloat16 -----------------------------------------------------------------------------------------------------

@pytest.fixture
def bfloat16(monkeypatch):
    """bfloat16() turns autocast on, for the CPU -> a list that grows with each use."""
    def turn_on():
        used = []

        def autocast(device):
            used.append(device.type)
            return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        for module in model, fast:
            monkeypatch.setattr(module, "autocast", autocast)
        return used
    return turn_on


@LOOPS
def test_bfloat16_leaves_weights_states_and_losses_in_float32(loop, tmp_path, bfloat16):
    """A run in bfloat16 stays near one in float32, and sampler and trainer near each other."""
    settings = tiny.settings(loop, tmp_path, steps=2, lr=1e-3)
    _, exact = loop.train(settings, reward=tiny.letter_e)
    used = bfloat16()
    policy, rows = loop.train(settings, reward=tiny.letter_e)
    assert used and all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in policy.parameters())
    assert rows[0]["loss"] != exact[0]["loss"], "or nothing was computed in bfloat16"
    assert rows[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.5)
    assert rows[0]["gap"] < 0.1


def test_twins_agree_in_bfloat16_too(bfloat16, gpt, prompts, completions, small, small_prompts):
    """Both round alike, but for the order of sums; what leaves the model is float32."""
    exact, used = gpt.states(prompts, completions), bfloat16()
    mask, read = mask_of(LENGTHS["ragged"])
    everywhere, packed = gpt.states(prompts, completions), gpt.states(prompts, completions, mask)
    assert packed.dtype == everywhere.dtype == torch.float32 and len(used) == 4
    between, off = (packed - everywhere)[read].abs().max(), (everywhere - exact).abs().max()
    assert between < 0.02 and off > 1e-3, "or nothing was computed in bfloat16"
    ours, plain = both(small, small_prompts, 40, 6, 1.0)
    decoder, graph = decode(small, small_prompts, 40, 6, 1.0, seed=0)
    assert all(cache.dtype == torch.bfloat16 for keys_values in decoder.caches for cache in keys_values)
    for rollout in ours, graph:
        assert torch.equal(rollout.completion_ids[:, 0], plain.completion_ids[:, 0]), "read from the prompt alone"
        assert (rollout.completion_ids == plain.completion_ids).float().mean() > 0.9
        again, _ = token_logprobs(small, small_prompts, rollout.completion_ids, rollout.mask)
        assert rollout.logprobs.dtype == torch.float32 and (again - rollout.logprobs).abs().max() < 0.1
