"""What the gradient of a batch is, and what it does not depend on.

One step of each loop runs on a given batch, and the gradients that reach the optimizers are compared with sums written
out row by row, on plain sequences without padding, groups, masks or shared prompts. Then the same batch is padded,
shuffled, split or taken apart, in float64: the gradients have to stay as they are. Sampler and trainer, last, have to
agree about the log-probabilities, at every temperature and after updates too.
"""
import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from grpo_min import ppo
from grpo_min.critic import Critic
from grpo_min.model import GPT
from grpo_min.rollout import Prompts, Rollout
from grpo_min.run.checkpoint import load_model
from tests import tiny
from tests.tiny import END, LOOPS, PAD, TOKENIZER, letter_e, recorded_rollouts, settings

TEMPERATURE, BETA, SHIFT = 0.7, 0.1, 0.5


@dataclass
class Batch:
    order: list                 # which of tiny.PROMPTS
    ids: torch.Tensor           # (B, N)
    mask: torch.Tensor          # (B, N)
    advantages: torch.Tensor    # (B, N); GRPO takes the first column for the whole row
    returns: torch.Tensor       # (B, N)
    wider: int = 0              # more columns of padding for the prompts

    def taking(self, rows, order):
        return Batch(order, *(getattr(self, name)[rows] for name in ("ids", "mask", "advantages", "returns")))


def batch_of(lengths, ends, prompts=4):
    """Random completions of these lengths, for the first prompts; those that end have END as their last token."""
    generator = torch.Generator().manual_seed(7)
    B, N = len(lengths), max(lengths)
    length, ends = torch.tensor(lengths), torch.tensor(ends)
    mask = torch.arange(N) < length[:, None]                                                     # (B, N)
    ids = torch.randint(6, 500, (B, N), generator=generator).masked_fill(~mask, PAD)
    ids[torch.arange(B)[ends], length[ends] - 1] = END
    advantages, returns = torch.randn(2, B, N, generator=generator, dtype=torch.float64)
    return Batch(list(range(prompts)), ids, mask, advantages, returns)


@pytest.fixture
def batch():
    """4 prompts, 4 completions each; they end at different times, and some are cut by the limit of 6."""
    lengths = [1, 4, 6, 6, 2, 6, 3, 5, 6, 6, 1, 1, 4, 2, 6, 5]
    return batch_of(lengths, [n < 6 or b in (2, 9) for b, n in enumerate(lengths)])


@pytest.fixture
def gradients(tmp_path, monkeypatch, double):
    """gradients(loop, batch, minibatches=1) -> {parameter: gradient} of one step, and the step's row of metrics.

    The reference differs from the policy, so that the KL has a gradient from the start.
    """
    path = tiny.critic_checkpoint(tmp_path / "critic.pt")

    def gradients(loop, batch, minibatches=1):
        found = {}

        def sampled(policy, prompts, group_size, *_):
            prompts.ids = F.pad(prompts.ids, (0, batch.wider), value=PAD)
            assert len(prompts.ids) * group_size == len(batch.ids)
            finished = (batch.ids == END).any(1)
            return Rollout(batch.ids, batch.mask, torch.zeros(batch.mask.shape), finished)

        def update(run, model, optimizer, loss, max_norm, *_):
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in model.named_parameters():
                key = f"{type(model).__name__} {name}"
                found[key] = found.get(key, 0) + parameter.grad / minibatches
            return 0.0

        def advantage(charged, *_):
            return batch.advantages[:, 0] if loop is not ppo else (batch.advantages, batch.returns)

        def kl(logprobs, ref_logprobs, kind):
            return loop.kl_estimate(logprobs, ref_logprobs - SHIFT, kind)
        for name, replacement in ("sample", sampled), ("update", update), ("batch_rows", lambda *_: batch.order):
            monkeypatch.setattr(loop, name, replacement)
        critic = dict(critic=path, critic_minibatches=minibatches) if loop is ppo else {}
        config = settings(loop, tmp_path, steps=1, prompts_per_step=len(batch.order), temperature=TEMPERATURE,
                          group_size=len(batch.ids) // len(batch.order), beta=BETA, minibatches=minibatches, **critic)
        _, rows = loop.train(config, advantage=advantage, kl=kl)
        return found, rows[0]
    return gradients


def row_by_row(loop, batch, folder):
    """The same gradients from plain sequences: -A log pi, the k3 penalty, and the critic's squared error."""
    policy = load_model(folder / "sft.pt")
    reference, critic = copy.deepcopy(policy), load_model(folder / "critic.pt", kind=Critic)
    loss, B, G = 0, len(batch.ids), len(batch.ids) // len(batch.order)
    prompts = Prompts.from_texts([tiny.PROMPTS[i] for i in batch.order], TOKENIZER)
    for b in range(B):
        P, n = int(prompts.length[b // G]), int(batch.mask[b].sum())
        ids = torch.cat([prompts.ids[b // G, :P], batch.ids[b, :n]])[None]                       # (1, P + n)
        at = torch.arange(P - 1, P - 1 + n)                         # the states before each completion token
        logprobs = (policy.plain(ids)[0, at] / TEMPERATURE).log_softmax(-1)[torch.arange(n), ids[0, at + 1]]
        ref = (reference.plain(ids)[0, at] / TEMPERATURE).log_softmax(-1)[torch.arange(n), ids[0, at + 1]].detach()
        advantages = batch.advantages[b, :n] if loop is ppo else batch.advantages[b, 0]
        k3 = (ref - SHIFT - logprobs).exp() - 1 - (ref - SHIFT - logprobs)
        loss = loss + (BETA * k3 - advantages * logprobs).sum() / B
        if loop is ppo:
            states = critic.trunk.run(ids, torch.arange(P + n))[0][0, at]                               # (n, D)
            gains = (critic.gain(states) * critic.trunk.tokens(ids[0, at + 1])).sum(-1)
            values = critic.scalar(states[0]) + torch.cat([gains.new_zeros(1), gains[:-1].cumsum(0)])
            loss = loss + 0.5 * ((values - batch.returns[b, :n]) ** 2).sum() / B
    loss.backward()
    return {f"{type(model).__name__} {name}": parameter.grad for model in (policy, critic)
            for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-10, name


# --- the gradient -------------------------------------------------------------------------------------------------

@LOOPS
def test_gradient_is_that_of_the_rows_one_by_one(loop, batch, gradients, tmp_path):
    found, _ = gradients(loop, batch)
    assert any(name.startswith("Critic") for name in found) == (loop is ppo)
    assert all((gradient != 0).any() for gradient in found.values())
    assert_same(found, row_by_row(loop, batch, tmp_path))


@LOOPS
@pytest.mark.parametrize("ends", [True, False], ids=["all empty", "all cut"])
def test_batches_in_which_all_end_at_once_or_none_ends(loop, ends, gradients, tmp_path):
    """Empty completions are the token END alone, and it is trained; of what was cut every token is trained."""
    batch = batch_of([1] * 8 if ends else [5] * 8, [ends] * 8)
    found, row = gradients(loop, batch)
    assert_same(found, row_by_row(loop, batch, tmp_path))
    assert row["length"] == (1 if ends else 5) and row["truncated"] == (0 if ends else 1)
    assert all(value == value and abs(value) < 1e3 for name, value in row.items()
               if value != "" and not name.startswith(tiny.WALL_CLOCK) and name != "explained_variance")


@LOOPS
def test_first_update_is_the_policy_gradient_and_later_ones_are_not(loop, tmp_path):
    """With the batch's own policy the ratio is exactly 1, clipped or not; then the policy has moved."""
    ratios, differences = [], []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        objective = loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
        surrogate = loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps)
        found, = torch.autograd.grad(surrogate, logprobs, retain_graph=True)
        ratios.append((logprobs - old_logprobs).exp()[mask])
        differences.append((found + advantages * mask / len(mask)).abs().max())
        return objective
    for passes in dict(epochs=2), dict(minibatches=2):
        ratios.clear(), differences.clear()
        loop.train(settings(loop, tmp_path, steps=2, **passes), loss=loss, reward=letter_e)
        assert [(ratio == 1).all().item() for ratio in ratios] == [True, False, True, False]
        assert [bool(difference < 1e-7) for difference in differences] == [True, False, True, False]


# --- what it does not depend on -----------------------------------------------------------------------------------

@LOOPS
def test_more_padding_on_the_right(loop, batch, gradients):
    whole, _ = gradients(loop, batch)
    padded = replace(batch, ids=F.pad(batch.ids, (0, 3), value=PAD), wider=4,
                     **{name: F.pad(getattr(batch, name), (0, 3)) for name in ("mask", "advantages", "returns")})
    assert_same(gradients(loop, padded)[0], whole)


@LOOPS
def test_what_stands_in_the_padding(loop, batch, gradients):
    """Tokens after END get no gradient and give none: their ids, advantages and returns may be anything."""
    whole, _ = gradients(loop, batch)
    garbage = {name: getattr(batch, name).masked_fill(~batch.mask, value)
               for name, value in (("ids", 77), ("advantages", 1e6), ("returns", -1e6))}
    assert_same(gradients(loop, replace(batch, **garbage))[0], whole)


@LOOPS
def test_order_of_the_groups(loop, batch, gradients):
    whole, _ = gradients(loop, batch)
    order = [2, 0, 3, 1]
    rows = [4 * q + i for q in order for i in range(4)]
    assert_same(gradients(loop, batch.taking(rows, order))[0], whole)
    moved = [4 * q + i for q in order for i in (1, 2, 3, 0)]
    assert_same(gradients(loop, batch.taking(moved, order))[0], whole)


@LOOPS
@pytest.mark.parametrize("minibatches", [2, 4])
def test_split_into_minibatches(loop, batch, minibatches, gradients):
    """Their mean is the gradient of the whole, though their completions are of different lengths."""
    assert_same(gradients(loop, batch, minibatches)[0], gradients(loop, batch)[0])


@LOOPS
def test_prompt_shared_or_repeated(loop, batch, gradients):
    repeated = batch.taking(slice(None), [q for q in batch.order for _ in range(2)])
    assert_same(gradients(loop, repeated)[0], gradients(loop, batch)[0])


# --- END ----------------------------------------------------------------------------------------------------------

@LOOPS
def test_end_is_trained_and_what_follows_it_is_not(loop, batch, gradients, monkeypatch):
    """The logits of the policy are read once for each real token, END's among them, and each pushes its own token."""
    read, head = [], GPT.head

    def watched(self, states):
        logits = head(self, states)
        if logits.requires_grad:
            logits.retain_grad()
            read.append(logits)
        return logits
    monkeypatch.setattr(GPT, "head", watched)
    gradients(loop, batch)
    logits, = read                                                                               # (n, V)
    ids = batch.ids[batch.mask]
    assert len(logits) == len(ids) == batch.mask.sum() and (ids == END).sum() == 12
    own = logits.grad[torch.arange(len(ids)), ids]                          # of the logit of the token that was sampled
    assert (own[ids == END].abs() > 1e-4).all()


# --- sampler and trainer ------------------------------------------------------------------------------------------

@LOOPS
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampler_and_trainer_agree_after_updates_too(loop, temperature, tmp_path, monkeypatch):
    rollouts = recorded_rollouts(loop, monkeypatch)
    config = settings(loop, tmp_path, steps=8, temperature=temperature, prompts_per_step=8, max_new_tokens=12, lr=3e-3,
                      seed=2)
    _, rows = loop.train(config, reward=letter_e)
    assert all(row["gap"] < 5e-5 for row in rows)
    assert all(len(rollout.length.unique()) > 1 for _, rollout in rollouts), "rows have to end at different times"
    assert rows[-1]["kl"] > 0.01, "and the policy has to have moved"


def test_the_critic_here_is_not_flat(tmp_path):
    """Or its gradients above would prove nothing."""
    critic, ids = load_model(tiny.critic_checkpoint(tmp_path / "critic.pt"), kind=Critic), torch.randint(6, 500, (4, 5))
    values = critic.values(Prompts.from_texts(tiny.PROMPTS[:2], TOKENIZER), ids, ids > 0)
    assert values.std() > 0.1
