"""How fast, and how near to what the machine can do: python -m grpo_min.lab.benchmark

Steps of GRPO and PPO on a model with random weights that never ends a completion, so that every completion has the same
length and the work is known. All settings take turns, so that a slow minute of the machine hits them alike, and the
median over all steps but the first of each turn is reported. Memory is that of a process of its own that takes one
turn. A phase is held against its matrix products, counted from the shapes: against what the same products take with
nothing else between them, measured in the same turn, and against a limit, what they would take at the best rate that
this machine reaches on large matrices or, where that is longer, reading and writing memory once. How often the CPU
would wait for a card is counted on one that is not there (lab/pretend.py).

--against trl does TRL's GRPO on the same work in the same run, where TRL is installed (it is not required): a model of
the same shape and vocabulary, prompts of as many tokens, completions of as many tokens. Transformers' generate()
samples as many completions.
"""
import contextlib
import io
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from grpo_min import grpo, ppo, tokenizer
from grpo_min.lab.benchmark_trl import OTHERS, versions
from grpo_min.lab.pretend import CAN_PRETEND, pretend_card
from grpo_min.lab.report import PHASES, machine, step_seconds, table_row
from grpo_min.model import GPT, GPTConfig
from grpo_min.run.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.run.files import make_folder, save_file
from grpo_min.run.metrics import peak_memory_mb
from grpo_min.run.plots import finish, plt

# About the arithmetic task, once it thinks.
BASE = dict(layers=3, width=96, prompts=32, prompt_length=14, group_size=8, new=24)
SMALL_GPT2 = dict(layers=4, width=128, prompts=32, prompt_length=6, group_size=16, new=8)
QUICK = dict(layers=1, width=64, prompts=8, prompt_length=14, group_size=4, new=8)
GROWTH = {"completions per prompt": ("group_size", [2, 4, 8, 16]), "tokens per completion": ("new", [8, 16, 24, 40]),
          "width of the model": ("width", [64, 96, 128, 192])}


@dataclass
class BenchmarkConfig:
    """Measure seconds per step by phase, tokens per second and the share of the machine's limit."""
    out: str = option("runs/benchmark", "folder to write benchmark.json, .md and .png into")
    rounds: int = option(5, "turns that each setting takes")
    steps: int = option(4, "steps per turn; the first is not counted")
    against: str = option("", "what else does the same work: trl", ["", "trl"])
    quick: bool = option(False, "a smoke test: two settings, of little work")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


# --- the work -----------------------------------------------------------------------------------------------------

class Endless(GPT):
    """A model with random weights that never says END."""

    def head(self, states):
        logits = super().head(states)
        logits[..., self.tokenizer.end] = -1e9
        return logits


def endless(layers, width):
    torch.manual_seed(0)
    return Endless(GPTConfig(tokenizer.own().vocab_size, context=128, layers=layers, heads=width // 32, width=width))


def random_words(prompt_length, count=1000):
    """Prompts of so many tokens, those around the text included."""
    own = tokenizer.own()
    tokens = [own.decode([i]) for i in range(6, own.vocab_size)]
    words = [text for text in tokens if text[0] == " " and text[1:].isalpha()]
    rows = np.random.default_rng(0).choice(words, (count, prompt_length - len(own.encode_prompt(""))))
    return ["".join(row) for row in rows]


def steps_of(loop, config, layers, width, prompts, prompt_length, group_size, new):
    """Take some steps of a loop -> their rows of metrics, without the first."""
    config_class = {grpo: grpo.GRPOConfig, ppo: ppo.PPOConfig}[loop]
    path = Path(config.out) / f"prompts-{prompt_length}.jsonl"
    save_file(path, "\n".join(json.dumps(dict(prompt=text)) for text in random_words(prompt_length)).encode())
    critic = dict(critic="sft", critic_minibatches=1) if loop is ppo else {}
    settings = config_class(run="", steps=config.steps, prompts_per_step=prompts, group_size=group_size,
                            max_new_tokens=new, device=config.device, prompts=str(path), **critic)
    with contextlib.redirect_stdout(io.StringIO()):
        _, rows = loop.train(settings, reward=lambda prompts, completions, **columns: [len(c) % 7 for c in completions],
                             model=endless(layers, width).to(pick_device(config.device)))
    assert all(row["length"] == new for row in rows), "or the work is not what is counted"
    return rows[1:]


def waits(config, name, work):
    """How often the CPU would wait for a card in a step, but for once for each token: counted on the pretend card."""
    counts = []
    for steps in 1, 2:
        with pretend_card() as card:
            steps_of({"GRPO": grpo, "PPO": ppo}[name], replace(config, device="card", steps=steps), **work)
        counts.append(card.waits.total())
    return counts[1] - counts[0] - work["new"]


# --- its matrix products ------------------------------------------------------------------------------------------

def products(layers, width, prompts, prompt_length, group_size, new):
    """The matrix products of each phase -> {phase: [(times, batch, m, k, n)]}: so many times `batch` products of m x k
    by k x n. The prompt is run once per prompt, and a completion's last token is never read. With the gradient there
    are two more of each."""
    heads, rows, head_width = width // 32, prompts * group_size, 32

    def linear(tokens, times=1):
        return [(layers * times, 1, tokens, k * width, n * width) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))]

    def attention(batch, queries, keys):
        return [(layers, batch, queries, head_width, keys), (layers, batch, queries, keys, head_width)]

    def head(times, tokens):
        return [(times, 1, tokens, width, tokenizer.own().vocab_size)]

    prompt = linear(prompts * prompt_length) + attention(prompts * heads, prompt_length, prompt_length)
    sample = prompt + head(new, rows) + linear(rows, new - 1)
    for t in range(1, new):
        sample += attention(rows * heads, 1, prompt_length + t)
    trunk = prompt + linear(rows * (new - 1)) + attention(rows * heads, new - 1, prompt_length + new - 1)
    score = trunk + head(1, rows * new)
    values = trunk + [(1, 1, rows * (new - 1), width, width)]
    return dict(sample=sample, score=score, update=with_gradient(score), critic=values + with_gradient(values))


def with_gradient(products):
    """For a product of m x k by k x n: itself, and the two that give the gradients of its factors."""
    all_three = []
    for times, batch, m, k, n in products:
        all_three += [(times, batch, m, k, n), (times, batch, m, n, k), (times, batch, k, m, n)]
    return all_three


def unshared(work):
    """The matrix products of sampling where every prompt is run once per completion, as others do."""
    return products(**dict(work, prompts=work["prompts"] * work["group_size"], group_size=1))["sample"]


def operations(products):
    """Floating-point operations: 2 for each multiplication."""
    return sum(2 * times * batch * m * k * n for times, batch, m, k, n in products)


def least_seconds(products, rate, bandwidth):
    """What the products take where each is bound by this machine's best rate, or by reading and writing memory once."""
    return sum(times * max(2 * batch * m * k * n / rate, 4 * batch * (m * k + k * n + m * n) / bandwidth)
               for times, batch, m, k, n in products)


def seconds_alone(products, device):
    """What the products take, each in its own shape and with nothing between them: medians of five."""
    total = 0.0
    for times, batch, m, k, n in products:
        a, b = torch.randn(batch, m, k, device=device).squeeze(0), torch.randn(batch, k, n, device=device).squeeze(0)
        total += times * float(np.median([seconds_of(lambda: a @ b, device) for _ in range(5)]))
    return total


def seconds_of(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rates(device, size=2048, floats=2**26):
    """Operations per second of a product of two square matrices and bytes per second of a copy, the best of ten."""
    a, large = torch.randn(size, size, device=device), torch.ones(floats, device=device)
    other = torch.empty_like(large)
    return (2 * size ** 3 / min(seconds_of(lambda: a @ a, device) for _ in range(10)),
            2 * 4 * floats / min(seconds_of(lambda: other.copy_(large), device) for _ in range(10)))


# --- the measurement ----------------------------------------------------------------------------------------------

def settings_of(config):
    """What is measured: a list of (name, work)."""
    base, growth = (QUICK, {}) if config.quick else (BASE, GROWTH)
    settings = [("GRPO", base), ("PPO", base)]
    for name, values in growth.values():
        settings += [("GRPO", {**base, name: value}) for value in values if value != base[name]]
    if config.against:
        for work in [base] if config.quick else [SMALL_GPT2, base]:
            settings += [(name, work) for name in ["GRPO", *OTHERS] if (name, work) not in settings]
    return settings


def turn_of(name, config, work):
    """A function that takes some steps -> their rows of metrics."""
    if name in OTHERS:
        make_turn, _ = OTHERS[name]
        return make_turn(config, work)
    return lambda: steps_of({"GRPO": grpo, "PPO": ppo}[name], config, **work)


def peak_memory(name, config, work):
    """Megabytes that a process needs to take one turn, with torch and all it imports. On CUDA: what was allocated."""
    turn_of(name, config, work)()
    return peak_memory_mb(pick_device(config.device))


def measure(config):
    """Let all settings take turns -> their records, and the best rate and bandwidth of each turn."""
    settings, device, best = settings_of(config), pick_device(config.device), []
    turns, measured = [turn_of(name, config, work) for name, work in settings], []
    for number, (name, work) in enumerate(settings, start=1):
        print(f"memory of setting {number} of {len(settings)}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured.append(dict(rows=[], alone=[], memory=process.submit(peak_memory, name, config, work).result()))
    start = time.perf_counter()
    for turn in range(config.rounds):
        left = (time.perf_counter() - start) / turn * (config.rounds - turn) if turn else 0
        print(f"turn {turn + 1} of {config.rounds}" + (f", {left:.0f} s left" if turn else ""), flush=True)
        best.append(rates(device, 256, 2**20) if config.quick else rates(device))
        for (_, work), take_turn, numbers in zip(settings, turns, measured):
            numbers["rows"] += take_turn()
            counted = {**products(**work), "unshared": unshared(work)}
            numbers["alone"].append({phase: seconds_alone(counted[phase], device) for phase in counted})
    rate, bandwidth = map(max, zip(*best))
    return [record_of(name, work, **numbers, rate=rate, bandwidth=bandwidth)
            for (name, work), numbers in zip(settings, measured)], best


def record_of(name, work, rows, alone, memory, rate, bandwidth):
    """rows: of metrics, one per step; alone: {phase: seconds of its products}, one per turn -> what is reported."""
    totals, seconds, counted = [step_seconds(row) for row in rows], {}, products(**work)
    for phase in PHASES:
        seconds[phase] = float(np.median([row.get(f"seconds_{phase}", 0.0) for row in rows]))
    step = float(np.median(totals))
    record = dict(name=name, work=work, peak_memory_mb=memory, seconds=seconds, step=[step, min(totals), max(totals)],
                  share_of_products={}, share_of_limit={},
                  tokens_per_second=work["prompts"] * work["group_size"] * work["new"] / step)
    if name not in OTHERS:
        for phase in [phase for phase in PHASES if seconds[phase]]:
            products_alone = float(np.median([turn[phase] for turn in alone]))
            record["share_of_products"][phase] = products_alone / seconds[phase]
            record["share_of_limit"][phase] = least_seconds(counted[phase], rate, bandwidth) / seconds[phase]
        record["share_of_unshared"] = float(np.median([turn["unshared"] for turn in alone])) / seconds["sample"]
    return record


# --- what is written ----------------------------------------------------------------------------------------------

def shape_of(work):
    return ["{layers} x {width}".format(**work), "{prompts} ({prompt_length}) x {group_size} x {new}".format(**work)]


def tables(records):
    """The records as Markdown: all of them, the sampling of ours, and what others take."""
    shape = ["layers x width", "prompts (tokens) x completions x tokens"]
    lines = table_row(["", *shape, *(f"{phase} (s)" for phase in PHASES), "step (s)", "tokens/s",
                       "products alone: sample", "update", "limit: sample", "update", "peak memory (MB)"])
    lines += table_row(["---"] * 14)
    sampling = table_row([*shape, "sampling (tokens/s)", "products alone, each prompt run once per completion"])
    sampling += table_row(["---"] * 4)
    others = table_row(["", *shape, "seconds", "seconds of ours", "ratio"]) + table_row(["---"] * 6)
    for record in records:
        name, work, seconds, (step, low, high) = (record[key] for key in ("name", "work", "seconds", "step"))
        shown, shares = PHASES, []
        if name in OTHERS:
            _, phase = OTHERS[name]
            ours = next(other for other in records if other["name"] == "GRPO" and other["work"] == work)
            ours_seconds = ours["seconds"][phase] if phase else ours["step"][0]
            others += table_row([f"{name}, {phase or 'step'}", *shape_of(work), f"{step:.3f}", f"{ours_seconds:.3f}",
                                 f"{step / ours_seconds:.2f}"])
            shown = [phase]
        elif name == "GRPO" and work in (BASE, SMALL_GPT2):
            tokens = work["prompts"] * work["group_size"] * work["new"]
            sampling += table_row([*shape_of(work), f"{tokens / seconds['sample']:.0f}",
                                   f"{record['share_of_unshared']:.0%}"])
        for kind in "share_of_products", "share_of_limit":
            for phase in "sample", "update":
                shares.append(f"{record[kind][phase]:.0%}" if phase in record[kind] else "-")
        lines += table_row([name, *shape_of(work),
                            *(f"{seconds[phase]:.3f}" if phase in shown else "-" for phase in PHASES),
                            f"{step:.3f} ({low:.3f} to {high:.3f})", f"{record['tokens_per_second']:.0f}", *shares,
                            f"{record['peak_memory_mb']:.0f}"])
    for table in sampling, others:
        if len(table) > 2:
            lines += ["", *table]
    return "\n".join([*lines, ""])


def caption(best, where):
    """What the columns mean, and where it was measured."""
    rate, bandwidth = zip(*best)
    return ("Median (lowest to highest). Products alone: the share of a phase that its matrix products take when "
            "nothing else is done. Limit: the share that they would take at the best rate and bandwidth seen here, "
            f"{max(rate) / 1e9:.0f} Gflop/s and {max(bandwidth) / 1e9:.0f} GB/s (lowest of the turns "
            f"{min(rate) / 1e9:.0f} and {min(bandwidth) / 1e9:.0f}). {where}.\n")


def plot(records, path):
    """Seconds of a step of GRPO as one thing grows, by phase."""
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3.6 * len(GROWTH), 3.2), sharey=True)
    base = records[0]["work"]
    for axis, (label, (name, _)) in zip(axes, GROWTH.items()):
        others = {key: value for key, value in base.items() if key != name}
        line = [record for record in records if record["name"] == "GRPO" and others.items() <= record["work"].items()]
        line.sort(key=lambda record: record["work"][name])
        x = [record["work"][name] for record in line]
        for phase in PHASES:
            if any(record["seconds"][phase] for record in line):
                axis.plot(x, [record["seconds"][phase] for record in line], marker="o", label=phase)
        axis.plot(x, [record["step"][0] for record in line], marker="o", color="black", label="step")
        axis.set(xlabel=label, ylabel="seconds" if axis is axes[0] else None, xticks=x)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    finish(figure, path)


def main(argv=None):
    config = parse(BenchmarkConfig, argv)
    require_positive(config, "rounds")
    require(config.steps >= 2, "--steps must be at least 2, since the first is not counted")
    device, out = pick_device(config.device), Path(config.out)
    make_folder(out)
    records, best = measure(config)
    where = [f"{torch.get_num_threads()} threads; {machine(device)}", *([versions()] if config.against else []),
             str(date.today())]
    text = tables(records) + "\n" + caption(best, ", ".join(where))
    for record in records[:2] if CAN_PRETEND else []:
        record["waits"] = waits(config, record["name"], record["work"])
        text += f"\nIn a step of {record['name']} the CPU would wait for a card {record['waits']} times" \
                " beside once for each token.\n"
    save_file(out / "benchmark.json", json.dumps(dict(records=records, rates=best), indent=1).encode())
    save_file(out / "benchmark.md", text.encode())
    plot(records, out / "benchmark.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
