"""Sampling: tokens come as often as the policy says, with the log-probabilities that training computes again.

END is the last real token of a completion and PAD after it is none; a row depends on its prompt, its uniform numbers
and nothing else; row b belongs to prompt b // G. All of this holds for the plain loop and for the fast one.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from grpo_min.rollout import (Prompts, Rollout, frozen_logprobs, inverse_cdf, pad, pad_completions, sample, split,
                              token_logprobs)
from tests import tiny
from tests.tiny import ASSISTANT, END, PAD, TOKENIZER, USER

encode, encode_completion = TOKENIZER.encode, TOKENIZER.encode_completion


@pytest.fixture(params=[False, True], ids=["fast", "plain"])
def draw(request):
    """draw(policy, prompts, ...) -> a rollout."""
    def draw(policy, prompts, group_size=4, new=8, temperature=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return sample(policy, prompts, group_size, new, temperature, generator, plain=request.param)
    return draw


def rows_of(*rows):
    """Prompts of these ids."""
    return Prompts(*pad(rows, PAD), [str(row) for row in rows])


def by_end(ids, end=END):
    """The mask that follows from END alone: True until the first END, that included."""
    ended = (ids == end).cumsum(1) - (ids == end).long()
    return ended == 0


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


# --- what is sampled ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_frequencies_match_the_policy(draw, small, small_prompts, temperature):
    """Chi-square of the first token, and of the second given the first, against softmax(logits / temperature)."""
    prompts = small_prompts.rows(1, 2)
    rollout = draw(small, prompts, 20_000, 2, temperature)
    with torch.no_grad():
        probs = (small(prompts, rollout.completion_ids) / temperature).softmax(-1).double()       # (B, N, V)
    first, second = rollout.completion_ids.T
    cells = [(second[first == a], probs[first == a][0, 1]) for a in first.unique() if a != END]
    statistic = freedom = 0
    for tokens, p in [(first, probs[0, 0]), *cells]:
        expected, observed = p * len(tokens), torch.bincount(tokens, minlength=12)
        enough = expected > 5
        statistic += ((observed - expected) ** 2 / expected)[enough].sum().item()
        freedom += enough.sum().item() - 1
    assert freedom > 30
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_training(draw, small, small_prompts, temperature):
    rollout = draw(small, small_prompts, 16, 12, temperature)
    assert len(rollout.length.unique()) > 4 and not rollout.finished.all()      # rows end at different times, or not
    logprobs, _ = token_logprobs(small, small_prompts, rollout.completion_ids, rollout.mask, temperature)
    assert (logprobs - rollout.logprobs).abs().max() < 5e-5
    assert (rollout.logprobs[~rollout.mask] == 0).all()


def test_token_logprobs_by_hand(draw, small, small_prompts):
    """Column t is log softmax(logits / T) of completion token t, from the state before it; entropy is -sum p log p."""
    temperature, rollout = 1.3, draw(small, small_prompts, 2, 5)
    logprobs, entropy = token_logprobs(small, small_prompts, rollout.completion_ids, rollout.mask, temperature)
    assert logprobs.requires_grad and not entropy.requires_grad
    for b in range(6):
        length = small_prompts.length[b // 2].item()
        ids = torch.cat([small_prompts.ids[b // 2, :length], rollout.completion_ids[b]])
        logits = (small.plain(ids[None])[0] / temperature).tolist()
        for t in range(rollout.mask.shape[1]):
            p = [math.exp(logit) for logit in logits[length - 1 + t]]
            p = [x / sum(p) for x in p]
            real = rollout.mask[b, t].item()
            assert logprobs[b, t].item() == pytest.approx(real * math.log(p[ids[length + t]]), abs=1e-5)
            assert entropy[b, t].item() == pytest.approx(-real * sum(x * math.log(x) for x in p), abs=1e-5)


def test_entropy_of_a_uniform_policy_is_log_v(make, small_prompts):
    uniform = make(vocab_size=12, std=0.0)
    ids, mask = torch.full((3, 2), 7), torch.tensor([[True, True], [True, False], [True, True]])
    logprobs, entropy = token_logprobs(uniform, small_prompts, ids, mask)
    assert torch.allclose(entropy, mask * math.log(12)) and torch.allclose(logprobs, mask * -math.log(12))


def test_inverse_cdf_by_hand():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2 ** -24])
    assert inverse_cdf(probs, uniforms).tolist() == [0, 0, 2, 2, 3, 3]
    sharp = torch.tensor([[0.0, 1.0, 0.0]]).expand(2, 3)   # the largest uniform number, and what rounding makes of it
    assert inverse_cdf(sharp, torch.tensor([1 - 2 ** -24, 1.0])).tolist() == [1, 1]


def test_temperature_0_is_greedy(draw, small, small_prompts):
    rollout = draw(small, small_prompts, 2, 8, temperature=0)
    best = small(small_prompts, rollout.completion_ids).argmax(-1)
    assert (best == rollout.completion_ids)[rollout.mask].all()
    assert torch.equal(rollout.completion_ids[::2], rollout.completion_ids[1::2])
    assert (rollout.logprobs == 0).all()


# --- mask, END and PAD --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("new", [1, 2, 8])
def test_mask_ends_with_end(draw, small, small_prompts, new):
    rollout = draw(small, small_prompts, 100, new)
    ids, mask = rollout.completion_ids, rollout.mask
    assert mask.dtype == torch.bool and mask[:, 0].all()
    assert torch.equal(mask, by_end(ids))                               # END included, nothing after it
    assert (ids[~mask] == PAD).all()
    assert (ids[mask] == PAD).any()                                     # PAD as an action is a token like any other
    assert torch.equal(rollout.finished, (ids == END).any(1))
    assert rollout.finished[ids[:, -1] == END].all() and (ids[:, -1] == END).any()     # END in the last column
    assert rollout.finished.any() and not rollout.finished.all()        # and some were cut
    assert torch.equal(rollout.length, mask.sum(1))
    assert (rollout.length[~rollout.finished] == new).all()


def test_columns_that_nobody_reached_are_dropped(draw, small, small_prompts):
    for seed in range(20):
        rollout = draw(small, small_prompts, 1, 16, seed=seed)
        assert rollout.mask.any(0).all()
        assert rollout.completion_ids.shape == rollout.mask.shape == rollout.logprobs.shape


def test_nothing_has_a_gradient(draw, small, small_prompts):
    assert not any(tensor.requires_grad for tensor in vars(draw(small, small_prompts)).values())


def test_texts_leave_out_end_and_padding():
    ids, length = pad([encode(" 28") + [END], encode(" a cow"), [END], encode(" 7") + [PAD],
                       encode_completion("<think> 1</think> 2")], PAD)
    mask = torch.arange(ids.shape[1]) < length[:, None]
    finished = torch.tensor([True, False, True, False, True])
    texts = Rollout(ids, mask, torch.zeros(ids.shape), finished).texts(TOKENIZER)
    assert texts == [" 28", " a cow", "", " 7<|pad|>", "<think> 1</think> 2"]


# --- rows and groups ----------------------------------------------------------------------------------------------

def test_same_seed_same_rollout(draw, small, small_prompts):
    assert same(draw(small, small_prompts), draw(small, small_prompts))
    assert not same(draw(small, small_prompts), draw(small, small_prompts, seed=1))


def test_a_row_does_not_depend_on_the_others(draw, small, small_prompts):
    whole = draw(small, small_prompts, 4, 8)
    # The first prompt alone has the first rows of the uniform numbers.
    alone = draw(small, rows_of(small_prompts.ids[0, :4].tolist()), 4, 8)
    N = alone.mask.shape[1]
    assert torch.equal(whole.completion_ids[:4, :N], alone.completion_ids) and not whole.mask[:4, N:].any()
    assert torch.allclose(whole.logprobs[:4, :N], alone.logprobs, atol=1e-5)
    # The last prompt keeps its rows whatever stands before it.
    others = rows_of([USER, 10, ASSISTANT], [USER, 7, ASSISTANT], [USER, 11, ASSISTANT])
    beside = draw(small, others, 4, 8)
    assert not torch.equal(whole.completion_ids[:4, 0], beside.completion_ids[:4, 0])
    N = min(whole.mask.shape[1], beside.mask.shape[1])
    assert torch.equal(whole.completion_ids[8:, :N], beside.completion_ids[8:, :N])
    assert not whole.mask[8:, N:].any() and not beside.mask[8:, N:].any()


def test_rows_of_a_group_follow_each_other(draw, make, small_prompts):
    """A sharp policy gives every prompt an answer of its own, which stands in rows q * G to q * G + G - 1."""
    policy = make(vocab_size=12, std=2.0)
    alone = [draw(policy, small_prompts.rows(q, q + 1), 1, 4, temperature=0).completion_ids[0] for q in range(3)]
    rollout = draw(policy, small_prompts, 5, 4, temperature=0)
    assert len({tuple(ids.tolist()) for ids in alone}) == 3
    for b in range(15):
        n = min(len(alone[b // 5]), rollout.mask.shape[1])
        assert torch.equal(rollout.completion_ids[b, :n], alone[b // 5][:n])


def test_completions_of_a_group_differ(draw, small, small_prompts):
    ids = draw(small, small_prompts, 8, 8).completion_ids
    assert all(len(ids[q * 8:q * 8 + 8].unique(dim=0)) > 4 for q in range(3))


def test_too_long_for_the_context(draw, small, small_prompts):
    longest = int(small_prompts.length.max())
    assert draw(small, small_prompts, 2, 32 - longest).mask.shape[1] <= 32 - longest
    with pytest.raises(ValueError, match="context"):
        draw(small, small_prompts, 2, 33 - longest)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_split_keeps_groups_whole(draw, small, minibatches):
    prompts = rows_of([USER, 6, ASSISTANT], [USER, 7, 8, ASSISTANT], [USER, ASSISTANT], [USER, 9, ASSISTANT])
    G = 3
    rollout = draw(small, prompts, G)
    whole, _ = token_logprobs(small, prompts, rollout.completion_ids, rollout.mask)
    seen, texts = [], []
    for (part, ids, mask), rows in split(prompts, rollout, minibatches):
        assert len(ids) == len(part.ids) * G == len(part.texts) * G == len(part.length) * G
        assert torch.equal(ids, rollout.completion_ids[rows]) and torch.equal(mask, rollout.mask[rows])
        assert torch.allclose(token_logprobs(small, part, ids, mask)[0], whole[rows], atol=1e-5)
        seen += list(range(12))[rows]
        texts += part.texts
    assert seen == list(range(12)) and texts == prompts.texts
    frozen = frozen_logprobs(small, prompts, rollout, 1.0, minibatches)
    assert torch.allclose(frozen, whole, atol=1e-5) and not frozen.requires_grad


# --- a tokenizer of its own ---------------------------------------------------------------------------------------

def test_a_model_samples_and_stops_by_its_own_tokenizer(draw):
    """Its END and PAD are other ids, and what is END elsewhere is a token like any other here."""
    other = tiny.other_tokenizer()
    assert not {other.end, other.pad} & {END, PAD}
    policy = tiny.gpt(tokenizer=other)
    texts = ["a cow", "", "start with 3, times 9."]
    prompts = Prompts.from_texts(texts, policy.tokenizer)
    for row, length, text in zip(prompts.ids.tolist(), prompts.length.tolist(), texts):
        assert row == other.encode_prompt(text) + [other.pad] * (len(row) - length)
    rollout = draw(policy, prompts, 60, 12)
    ids, mask = rollout.completion_ids, rollout.mask
    assert (ids[mask] == END).any() and torch.equal(mask, by_end(ids, other.end))
    assert (ids[~mask] == other.pad).all() and (~mask).any()
    assert torch.equal(rollout.finished, (ids == other.end).any(1)) and 0 < rollout.finished.sum() < len(ids)
    logprobs, _ = token_logprobs(policy, prompts, ids, mask)
    assert (logprobs - rollout.logprobs).abs().max() < 5e-5
    for text, row, real, end in zip(rollout.texts(other), ids, mask, rollout.finished):
        assert text == other.decode(row[real].tolist()[:-1] if end else row[real].tolist())


# --- padding ------------------------------------------------------------------------------------------------------

def test_prompts_are_padded_on_the_right():
    texts = ["a cow", "start with 3, times 9.", ""]
    prompts = Prompts.from_texts(texts, TOKENIZER)
    rows = [TOKENIZER.encode_prompt(text) for text in texts]
    assert prompts.length.tolist() == [len(row) for row in rows] and prompts.texts == texts
    assert prompts.ids.tolist() == [row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows]


def test_completions_are_padded_after_end():
    ids, mask = pad_completions([" 28", " a cow eats grass."], TOKENIZER, finished=[True, False])
    assert ids[0, :mask[0].sum()].tolist() == encode(" 28") + [END]
    assert ids[1].tolist() == encode(" a cow eats grass.") and mask[1].all()
    assert torch.equal(mask[0], by_end(ids)[0])
    assert pad_completions([""], TOKENIZER)[0].tolist() == [[END]]


def test_empty_completions_are_ids_too():
    ids, mask = pad_completions([""], TOKENIZER, finished=[False])
    assert ids.shape == mask.shape == (1, 0) and ids.dtype == torch.long


def test_completions_that_are_end_alone(small, small_prompts):
    """No state after the prompt's is read: there is no column to compute."""
    ids, mask = torch.full((6, 1), END), torch.ones(6, 1, dtype=torch.bool)
    logprobs, _ = token_logprobs(small, small_prompts, ids, mask)
    expected = small(small_prompts, ids).log_softmax(-1)[:, 0, END]
    assert logprobs.shape == (6, 1) and torch.allclose(logprobs[:, 0], expected)


def test_training_reads_the_sampled_ids_and_no_text(gpt):
    """Ids that no text encodes to (` 28` in two tokens) keep the log-probability of those very ids."""
    prompts, ids = Prompts.from_texts(["a cow"], TOKENIZER), torch.tensor([encode(" 2") + encode("8") + [END]])
    assert encode(" 28") != ids[0, :-1].tolist()
    logprobs, _ = token_logprobs(gpt, prompts, ids, torch.ones(1, 3, dtype=torch.bool))
    expected = F.log_softmax(gpt(prompts, ids), -1)[0, torch.arange(3), ids[0]]
    assert torch.allclose(logprobs[0], expected)
