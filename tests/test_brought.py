"""What people bring: files as other programs save them, formats of other projects, rewards that do not judge
everything, more steps than were planned, and learning rates that blow up.
"""
import json
import re

import numpy as np
import pytest
import torch

from grpo_min import critic, evaluate, grpo, ppo, pretrain, reward_model, sft, variants
from grpo_min.grpo import group_advantages
from grpo_min.lab import compare
from grpo_min.rewards import correct, numbers, score, weighted_sum, well_formed
from grpo_min.rollout import Prompts, Rollout, sample
from grpo_min.run.config import UserError, run_command
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.data import read_jsonl
from grpo_min.run.formats import FORMATS
from grpo_min.run.table import read_csv
from tests import tiny
from tests.tiny import LOOPS, TOKENIZER, letter_e, settings

pytestmark = pytest.mark.usefixtures("no_curves")


# --- files --------------------------------------------------------------------------------------------------------

ROWS = [dict(prompt="2 plus 3", answer="5"), dict(prompt="2 plus 4", answer="6")]
LINES = [json.dumps(row).encode() for row in ROWS]
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content", [
    b"\n".join(LINES), b"\n".join(LINES) + b"\n\n\n", b"\n\n".join(LINES), BOM + b"\n".join(LINES),
    b"\r\n".join(LINES) + b"\r\n \r\n", BOM + b"\r\n" + b"\r\n".join(LINES),
    BOM + LINES[0] + b"\n" + BOM + LINES[1]],
    ids=["plain", "empty lines at the end", "empty lines between", "byte order mark", "CRLF",
         "an empty line with a mark", "two files in one"])
def test_lines_as_people_save_them(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert read_jsonl(tmp_path / "rows.jsonl", ["prompt", "answer"]) == ROWS


def test_a_bad_line_keeps_its_number_behind_empty_ones(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n" + LINES[0] + b"\n\n{\n")
    with pytest.raises(UserError, match="line 5: not JSON"):
        read_jsonl(tmp_path / "rows.jsonl", ["prompt"])
    (tmp_path / "rows.jsonl").write_bytes(BOM + b"\n\n")
    with pytest.raises(UserError, match="has no lines"):
        read_jsonl(tmp_path / "rows.jsonl", ["prompt"])


def test_a_text_with_a_byte_order_mark_is_the_same_text(tmp_path):
    for name, mark in ("plain", b""), ("marked", BOM):
        (tmp_path / name).write_bytes(mark + b"a cow eats grass.\r\na bee flies.\r\n")
    documents = [pretrain.read_documents(tmp_path / name, TOKENIZER) for name in ("plain", "marked")]
    assert documents[0] == documents[1] == [TOKENIZER.encode(text) + [TOKENIZER.end]
                                            for text in ("a cow eats grass.", "a bee flies.")]


@pytest.mark.parametrize("value, expected", [(28, "28"), (28.0, "28"), (-3, "-3"), (0.5, "0.5"), ("28", "28"),
                                             ("", "")])
def test_a_number_where_text_is_meant(value, expected, tmp_path):
    """Programs for tables save a column of whole numbers as 28.0 if one of them is missing."""
    (row,) = read_jsonl(tiny.jsonl(tmp_path / "rows.jsonl", [dict(prompt="p", answer=value, n=value)]), ["answer"])
    assert row == dict(prompt="p", answer=expected, n=value), "and what is not named stays as it is"


@pytest.mark.parametrize("value, said", [([28], "is [28]"), (dict(a=1), 'is {"a": 1}'), (True, "is true"),
                                         (None, "is null"), (float("nan"), "is NaN")])
def test_what_is_no_text_is_refused_in_its_own_words(value, said, tmp_path):
    path = tiny.jsonl(tmp_path / "rows.jsonl", [dict(prompt="p", answer=value)])
    with pytest.raises(UserError, match=re.escape(f'line 1: the field "answer" {said}, where text or a number is')):
        read_jsonl(path, ["prompt", "answer"])


def test_a_column_that_only_some_rows_have_is_none_elsewhere(tmp_path):
    rows = [dict(prompt="p", answer="1"), dict(prompt="q", answer="2", level=3), dict(note="x", prompt="r", answer="3")]
    path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    empty = dict(level=None, note=None)
    assert read_jsonl(path, ["prompt", "answer"]) == [empty | row for row in rows]
    seen = []

    def reward(prompts, completions, level, note, answer, finished):
        seen.extend(zip(prompts, level, note))
        return [0.0] * len(prompts)
    grpo.train(settings(grpo, tmp_path, prompts=path, prompts_per_step=3, steps=1), reward=reward)
    assert set(seen) == {("p", None, None), ("q", 3, None), ("r", None, "x")}


# --- formats of others --------------------------------------------------------------------------------------------

PAIRS, ASKED, SHOWN = ["prompt", "chosen", "rejected"], ["prompt", "answer"], ["prompt", "response"]
TALK = [dict(role="user", content="2 plus 3?"), dict(role="assistant", content="5")]
OTHERS = {      # a row as it is published, the fields that are wanted, and the row that it becomes
    "GSM8K": (dict(question="2 plus 3?", answer="2 and 3.\n#### 5"), ASKED, dict(prompt="2 plus 3?", answer="5")),
    "HH-RLHF": (dict(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
                     rejected="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"), PAIRS,
                dict(prompt="\n\nHuman: a\n\nAssistant: b\n\nHuman: c", chosen="good", rejected="bad")),
    "a conversation": (dict(messages=TALK), SHOWN, dict(prompt="2 plus 3?", response="5")),
    "Alpaca": (dict(instruction="2 plus 3?", input="", output="5"), SHOWN, dict(prompt="2 plus 3?", response="5")),
    "a prompt-completion set": (dict(prompt="2 plus 3?", completion="5"), SHOWN,
                                dict(prompt="2 plus 3?", response="5")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_format_that_is_known_is_explained(name, tmp_path):
    """The line says which fields there are, and its advice, followed to the letter, makes a file that is read."""
    row, fields, expected = OTHERS[name]
    path = tiny.jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as refusal:
        read_jsonl(path, fields)
    text = str(refusal.value)
    assert f"(found: {', '.join(row)})" in text and f"If this is {name}, write " in text and "\n" not in text
    advice = text.split("write ")[1].removesuffix(" for each row")
    assert read_jsonl(tiny.jsonl(tmp_path / "ours.jsonl", [eval(advice, dict(row=row))]), fields) == [expected]
    assert FORMATS.keys() == OTHERS.keys()


def test_messages_in_a_field_are_explained(tmp_path):
    row = dict(prompt=TALK[:1], chosen=TALK[1:], rejected=TALK[1:])
    with pytest.raises(UserError, match=re.escape('messages, write row["prompt"][-1]["content"]')) as refusal:
        read_jsonl(tiny.jsonl(tmp_path / "rows.jsonl", [row]), PAIRS)
    assert eval(str(refusal.value).split("write ")[1], dict(row=row)) == "2 plus 3?"


def test_a_split_that_a_domain_does_not_have():
    with pytest.raises(UserError, match="--split longer: animals has only val and test"):
        evaluate.held_out("animals", "longer")
    assert len(evaluate.held_out("arithmetic", "longer", 5)) == 5


# --- a reward that does not judge everything ----------------------------------------------------------------------

def rollout_of(texts):
    rows = [TOKENIZER.encode_completion(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [TOKENIZER.pad] * (longest - len(row)) for row in rows])
    return Rollout(ids, ids != TOKENIZER.pad, torch.zeros(ids.shape), torch.ones(len(ids), dtype=torch.bool))


def test_what_is_not_judged_is_left_out_by_hand():
    """Two groups of three, and one of which nobody is judged."""
    rollout, said = rollout_of("abcdefghi"), [1.0, None, 0.5, 0.1, 0.1, None, None, None, None]
    rewards, texts = score(lambda prompts, completions, **columns: said, [dict(prompt=p) for p in "pqr"], rollout, 3,
                           TOKENIZER)
    assert texts == list("abcdefghi")
    assert rewards.tolist() == pytest.approx([1, 0.75, 0.5, 0.1, 0.1, 0.1, 0, 0, 0])
    assert rollout.mask.any(dim=1).tolist() == [number is not None for number in said]
    advantages = group_advantages(rewards, 3)
    assert advantages.tolist() == [0.25, 0, -0.25] + [0] * 6, "equal rewards: exactly 0, whoever is not judged"


@LOOPS
def test_a_completion_that_is_not_judged_teaches_nothing(loop, tmp_path, watch):
    """Its tokens are in no loss, policy's or critic's; the step is that of the same batch with a mask of its own."""
    def some(prompts, completions, **columns):
        return [None if i % 3 == 1 else reward for i, reward in enumerate(letter_e(prompts, completions))]
    more = dict(critic=tiny.critic_checkpoint(tmp_path / "critic.pt")) if loop is ppo else {}
    calls = watch(loop, "value_loss") if loop is ppo else []
    masks = []

    def loss(logprobs, old_logprobs, advantages, mask, *rest):
        masks.append(mask)
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, *rest)
    _, (row,) = loop.train(settings(loop, tmp_path, steps=1, beta=0.3, run=str(tmp_path / "run"), **more), reward=some,
                           loss=loss)
    judged = [True, False, True] * 4
    assert masks[0].any(dim=1).tolist() == judged and row["unjudged"] == pytest.approx(1 / 3)
    assert all(arguments[3].any(dim=1).tolist() == judged for arguments, _ in calls)
    assert read_csv(tmp_path / "run/metrics.csv")[0]["unjudged"] == pytest.approx(1 / 3)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] is None for sample in samples] == [False, True, False] * 3
    _, (row,) = loop.train(settings(loop, tmp_path, steps=1, **more), reward=letter_e)
    assert "unjudged" not in row


@pytest.mark.parametrize("loop", [grpo, ppo, variants], ids=["grpo", "ppo", "variants"])
def test_where_nothing_is_judged_nothing_moves(loop, tmp_path):
    more = {grpo: {}, ppo: dict(critic=tiny.critic_checkpoint(tmp_path / "critic.pt")),
            variants: dict(dynamic_sampling=True, aggregation="token")}[loop]
    config = settings(loop, tmp_path, steps=2, beta=0.3, **more)
    policy, rows = loop.train(config, reward=lambda prompts, completions, **columns: [None] * len(prompts))
    assert tiny.same(policy.state_dict(), load_model(config.sft).state_dict())
    assert rows[1]["unjudged"] == 1 and rows[1]["reward"] == "" and rows[1]["loss"] == 0


def test_metrics_are_those_of_what_was_judged(tmp_path):
    judged = grpo.train(settings(grpo, tmp_path, steps=1), reward=lambda p, texts, **columns: [1.0] * len(texts))[1][0]
    half = grpo.train(settings(grpo, tmp_path, steps=1),
                      reward=lambda p, texts, **columns: [None if i % 2 else 1.0 for i in range(len(texts))])[1][0]
    assert half["reward"] == 1 == judged["reward"] and half["equal_groups"] == 1 and half["unjudged"] == 0.5
    assert half["thinking"] == judged["thinking"] and half["truncated"] == judged["truncated"]


def test_groups_of_which_nobody_is_judged_make_room(tmp_path):
    """Dynamic sampling takes other prompts for them, as for all groups of equal rewards."""
    texts = tiny.PROMPTS[:4]

    def reward(prompts, completions, **columns):
        return [None if prompt in texts else float(i % 3) for i, prompt in enumerate(prompts)]
    _, rows = variants.train(settings(variants, tmp_path, steps=3, dynamic_sampling=True), reward=reward)
    assert sum(row["dropped"] for row in rows) == 4 and not any("unjudged" in row for row in rows)


def test_values_are_those_of_what_was_judged(tmp_path, monkeypatch):
    """The ruler and the oracle: the mean of the continuations that were judged, and nothing where none was."""
    config = settings(ppo, tmp_path, group_size=1)
    policy, rows = load_model(config.sft), [dict(prompt=text, answer="") for text in tiny.PROMPTS[:3]]
    prompts = Prompts.from_texts([row["prompt"] for row in rows], TOKENIZER)
    rollout = sample(policy, prompts, 1, 6, generator=torch.Generator().manual_seed(1))

    def reward(prompts, completions, **columns):
        return [[None, 2.0, None, 4.0][i % 4] if prompt != tiny.PROMPTS[1] else None
                for i, prompt in enumerate(prompts)]
    values = critic.sampled_values(config, policy, reward, rows, prompts, rollout, 4, "x")
    for row in 0, 2:
        assert (values[row][rollout.mask[row]] == 3).all()
    assert values[1][rollout.mask[1]].isnan().all()
    oracle = critic.Oracle(config, policy, "cpu", reward)
    oracle.rows = {row["prompt"]: row for row in rows}
    assert (oracle.values(prompts, rollout.completion_ids, rollout.mask)[1] == 0).all()
    rewards = torch.tensor([1.0, 5.0, 0.0])
    share = critic.explainable_variance(config, policy, reward, rows, prompts, rollout, rewards, 0)
    assert share == "" or np.isfinite(share)


def test_evaluation_of_what_was_judged(make):
    policy, rows = make(context=64), [dict(prompt=text) for text in tiny.PROMPTS[:4]]

    def reward(prompts, completions, **columns):
        return [None if prompt == tiny.PROMPTS[0] else float(i % 2) for i, prompt in enumerate(prompts)]
    figures = evaluate.evaluate(policy, reward, rows, max_new_tokens=6)
    assert figures["reward"][0] == 0.5, "three prompts, half of whose answers are worth 1"


def test_none_is_not_nan_and_counts_nothing_in_a_sum():
    with pytest.raises(UserError, match="None: not judged"):
        numbers(lambda prompts, completions: [None, float("nan")], ["a"] * 2, ["b"] * 2)
    both = weighted_sum((lambda *_, **columns: [None, 1.0], 1.0), (well_formed, 0.2))
    assert both(["a"] * 2, ["<think>x</think>y"] * 2) == [0.2, 1.2]
    assert correct(["a"], ["5"], answer=["5"]) == [1.0]


# --- pairs that teach nothing, and pairs of one's own -------------------------------------------------------------

def pairs_config(folder, rows, **more):
    return dict(run=str(folder / "run"), sft=tiny.checkpoint(folder / "sft.pt"), steps=2, batch_size=4,
                preferences=tiny.jsonl(folder / "own.jsonl", rows), **more)


def own_pairs(equal):
    rows = [dict(prompt=f"question {i}", chosen="yes.", rejected="no.") for i in range(12)]
    return [dict(row, rejected="yes.") if i < equal else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("equal", [0, 3, 12])
def test_pairs_of_equal_answers_are_counted(equal, tmp_path, capsys):
    reward_model.train(reward_model.RewardModelConfig(**pairs_config(tmp_path, own_pairs(equal)), device="cpu"))
    out = capsys.readouterr().out
    assert (f"{equal} of 12 choices are between equal answers and teach nothing" in out) == (equal > 0)


@pytest.mark.parametrize("words, judged", [([], "not judged: --holdout 0.2"), (["--holdout", "0.25"], "of 3, ")])
def test_own_pairs_are_judged_on_what_was_kept_back_or_not_at_all(words, judged, tmp_path, capsys):
    config = pairs_config(tmp_path, own_pairs(0))
    options = [word for name, value in config.items() for word in ("--" + name.replace("_", "-"), str(value))]
    reward_model.main([*options, "--device", "cpu", *words])
    out = capsys.readouterr().out
    assert judged in out and "ceiling" not in out and not (tmp_path / "run/evaluation.json").exists()


# --- more steps ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loop", [grpo, ppo, variants], ids=["grpo", "ppo", "variants"])
def test_rl_goes_on_to_more_steps_bit_for_bit(loop, tmp_path):
    """Nothing in RL depends on how many steps there will be."""
    whole, parts = (settings(loop, tmp_path, run=str(tmp_path / name), steps=4) for name in ("whole", "parts"))
    loop.train(whole, reward=letter_e)
    parts.steps = 2
    loop.train(parts, reward=letter_e)
    parts.steps, parts.resume = 4, True
    loop.train(parts, reward=letter_e)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole/config.json").read_text() == (tmp_path / "parts/config.json").read_text()


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
    config = settings(grpo, tmp_path, run=str(tmp_path / "run"), steps=3)
    grpo.train(config, reward=letter_e)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    config.steps, config.resume = 2, True
    with pytest.raises(UserError, match="other settings: steps"):
        grpo.train(config, reward=letter_e)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_schedule_says_why_it_does_not_go_on(tmp_path):
    config = sft.SFTConfig(run=str(tmp_path / "run"), base=tiny.checkpoint(tmp_path / "base.pt"), steps=2, batch_size=4,
                           demonstrations=tiny.demonstrations(tmp_path / "rows.jsonl"), device="cpu")
    sft.train(config)
    config.steps, config.resume = 4, True
    with pytest.raises(UserError, match=r"steps \(its learning rate falls until the last step\)"):
        sft.train(config)


def test_an_evaluation_belongs_to_its_weights(tmp_path, monkeypatch):
    """A run that went on to more steps is evaluated again."""
    monkeypatch.setattr(compare, "evaluate", lambda *_, **more: dict(accuracy=[len(asked)]))
    monkeypatch.setattr(compare, "held_out", lambda *_: asked.append(1))
    asked, sets = [], len(compare.SETS["correct"])
    config = compare.CompareConfig(sft=tiny.checkpoint(tmp_path / "sft.pt"))
    for seed, times in (0, 1), (0, 1), (1, 2):
        tiny.checkpoint(tmp_path / "checkpoint.pt", seed=seed)
        policy = tiny.gpt(seed=seed)
        compare.evaluate_or_reuse(tmp_path / "evaluation.json", config, policy, policy, "correct")
        assert len(asked) == times * sets


# --- learning rates that blow up ----------------------------------------------------------------------------------

def diverging(stage, folder, steps):
    """A short run of a stage with a learning rate of a million."""
    base = dict(run=str(folder / "run"), steps=steps, lr=1e6, device="cpu")
    if stage in (grpo, ppo, variants):
        return settings(stage, folder, **base)
    if stage is pretrain:
        return pretrain.PretrainConfig(text=tiny.text_file(folder / "text.txt"), layers=2, heads=2, width=16,
                                       context=16, warmup=1, **base)
    if stage is critic:
        return critic.CriticConfig(sft=tiny.checkpoint(folder / "sft.pt"), prompts=tiny.prompts(folder / "rows.jsonl"),
                                   prompts_per_step=4, max_new_tokens=6, warmup=1, **base)
    if stage is sft:
        return sft.SFTConfig(base=tiny.checkpoint(folder / "sft.pt"), batch_size=4, warmup=1,
                             demonstrations=tiny.demonstrations(folder / "rows.jsonl"), **base)
    return reward_model.RewardModelConfig(sft=tiny.checkpoint(folder / "sft.pt"), batch_size=4, warmup=1,
                                          preferences=tiny.preferences(folder / "rows.jsonl"), **base)


@pytest.mark.parametrize("stage", [pretrain, sft, reward_model, critic, grpo, ppo, variants],
                         ids=lambda stage: stage.__name__.split(".")[-1])
def test_a_run_that_blows_up_says_so_and_keeps_what_was_good(stage, tmp_path, capsys):
    """Wherever it shows first: in a loss, in a gradient, in what is sampled, in what is saved."""
    more = dict(reward=letter_e) if stage in (grpo, ppo, variants) else {}
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: stage.train(diverging(stage, tmp_path, 40), **more))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1 and "try a smaller learning rate" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint.pt'}" in error
    model = load_checkpoint(tmp_path / "run/checkpoint.pt")["model"]
    assert all(tensor.isfinite().all() and tensor.abs().max() < 1e4 for tensor in model.values())


def test_finite_weights_that_nobody_can_compute_with_are_not_saved(tmp_path):
    """A run of one step: nothing comes after it that could show what its weights are worth."""
    config = diverging(grpo, tmp_path, 1)
    config.sft = tiny.checkpoint(tmp_path / "deep.pt", layers=3)
    with pytest.raises(UserError, match="no longer finite: try a smaller learning rate"):
        grpo.train(config, reward=letter_e)
    assert load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 0


@pytest.mark.parametrize("plain", [True, False])
def test_a_policy_whose_numbers_are_gone_is_no_index_error(plain, gpt, prompts):
    with torch.no_grad():
        gpt.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no longer finite"):
        sample(gpt, prompts, 2, 4, plain=plain)
