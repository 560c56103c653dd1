"""Held to an implementation that is not ours: what GRPO hands to its optimizer is what TRL's trainers hand to theirs.

`variants.train` and `GRPOTrainer.train` run on the same weights, prompts, completions and rewards; each side tokenizes,
computes advantages, log-probabilities and KL, splits, and sums up for itself. Nothing is replaced but the sampling and
the optimizer, which notes the gradients and then moves the weights to where both sides are to be next. So in four
updates, two on each of two batches, the ratio is 1 and then not, and the reference is the policy and then not.

TRL's head is float32 whatever the model is. Gradients may differ by ROUNDING times an update's largest entry: measured
were 5e-6, and either side is up to 6e-6 from our gradient in float64. Wrong variants are 1000 times as far off. TRL
has more that is not here: masks by drift; its bonus for entropy is exact, ours an estimate. Skipped where
TRL is not installed; written for 1.16.
"""
import copy

import pytest
import torch

for package in "trl", "datasets", "safetensors":
    pytest.importorskip(package)

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl.rewards import get_soft_overlong_punishment  # noqa: E402
from trl.trainer import grpo_trainer  # noqa: E402

from grpo_min import grpo, variants  # noqa: E402
from grpo_min.model import GPT  # noqa: E402
from grpo_min.real import names  # noqa: E402
from grpo_min.real.export import export  # noqa: E402
from grpo_min.real.load import load  # noqa: E402
from grpo_min.rollout import Prompts, Rollout, pad  # noqa: E402
from tests import real_models, tiny  # noqa: E402

# TRL's loss_type: our options, and by what a token's loss is divided in the update of a batch of B completions and T
# tokens. n: tokens of the token's completion; t: of its part, where a batch is computed in several. LONGEST:
# max_completion_length, our max_new_tokens.
LOSSES = {
    "grpo": dict(aggregation="sequence"),                       # B n
    "bnpo": dict(aggregation="token"),                          # t, times the parts of an update
    "dapo": dict(aggregation="token"),                          # T: with several parts not ours
    "dr_grpo": dict(aggregation="constant"),                    # B LONGEST
    "luspo": dict(aggregation="sum"),                           # B
    "cispo": dict(aggregation="token", ratio="cispo"),          # T: with several parts not ours
    "sapo": dict(aggregation="sequence", ratio="sapo"),         # B n
    "vespo": dict(aggregation="token", ratio="vespo"),          # T: with several parts not ours
}
SCALES = {"none": dict(), "group": dict(scale_advantages=True), "batch": dict(advantage="batch_scaled")}
LEVELS = "token", "sequence"            # TRL's importance_sampling_level, and our ratio of the same name
OWN = "cispo", "sapo", "vespo"          # losses with a ratio of their own: here with the tokens' alone


def clipping(loss_type, low, high):
    """(our bounds, TRL's). Its CISPO clips weights from above alone, and at epsilon_high, not 1 more. 0: as low."""
    if loss_type == "cispo":
        return dict(clip_eps=1.0, clip_eps_high=high or low), dict(epsilon_high=1 + (high or low))
    return dict(clip_eps=low, clip_eps_high=high), dict(epsilon=low, epsilon_high=high or None)


ROUNDING, Q, G, LONGEST, BETA, TEMPERATURE = 1e-5, 4, 4, 8, 0.3, 0.7
B, LENGTHS = Q * G, [1, 4, 6, 6, 2, 6, 3, 5, 6, 6, 1, 1, 4, 2, 6, 5]
REWARDS = torch.randn(B, generator=torch.Generator().manual_seed(3)).tolist()
RAGGED = ["a cow", "what does a cow eat?", "12345", "start with 3, plus 6."]
EVEN = ["12", "34", "56", "78"]
WORDS = {True: names.GPT2, False: names.LLAMA}


class Watched(torch.optim.SGD):
    """Notes what read() returns when it is to step, and then has the model take the next of some weights."""

    def __init__(self, model, weights, read):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.weights, self.read, self.found = model, iter(weights), read, []

    def step(self, closure=None):
        self.found.append(self.read())
        self.model.load_state_dict(next(self.weights), strict=False)


class Pair:
    """A model of ours and its export, and gradients of both: a list with a dict {our parameter: gradient} an update."""

    def __init__(self, model, folder, monkeypatch, prompts=RAGGED):
        self.model, self.folder, self.patch, self.prompts = model, folder, monkeypatch, prompts
        self.words = WORDS[type(model) is GPT]
        export(model, folder)
        self.places, draw = [], torch.Generator().manual_seed(1)
        for _ in range(4):
            self.places.append({name: weight + 0.04 * torch.randn(weight.shape, generator=draw)
                                for name, weight in model.state_dict().items()})
        ids = torch.randint(3, 420, (B, max(LENGTHS)), generator=torch.Generator().manual_seed(2)).tolist()
        self.completions = [row[:n] for row, n in zip(ids, LENGTHS)]
        self.rows = []

    def ours(self, parts={}, rewards=REWARDS, **settings):
        """What variants.train hands to its optimizer. parts: functions in place of its own; self.rows: its metrics."""
        model = copy.deepcopy(self.model)
        ids, length = pad(self.completions, model.tokenizer.pad)
        mask = torch.arange(ids.shape[1]) < length[:, None]

        def collect(config, policy, *_):
            ended = torch.tensor([row[-1] == model.tokenizer.end for row in self.completions])
            rollout = Rollout(ids, mask, torch.zeros(ids.shape), ended)
            prompts = Prompts.from_texts(self.prompts, model.tokenizer)
            return [dict(prompt=text) for text in self.prompts], prompts, rollout, torch.tensor(rewards), ["text"] * B
        watched = Watched(model, self.places, lambda: {
            name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        self.patch.setattr(grpo, "optimizer_for", lambda policy, lr: watched)
        self.patch.setattr(grpo, "collect", collect)
        config = tiny.settings(variants, self.folder, **dict(
            steps=2, epochs=2, prompts_per_step=Q, group_size=G, max_new_tokens=LONGEST, temperature=TEMPERATURE,
            beta=0.0, max_grad_norm=1e9) | settings | dict(dynamic_sampling=False))
        self.rows = variants.train(config, model=model, reward=tiny.letter_e, **parts)[1]
        return watched.found

    def theirs(self, trainer=GRPOTrainer, minibatches=1, microbatches=1, epochs=2, rewards=lambda **_: REWARDS,
               **options):
        """What a trainer of TRL hands to its optimizer."""
        model, parts = AutoModelForCausalLM.from_pretrained(self.folder), minibatches * microbatches
        weights, twin = [], copy.deepcopy(self.model)
        for place in self.places:
            twin.load_state_dict(place)
            weights.append(names.named(twin, self.words))

        def read():
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            return {ours: torch.cat([names.turned(name, found[name]) for name in names.their_names(ours, self.words)])
                    for ours, _ in self.model.named_parameters()}
        watched = Watched(model, weights, read)
        settings = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer](
            output_dir=str(self.folder / "out"), max_steps=2 * epochs * minibatches, num_iterations=epochs,
            per_device_train_batch_size=B // parts, steps_per_generation=parts, num_generations=G,
            gradient_accumulation_steps=microbatches, max_completion_length=LONGEST, temperature=TEMPERATURE,
            shuffle_dataset=False, max_grad_norm=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, **options)
        rows = [dict(prompt=[dict(role="user", content=text)]) for text in self.prompts]
        trainer = trainer(model=model, reward_funcs=rewards, args=settings, optimizers=(watched, None),
                          processing_class=AutoTokenizer.from_pretrained(self.folder),
                          train_dataset=Dataset.from_list(rows))
        sampled = (self.completions, None) if type(trainer) is GRPOTrainer else self.completions
        self.patch.setattr(trainer, "_generate_single_turn", lambda *_: sampled)
        trainer.train()
        return watched.found


def difference(some, others):
    """The largest difference of any entry in any update, as a share of the update's largest entry."""
    assert len(some) == len(others) > 1
    found = []
    for a, b in zip(some, others):
        assert a.keys() == b.keys()
        largest = max(gradient.abs().max() for gradient in a.values())
        found.append(max((a[name] - b[name]).abs().max() for name in a) / largest)
    return max(found)


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A Llama, and prompts of different lengths."""
    real_models.save(tmp_path / "in")
    return Pair(load(str(tmp_path / "in")), tmp_path / "out", monkeypatch)


def clips_both_ways(pair):
    return all(pair.rows[-1][name] > 0.01 for name in ("clip_low", "clip_high"))


# --- the loss -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta, low, high", [(0.0, 0.2, 0.0), (BETA, 0.1, 0.3)])
@pytest.mark.parametrize("loss_type, level", [(name, level) for name in LOSSES for level in LEVELS
                                              if name not in OWN or level == "token"])
def test_gradients_are_those_of_trl(loss_type, level, beta, low, high, llama):
    bounds, theirs = clipping(loss_type, low, high)
    ours = llama.ours(beta=beta, **dict(ratio=level) | LOSSES[loss_type], **bounds)
    assert clips_both_ways(llama) or loss_type in OWN
    theirs = llama.theirs(loss_type=loss_type, importance_sampling_level=level, beta=beta, use_bias_correction_kl=False,
                          scale_rewards="none", **theirs)
    assert difference(ours, theirs) < ROUNDING


def test_wrong_variants_are_told_apart(llama):
    theirs = llama.theirs(loss_type="dapo", beta=BETA, use_bias_correction_kl=False, scale_rewards="none", epsilon=0.1,
                          epsilon_high=0.3)
    right = dict(aggregation="token", beta=BETA, clip_eps=0.1, clip_eps_high=0.3)
    assert difference(llama.ours(**right), theirs) < ROUNDING
    for wrong in [dict(aggregation="sequence"), dict(aggregation="constant"), dict(aggregation="sum"),
                  dict(aggregation="prompt"), dict(ratio="sequence"), dict(ratio="cispo"), dict(ratio="sapo"),
                  dict(ratio="vespo"), dict(kl="unbiased"), dict(entropy_coef=0.3), dict(clip_max=1.31),
                  dict(clip_eps_high=0.0), dict(clip_eps=0.3), dict(beta=0.2), dict(kl="k1"), dict(kl="k2"),
                  dict(kl="k1", kl_in="reward"), dict(temperature=1.0), dict(scale_advantages=True),
                  dict(advantage="leave_one_out"),
                  dict(parts=dict(kl=lambda *arguments: -grpo.kl_estimate(*arguments)))]:
        assert difference(llama.ours(**right | wrong), theirs) > 1000 * ROUNDING, wrong


@pytest.mark.parametrize("loss_type, beta", [("dapo", BETA), ("grpo", 1.0), ("cispo", BETA), ("vespo", BETA)])
def test_the_unbiased_kl_is_trls_default(loss_type, beta, llama):
    """The KL times the token's ratio, through which it has a gradient too, at a ratio of 1 as well."""
    ours, theirs = clipping(loss_type, 0.1, 0.3)
    ours, theirs = dict(beta=beta, **LOSSES[loss_type], **ours), dict(beta=beta, loss_type=loss_type, **theirs)
    found = llama.theirs(scale_rewards="none", **theirs)
    assert difference(llama.ours(kl="unbiased", **ours), found) < ROUNDING
    assert difference(llama.ours(**ours), found) > 1000 * ROUNDING


def test_trls_default_with_a_ratio_of_sequences_is_not_here(llama):
    """It takes the sequence's ratio there, whose gradient is not that of a token's KL."""
    found = llama.theirs(loss_type="grpo", importance_sampling_level="sequence", beta=BETA, scale_rewards="none")
    ours = llama.ours(aggregation="sequence", ratio="sequence", beta=BETA, kl="unbiased")
    assert difference(ours, found) > 1000 * ROUNDING


@pytest.mark.parametrize("level", LEVELS)
def test_two_sided_clip_is_that_of_trl(level, llama):
    ours = dict(aggregation="sequence", ratio=level, clip_eps=0.02, clip_eps_high=0.03)
    theirs = llama.theirs(loss_type="grpo", importance_sampling_level=level, scale_rewards="none", epsilon=0.02,
                          epsilon_high=0.03, delta=1.05)
    assert difference(llama.ours(**ours, clip_max=1.05), theirs) < ROUNDING
    assert difference(llama.ours(**ours), theirs) > 1000 * ROUNDING


# --- advantages ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_those_of_trl(scale, llama):
    theirs = llama.theirs(scale_rewards=scale, loss_type="bnpo")
    assert difference(llama.ours(aggregation="token", **SCALES[scale]), theirs) < ROUNDING


def test_the_batchs_deviation_is_not_that_of_reinforce_plus_plus(llama):
    """scale_rewards `batch` divides by the batch's standard deviation, but takes off the mean of the group."""
    theirs = llama.theirs(scale_rewards="batch", loss_type="bnpo")
    assert difference(llama.ours(aggregation="token", advantage="batch"), theirs) > 1000 * ROUNDING


def test_several_rewards_are_scaled_as_in_trl(llama):
    others = torch.randn(B, generator=torch.Generator().manual_seed(4)).mul(30).tolist()
    functions = [lambda *_, **columns: REWARDS, lambda *_, **columns: others]
    parts = variants.gdpo((functions[0], 1.0), (functions[1], 0.4))
    rewards = parts.pop("reward")(["?"] * B, ["text"] * B)
    theirs = llama.theirs(loss_type="bnpo", rewards=functions, reward_weights=[1.0, 0.4],
                          multi_objective_aggregation="normalize_then_sum")
    assert difference(llama.ours(parts, rewards, aggregation="token"), theirs) < ROUNDING
    assert difference(llama.ours({}, rewards, aggregation="token", scale_advantages=True), theirs) > 1000 * ROUNDING


# --- completions that are too long --------------------------------------------------------------------------------

def test_penalty_for_length_is_that_of_trl(llama):
    """8 tokens at most, the last 4 of them in the buffer: 5 and 6 tokens cost 1 / 4 and 1 / 2."""
    theirs = llama.theirs(epsilon_high=0.28, rewards=[lambda **_: REWARDS, get_soft_overlong_punishment(LONGEST, 4)])
    ours = variants.RECIPES["dapo"] | dict(overlong_buffer=4 / LONGEST)
    assert difference(llama.ours(**ours), theirs) < ROUNDING
    assert difference(llama.ours(**ours | dict(overlong_buffer=0.0)), theirs) > 1000 * ROUNDING


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_what_was_cut_is_left_out_as_in_trl(loss_type, llama):
    for row in llama.completions[1::2]:
        row[-1] = llama.model.tokenizer.end
    theirs = llama.theirs(loss_type=loss_type, scale_rewards="none", mask_truncated_completions=True)
    assert difference(llama.ours(**LOSSES[loss_type], mask_cut=True), theirs) < ROUNDING
    assert difference(llama.ours(**LOSSES[loss_type]), theirs) > 1000 * ROUNDING


@pytest.mark.parametrize("loss_type", LOSSES)
def test_tokens_of_the_highest_entropy_are_those_of_trl(loss_type, llama):
    """With one update of a batch: in a second one TRL asks for the entropies of then."""
    bounds, options = clipping(loss_type, 0.2, 0.0)
    theirs = llama.theirs(loss_type=loss_type, scale_rewards="none", beta=BETA, use_bias_correction_kl=False, epochs=1,
                          top_entropy_quantile=0.3, **options)
    ours = dict(beta=BETA, epochs=1, **LOSSES[loss_type], **bounds)
    assert difference(llama.ours(**ours, top_entropy=0.3), theirs) < ROUNDING
    for wrong in 1.0, 0.5, 0.2:
        assert difference(llama.ours(**ours, top_entropy=wrong), theirs) > 1000 * ROUNDING


# --- updates in parts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", ["minibatches", "microbatches"])
@pytest.mark.parametrize("loss_type", [*LOSSES])
def test_parts_of_a_batch(loss_type, parts, llama, monkeypatch):
    """Ours are whole groups, theirs random rows: here they are not shuffled. Minibatches are an update each,
    microbatches are parts of one. Our minibatches count their own tokens, as bnpo's; in dapo, cispo and vespo the
    tokens of all count, so that a minibatch weighs as much as it has of them, and microbatches change nothing. Where
    ours would have to count their own tokens they are refused; bnpo's do, and so are not the whole batch's gradient.
    """
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda rows: rows)
    bounds, options = clipping(loss_type, 0.2, 0.0)
    settings, halves = LOSSES[loss_type] | bounds, {parts: 2, "epochs": 1 if parts == "minibatches" else 2}
    theirs = llama.theirs(loss_type=loss_type, scale_rewards="none", **options, **halves)
    if parts == "microbatches" and settings["aggregation"] == "token":
        whole = difference(llama.ours(**settings), theirs)
        assert whole > 1000 * ROUNDING if loss_type == "bnpo" else whole < ROUNDING
        return
    ours = llama.ours(**settings, **halves)
    if loss_type in ("dapo", "cispo", "vespo"):
        assert difference(ours, theirs) > 1000 * ROUNDING
        for update, gradients in enumerate(ours):
            half = LENGTHS[B // 2:] if update % 2 else LENGTHS[:B // 2]
            for gradient in gradients.values():
                gradient *= 2 * sum(half) / sum(LENGTHS)
    assert difference(ours, theirs) < ROUNDING


# --- recipes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options", [
    ("grpo", dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False)),
    ("dapo", dict(epsilon_high=0.28)),          # without dynamic sampling, which TRL does not have; none is too long
    ("dr_grpo", dict(loss_type="dr_grpo", scale_rewards="none")),
    ("gspo", dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4)),
    ("cispo", dict(loss_type="cispo", epsilon_high=4.0)),
    ("sapo", dict(loss_type="sapo")),
    ("luspo", dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3)),
    ("vespo", dict(loss_type="vespo")),
])
def test_recipes_are_these_options_of_trl(name, options, llama):
    assert difference(llama.ours(**variants.RECIPES[name]), llama.theirs(**options)) < ROUNDING


def test_trls_defaults(llama):
    """As notebook 04 says: scaled by the group, the mean over all tokens, no KL; if there is, k3 times the ratio."""
    ours = dict(scale_advantages=True, aggregation="token")
    assert difference(llama.ours(**ours, beta=0.0), llama.theirs()) < ROUNDING
    assert difference(llama.ours(**ours, beta=BETA, kl="unbiased"), llama.theirs(beta=BETA)) < ROUNDING


def test_scalerl_is_that_of_trl_but_for_the_mean_over_prompts(llama):
    theirs = llama.theirs(loss_type="cispo", epsilon_high=5.0, scale_rewards="batch")
    assert difference(llama.ours(**variants.RECIPES["scalerl"] | dict(aggregation="token")), theirs) < ROUNDING
    assert difference(llama.ours(**variants.RECIPES["scalerl"]), theirs) > 1000 * ROUNDING


def test_rloo_is_that_of_trl_for_one_update_of_a_batch(llama):
    """Leave one out, and k1 in the reward. Further updates differ: TRL clips one ratio, the product of the tokens'."""
    ours, theirs = dict(variants.RECIPES["rloo"], beta=BETA), dict(trainer=RLOOTrainer, beta=BETA)
    assert difference(llama.ours(**ours, epochs=1), llama.theirs(**theirs, epochs=1)) < ROUNDING
    assert difference(llama.ours(**ours), llama.theirs(**theirs)) > 1000 * ROUNDING


# --- the model ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts", [EVEN, RAGGED], ids=["even", "ragged"])
def test_learned_positions_take_prompts_of_one_length(prompts, tmp_path, monkeypatch):
    """TRL pads the shorter ones on the left, and its forward counts the padding as positions."""
    pair = Pair(real_models.randomised(tiny.gpt()), tmp_path / "out", monkeypatch, prompts)
    lengths = {len(tiny.TOKENIZER.encode_prompt(text)) for text in prompts}
    assert (len(lengths) == 1) == (prompts is EVEN)
    found = difference(pair.ours(aggregation="token"), pair.theirs(scale_rewards="none"))
    assert found < ROUNDING if prompts is EVEN else found > 1000 * ROUNDING
