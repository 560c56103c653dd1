"""Every setting of a loop reaches the place it is meant for, and every figure of a row is computed from what it names.

The loops run for a step or two with settings that are all different from each other and from the defaults, and the
functions they call are watched: a setting that is ignored, exchanged with another or replaced by a constant shows.
"""
import json
import platform
import subprocess
import sys
import types

import pytest
import torch

from grpo_min import grpo, ppo
from grpo_min.grpo import kl_estimate
from grpo_min.lab import processes
from grpo_min.model import ScalarGPT
from grpo_min.rewards import learned, load_reward
from grpo_min.rollout import require_fit, token_logprobs
from grpo_min.run import cores, log, metrics
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import UserError, pick_device
from tests import tiny
from tests.tiny import LOOPS, letter_e, recorded_rollouts, settings

pytestmark = pytest.mark.usefixtures("no_curves")


# --- threads ------------------------------------------------------------------------------------------------------

def threads_over_time(monkeypatch, tmp_path, crowded):
    """The number of threads at the end of each of 30 steps of 3 seconds. crowded(step) -> the cores that a run with
    two threads has in that step, and how often in a second it is taken off one."""
    threads, clock = [2], dict(now=1000.0, cpu=0.0, preempted=0)
    run = log.Run(settings(grpo, tmp_path), [], {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cores.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(cores.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(cores, "resource", types.SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda _: types.SimpleNamespace(ru_nivcsw=clock["preempted"])))
    run.threads, ends = 2, []
    with run:
        for step in range(30):
            cpu, preempted = crowded(step)
            clock["now"] += 3
            clock["cpu"] += 3 * (cpu if threads[-1] == 2 else 1)
            clock["preempted"] += 3 * preempted
            run.step_done(step, {}, "")
            ends.append(threads[-1])
    return ends, threads[-1]


@pytest.mark.parametrize("cpu, preempted, left", [(1.0, 300, 1), (1.99, 300, 2), (1.0, 50, 2)],
                         ids=["others use the cores", "a core for each", "threads that wait for something else"])
def test_one_thread_where_others_use_the_cores(cpu, preempted, left, tmp_path, monkeypatch, capsys):
    ends, after = threads_over_time(monkeypatch, tmp_path, lambda step: (cpu, preempted))
    assert ends[1] == left and after == 2, "the run after this one begins with all of them"
    assert capsys.readouterr().out.count("1 thread") == (left == 1), "said once"


def test_threads_are_tried_again_and_more_and_more_seldom(tmp_path, monkeypatch):
    """Crowded for ever, a step of three seconds in 13, then in 23, in 43 and in 83."""
    ends, _ = threads_over_time(monkeypatch, tmp_path, lambda step: (1.0, 300))
    assert [step for step, threads in enumerate(ends) if threads == 2] == [0, 5, 13, 28]


def test_a_busy_moment_costs_little(tmp_path, monkeypatch):
    """Two steps beside others: one thread for ten seconds, and then two until the end."""
    ends, _ = threads_over_time(monkeypatch, tmp_path, lambda step: (1.0, 300) if step in (1, 2) else (2.0, 0))
    assert ends == [2] + 4 * [1] + 25 * [2]


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize("keep, filled", [(True, False), (False, True)])
def test_memory_that_a_tensor_leaves_is_kept(keep, filled):
    """100 MB have 24,400 pages: a process of its own is asked how many are filled anew after a tensor of twice that."""
    script = f"""import resource, torch
from grpo_min.run.cores import keep_memory
keep_memory(); keep_memory({keep})
torch.ones(50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    pages = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert pages > 20_000 if filled else pages < 1000


@pytest.mark.parametrize("own, files, expected", [
    ("", {}, 64), ("0::/\n", {"cpu.max": "max 100000"}, 64), ("0::/\n", {"cpu.max": "200000 100000"}, 2),
    ("0::/\n", {"cpu.max": "50000 100000"}, 1), ("0::/a/b\n", {"a/cpu.max": "300000 100000"}, 3),
    ("0::/a/b\n", {"a/b/cpu.max": "500000 100000", "a/cpu.max": "max 100000"}, 5),
    ("0::/../x\n", {"cpu.max": "150000 100000"}, 1),
    ("1:cpu,cpuacct:/d\n0::/\n", {"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4),
    ("1:cpu:/hidden\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64)])
def test_cores_of_a_container(own, files, expected, tmp_path, monkeypatch):
    """With --cpus=2 on a machine with 64 cores two processes run beside each other, not 64."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cores.cores(tmp_path, tmp_path / "own") == expected


def test_cores_where_nothing_limits_them(tmp_path, monkeypatch):
    """macOS and Windows know neither an affinity nor control groups."""
    monkeypatch.delattr(cores.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 12)
    assert cores.cores(tmp_path, tmp_path / "none") == 12


@pytest.mark.parametrize("asked, here, expected", [(None, 64, 2), (None, 1, 1), ("7", 64, None)])
def test_no_more_threads_than_help(asked, here, expected, monkeypatch):
    """On a card's host of 64 cores a model as small as these gets two, unless OMP_NUM_THREADS asks for more."""
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(cores, "cores", lambda: here)
    pick_device("cpu")
    assert chosen == ([expected] if expected else [])


@pytest.mark.parametrize("kind, expected", [("cpu", 5), ("cuda", 1), ("mps", 1)])
def test_as_many_processes_as_cores_whatever_threads_a_run_has_left(kind, expected, monkeypatch):
    sizes, pool = [], processes.ThreadPoolExecutor
    monkeypatch.setattr(processes, "ThreadPoolExecutor", lambda size: sizes.append(size) or pool(size))
    monkeypatch.setattr(processes, "cores", lambda: 5)
    with processes.beside_each_other(torch.device(kind)):
        assert torch.get_num_threads() == 1
    assert sizes == [expected]


# --- the policy's update and the critic's -------------------------------------------------------------------------

@LOOPS
def test_each_model_has_its_own_learning_rate_and_no_weight_decay(loop, tmp_path, watch):
    calls = watch(loop, "optimizer_for")
    loop.train(settings(loop, tmp_path, steps=1, lr=0.011, **(dict(critic_lr=0.022) if loop is ppo else {})))
    expected = [("GPT", 0.011), ("Critic", 0.022)][:1 if loop is grpo else 2]
    assert [(type(model).__name__, *rest) for (model, *rest), _ in calls] == expected
    for (_, (_, lr)), (_, optimizer) in zip(zip(calls, expected), calls):
        assert all(group["lr"] == lr and group["weight_decay"] == 0 for group in optimizer.param_groups)


@LOOPS
def test_gradients_are_clipped_to_the_norm_that_is_set(loop, tmp_path, watch):
    calls = watch(loop, "update")
    more = dict(critic_epochs=3, critic_minibatches=2) if loop is ppo else {}
    loop.train(settings(loop, tmp_path, steps=1, max_grad_norm=0.37, minibatches=2, epochs=2, **more), reward=letter_e)
    assert [arguments[4] for arguments, _ in calls] == [0.37] * (4 if loop is grpo else 10)
    models = [type(arguments[1]).__name__ for arguments, _ in calls]
    assert models == ["GPT"] * 4 + ["Critic"] * (6 if loop is ppo else 0), "first the policy, then the critic"


@LOOPS
@pytest.mark.parametrize("more, charged", [(dict(kl="k2", beta=0.3), 0.3), (dict(kl="k3", beta=0.3), 0.3),
                                           (dict(beta=0.0), 0), (dict(kl="k1", kl_in="reward", beta=0.3), 0)],
                         ids=["k2", "k3", "no reference", "in the reward"])
def test_the_loss_is_told_beta_times_the_kl_of_each_token(loop, more, charged, tmp_path):
    """With a gradient, and nothing where there is no reference or the KL is charged in the reward."""
    estimates, penalties = [], []

    def kl(logprobs, ref_logprobs, kind):
        assert kind == more["kl"] and not ref_logprobs.requires_grad
        estimates.append(loop.kl_estimate(logprobs, ref_logprobs, kind))
        return estimates[-1]

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        penalties.append(penalty)
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
    loop.train(settings(loop, tmp_path, steps=2, epochs=2, minibatches=2, **more), reward=letter_e, loss=loss, kl=kl)
    assert len(penalties) == 8
    if charged:
        assert all(torch.equal(penalty, 0.3 * each) for penalty, each in zip(penalties, estimates, strict=True))
        assert penalties[1].shape[0] == 6 and penalties[1].requires_grad and (penalties[-1] != 0).any()
    else:
        assert penalties == [0.0] * 8 and len(estimates) == (2 if more["beta"] else 0)


def test_value_loss_gets_its_settings(tmp_path, watch):
    """The clip around the values at sampling, in later epochs too; the returns as GAE gave them, whitened or not."""
    advantages, losses, updates = [], watch(ppo, "value_loss"), watch(ppo, "update")

    def advantage(*arguments):
        advantages.append((arguments, ppo.gae(*arguments)))
        return advantages[-1][1]
    config = settings(ppo, tmp_path, steps=1, critic_minibatches=2, critic_epochs=2, value_clip=0.05, gamma=0.8,
                      lam=0.1, whiten=True, critic=tiny.critic_checkpoint(tmp_path / "critic.pt"))
    ppo.train(config, reward=letter_e, advantage=advantage)
    ((_, old_values, _, *rest), (_, returns)), = advantages
    assert rest == [0.8, 0.1] and len(losses) == 4
    for i, ((values, old, target, mask, clip), _) in enumerate(losses):
        rows = slice(6 * (i % 2), 6 * (i % 2) + 6)
        assert clip == 0.05 and torch.equal(old, old_values[rows]) and torch.equal(target, returns[rows])
        assert (values - old).abs().max() < 1e-6 if i == 0 else (values - old).abs().max() > 1e-4
    critics = [loss for (_, model, _, loss, *_), _ in updates if type(model).__name__ == "Critic"]
    assert [loss.item() for loss in critics] == pytest.approx([error.item() for _, error in losses])


def test_critic_starts_as_a_copy_of_the_policy(tmp_path):
    policy = tiny.gpt()
    critic = ppo.start_critic(ppo.PPOConfig(critic="sft"), policy, torch.device("cpu"))
    assert critic.tokenizer is policy.tokenizer and (critic.scalar.weight == 0).all()
    assert (critic.gain.weight == 0).all() and (critic.gain.bias == 0).all()
    assert tiny.same(critic.trunk.state_dict(), policy.state_dict())
    assert critic.trunk.tokens.weight.data_ptr() != policy.tokens.weight.data_ptr()


# --- seeds --------------------------------------------------------------------------------------------------------

@LOOPS
def test_prompts_and_sampling_depend_on_seed_and_step(loop, tmp_path, watch):
    batches, generators = watch(loop, "batch_rows"), watch(loop, "generator")
    loop.train(settings(loop, tmp_path, steps=2, seed=3), reward=letter_e)
    assert [arguments for arguments, _ in batches] == [(12, 4, 3, 0), (12, 4, 3, 1)]
    assert [arguments for arguments, _ in generators] == [(3, 0), (3, 1)]


# --- the tokenizer ------------------------------------------------------------------------------------------------

@LOOPS
def test_a_run_is_in_the_tokens_of_its_model(loop, tmp_path, watch):
    """Prompts, completions, their text and the checkpoint: all by the model's tokenizer, the critic's too."""
    other, seen, asked = tiny.other_tokenizer(), [], watch(loop, "token_logprobs")

    def reward(prompts, completions, **columns):
        seen.append(list(zip(completions, columns["finished"])))
        return letter_e(prompts, completions)
    config = settings(loop, tmp_path, run=str(tmp_path / "run"), steps=2)
    policy, _ = loop.train(config, reward=reward, model=tiny.gpt(tokenizer=other))
    assert len(asked) == 2
    for ((_, prompts, ids, mask, *_), _), step in zip(asked, seen):
        for row, length, text in zip(prompts.ids.tolist(), prompts.length.tolist(), prompts.texts):
            assert row[:length] == other.encode_prompt(text) and set(row[length:]) <= {other.pad}
        for row, real, (text, finished) in zip(ids, mask, step):
            assert text + "<|end|>" * finished == other.decode(row[real].tolist())
            assert finished == (other.end in row[real].tolist()) and (row[~real] == other.pad).all()
        assert not all(finished for _, finished in step)
    assert any(finished for step in seen for _, finished in step)
    again = load_model(tmp_path / "run/checkpoint.pt")
    assert again.tokenizer.to_dict() == other.to_dict() and again.config.vocab_size == other.vocab_size == 262
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    (_, _, ids, mask, *_), _ = asked[-1]
    for sample, row, real in zip(samples[9:], ids, mask):
        assert sample["tokens"] == [other.decode([token]) for token in row[real].tolist()]
    if loop is ppo:
        assert ppo.start_critic(config, policy, torch.device("cpu")).tokenizer is policy.tokenizer


# --- what a row reports -------------------------------------------------------------------------------------------

@LOOPS
@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_kl_is_reported_as_k3_whatever_is_charged(loop, kind, tmp_path, monkeypatch):
    rollouts, config = recorded_rollouts(loop, monkeypatch), settings(loop, tmp_path, kl=kind)
    _, rows = loop.train(config, reward=letter_e)
    reference = load_model(config.sft)
    for (prompts, rollout), row in zip(rollouts, rows):
        ref_logprobs, _ = token_logprobs(reference, prompts, rollout.completion_ids, rollout.mask)
        expected = kl_estimate(rollout.logprobs, ref_logprobs, "k3").sum(1).mean().item()
        assert row["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert rows[-1]["kl"] > 1e-3


@LOOPS
def test_gap_and_clip_shares_are_those_of_the_updates(loop, tmp_path):
    shares = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        ratio = (logprobs - old_logprobs).exp()[mask]
        shares.append([(ratio < 1 - clip_eps).float().mean().item(), (ratio > 1 + clip_eps).float().mean().item()])
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
    _, rows = loop.train(settings(loop, tmp_path, steps=1, epochs=2, minibatches=2, clip_eps=0.001), reward=letter_e,
                         loss=loss)
    assert rows[0]["gap"] < 5e-5, "of each minibatch with its own rows"
    low, high = (sum(column) / 4 for column in zip(*shares))
    assert rows[0]["clip_low"] == pytest.approx(low) and rows[0]["clip_high"] == pytest.approx(high)
    assert abs(low - high) > 0.01


@LOOPS
def test_samples_show_the_readers_reward_and_the_advantage_that_was_used(loop, tmp_path):
    used = []

    def loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty):
        used.append(advantages[:, 0])
        return loop.policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, penalty)
    config = settings(loop, tmp_path, steps=3, run=str(tmp_path / "run"), kl="k1", kl_in="reward", beta=0.5)
    loop.train(config, reward=letter_e, loss=loss)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for sample, advantage in zip(samples[18:], used[2].tolist()):
        assert sample["step"] == 2 and sample["reward"] == round(letter_e([], [sample["completion"]])[0], 4)
        assert sample["advantage"] == round(advantage, 4)


def test_explained_variance_counts_what_is_charged_in_the_reward(tmp_path, watch):
    calls, charged = watch(metrics, "explained_variance"), []

    def advantage(rewards, *rest):
        charged.append(rewards)
        return ppo.gae(rewards, *rest)
    ppo.train(settings(ppo, tmp_path, kl="k1", kl_in="reward", beta=0.5, gamma=0.8), reward=letter_e,
              advantage=advantage)
    for ((_, actual, mask), _), rewards in zip(calls, charged):
        N = rewards.shape[1]
        to_go = torch.stack([sum(0.8 ** (l - t) * rewards[:, l] for l in range(t, N)) for t in range(N)], 1)
        assert torch.allclose(actual[mask], to_go[mask], atol=1e-5)


# --- warnings -----------------------------------------------------------------------------------------------------

TROUBLE = dict(equal_groups=(0.5, 0.95), truncated=(0.1, 0.5), kl=(5.0, 50.0), entropy=(0.5, 0.001), gap=(1e-6, 0.1),
               clip_high=(0.02, 0.1),
               explained_variance=(0.2, -1.0), critic_share=(0.5, 0.05))       # a healthy value, and a sick one


class FakeRun:
    def __init__(self, config):
        self.config, self.warned, self.rows, self.name = config, set(), [], ""
        self.folder = None

    def step_done(self, step, row, line, samples):
        self.rows.append(row)


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_said_once_and_health_never(name, tmp_path, capsys):
    clock = metrics.Clock(torch.device("cpu"))
    row = dict(reward=0.5, accuracy="", thinking=0.5, kl=0.1, length=5.0)
    for value, notes in zip(TROUBLE[name], (0, 1)):
        run = FakeRun(settings(grpo, tmp_path))
        for step in range(2):
            metrics.record(run, step, dict(row, **{name: value}), clock, [])
        assert capsys.readouterr().out.count(f"note: {name} is") == notes
    assert set(TROUBLE) == {column for column, *_ in metrics.TROUBLE}


def test_an_entropy_of_no_token_is_no_trouble(tmp_path, capsys):
    row = dict(reward=0.5, accuracy="", thinking=0.5, kl=0.1, length=5.0, entropy=0.0)
    metrics.record(FakeRun(settings(grpo, tmp_path)), 0, row, metrics.Clock(torch.device("cpu")), [])
    assert "note: entropy" not in capsys.readouterr().out


# --- rewards by name ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [("correct", [1, 0, 1, 0]), ("well_formed", [0, 1, 1, 0]),
                                            ("both", [1, 0.2, 1.2, 0])])
def test_rewards_have_the_names_they_are_called_by(name, expected):
    reward, rows, files = load_reward(grpo.GRPOConfig(reward=name), None, tiny.gpt(context=80), torch.device("cpu"))
    said = [" 28", "<think> x</think> 27", "<think> x</think> 28", "27"]
    assert reward([""] * 4, said, answer=["28"] * 4, finished=[True] * 4) == pytest.approx(expected)
    assert len(files) == 1 and files[0].endswith("/arithmetic_train.jsonl") and "answer" in rows[0]


def test_learned_reward_reads_the_training_prompts_and_its_model(tmp_path):
    path = tiny.reward_checkpoint(tmp_path / "reward_model.pt")
    config = grpo.GRPOConfig(reward="learned", reward_model=path)
    reward, _, files = load_reward(config, None, tiny.gpt(context=80), torch.device("cpu"))
    assert files[0].endswith("/animals_train.jsonl") and files[1] == path
    model = load_model(path, kind=ScalarGPT)
    with torch.no_grad():
        model.scalar.bias += 1000                                                       # a score is not bounded
    assert learned(model)(["a"], ["b"])[0] == pytest.approx(reward(["a"], ["b"])[0] + 1000, abs=1e-2)


def test_several_reward_models_give_the_mean_of_their_scores(tmp_path):
    paths = [tiny.reward_checkpoint(tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2, 3)]
    asked, policy = (["a", "what?"], ["b", "yes."]), tiny.gpt(context=80)
    config = grpo.GRPOConfig(reward="learned", reward_model=",".join(paths))
    reward, _, files = load_reward(config, None, policy, torch.device("cpu"))
    alone = [learned(load_model(path, kind=ScalarGPT))(*asked, finished=[True, False]) for path in paths]
    means = [sum(scores) / 3 for scores in zip(*alone)]
    assert reward(*asked, finished=[True, False]) == pytest.approx(means, abs=1e-5) and files[1:] == paths
    assert len({round(scores[0], 3) for scores in alone}) == 3


def test_what_just_fits_is_accepted():
    require_fit(20, [(5, 6), (10, 10)], "data.jsonl")
    with pytest.raises(UserError, match="data.jsonl, line 2"):
        require_fit(20, [(10, 10), (10, 11)], "data.jsonl")
