"""The drop-in parts of GRPO, one by one against numbers worked out by hand, values and gradients; then as recipes.

Ratios are given by the log of the policy now; the old log-probabilities are 0 or small numbers, and are never trained.
"""
import dataclasses
import json
import math

import pytest
import torch

from grpo_min import grpo, runs, variants
from grpo_min.config import UserError, parse
from grpo_min.grpo import GRPOConfig, group_advantages, policy_loss
from grpo_min.metrics import update_metrics
from grpo_min.rollout import Rollout
from grpo_min.tokenizer import PAD
from grpo_min.variants import ADVANTAGES, AGGREGATIONS, RATIOS, RECIPES, make_loss
from tests import tiny
from tests.test_algorithms import close, ragged
from tests.test_loops import crash, state, stop_at
from tests.tiny import assert_same_run, letter_e, settings

REWARDS = torch.tensor([1.0, 2, 6, 0, 0, 3])          # two groups of three
DEFAULTS = dataclasses.asdict(GRPOConfig())


# --- advantages ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("mean_std", [-2 / (7 ** 0.5 + 1e-4), -1 / (7 ** 0.5 + 1e-4), 3 / (7 ** 0.5 + 1e-4),        # mean 3, squares 14 / 2
                  -1 / (3 ** 0.5 + 1e-4), -1 / (3 ** 0.5 + 1e-4), 2 / (3 ** 0.5 + 1e-4)]),      # mean 1, squares 6 / 2
    ("leave_one_out", [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3 - 0]),
    ("batch", [(r - 2) / (5.2 ** 0.5 + 1e-4) for r in (1, 2, 6, 0, 0, 3)]),                     # mean 2, squares 26 / 5
    ("none", [1, 2, 6, 0, 0, 3]),
])
def test_advantages_by_hand(name, expected):
    advantages = ADVANTAGES[name](REWARDS, 3)
    assert close(advantages, expected) and advantages.dtype == torch.float32 and advantages.shape == (6,)


@pytest.mark.parametrize("G", [2, 3, 5])
def test_leave_one_out_is_the_group_means_advantage_times_g_over_g_minus_1(G):
    """R_i - (S - R_i) / (G - 1) = (G R_i - S) / (G - 1) = G / (G - 1) (R_i - S / G), with S the sum of the group."""
    rewards = torch.randn(4 * G, generator=torch.Generator().manual_seed(0)).double()
    assert close(variants.leave_one_out(rewards, G), group_advantages(rewards, G) * G / (G - 1), 1e-12)


def test_mean_std_is_scale_advantages_to_the_bit():
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(variants.mean_std(rewards, 8), group_advantages(rewards, 8, scale=True))


@pytest.mark.parametrize("name", ["mean_std", "leave_one_out", "batch"])
def test_equal_rewards_have_advantages_of_exactly_zero(name):
    assert torch.equal(ADVANTAGES[name](torch.tensor([0.7] * 12), 12), torch.zeros(12))


def test_batch_gives_groups_of_equals_an_advantage():
    assert close(variants.batch(torch.tensor([0.0, 0, 1, 1]), 2), [v / (3 ** -0.5 + 1e-4) for v in (-.5, -.5, .5, .5)])


@pytest.mark.parametrize("name", ["mean_std", "leave_one_out"])
@pytest.mark.parametrize("count, group_size", [(4, 1), (5, 2)])
def test_rewards_that_make_no_groups_are_refused(name, count, group_size):
    with pytest.raises(ValueError, match="groups"):
        ADVANTAGES[name](torch.zeros(count), group_size)


# --- aggregation --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, loss, gradients", [        # rows of 1 and 3 tokens, A is 2 and -4
    ("sum", -(2 - 12) / 2, (-2 / 2, 4 / 2)),
    ("sequence", -(2 - 4) / 2, (-2 / 2, 4 / 2 / 3)),
    ("token", -(2 - 12) / 4, (-2 / 4, 4 / 4)),
    ("constant", -(2 - 12) / 2 / 10, (-2 / 2 / 10, 4 / 2 / 10)),
])
def test_aggregations_by_hand(name, loss, gradients):
    logprobs = torch.zeros(2, 3, requires_grad=True)
    advantages, mask = torch.tensor([[2.0], [-4.0]]).expand(2, 3), ragged([1, 3])
    found = make_loss("token", name, longest=10)(logprobs, torch.zeros(2, 3), advantages, mask, 0.2)
    found.backward()
    assert close(found, loss) and close(logprobs.grad, torch.tensor(gradients)[:, None] * mask)


@pytest.mark.parametrize("ratio", RATIOS)
def test_with_equal_lengths_aggregations_differ_by_a_constant_alone(ratio):
    """sum / 4 = sequence = token = constant where all 3 completions have 4 tokens, and the longest has 4 too."""
    logprobs, old, advantages = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    mask, found = ragged([4, 4, 4]), {}
    for name in AGGREGATIONS:
        leaf = logprobs.clone().requires_grad_()
        loss = make_loss(ratio, name, longest=4)(leaf, old, advantages, mask, 0.2)
        loss.backward()
        found[name] = torch.cat([loss.detach().view(1), leaf.grad.flatten()])
    for name in "sequence", "token", "constant":
        assert close(found[name], found["sum"] / 4, 1e-12), name
    assert found["sum"].abs().max() > 0.1


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_tokens_after_the_end_have_no_effect_and_empty_rows_are_finite(ratio, name):
    mask, found = ragged([2, 0, 4]), []
    for garbage in 0.0, 7.0:
        logprobs, old, advantages = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(3))
        logprobs = logprobs.masked_fill(~mask, garbage).requires_grad_()
        advantages = advantages[:, :1].expand(3, 4)
        loss = make_loss(ratio, name, longest=4)(logprobs, old.masked_fill(~mask, -garbage), advantages, mask, 0.2)
        loss.backward()
        found.append((loss.item(), logprobs.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert math.isfinite(found[0][0]) and (found[0][1][~mask] == 0).all() and (found[0][1][mask] != 0).any()
    empty = torch.zeros(2, 2, requires_grad=True)
    make_loss(ratio, name, longest=4)(empty, torch.zeros(2, 2), torch.ones(2, 2), ragged([0, 0], 2), 0.2).backward()
    assert torch.equal(empty.grad, torch.zeros(2, 2))


# --- ratio and clip -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, high, surrogate, gradient", [       # A = 2: clip_eps is 0.2
    (1.25, 0.0, 1.2 * 2, 0.0),                  # 0: the upper bound is that of clip_eps
    (1.25, 0.28, 1.25 * 2, 1.25 * 2),           # a higher one keeps what clip_eps alone clips
    (1.3, 0.28, 1.28 * 2, 0.0),
    (1.15, 0.1, 1.1 * 2, 0.0),                  # a lower one clips more
])
def test_clip_higher_by_hand(ratio, high, surrogate, gradient):
    logprobs = torch.tensor([[math.log(ratio)]]).double().requires_grad_()
    loss = make_loss(clip_eps_high=high)(logprobs, torch.zeros(1, 1), torch.full((1, 1), 2.0), ragged([1]), 0.2)
    loss.backward()
    assert close(loss, -surrogate) and close(logprobs.grad, -gradient)


def test_clip_higher_leaves_the_lower_bound_alone():
    logprobs = torch.tensor([[math.log(0.75)]], requires_grad=True)
    loss = make_loss(clip_eps_high=0.28)(logprobs, torch.zeros(1, 1), torch.full((1, 1), -2.0), ragged([1]), 0.2)
    loss.backward()
    assert close(loss, 0.8 * 2) and close(logprobs.grad, 0)


def test_parts_of_the_defaults_make_policy_loss():
    logprobs, old, advantages = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(4))
    arguments = (logprobs, old, advantages, ragged([1, 4, 2]), 0.2)
    assert torch.equal(make_loss()(*arguments), policy_loss(*arguments))


def of_one_row(ratio, tokens, advantage, clip_eps=0.2, high=0.0, aggregation="sequence"):
    """Loss and gradient of one completion whose tokens have these ratios."""
    logprobs = torch.tensor([tokens]).double().log().requires_grad_()
    old, advantages = torch.zeros(1, len(tokens)).double(), torch.full((1, len(tokens)), advantage).double()
    loss = make_loss(ratio, aggregation, high)(logprobs, old, advantages, ragged([len(tokens)]), clip_eps)
    loss.backward()
    return loss.item(), logprobs.grad[0]


def test_sequence_ratio_by_hand():
    # The geometric mean of 0.5, 1.25 and 1.6 is exactly 1, of 2 and 0.72 it is 1.2, of 4 and 1 it is 2.
    loss, gradient = of_one_row("sequence", [0.5, 1.25, 1.6], 2.0)
    assert loss == pytest.approx(-2) and close(gradient, [-2 / 3] * 3)          # nothing is clipped: all tokens learn
    loss, gradient = of_one_row("sequence", [2.0, 0.72], 3.0, high=0.3)
    assert loss == pytest.approx(-3.6) and close(gradient, [-3.6 / 2] * 2)      # d s / d log pi_t = s / length
    loss, gradient = of_one_row("sequence", [4.0, 1.0], 3.0)
    assert loss == pytest.approx(-3.6) and close(gradient, [0, 0])              # clipped: no token learns
    loss, gradient = of_one_row("sequence", [4.0, 1.0], -3.0)
    assert loss == pytest.approx(6) and close(gradient, [3, 3])                 # a bad one is pushed back, as in PPO


def test_sequence_ratio_is_each_completions_own():
    logprobs, mask = torch.tensor([[2.0, 9], [0.5, 0.5]]).log(), ragged([1, 2])
    assert close(variants.log_ratio(logprobs, torch.zeros(2, 2), mask, "sequence").exp(), [[2.0], [0.5]])
    assert close(variants.log_ratio(logprobs, torch.zeros(2, 2), mask).exp(), [[2.0, 9], [0.5, 0.5]])


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(advantage):
    # Weights 0.8, 1.1 and 1.2 for ratios of 0.5, 1.1 and 3: clipped on both sides whatever the sign, and none is lost.
    loss, gradient = of_one_row("cispo", [0.5, 1.1, 3.0], advantage, aggregation="sum")
    assert close(gradient, [-0.8 * advantage, -1.1 * advantage, -1.2 * advantage])
    assert loss == pytest.approx(-advantage * (0.8 * math.log(0.5) + 1.1 * math.log(1.1) + 1.2 * math.log(3)))
    _, gradient = of_one_row("cispo", [0.01, 5.0, 6.0], advantage, clip_eps=1.0, high=3.0, aggregation="sum")
    assert close(gradient, [-0.01 * advantage, -4 * advantage, -4 * advantage])          # the recipe's bounds


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_at_ratio_one_all_ratios_have_the_gradient_of_the_policy(aggregation):
    """Tokens' ratios and CISPO: A d log pi. GSPO: A d (mean of log pi), which summed over the tokens is the same."""
    mask, found = ragged([1, 4, 2]), {}
    advantages = torch.tensor([[1.0], [-2.0], [3.0]]).double().expand(3, 4)
    for ratio in RATIOS:
        logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double().requires_grad_()
        make_loss(ratio, aggregation, longest=4)(logprobs, logprobs.detach(), advantages, mask, 3e-4).backward()
        found[ratio] = logprobs.grad
    divisor = {"sum": 1, "sequence": torch.tensor([[1], [4], [2]]), "token": 7 / 3,
               "constant": 4}[aggregation]
    for ratio in RATIOS:
        assert close(found[ratio], -advantages * mask / 3 / divisor), ratio


def test_away_from_ratio_one_the_ratios_differ():
    found = {ratio: of_one_row(ratio, [0.5, 1.1, 1.5], 2.0, aggregation="sum")[1] for ratio in RATIOS}
    assert close(found["token"], [-0.5 * 2, -1.1 * 2, 0]) and close(found["cispo"], [-0.8 * 2, -1.1 * 2, -1.2 * 2])
    assert close(found["sequence"], [-2 * (0.5 * 1.1 * 1.5) ** (1 / 3)] * 3)


def test_clip_shares_are_those_of_the_ratio_that_is_clipped():
    logprobs, mask = torch.tensor([[1.25, 1.0], [0.5, 9.0]]).log(), ragged([2, 1])
    zeros = torch.zeros(2, 2)

    def shares(*more):
        row = update_metrics(torch.tensor(0.0), 0.0, logprobs, zeros, zeros, zeros, mask, 0.2, *more)
        return row["clip_low"] * 3, row["clip_high"] * 3
    assert shares() == pytest.approx((1, 1)) and shares(0.28) == pytest.approx((1, 0))
    assert shares(0.1, "sequence") == pytest.approx((1, 2)), "sqrt(1.25) is 1.118, and both tokens are in"


# --- in the loop --------------------------------------------------------------------------------------------------

def test_scale_advantages_still_is_mean_std(tmp_path):
    found = [grpo.train(settings(grpo, tmp_path, steps=2, **more), reward=letter_e)
             for more in (dict(scale_advantages=True), dict(advantage="mean_std"), dict())]
    assert tiny.same(state(found[0][0]), state(found[1][0])) and not tiny.same(state(found[0][0]), state(found[2][0]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_is_the_one_named(name, tmp_path):
    seen = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps):
        seen.append(advantages)
        return (logprobs * 0).sum()

    def reward(prompts, completions, **columns):
        return [float(i % 5) for i in range(12)]
    grpo.train(settings(grpo, tmp_path, steps=1, advantage=name), reward=reward, loss=loss)
    assert torch.equal(seen[0][:, 0], ADVANTAGES[name](torch.arange(12.0) % 5, 3))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_surrogate_and_penalty_are_divided_alike_and_by_all_tokens(aggregation, beta, tmp_path, monkeypatch):
    """With beta 0 groups of equals are left out of the forward, but their tokens count in the mean over tokens."""
    rollouts = tiny.recorded_rollouts(grpo, monkeypatch)

    def reward(prompts, completions, **columns):
        return [0.0] * 6 + [1.0, 2, 6, 0, 0, 3]                                         # two groups of equals
    config = settings(grpo, tmp_path, steps=1, beta=beta, aggregation=aggregation)
    _, (row,) = grpo.train(config, reward=reward, kl=lambda logprobs, ref_logprobs, kind: 0 * logprobs + 0.3)
    length = rollouts[0][1].mask.sum(1).double()                                        # (12,)
    assert length.min() < length.max()
    divisor = {"sum": torch.ones(12), "sequence": length, "token": length.mean().expand(12),
               "constant": torch.full((12,), 6.0)}[aggregation]
    advantages = torch.tensor([0.0] * 6 + [-2, -1, 3, -1, -1, 2])
    expected = ((beta * 0.3 - advantages) * length / divisor).mean().item()
    assert row["loss"] == pytest.approx(expected, abs=1e-5)


def test_ratio_and_bound_reach_loss_and_metrics(tmp_path, watch):
    made, measured = watch(grpo, "make_loss"), watch(grpo, "update_metrics")
    config = settings(grpo, tmp_path, steps=1, ratio="sequence", aggregation="constant", clip_eps=0.1,
                      clip_eps_high=0.3)
    grpo.train(config, reward=letter_e)
    assert made[0][0] == ("sequence", "constant", 0.3, 6) and measured[0][0][7:] == (0.1, 0.3, "sequence")


def test_default_parts_are_the_functions_of_the_file(tmp_path, watch):
    made, used, compared = watch(grpo, "make_loss"), watch(grpo, "policy_loss"), watch(grpo, "group_advantages")
    grpo.train(settings(grpo, tmp_path, steps=1), reward=letter_e)
    assert (len(made), len(used), len(compared)) == (0, 1, 1)


def test_arguments_win_over_names(tmp_path):
    config = settings(grpo, tmp_path, steps=1, beta=0.0, advantage="batch", aggregation="token")
    policy, (row,) = grpo.train(config, reward=letter_e, advantage=lambda rewards, *_: rewards * 0,
                                loss=lambda logprobs, *_: logprobs.sum() * 0 + 7)
    assert row["loss"] == 7 and tiny.same(state(policy), state(runs.load_model(config.sft, "GPT")))


@pytest.mark.parametrize("more, said", [(dict(clip_eps_high=-0.1), "--clip-eps-high"),
                                        (dict(scale_advantages=True, advantage="batch"), "--scale-advantages")])
def test_settings_that_cannot_work(more, said, tmp_path):
    with pytest.raises(UserError, match=said):
        grpo.train(settings(grpo, tmp_path, **more), reward=letter_e)


# --- recipes ------------------------------------------------------------------------------------------------------

PUBLISHED = {       # all that differs from the defaults
    "grpo": dict(advantage="mean_std", aggregation="sequence", beta=0.04),
    "dapo": dict(advantage="mean_std", aggregation="token", clip_eps_high=0.28, beta=0.0, dynamic_sampling=True),
    "dr_grpo": dict(aggregation="constant", beta=0.0),
    "rloo": dict(advantage="leave_one_out", kl="k1", kl_in="reward"),
    "gspo": dict(advantage="mean_std", aggregation="sequence", ratio="sequence", clip_eps=3e-4, clip_eps_high=4e-4,
                 beta=0.0),
    "cispo": dict(advantage="mean_std", aggregation="token", ratio="cispo", clip_eps=1.0, clip_eps_high=3.0, beta=0.0),
    "reinforce++": dict(advantage="batch", aggregation="token", kl="k1", kl_in="reward"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_parts_and_nothing_else(name):
    found = dataclasses.asdict(parse(GRPOConfig, ["--recipe", name, "--steps", "7"], RECIPES))
    assert found == dict(DEFAULTS, steps=7, **PUBLISHED[name])


def test_a_recipe_does_not_depend_on_the_defaults():
    changed = dict(clip_eps=0.7, beta=0.7, kl="k2", ratio="cispo", advantage="none")
    other = dataclasses.make_dataclass("Other", [(f.name, f.type, dataclasses.field(
        default=changed.get(f.name, f.default), metadata=f.metadata)) for f in dataclasses.fields(GRPOConfig)])
    found = parse(other, ["--recipe", "grpo"], RECIPES)
    parts = found.beta, found.kl, found.ratio, found.advantage, found.clip_eps
    assert parts == (0.04, "k3", "token", "mean_std", 0.7)


@pytest.mark.parametrize("words", ["--recipe dapo --beta 0.01 --no-dynamic-sampling --aggregation sum",
                                   "--beta 0.01 --aggregation sum --no-dynamic-sampling --recipe dapo"])
def test_an_option_wins_over_the_recipe(words):
    # All three are the defaults, so that comparing with these would not show that they were given.
    found = dataclasses.asdict(parse(GRPOConfig, words.split(), RECIPES))
    assert found == dict(DEFAULTS, advantage="mean_std", clip_eps_high=0.28)


def test_a_recipe_for_one_command_line_leaves_the_next_alone():
    parse(GRPOConfig, ["--recipe", "gspo"], RECIPES)
    assert parse(GRPOConfig, [], RECIPES) == GRPOConfig()


@pytest.mark.parametrize("option, value", [("--recipe", "grpoo"), ("--advantage", "median"), ("--ratio", "batch"),
                                           ("--aggregation", "product")])
def test_unknown_names_are_refused_in_one_line(option, value):
    with pytest.raises(UserError, match=f"argument {option}: invalid choice: '{value}'") as refused:
        grpo.main([option, value])
    assert "\n" not in str(refused.value)


def test_help_and_readme_list_the_recipes(capsys, root):
    with pytest.raises(SystemExit):
        grpo.main(["--help"])
    shown, readme = capsys.readouterr().out, (root / "README.md").read_text(encoding="utf-8")
    table = shown[shown.index("recipes (an option given"):].strip().splitlines()[1:]
    assert [line.split()[0] for line in table] == list(RECIPES)
    for line in table:
        name, *options = line.split()
        again = parse(GRPOConfig, options)
        assert again == parse(GRPOConfig, ["--recipe", name], RECIPES), "the options printed are the recipe"
        assert f"| `{name}` | `{' '.join(options)}` |" in readme


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("more", [[], ["--epochs", "2", "--minibatches", "2"]], ids=["one update", "four updates"])
def test_recipes_run(name, more, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "train", lambda config, train=grpo.train: train(config, reward=letter_e))
    before = tiny.gpt()
    options = dict(run=tmp_path / "run", sft=tiny.checkpoint(tmp_path / "sft.pt"), steps=2, lr=0.001,
                   prompts=tiny.prompts(tmp_path / "prompts.jsonl"), prompts_per_step=4, group_size=3, max_new_tokens=6)
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    grpo.main(["--recipe", name, *words, *more])
    policy = runs.load_model(tmp_path / "run/checkpoint.pt", "GPT")
    assert not tiny.same(state(policy), state(before))
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert "recipe" not in written and {key: written[key] for key in RECIPES[name]} == RECIPES[name]
    rows = runs.read_csv(tmp_path / "run/metrics.csv")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows) and len(rows) == 2


# --- dynamic sampling ---------------------------------------------------------------------------------------------

def hard(*good):
    """A reward whose groups differ for these prompts, and are all equal for the others."""
    def reward(prompts, completions, **columns):
        return [float(i % 3) if prompt in good else 1.0 for i, prompt in enumerate(prompts)]
    return reward


def dynamic(folder, **more):
    return settings(grpo, folder, **dict(dict(steps=1, dynamic_sampling=True), **more))


def trained_prompts(config, reward, watch):
    """The prompts of the trained batch of every step, and the rows of metrics."""
    calls = watch(grpo, "shown_samples")
    _, rows = grpo.train(config, reward=reward)
    return [[row["prompt"] for row in batch] for (_, _, _, batch, *_), _ in calls], rows


def test_groups_of_equals_are_replaced_until_the_batch_is_full(tmp_path, watch):
    sampled, advantages = watch(grpo, "sample"), watch(grpo, "group_advantages")
    kept, (row,) = trained_prompts(dynamic(tmp_path), hard(*tiny.PROMPTS[:7]), watch)
    assert len(set(kept[0])) == 4 and set(kept[0]) <= set(tiny.PROMPTS[:7]) and row["equal_groups"] == 0
    seen = [text for (_, prompts, *_), _ in sampled for text in prompts.texts]
    assert len(set(seen)) == len(seen) > 4, "no prompt is sampled twice"
    assert row["dropped"] == len(seen) - 4 and row["completions"] == 3 * len(seen)
    assert torch.equal(advantages[0][0][0], torch.tensor([0.0, 1, 2] * 4))
    assert row["seconds_sample"] > 0 and row["reward"] == 1


def test_groups_that_differ_stay_where_they_are(tmp_path, watch):
    good = tiny.PROMPTS[:7]
    first, _ = trained_prompts(settings(grpo, tmp_path, steps=1), hard(*good), watch)
    kept, _ = trained_prompts(dynamic(tmp_path), hard(*good), watch)
    assert any(prompt in good for prompt in first[0]) and any(prompt not in good for prompt in first[0])
    assert all(new == old for old, new in zip(first[0], kept[0]) if old in good)


def test_what_is_trained_are_the_rows_of_the_prompts_kept(tmp_path, watch):
    """Prompt, completion ids, mask and the sampler's log-probabilities stay together, whatever was replaced."""
    updates, parts = watch(grpo, "update_metrics"), watch(grpo, "token_logprobs")
    kept, (row,) = trained_prompts(dynamic(tmp_path, epochs=1), hard(*tiny.PROMPTS[:7]), watch)
    assert row["dropped"] > 0 and row["gap"] < 1e-5
    assert parts[0][0][1].texts == kept[0] and updates[0][0][6].sum() > 12


def test_nothing_is_replaced_where_all_groups_differ(tmp_path):
    found = [grpo.train(settings(grpo, tmp_path, dynamic_sampling=on), reward=hard(*tiny.PROMPTS))
             for on in (False, True)]
    assert tiny.same(state(found[0][0]), state(found[1][0]))
    assert [row.get("dropped") for _, rows in found for row in rows] == [None] * 3 + [0] * 3
    assert [row["completions"] for row in found[1][1]] == [12, 24, 36]


def test_it_ends_when_every_prompt_has_had_its_turn(tmp_path, watch):
    sampled = watch(grpo, "sample")
    config = dynamic(tmp_path, prompts_per_step=5, beta=0.0)                     # 12 prompts: 5, 5 others, the last 2
    policy, (row,) = grpo.train(config, reward=hard())
    assert [len(prompts.texts) for (_, prompts, *_), _ in sampled] == [5, 5, 2]
    assert row["dropped"] == 7 and row["completions"] == 36 and row["equal_groups"] == 1
    assert tiny.same(state(policy), state(runs.load_model(config.sft, "GPT")))


def test_it_ends_after_so_many_rounds(tmp_path, watch, monkeypatch):
    sampled = watch(grpo, "sample")
    monkeypatch.setattr(grpo, "REFILLS", 2)
    _, rows = grpo.train(dynamic(tmp_path, prompts_per_step=2, steps=2), reward=hard())
    assert len(sampled) == 2 * 3 and [row["dropped"] for row in rows] == [4, 4]
    assert [row["completions"] for row in rows] == [18, 36]


def test_draws_depend_on_seed_step_and_round_alone(tmp_path, watch):
    sampled, generators = watch(grpo, "sample"), watch(grpo, "generator")
    grpo.train(dynamic(tmp_path, seed=3, steps=2, prompts_per_step=4), reward=hard())
    assert [arguments for arguments, _ in generators] == [
        each for step in (0, 1) for each in ((3, step), ("3 refill", step), ("3 refill 0", step), ("3 refill 1", step))]
    orders = [[text for (_, prompts, *_), _ in sampled[i + 1:i + 3] for text in prompts.texts] for i in (0, 3)]
    assert len(sampled) == 6 and orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    def reward(prompts, completions, **columns):
        return [float(len(text) > 8) for text in completions]
    whole, parts = (dynamic(tmp_path, run=str(tmp_path / name), steps=6, epochs=2) for name in ("a", "b"))
    policy, rows = grpo.train(whole, reward=reward)
    assert any(row["dropped"] > 0 for row in rows[:3]) and any(row["dropped"] > 0 for row in rows[3:])
    monkeypatch.setattr(runs, "SAVE_EVERY", 0)
    with pytest.raises(RuntimeError):
        grpo.train(parts, reward=stop_at(7, crash, reward))
    assert 0 < runs.load_checkpoint(tmp_path / "b/checkpoint.pt")["step"] < 6
    resumed, resumed_rows = grpo.train(dataclasses.replace(parts, resume=True), reward=reward)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert tiny.same(state(policy), state(resumed)) and resumed_rows[-1]["completions"] == rows[-1]["completions"]


@pytest.mark.parametrize("longer", ["old", "new"])
def test_rows_of_another_rollout_are_put_in_place(longer):
    def rollout(first, n, N):
        ids = torch.arange(first, first + n * N).view(n, N)
        return Rollout(ids, torch.ones(n, N).bool(), ids / 10, torch.arange(n) % 2 == 0)
    old, new = rollout(100, 4, 3 if longer == "old" else 2), rollout(200, 2, 2 if longer == "old" else 3)
    merged = old.with_rows(torch.tensor([3, 1]), new)
    assert merged.completion_ids.tolist() == (
        [[100, 101, 102], [202, 203, PAD], [106, 107, 108], [200, 201, PAD]] if longer == "old" else
        [[100, 101, PAD], [203, 204, 205], [104, 105, PAD], [200, 201, 202]])
    assert torch.equal(merged.mask, merged.completion_ids != PAD)
    assert torch.equal(merged.logprobs, merged.completion_ids.masked_fill(~merged.mask, 0) / 10)
    assert merged.finished.tolist() == [True, False, True, True] and old.completion_ids[1, 0] in (102, 103)
