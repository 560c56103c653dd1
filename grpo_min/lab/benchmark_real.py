"""Speed and memory at a real model's size: python -m grpo_min.lab.benchmark_real --sft runs/smollm2/checkpoint.pt

Steps of GRPO and PPO on prompts of tutorials/tasks/two_words.py. END is never sampled, so that the work is known.
Sampling is held against its matrix products alone: in their order, with the weights of layer after layer, which have to
come from memory for every token. --against trl lets TRL's GRPO take turns with ours, on the same weights, prompts and
numbers of tokens. Prompts grow by sentences in front of them: here each is run once, there once per completion. Memory
is that of a process of its own that takes two steps, beside the bytes that are counted.
"""
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from grpo_min import grpo, ppo, tokenizer
from grpo_min.lab.benchmark import seconds_of
from grpo_min.lab.benchmark_trl import installed, trainer_steps, versions
from grpo_min.lab.report import PHASES, RESULTS, machine, state_bytes, step_seconds, table_row
from grpo_min.model import autocast
from grpo_min.real.export import export
from grpo_min.real.llama import Llama, LlamaConfig
from grpo_min.real.lora import adapt
from grpo_min.run import metrics
from grpo_min.run.checkpoint import load_model
from grpo_min.run.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.run.cores import keep_memory
from grpo_min.run.files import make_folder, save_file
from grpo_min.run.metrics import peak_memory_mb
from grpo_min.run.plots import finish, plt
from grpo_min.task import load_task

MEMORY = [*(("GRPO", dict(microbatches=n)) for n in (1, 2, 4, 8)), ("GRPO", dict(beta=0.01)),
          ("PPO", {}), ("PPO", dict(beta=0.01)), ("GRPO", dict(lora=8)), ("GRPO", dict(lora=8, beta=0.01)),
          ("PPO", dict(lora=8)), ("PPO", dict(lora=8, beta=0.01))]
UNLESS_SAID = dict(beta=0.0, microbatches=2, lora=0)
# tokens: of a prompt at least, 0 for those of the task as they are; memory: whose is measured
WORK = dict(prompts=8, group_size=8, new=24, tokens=[0, 100, 200], memory=MEMORY)
QUICK = dict(prompts=4, group_size=2, new=4, tokens=[0, 80], memory=[MEMORY[0], MEMORY[-1]])
QUICK_MODEL = LlamaConfig(vocab_size=tokenizer.own().vocab_size, context=80, layers=2, heads=4, kv_heads=2, width=64,
                          head_size=16, hidden=96, theta=1e4, eps=1e-5, bias=False, head_norm=False, tied=True)
FILLER = ["It is a calm day.", "The shop on the corner opens at nine.", "Two people walk along the street.",
          "A letter has come in the post.", "There is bread on the table.", "Somebody has left a door open."]
KEPT = ", memory kept as here"      # TRL with the one setting of ours that it lacks, run.cores.keep_memory
LOOPS = {"GRPO": (grpo, grpo.GRPOConfig), "PPO": (ppo, ppo.PPOConfig)}


@dataclass
class RealBenchmarkConfig:
    """Measure a real model: sampling against its matrix products, steps by phase as prompts grow, and memory."""
    sft: str = option("runs/smollm2/checkpoint.pt", "checkpoint of the policy, as grpo_min.real.load writes it")
    out: str = option("runs/benchmark_real", "folder to write benchmark_real.json, .md and .png into")
    rounds: int = option(1, "turns of each kind; 0: memory alone, beside the steps of the file in --out")
    steps: int = option(3, "steps per turn; the first is not counted")
    against: str = option("", "what else does the same work: trl", ["", "trl"])
    quick: bool = option(False, "a smoke test: a small random model in place of --sft, and little work")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


# --- the work -----------------------------------------------------------------------------------------------------

def policy_of(config, context=None, lora=0):
    """The policy, which never samples END. A Llama can be read in any context, since its angles need no weights. lora:
    the rank of adapters, if only they shall be trained."""
    torch.manual_seed(0)
    model = QUICK_MODEL.build() if config.quick else load_model(config.sft)
    if context and isinstance(model, Llama):
        model.config = replace(model.config, context=context)

    class Endless(type(model)):
        def head(self, states):
            logits = super().head(states)
            if not torch.is_grad_enabled():                                # an update reads no END anyway
                logits[..., self.tokenizer.end] = -1e9
            return logits
    model.__class__ = Endless
    model = model.to(pick_device(config.device))
    return adapt(model, lora, config.sft) if lora else model


def texts_of(config, work):
    """The prompts of a step in every length that the model can read -> {tokens of the longest: texts}."""
    model, texts = policy_of(config), {}

    def tokens_of(text):
        return len(model.tokenizer.encode_prompt(text))
    prompts, = load_task(str(RESULTS.parent / "tasks" / "two_words.py"), "prompts")
    asked = [row["prompt"] for row in prompts("train")[:work["prompts"]]]
    for tokens in work["tokens"]:
        before, sentences = "", itertools.cycle(FILLER)
        while tokens_of(before + asked[0]) < tokens:
            before += next(sentences) + " "
        longest = max(tokens_of(before + text) for text in asked)
        if isinstance(model, Llama) or longest + work["new"] <= model.config.context:
            texts[longest] = [before + text for text in asked]
    require(texts, f"{config.sft}: a context of {model.config.context} has no room for the prompts")
    return texts


def score(texts):
    """A reward that takes no time."""
    return [float(len(text) % 7) for text in texts]


def steps_of(config, work, name, length, texts, **settings):
    """Take some steps of GRPO or PPO -> their rows of metrics without the first, with what state_bytes counts."""
    loop, config_class = LOOPS[name]
    settings = {**UNLESS_SAID, **settings}
    critic = dict(critic="sft", critic_minibatches=settings["microbatches"]) if loop is ppo else {}
    path = Path(config.out) / "prompts.jsonl"
    save_file(path, "\n".join(json.dumps(dict(prompt=text)) for text in texts).encode())
    settings = config_class(run="", steps=config.steps, prompts=str(path), prompts_per_step=work["prompts"], lr=1e-5,
                            group_size=work["group_size"], max_new_tokens=work["new"], device=config.device,
                            **critic, **settings)
    with contextlib.redirect_stdout(io.StringIO()):
        _, rows = loop.train(settings, reward=lambda prompts, completions, **columns: score(completions),
                             model=policy_of(config, length + work["new"], settings.lora),
                             evaluate=lambda policy, step: dict(state=state_bytes(policy, settings)))
    assert all(row["length"] == work["new"] for row in rows), "or the work is not what is counted"
    return rows[1:]


def trl_steps(config, work, texts, folder, batch, keep):
    """Let TRL's GRPO take as many steps from an exported folder -> seconds of each but the first. It samples all
    completions at once and reads a batch of them at a time. keep: whether memory is kept."""
    device = pick_device(config.device)
    keep_memory(keep)
    from transformers import AutoTokenizer, GenerationConfig
    theirs = AutoTokenizer.from_pretrained(folder)
    ends = [GenerationConfig.from_pretrained(folder).eos_token_id, theirs.eos_token_id]

    def reward(completions, completion_ids, **columns):
        assert {*map(len, completion_ids)} == {work["new"]}
        return score([messages[0]["content"] for messages in completions])
    return trainer_steps(
        str(folder), theirs, [[dict(role="user", content=text)] for text in texts], reward, device,
        Path(config.out) / "trl", per_device_train_batch_size=batch, num_generations=work["group_size"],
        gradient_accumulation_steps=work["prompts"] * work["group_size"] // batch, max_completion_length=work["new"],
        beta=0.0, learning_rate=1e-5, max_steps=config.steps, generation_kwargs=dict(suppress_tokens=ends))()


def sampling_products(model, Q, G, P, N):
    """The matrix products of sampling N tokens for G completions of each of Q prompts of P tokens -> a function that
    computes them in their order and nothing else, with the model's weights and ones for the other factors."""
    H, D, B = model.config.heads, model.config.width, Q * G
    K, E = getattr(model.config, "kv_heads", H), getattr(model.config, "head_size", D // H)
    head, hidden = getattr(model, "unembed", model.tokens).weight, model.blocks[0].down.in_features        # (V, D)
    some = functools.partial(torch.ones, device=head.device)
    caches = [(some(B, K, P + N, E), some(B, K, P + N, E)) for _ in model.blocks]

    def factors(rows, tokens, S):
        """Of the weights' products, and of those with S keys and values, each read by H / K heads of queries."""
        n, queries = rows * tokens, H // K * tokens
        return some(n, D), some(n, H * E), some(n, hidden), some(rows, K, queries, E), some(rows, K, queries, S)
    prompts, steps = factors(Q, P, P), [factors(B, 1, P + t) for t in range(1, N)]

    def layers(x, y, z, queries, shares):
        rows, S = len(queries), shares.shape[3]
        for block, (keys, values) in zip(model.blocks, caches):
            F.linear(x, block.attention.qkv.weight)
            queries @ keys[:rows, :, :S].transpose(2, 3)
            shares @ values[:rows, :, :S]
            F.linear(y, block.attention.out.weight)
            F.linear(x, block.up.weight)
            F.linear(z, block.down.weight)

    @torch.no_grad()
    def compute():
        with autocast(head.device):
            layers(*prompts)
            F.linear(some(B, D), head)
            for step in steps:
                layers(*step)
                F.linear(step[0], head)
    return compute


# --- the measurement ----------------------------------------------------------------------------------------------

def in_own_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def memory_of(config, work, name, length, texts, settings):
    """Take two steps -> megabytes that this process needed at most, with torch and all it imports (on CUDA: what was
    allocated), at all and in each phase of the first step, and megabytes that are counted."""
    device, lap, clocks, phases = pick_device(config.device), metrics.Clock.lap, [], {}

    def lap_and_look(clock, phase):
        lap(clock, phase)
        clocks.append(clock)
        peak = peak_memory_mb(device) or 0
        phases["all"] = max(peak, phases.get("all", 0))
        if clock is clocks[0]:              # later, memory is kept from one phase to the next
            phases[phase] = max(peak, phases.get(phase, 0))
        forget_peak(device)
    metrics.Clock.lap = lap_and_look
    row = steps_of(replace(config, steps=2), work, name, length, texts, **settings)[-1]
    metrics.Clock.lap = lap
    return dict(name=name, settings={**UNLESS_SAID, **settings}, peak=phases.pop("all"), phases=phases,
                state={part: size / 2**20 for part, size in row["state"].items()})


def forget_peak(device):
    """Begin anew to look for the peak of memory; where that cannot be done, phases have the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(config, work, folder):
    """Let all take turns, then measure memory -> records of steps, records of memory. folder: one for TRL to read."""
    texts, device = texts_of(config, work), pick_device(config.device)
    shortest, rows, alone, memory, theirs = min(texts), {}, {}, [], {}
    if config.against:
        export(policy_of(config, max(texts) + work["new"]), folder)
        batch = work["group_size"]
        theirs = {f"TRL GRPO, {batch} at a time": batch, f"TRL GRPO, {batch} at a time{KEPT}": batch,
                  f"TRL GRPO, {batch * work['prompts']} at a time": batch * work["prompts"]}
    turns = 2 * len(texts) + 3 if theirs else len(texts) + 1
    total = config.rounds * turns + len(work["memory"])
    start, done = time.perf_counter(), itertools.count()

    def say(what):
        n = next(done)
        left = f", about {(time.perf_counter() - start) / n * (total - n):.0f} s left" if n else ""
        print(f"{n + 1} of {total}: {what}{left}", flush=True)
    for _, (length, prompts) in itertools.product(range(config.rounds), texts.items()):
        names = ["GRPO", "PPO", *theirs]
        if length > shortest:                                       # of TRL's the one that is the faster there
            names = ["GRPO", *sorted(theirs, key=lambda name: (KEPT in name, np.median(rows[name, shortest])))[:1]]
        for name in names:
            say(f"{name}, prompts of {length} tokens")
            taken = (in_own_process(trl_steps, config, work, prompts, folder, theirs[name], KEPT in name)
                     if name in theirs else in_own_process(steps_of, config, work, name, length, prompts))
            rows.setdefault((name, length), []).extend(taken)
        compute = sampling_products(policy_of(config), work["prompts"], work["group_size"], length, work["new"])
        alone.setdefault(length, []).extend([seconds_of(compute, device) for _ in range(config.steps)][1:])
    for name, settings in work["memory"]:
        say(f"memory of {name} {settings or ''}")
        memory += [in_own_process(memory_of, config, work, name, shortest, texts[shortest], settings)]
    if config.rounds == 0:
        return json.loads((Path(config.out) / "benchmark_real.json").read_text(encoding="utf-8"))["records"], memory
    return [record_of(*key, taken, alone[key[1]]) for key, taken in rows.items()], memory


def record_of(name, length, rows, alone):
    """rows: of metrics, or TRL's seconds, one per step; alone: seconds of sampling's products -> what is reported."""
    record, steps = dict(name=name, length=length, seconds={}, share=None), rows
    if name in LOOPS:
        steps = [step_seconds(row) for row in rows]
        for phase in PHASES:
            record["seconds"][phase] = float(np.median([row.get(f"seconds_{phase}", 0.0) for row in rows]))
        record["share"] = float(np.median(alone)) / record["seconds"]["sample"]
    return dict(record, step=[float(np.median(steps)), min(steps), max(steps)])


# --- what is written ----------------------------------------------------------------------------------------------

def ratios(records):
    """Seconds of a step as prompts grow -> [(tokens, ours, TRL's own at its faster batch or None)]."""
    found = []
    for ours in [record for record in records if record["name"] == "GRPO"]:
        theirs = [record["step"][0] for record in records
                  if record["name"] not in LOOPS and KEPT not in record["name"] and record["length"] == ours["length"]]
        found.append((ours["length"], ours["step"][0], min(theirs, default=None)))
    return found


def tables(records, memory):
    """The records as Markdown: steps, what TRL takes as prompts grow, memory."""
    lines = table_row(["", "tokens of a prompt", *(f"{phase} (s)" for phase in PHASES), "step (s)",
                       "of sampling, its products alone"]) + table_row(["---"] * 8)
    for record in records:
        phases = [f"{record['seconds'][phase]:.3f}" if record["seconds"] else "-" for phase in PHASES]
        lines += table_row([record["name"], f"{record['length']}", *phases, "{:.3f} ({:.3f} to {:.3f})".format(
            *record["step"]), f"{record['share']:.0%}" if record["share"] else "-"])
    if any(theirs for *_, theirs in ratios(records)):
        lines += ["", *table_row(["tokens of a prompt", "GRPO here (s)", "TRL (s)", "ratio"])]
        lines += table_row(["---"] * 4)
        for length, ours, theirs in ratios(records):
            lines += table_row([f"{length}", f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"])
    parts = list(max((record["state"] for record in memory), key=len))
    lines += ["", *table_row(["", "weights", "microbatches", "beta", *(f"{part} (MB)" for part in parts),
                              "counted (MB)", *(f"peak in {phase} (MB)" for phase in PHASES), "peak (MB)"])]
    lines += table_row(["---"] * (6 + len(parts) + len(PHASES)))
    for record in memory:
        settings, state = record["settings"], record["state"]
        lines += table_row([record["name"], f"LoRA, rank {settings['lora']}" if settings["lora"] else "all",
                            f"{settings['microbatches']}", f"{settings['beta']}",
                            *(f"{state.get(part, 0):.0f}" for part in parts), f"{sum(state.values()):.0f}",
                            *(f"{record['phases'].get(phase, 0):.0f}" for phase in PHASES), f"{record['peak']:.0f}"])
    return "\n".join([*lines, ""])


def plot(records, path):
    """Seconds of a step as prompts grow, and how many times as long TRL takes."""
    lengths, ours, theirs = zip(*ratios(records))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    axes[0].plot(lengths, ours, marker="o", label="GRPO here")
    if all(theirs):
        axes[0].plot(lengths, theirs, marker="o", label="TRL")
        axes[1].plot(lengths, np.divide(theirs, ours), marker="o", color="black")
    for axis, label in zip(axes, ["seconds of a step", "TRL's seconds / ours"]):
        axis.set(xlabel="tokens of a prompt", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    finish(figure, path)


def main(argv=None):
    config = parse(RealBenchmarkConfig, argv)
    kept = Path(config.out) / "benchmark_real.json"
    require(config.rounds > 0 or kept.exists(), f"--rounds {config.rounds}: {kept}, with steps, is not there")
    require(config.steps >= 2, "--steps must be at least 2, since the first is not counted")
    device, out, work = pick_device(config.device), Path(config.out), QUICK if config.quick else WORK
    if config.against:
        with installed():
            import trl  # noqa: F401
    if not config.quick:
        policy_of(config)                                           # if it cannot be read, no folder is made
    make_folder(out)
    with tempfile.TemporaryDirectory() as folder:
        records, memory = measure(config, work, Path(folder) / "model")
    save_file(out / "benchmark_real.json", json.dumps(dict(records=records, memory=memory), indent=1).encode())
    model = "a small random model" if config.quick else config.sft
    where = [f"{torch.get_num_threads()} threads; {machine(device)}", *([versions()] if config.against else [])]
    text = tables(records, memory) + "\n" + (
        f"{model}: {work['prompts']} prompts x {work['group_size']} completions x {work['new']} tokens; steps without "
        "KL penalty, in 2 microbatches. Median (lowest to highest). Memory: of a process with the shortest prompts, "
        "with torch and all it imports, in the phases of its first step, and in two; 1 MB is 2^20 bytes. "
        f"{', '.join([*where, str(date.today())])}.\n")
    save_file(out / "benchmark_real.md", text.encode())
    plot(records, out / "benchmark_real.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
