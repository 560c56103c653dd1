"""Every stage whole on the pretend card of grpo_min/lab/pretend.py: the rows of metrics are the CPU's to the bit.

Where a line of the package mixes tensors of the CPU with the card's, or makes a float64 one there, as no card or not
every card allows, these fail. The card's own refusals, and its count of waits, are tested first.
"""
import copy
import dataclasses
import functools
import io
import re
import signal
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_min import critic, dpo, evaluate, grpo, ppo, pretrain, reward_model, sample, sft, variants
from grpo_min.lab.pretend import CAN_PRETEND, pretend_card
from grpo_min.lab.studies import recipes_one_update
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned
from grpo_min.rollout import Prompts
from grpo_min.run import fast
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import UserError
from grpo_min.run.data import read_jsonl
from tests import tiny

pytestmark = [pytest.mark.skipif(not CAN_PRETEND, reason="this torch has no devices made of Python"),
              pytest.mark.usefixtures("no_curves")]
STAGES = [critic, dpo, evaluate, grpo, ppo, pretrain, reward_model, sample, sft]


@pytest.fixture
def card():
    with pretend_card() as card:
        yield card


@pytest.fixture
def compute_on(monkeypatch):
    """compute_on(device): every stage picks this one, whatever its config says."""
    def compute_on(device):
        for stage in STAGES:
            monkeypatch.setattr(stage, "pick_device", lambda name: torch.device(device))
    return compute_on


@pytest.fixture
def on_both(card, compute_on):
    """on_both(work) -> what work() returns on the CPU, and on the card."""
    def on_both(work):
        compute_on("cpu")
        expected = work()
        assert not card.waits
        compute_on(card.device)
        found = work()
        assert card.waits, "or it was not on the card"
        return expected, found
    return on_both


# --- the card -----------------------------------------------------------------------------------------------------

OPERATIONS = dict(
    add=lambda x, y: x + y, cat=lambda x, y: torch.cat([x, y]), matmul=lambda x, y: x @ y.T,
    where=lambda x, y: torch.where(x > 2, x, y), in_place=lambda x, y: x.mul_(y), out=lambda x, y: torch.exp(x, out=y),
    index=lambda x, y: x[y[0].long()], put=lambda x, y: x.index_put_((x[0].long(),), y[:1]))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_tensors_of_the_cpu_do_not_meet_the_card_s(operation, card):
    x = torch.tensor([[1.0, 0, 1], [3, 4, 5]])
    operation(x.clone(), x.clone())
    operation(x.to(card.device), x.to(card.device))
    for pair in (x.to(card.device), x), (x, x.to(card.device)):
        with pytest.raises(RuntimeError, match="same device"):
            operation(*pair)


def test_numbers_meet_the_card_s_tensors_and_copies_cross(card):
    x = torch.arange(3.0, device=card.device)
    assert x.device.type == "card" and x.shape == (3,)
    assert (x + torch.tensor(2.0)).tolist() == [2, 3, 4] and (1 - x).tolist() == [1, 0, -1]
    assert x.cpu().device.type == "cpu" and x.new_zeros(2).device == torch.zeros_like(x).device == x.device
    x.copy_(torch.tensor([5, 6, 7]))
    there = torch.zeros(3)
    assert there.copy_(x) is there and there.device.type == "cpu" and there.tolist() == [5, 6, 7]


def test_the_card_has_no_float64(card):
    x, precise = torch.ones(2, device=card.device), torch.ones(2, dtype=torch.float64)
    for make in [x.double, lambda: precise.to(x.device), lambda: torch.zeros(2, dtype=precise.dtype, device=x.device),
                 lambda: torch.tensor([1.0], dtype=precise.dtype, device=x.device), lambda: x.to(precise.dtype),
                 lambda: torch.nn.Linear(2, 2).double().to(x.device)]:
        with pytest.raises(TypeError, match="float64"):
            make()
    assert precise.to(x).dtype == precise.to(card.device, torch.float32).dtype == torch.float32
    assert x.cpu().double().dtype == x.to("cpu", torch.float64).dtype == torch.float64


WAITING = dict(
    item=lambda x: x[0].item(), float=lambda x: float(x[0]), bool=lambda x: bool((x > 0).all()),
    nonzero=lambda x: x.nonzero(), mask=lambda x: x[x > 1], masked_select=lambda x: x.masked_select(x > 1),
    put_by_mask=lambda x: x.index_put_((x > 1,), x[:1]), cpu=lambda x: x.cpu(), tolist=lambda x: x.tolist(),
    copy=lambda x: torch.zeros(3).copy_(x), equal=lambda x: torch.equal(x, x), format=lambda x: f"{x[0]}")
NOT_WAITING = dict(
    compute=lambda x: (x * 2 + 1).exp().sum(), mask=lambda x: x.masked_fill(x > 1, 0), numbers=lambda x: x[0] * 2 - 1,
    scatter=lambda x: x.masked_scatter(x > 1, x), make=lambda x: torch.zeros(3, device=x.device),
    where=lambda x: torch.where(x > 1, x, 0.0), elsewhere=lambda x: x.new_zeros(3, device="cpu"),
    shape=lambda x: len(x) + x.numel(), index=lambda x: x[x.long()])


@pytest.mark.parametrize("look", WAITING.values(), ids=WAITING)
def test_looking_at_what_is_on_the_card_is_a_wait(look, card):
    x = torch.arange(3.0).to(card.device)
    card.waits.clear()
    look(x)
    assert card.waits.total() == 1


@pytest.mark.parametrize("work", NOT_WAITING.values(), ids=NOT_WAITING)
def test_work_of_the_card_alone_is_no_wait(work, card):
    x = torch.arange(3.0).to(card.device)
    card.waits.clear()
    work(x)
    assert not card.waits


def test_a_wait_is_counted_where_the_package_waits(card, root):
    grpo.group_advantages(torch.ones(4, device=card.device), 2)
    assert [kind for kind, _ in card.waits] == ["to the CPU", "from the CPU"] and set(card.waits.values()) == {1}
    for (_, place), word in zip(card.waits, ["rewards.cpu()", ".to(rewards)"]):
        file, line = place.split(":")
        assert word in (root / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_gradients_wait_where_they_are_asked_for(card):
    """In this thread: of a mask the gradient is a wait, too."""
    x, mask = torch.ones(3, device=card.device, requires_grad=True), torch.arange(3, device=card.device) > 0
    for forward in lambda: x[mask], lambda: torch.zeros_like(x).masked_scatter(mask, x):
        result = forward().sum()
        card.waits.clear()
        result.backward()
        assert card.waits == {("mask", ""): 1}


def test_gradients_updates_and_checkpoints_are_the_cpu_s(card):
    """Also that a copy has weights of its own, and that what is saved needs no card."""
    states = []
    for device in "cpu", card.device:
        model = tiny.gpt().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            model.plain(torch.arange(12, device=device).view(2, 6)).log_softmax(-1)[..., 7].sum().backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        states.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert tiny.same(*states)
    before, twin = model.state_dict()["norm.weight"].cpu(), copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.add_(1)
    assert twin.norm.weight.requires_grad and torch.equal(model.norm.weight.cpu(), before)
    optimizer.load_state_dict(states[0][1])
    assert tiny.same(states[0][1]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"].cpu())


# --- the supervised stages ----------------------------------------------------------------------------------------

def pretrained(folder):
    return pretrain.train(pretrain.PretrainConfig(
        run="", text=tiny.text_file(folder / "text.txt"), layers=1, heads=2, width=16, context=16, batch_size=4,
        steps=4, warmup=2, device="cpu"))


def fine_tuned(folder):
    return sft.train(sft.SFTConfig(
        run="", base=tiny.checkpoint(folder / "base.pt"), demonstrations=tiny.demonstrations(folder / "sft.jsonl"),
        batch_size=5, steps=4, warmup=2, device="cpu"))


def taught_choices(folder):
    path = tiny.preferences(folder / "pairs.jsonl")
    model, rows = reward_model.train(reward_model.RewardModelConfig(
        run="", sft=tiny.checkpoint(folder / "sft.pt"), preferences=path, batch_size=5, steps=4, warmup=2,
        device="cpu"))
    return model, [*rows, reward_model.judge(model, read_jsonl(path, ["prompt"]))]


def preferring(folder):
    return dpo.train(dpo.DPOConfig(
        run="", sft=tiny.checkpoint(folder / "sft.pt"), preferences=tiny.preferences(folder / "pairs.jsonl"),
        batch_size=5, steps=4, warmup=2, device="cpu"))


def taught_values(folder):
    model, figures, rows = critic.train(critic.CriticConfig(
        run="", sft=tiny.checkpoint(folder / "sft.pt"), prompts=tiny.prompts(folder / "prompts.jsonl"), steps=6,
        batches=3, prompts_per_step=8, warmup=2, max_new_tokens=6, device="cpu"), reward=tiny.letter_e)
    return model, [*rows, figures]


@pytest.mark.parametrize("stage", [pretrained, fine_tuned, taught_choices, preferring, taught_values])
def test_a_supervised_stage_runs_whole(stage, on_both, tmp_path):
    (model, expected), (ours, rows) = on_both(lambda: stage(tmp_path))
    assert tiny.same(tiny.without_clock(rows), tiny.without_clock(expected))
    assert {parameter.device.type for parameter in ours.parameters()} == {"card"}
    assert tiny.same(ours.cpu().state_dict(), model.state_dict())


# --- GRPO, PPO and the variants -----------------------------------------------------------------------------------

def many(folder):
    """A critic of its own, several updates and a KL in the reward; and everything that PPO alone can do."""
    return dict(critic=tiny.critic_checkpoint(folder / "critic.pt"), whiten=True, value_clip=0.2, critic_epochs=2,
                critic_minibatches=2, epochs=2, minibatches=2, kl="k1", kl_in="reward")


RUNS = {
    "GRPO": (grpo, {}), "PPO": (ppo, {}), "PPO, all of it": (ppo, many), "GRPO, no KL": (grpo, dict(beta=0.0)),
    "GRPO, minibatches": (grpo, dict(epochs=2, minibatches=2, scale_advantages=True)),
    "GRPO, microbatches": (grpo, dict(microbatches=2, beta=0.1)), "PPO, microbatches": (ppo, dict(microbatches=4)),
    "GRPO, KL in the reward": (grpo, dict(kl="k1", kl_in="reward", epochs=2)),
    "PPO, ruler": (ppo, dict(steps=20, prompts_per_step=2, max_new_tokens=4)),
    **{recipe: (variants, dict(settings, epochs=2)) for recipe, settings in variants.RECIPES.items()},
}


@pytest.mark.parametrize("loop, more", RUNS.values(), ids=RUNS)
def test_a_loop_runs_whole(loop, more, on_both, tmp_path):
    config = tiny.settings(loop, tmp_path, **(more(tmp_path) if callable(more) else more))
    (policy, expected), (ours, rows) = on_both(lambda: loop.train(config, reward=tiny.letter_e))
    assert tiny.same(tiny.without_clock(rows), tiny.without_clock(expected)) and len(rows) == config.steps
    assert tiny.same(ours.cpu().state_dict(), policy.state_dict())
    assert "recipe" not in vars(config) or config.dynamic_sampling == any(row.get("dropped", 0) for row in rows)
    assert config.steps < 20 or rows[-1]["explainable_variance"] != ""


@tiny.LOOPS
def test_a_learned_reward(loop, on_both, tmp_path):
    config = tiny.settings(loop, tmp_path, reward="learned",
                           reward_model=tiny.reward_checkpoint(tmp_path / "reward_model.pt"))
    (_, expected), (_, rows) = on_both(lambda: loop.train(config))
    assert tiny.without_clock(rows) == tiny.without_clock(expected) and len({row["reward"] for row in rows}) == 3


def test_a_learned_reward_s_scores(card, tmp_path):
    path = tiny.reward_checkpoint(tmp_path / "reward_model.pt")
    expected, scores = [learned(load_model(path, device, ScalarGPT), batch_size=2)(tiny.PROMPTS[:5], list("abcde"))
                        for device in ("cpu", card.device)]
    assert scores == expected and len(set(scores)) == 5


def test_the_oracle(on_both, tmp_path):
    config, seen = tiny.settings(ppo, tmp_path, critic_epochs=0), []

    def advantage(rewards, values, *rest):
        seen.append(values.cpu())
        return ppo.gae(rewards, values, *rest)
    oracle = functools.partial(critic.Oracle, reward=tiny.letter_e, copies=2)
    (_, expected), (_, rows) = on_both(lambda: ppo.train(config, reward=tiny.letter_e, advantage=advantage,
                                                         start_critic=oracle))
    assert tiny.without_clock(rows) == tiny.without_clock(expected)
    assert tiny.same(seen[:3], seen[3:]) and all((values != 0).any() for values in seen)


@tiny.LOOPS
def test_the_decoder_that_graphs_record(loop, on_both, tmp_path, monkeypatch):
    """Its steps are run in place of being recorded; it samples what the other one does."""
    used = []

    def by_decoder(policy, prompts, uniforms, temperature, choose):
        used.append(uniforms.device.type)
        B, N = uniforms.shape
        decoder = fast.graph_decoder(policy, len(prompts.ids), B // len(prompts.ids), N, temperature, choose)
        return decoder.sample(prompts, uniforms)
    config = tiny.settings(loop, tmp_path, max_new_tokens=12)
    plain = loop.train(config, reward=tiny.letter_e)[1]
    monkeypatch.setattr(fast, "sample", by_decoder)
    (_, expected), (_, rows) = on_both(lambda: loop.train(config, reward=tiny.letter_e))
    assert tiny.without_clock(rows) == tiny.without_clock(expected) and used == ["cpu"] * 3 + ["card"] * 3
    assert [row["length"] for row in rows] == [row["length"] for row in plain]


@tiny.LOOPS
def test_a_resumed_run_goes_on_with_the_same_bits(loop, card, compute_on, tmp_path):
    """Stopped and resumed on the card; and what the card has saved is what the CPU has saved."""
    def stopping(prompts, completions, calls=[], **columns):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return tiny.letter_e(prompts, completions)
    config = tiny.settings(loop, tmp_path, run=str(tmp_path / "again"), steps=4)
    compute_on(card.device)
    with pytest.raises(UserError, match="Ctrl-C"):
        loop.train(config, reward=stopping)
    loop.train(dataclasses.replace(config, resume=True), reward=tiny.letter_e)
    for name, device in ("whole", card.device), ("cpu", "cpu"):
        compute_on(device)
        loop.train(dataclasses.replace(config, run=str(tmp_path / name)), reward=tiny.letter_e)
        tiny.assert_same_run(tmp_path / "again", tmp_path / name)


# --- what is done with a policy -----------------------------------------------------------------------------------

@pytest.mark.parametrize("domain", ["arithmetic", "animals"])
def test_an_evaluation(domain, on_both, tmp_path, capsys):
    path, other = tiny.checkpoint(tmp_path / "policy.pt"), tiny.checkpoint(tmp_path / "other.pt", seed=1)
    words = ["--checkpoint", path, "--opponent", other, "--domain", domain, "--prompts", "3", "--max-new-tokens", "6"]
    on_both(lambda: evaluate.main(words))
    first, second = capsys.readouterr().out.split(path)[1:]
    assert first == second and "truncated" in first


def test_answers_with_scores(on_both, tmp_path, capsys):
    words = ["--checkpoint", tiny.checkpoint(tmp_path / "policy.pt"), "--prompt", "a cow", "--max-new-tokens", "6",
             "--reward-model", tiny.reward_checkpoint(tmp_path / "reward_model.pt")]
    on_both(lambda: sample.main(words))
    said = capsys.readouterr().out
    assert said.count("(score ") == 4 and said[:len(said) // 2] == said[len(said) // 2:]


def test_the_recipes_gradients(card):
    found = []
    for device in "cpu", card.device:
        policy = tiny.gpt().to(device)
        prompts = Prompts.from_texts(tiny.PROMPTS[:3], policy.tokenizer, device)
        rollout = grpo.sample(policy, prompts, 4, 6, 1.0, torch.Generator().manual_seed(0))
        rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1], device=device)
        cosines, left_out = recipes_one_update.compare_recipes(policy, prompts, rollout, rewards, 4)
        found.append([list(map(torch.from_numpy, cosines)), left_out])
    assert tiny.same(*found)


# --- Apple's GPU --------------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.names.add(str(operation).removeprefix("aten.").removesuffix(".default"))
        return operation(*arguments, **(keywords or {}))


def test_every_operation_of_a_step_has_a_kernel_on_apples_gpu(tmp_path):
    """By torch's own table of kernels. Attention alone is another operation there: the CPU's has one of its own."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {re.match(r"[\w.]+", entry)[0]: entry for entry in table.read_text("utf-8").split("\n- func: ")[1:]}

    def runs_there(name):
        entry = entries[name]
        if "structured_delegate: " in entry:
            entry = entries[re.search(r"structured_delegate: (\S+)", entry)[1]]
        return "dispatch:" not in entry or "MPS" in entry or "Composite" in entry
    with Operations() as operations, torch.autograd.set_multithreading_enabled(False):
        for loop in grpo, ppo:
            loop.train(tiny.settings(loop, tmp_path, steps=2), reward=tiny.letter_e)
    names = {name for name in operations.names if not name.startswith("profiler.")}
    assert not runs_there("_scaled_dot_product_flash_attention_for_cpu") and len(names) > 100
    assert {name for name in names if not runs_there(name)} == {
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
