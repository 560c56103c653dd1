"""The command of the studies, what they share, and those of them that train on arithmetic: every setting and seed is
run once, the tables and files hold what the runs reached, and nothing is trained twice.
"""
import csv
import json
import os
import re

import numpy as np
import pytest
import torch

from grpo_min import grpo, ppo, sft, variants
from grpo_min.lab.report import state_bytes
from grpo_min.lab.studies import (__main__ as command, baselines, common, credit, critic, group_size, is_rl_needed, kl,
                                  learning, length, noise, overoptimisation, real, recipes, threads, tuning)
from grpo_min.lab.studies.common import StudyConfig
from grpo_min.rewards import correct
from grpo_min.rollout import Prompts, Rollout, pad_completions, sample, token_logprobs
from grpo_min.run.checkpoint import load_checkpoint, load_model
from grpo_min.run.config import UserError
from grpo_min.run.data import read_jsonl
from grpo_min.run.files import DATA
from grpo_min.run.table import number
from tests import tiny

SFT = str(DATA / "checkpoints/sft.pt")
TABLES = [(name, {part: ("setting", "{}")}, learning.NUMBERS) for name, part in [
    ("baselines", "advantage"), ("group_size", "prompts x completions"), ("recipes", "recipe"),
    ("length", "aggregation")]]
TABLES += [(module.__name__.rpartition(".")[2], module.LABELS, module.NUMBERS)
           for module in (critic, is_rl_needed, kl, noise, overoptimisation, tuning)]
TABLES += [("critic-training", critic.TRAININGS, critic.LEARNED)]


# --- the command --------------------------------------------------------------------------------------------------

def test_help_lists_every_study(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    listed = re.findall(r"^ *(\w+)  +\w", capsys.readouterr().out.split("options:")[0], re.MULTILINE)
    assert listed == [*list(command.STUDIES)[:-3], "all", "luck", "threads", "real"] and len(listed) == 21


@pytest.mark.parametrize("words", [[], ["--quick"], ["publish"], ["Tuning"]])
def test_a_study_that_is_none(words):
    with pytest.raises(UserError, match="name a study first: tuning, baselines, .*, luck, threads, real, all$"):
        command.main(words)


def test_a_smoke_test_leaves_what_is_published_alone(monkeypatch):
    configs = []
    monkeypatch.setattr(command.STUDIES["kl"], "study", configs.append)
    for words in ["--quick", "--quick --eval-prompts 5 --out elsewhere", ""]:
        command.main(["kl", "--run", "somewhere", *words.split()])
    assert [(config.run, config.out, config.eval_prompts) for config in configs] == [
        ("somewhere/quick", "somewhere/quick", 20), ("somewhere/quick", "elsewhere", 5),
        ("somewhere", str(common.RESULTS), 1000)]


def test_all_studies_one_after_the_other(tmp_path, monkeypatch):
    names = []
    for name, module in command.STUDIES.items():
        monkeypatch.setattr(module, "study", lambda config, name=name: names.append(name))
    words = ["all", "--run", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command.main(words)
    assert names == list(command.IN_ALL) and len(names) == 16
    text = (tmp_path / "out/minutes.md").read_text()
    assert all(f"| {name} | 0.0 |" in text for name in [*names, "**all**"])
    (tmp_path / "out/minutes.md").unlink()
    (tmp_path / "runs").mkdir()                       # perhaps with runs in it, which are not run again
    command.main(words)
    assert not (tmp_path / "out/minutes.md").exists()


def test_jobs_can_be_sent_to_other_processes(tmp_path):
    config = StudyConfig(run=str(tmp_path), sft=tiny.checkpoint(tmp_path / "sft.pt", context=128), quick=True,
                         reward_model=tiny.reward_checkpoint(tmp_path / "reward.pt"), device="cpu", eval_prompts=2)
    (row, curve), = common.run_jobs(config, kl.train_with_penalty, [(0.1, "reward", 1)])
    assert row["charged_in"] == "reward" and [line["step"] for line in curve] == [0, 1]


# --- what they share ----------------------------------------------------------------------------------------------

def test_a_table_has_a_line_for_the_seeds_of_each_setting():
    rows = [dict(name="a", rate=0.5, x=1.0, y=None), dict(name="b", rate=0.5, x=5.0, y=2),
            dict(name="a", rate=0.5, x=2.0, y=None), dict(name="a", rate=1, x=4.0, y=3)]
    lines = common.seed_table({"who": ("name", "{}"), "share": ("rate", "{:.0%}")},
                              {"X": ("x", "{:.1f}"), "Y": ("y", "{}")}, rows)
    assert lines == ["| who | share | X | Y |", "| --- | --- | --- | --- |", "| a | 50% | 1.5 (1.0 to 2.0) | - |",
                     "| b | 50% | 5.0 | 2.0 |", "| a | 100% | 4.0 | 3.0 |"]
    assert common.column_by(rows, "name", "x") == {"a": [1.0, 2.0, 4.0], "b": [5.0]}


def cell(text):
    """A cell of a CSV file: a number where it is one, None where nothing was measured."""
    try:
        return number(text) if text else None
    except ValueError:
        return text


@pytest.mark.parametrize("name, labels, numbers", TABLES)
def test_a_committed_table_is_that_of_the_committed_runs(name, labels, numbers):
    rows = []
    for row in csv.DictReader((common.RESULTS / f"{name}.csv").read_text().splitlines()):
        rows.append({key: cell(text) for key, text in row.items()})
    text = (common.RESULTS / f"{name.removesuffix('-training')}.md").read_text()
    assert "\n".join(common.seed_table(labels, numbers, rows)) + "\n\n" in text


def test_settings_are_told_apart_where_all_seeds_agree():
    assert common.sides({"x": [1, 2], "a": [3, 4], "b": [0.1, 0.9], "c": [2, 9]}) == (["a"], ["b"], ["c"])


def test_means_along_a_run():
    metrics = [dict(x=x, seconds_a=1, seconds_b=0.5) for x in range(12)] + [dict(x="")]
    assert common.first_of(metrics, "x") == 4.5 and common.last_of(metrics, "x") == 6.5
    assert common.first_of(metrics, "y") is None and common.seconds_of(metrics) == 18


def test_what_is_measured_of_a_policy():
    policy, rows = load_model(SFT), read_jsonl(DATA / "arithmetic_val.jsonl", ["prompt", "answer"])[:60]
    same = common.measure_arithmetic(policy, policy, rows)
    assert same["kl"] < 1e-6 and 0.3 < same["accuracy"] < 0.8 and 0.2 < same["thinking"] < 0.8
    other = common.measure_arithmetic(policy, load_model(DATA / "checkpoints/base.pt"), rows)
    assert other["kl"] > 1 and dict(other, kl=0) == dict(same, kl=0)


# --- tuning, and the studies of learning --------------------------------------------------------------------------

@pytest.mark.parametrize("study", [baselines, group_size, recipes, length])
def test_every_setting_has_the_same_completions_per_step(study):
    configs = [variants.VariantConfig(**{**learning.SHARED, **changes}) for changes in study.SETTINGS.values()]
    assert all(config.prompts_per_step * config.group_size == 128 for config in configs)
    minibatches = 4 if study is recipes else 1
    assert {config.minibatches for config in configs} == {minibatches}
    assert len({str(config) for config in configs}) == len(configs)
    assert configs[0] == variants.VariantConfig(**learning.SHARED, minibatches=minibatches), "the first is the default"


def test_a_study_writes_what_its_runs_reached(tmp_path, run_study):
    sft = tiny.checkpoint(tmp_path / "sft.pt", context=128)
    rows, curves, text = run_study("recipes", again=True, steps=2, eval_prompts=5, sft=sft)
    assert [(row["setting"], row["seed"]) for row in rows] == [("no recipe", "1"), ("grpo", "1")]
    assert len(curves) == 2 * 2 and {row["completions"] for row in curves} == {"128", "256"}
    assert "| grpo |" in text and "2 steps, seeds 1 to 1" in text
    runs = {path.parent.name for path in (tmp_path / "runs/quick").glob("*/checkpoint.pt")}
    assert runs == {"recipes-norecipe-1", "recipes-grpo-1"}


def test_tuning_to_the_end(tmp_path, run_study):
    options = dict(sft=tiny.checkpoint(tmp_path / "sft.pt", context=128),
                   reward_model=tiny.reward_checkpoint(tmp_path / "reward_model.pt"))
    rows, _, text = run_study("tuning", steps=1, eval_prompts=3, **options)
    assert [(row["task"], row["algorithm"], row["settings"]) for row in rows] == [
        (task, name, label) for task in ("arithmetic", "animals") for name in ("GRPO", "PPO")
        for label in ("defaults", "lr / 3")]
    assert [row["explained_variance"] == "" for row in rows if row["task"] == "animals"] == [True, True, False, False]
    assert float(rows[1]["lr"]) == pytest.approx(1e-4) and float(rows[6]["lr"]) == pytest.approx(6e-4)
    assert len(list((tmp_path / "runs/quick").glob("critic-*/checkpoint.pt"))) == 2
    configs = {"GRPO": grpo.GRPOConfig, "PPO": ppo.PPOConfig}
    for (_, name), settings in tuning.SETTINGS.items():
        assert len({str(configs[name](**changes)) for changes in settings.values()}) == len(settings)


# --- filtered SFT -------------------------------------------------------------------------------------------------

def test_online_filtered_sft_is_reinforce_without_a_baseline(tmp_path, monkeypatch):
    """The gradient of SFT's cross-entropy on the right completions is that of GRPO's loss with --advantage none, but
    for the divisor: all tokens of the right completions in the one, all B completions in the other."""
    policy, rows = load_model(SFT), read_jsonl(DATA / "arithmetic_train.jsonl", ["prompt", "answer"])[:8]
    prompts = Prompts.from_texts([row["prompt"] for row in rows], policy.tokenizer)
    rollout = sample(policy, prompts, 4, 40, 1.0, torch.Generator().manual_seed(0))
    texts, answers = rollout.texts(policy.tokenizer), [row["answer"] for row in rows for _ in range(4)]
    rewards = torch.tensor(correct(texts, texts, answers, rollout.finished.tolist()))  # (32,)
    right = rewards.nonzero().flatten().tolist()
    assert 4 < len(right) < 32
    for b in right:                                                     # or SFT would train on other tokens
        ids = rollout.completion_ids[b][rollout.mask[b]].tolist()
        assert policy.tokenizer.encode_completion(texts[b]) == ids
    logprobs, _ = token_logprobs(policy, prompts, rollout.completion_ids, rollout.mask)
    advantages = variants.no_baseline(rewards, 4)[:, None]
    grpo.policy_loss(logprobs, logprobs.detach(), advantages, rollout.mask, 0.2).backward()
    kept = tiny.jsonl(tmp_path / "right.jsonl", [dict(prompt=prompts.texts[b // 4], response=texts[b])
                                                 for b in right])
    monkeypatch.setattr(sft, "fit", lambda config, model, inputs, loss_at: loss_at(0))
    model, (loss, _) = sft.train(sft.SFTConfig(base=SFT, demonstrations=kept, batch_size=len(right), device="cpu"))
    loss.backward()
    online, filtered = (torch.cat([p.grad.flatten() for p in trained.parameters()]) for trained in (policy, model))
    assert torch.allclose(online * 32, filtered * rollout.mask[right].sum(), atol=1e-3 * online.norm().item())


def test_right_answers_are_those_of_grpos_first_batch():
    batches = []

    def collect(*arguments):
        batches.append(grpo.collect(*arguments))
        return batches[-1]
    grpo.train(grpo.GRPOConfig(run="", steps=1, prompts_per_step=is_rl_needed.Q, group_size=is_rl_needed.G,
                               device="cpu", seed=3), collect=collect)
    (_, prompts, _, rewards, texts), = batches
    expected = [(prompts.texts[b // is_rl_needed.G], text) for b, text in enumerate(texts) if rewards[b] == 1]
    right, = is_rl_needed.right_answers(load_model(SFT), 3, 1)
    assert [tuple(row.values()) for row in right] == expected and 0 < len(expected) < len(texts)


def test_is_rl_needed_to_the_end(tmp_path, run_study):
    rows, curves, text = run_study("is_rl_needed", again=True, steps=2)
    methods = [is_rl_needed.SFT, is_rl_needed.GRPO, is_rl_needed.ONLINE, is_rl_needed.OFFLINE, is_rl_needed.LONGER]
    assert [row["setting"] for row in rows] == methods and all(f"| {method} |" in text for method in methods)
    assert [row["completions"] for row in rows] == ["0", "256", "256", "256", "0"]
    assert [int(row["completions"]) for row in curves] == [128, 256] * 2 + [128, 128, 256] + [0]
    kept = read_jsonl(next((tmp_path / "runs/quick").glob("*offline-1-1.jsonl")), ["prompt", "response"])
    assert int(rows[3]["updates"]) == 4 * len(kept) // 32


def test_too_few_right_answers_are_one_line(tmp_path):
    config = StudyConfig(sft=tiny.checkpoint(tmp_path / "sft.pt", context=128), run=str(tmp_path), device="cpu",
                         eval_prompts=2)
    with pytest.raises(UserError, match="only 0 of 128 answers are right: too few for batches of 32"):
        is_rl_needed.offline(config, is_rl_needed.OFFLINE, 1, 1)


# --- critics ------------------------------------------------------------------------------------------------------

def test_a_shared_trunk_is_the_policy_itself_and_the_value_loss_moves_it(tmp_path):
    critics = []

    def start_critic(*arguments):
        critics.append(critic.shared_trunk(*arguments))
        return critics[-1]
    def loss(logprobs, *arguments):
        return (0 * logprobs).sum()
    settings = tiny.settings(ppo, tmp_path, steps=2, beta=0.0, run=str(tmp_path / "run"))
    policy, _ = ppo.train(settings, reward=tiny.letter_e, loss=loss, start_critic=start_critic)
    assert critics[0].trunk is policy and (critics[0].scalar.weight != 0).any()
    before = load_model(settings.sft)
    assert not torch.equal(policy.tokens.weight, before.tokens.weight), "the value loss alone moves it"
    saved = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert torch.equal(saved["critic"]["trunk.tokens.weight"], saved["model"]["tokens.weight"])


def test_a_head_alone_learns_and_leaves_the_trunk_to_the_policy(tmp_path):
    critics = []

    def start_critic(*arguments):
        critics.append(critic.head_alone(*arguments))
        return critics[-1]

    def loss(logprobs, *arguments):
        return (0 * logprobs).sum()
    settings = tiny.settings(ppo, tmp_path, steps=2, beta=0.0, critic_lr=1e-2)
    policy, _ = ppo.train(settings, reward=tiny.letter_e, loss=loss, start_critic=start_critic)
    assert critics[0].trunk is policy and (critics[0].gain.weight != 0).any()
    assert tiny.same(policy.state_dict(), load_model(settings.sft).state_dict())
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_the_memory_of_a_shared_trunk():
    policy, config = tiny.gpt(), ppo.PPOConfig()
    trunk, head = 4 * sum(p.numel() for p in policy.parameters()), 4 * (16 + 1 + 16 * 16 + 16)
    assert critic.model_state(policy, config, critic.TRAINED) == sum(state_bytes(policy, config).values())
    # policy, reference and gradient; head and gradient; two optimizers with two moments of the trunk each
    shared = 3 * trunk + 2 * head + 4 * trunk + 2 * head
    assert critic.model_state(policy, config, "shared trunk, critic_lr 1e-05") == shared
    assert critic.model_state(policy, config, critic.HEAD_ALONE) == shared - 2 * trunk


def test_critic_to_the_end(run_study):
    rows, curves, text = run_study("critic", again=True, steps=2)
    assert [row["setting"] for row in rows] == [critic.FRESH, critic.NO_CRITIC, "shared trunk, critic_lr 0.0001"]
    assert [row["ev_mean"] == "" for row in rows] == [False, True, False]
    assert float(rows[1]["megabytes"]) < float(rows[2]["megabytes"]) < float(rows[0]["megabytes"])
    assert len(curves) == 3 * 2 and all(f"| arithmetic | {head} | 4 |" in text for head in list(critic.HEADS)[1:3])


# --- credit -------------------------------------------------------------------------------------------------------

def test_the_reward_of_the_digits():
    right = [["1", "2"], ["1", "2"], ["1", "2"], ["1", "2"]]
    texts, seen = [" 1 2", " 1 3", " 1", " 1 2 2"], []
    assert credit.reward_of((2, "share", 0), 1, seen)([], texts, right) == [1, 0.5, 0, 0] and seen == [0.375]
    assert credit.reward_of((2, "all", 0), 1)([], texts, right) == [1, 0, 0, 0]
    many = credit.reward_of((2, "share", 3), 1, seen)([], texts * 1000, right * 1000)
    noise = np.array(many) - [1, 0.5, 0, 0] * 1000
    assert seen == [0.375, 0.375], "the rewards without noise"
    assert abs(noise.mean()) < 0.06 and noise.std() == pytest.approx(3 * (0.55 * 0.45 / 2) ** 0.5, rel=0.05)


def test_demonstrations_are_right_in_55_percent_of_the_positions(tmp_path):
    config = StudyConfig(run=str(tmp_path))
    rows = read_jsonl(credit.demonstrations_file(config, 4), ["prompt", "response"])
    shares = []
    for row in rows:
        right = [str((int(digit) + 1) % 10) for digit in row["prompt"].split()[2:]]
        shares.append(credit.right_share(row["response"], right))
    assert len(rows) == 8000 and np.mean(shares) == pytest.approx(0.55, abs=0.01)
    for line in credit.prompts_file(config, 4).read_text().splitlines():
        row = json.loads(line)
        assert row["right"] == [str((int(digit) + 1) % 10) for digit in row["prompt"].split()[2:]]


def test_credit_to_the_end(run_study):
    rows, _, text = run_study("credit", again=True, steps=2)
    assert {row["arm"] for row in rows} == set(credit.ARMS) and {row["G"] for row in rows} == {"8", "2"}
    for arm in credit.ARMS:
        assert len([row for row in rows if row["arm"] == arm and row["G"] == "8"]) == 1
        assert f"| 2 | share | 0 | {arm} |" in text
    assert all((row["completions"] == "384") == (row["reached"] == "False") for row in rows), "2 steps, and one more"


def test_the_map_counts_the_seeds_in_which_ppo_needs_fewer():
    rows = [dict(n=2, kind="share", noise=0, G=8, arm=arm, completions=completions)
            for arm, needed in [("GRPO", [300, 400, 500]), ("PPO", [200, 400, 400]), ("PPO, lambda 0", [400, 500, 600])]
            for completions in needed]
    warm = {(2, "share", 0): dict(completions=64, explained=0.5, explainable=0.625)}
    line = credit.map_table(rows, warm)[-1]
    assert line == ("| 2 | 0 | 400 (300 to 500) | 333 (200 to 400) | 2 of 3 | 500 (400 to 600) | 0 of 3 | 64 | 0.50 | "
                    "0.62 |")


# --- a task of one's own, a real model, threads -------------------------------------------------------------------

def test_countdown_to_the_end(run_study):
    _, _, text = run_study("countdown", eval_prompts=4)
    assert "| fine-tuned |" in text and "| GRPO |" in text and "4 test prompts" in text
    assert text.count("\n| use ") == 3 and "| prompt | fine-tuned | GRPO, seed 1 |" in text


def test_a_real_model_to_the_end(run_study, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "in_own_process", lambda function, *arguments: function(*arguments))
    start = tiny.checkpoint(tmp_path / "start.pt", context=128)
    rows, curves, text = run_study("real", again=True, sft=start, eval_prompts=12)
    assert [(row["algorithm"], row["setting"]) for row in rows] == [
        ("before", "main"), ("GRPO", "lr 1e-5"), ("GRPO", "main"), ("PPO", "lr 1e-5, critic_lr 3e-5"),
        ("PPO", "main")]
    assert float(rows[0]["kl"]) == float(rows[0]["test_kl"]) == 0 and not rows[0]["minutes"]
    assert all(float(row["minutes"]) > 0 and row["judged"] == "48.0" for row in rows[1:])
    assert [curve["completions"] for curve in curves] == ["64", "128"] * 4
    with open(tmp_path / "out/real-answers.csv", encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    assert [row["algorithm"] for row in answers] == ["before"] * 10 + ["GRPO"] * 10 + ["PPO"] * 10
    assert text.count("\n| before |") == 2 and "48 answers each" in text and "| words | before | GRPO | PPO |" in text
    assert not list((tmp_path / "runs").glob("**/checkpoint.pt")), "they would be large"


def test_a_pattern_has_blanks_for_the_words():
    assert real.pattern(" The Moon lights the river.", ["river", "moon"]) == "The _ lights the _."
    assert real.pattern("A mirror mirrors the moon.", ["mirror", "moon"]) == "A _ mirrors the _."


def test_what_a_policy_says_of_two_words_is_judged(monkeypatch):
    """Of two prompts, two answers to each: all figures by hand."""
    said = iter([["The {0} and the {1}.", "The {0} and the {1}."], ["The {0} and the {1}.", "A {1}."]])
    policy = tiny.gpt(context=128)

    def answers(policy, prompts, samples, *_):
        texts = [text.format(*re.findall('"(.+?)"', prompts.texts[0])) for text in next(said)]
        ids, mask = pad_completions(texts, policy.tokenizer)
        return Rollout(ids, mask, token_logprobs(policy, prompts, ids, mask)[0] + 0.5 * mask, torch.tensor([True] * 2))
    monkeypatch.setattr(real, "sample", answers)
    figures, answers = real.judge(policy, policy, "val", 2, samples=2, batch=1)
    length = np.mean([len(policy.tokenizer.encode_completion(row["answer"], True)) for row in answers])
    assert figures["right"] == 0.75 and figures["different"] == 1.5 and figures["judged"] == 4
    assert figures["patterns"] == 2 and figures["commonest"] == 0.75 and figures["words"] == (5 * 3 + 2) / 4
    assert 0.4 * length < figures["kl"] < 0.6 * length, "half a nat for each token"
    assert [row["pattern"] for row in answers] == ["The _ and the _."] * 2 and answers[0]["reward"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs an affinity")
def test_the_main_job_where_others_use_the_cores(tmp_path, monkeypatch):
    """Each time from nothing, in a folder of its own; with one core where that is said, and with all again after it."""
    started, all_cores = [], os.sched_getaffinity(0)
    monkeypatch.setattr(threads.subprocess, "run", lambda command, **_: started.append(
        (command[-3:], len(os.sched_getaffinity(0)))))
    monkeypatch.setattr(threads, "use_a_core", print)                       # a process that ends at once
    command.main(["threads", "--quick", "--out", str(tmp_path)])
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "threads.md").read_text().splitlines()[2:6]]
    assert len(rows) == 4 and rows[0][2] == "1.00" and os.sched_getaffinity(0) == all_cores
    assert [cores for _, cores in started] == [len(all_cores)] * 3 + [1]
    assert len({words[1] for words, _ in started}) == 4 and all(words[2] == "--quick" for words, _ in started)
