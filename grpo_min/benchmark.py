"""How fast, and how near to what the machine can do: python -m grpo_min.benchmark

Steps of GRPO and PPO on a model with random weights that never ends a completion, so that every completion has the same
length and the work is known. All settings take turns, so that a slow minute of the machine hits them alike, and the
median over all steps but the first of each turn is reported. Memory is that of a process of its own that takes one
turn. A phase is held against its matrix products, counted from the shapes: against what the same products take with
nothing else between them, measured in the same turn, and against a limit, what they would take at the best rate that
this machine reaches on large matrices or, where that is longer, reading and writing memory once.

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
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from grpo_min import grpo, ppo
from grpo_min.config import option, parse, pick_device, require, require_positive, run_command
from grpo_min.metrics import peak_memory_mb
from grpo_min.model import GPT, GPTConfig
from grpo_min.plots import finish, plt
from grpo_min.report import PHASES, machine, table_row
from grpo_min.runs import make_folder, save_file
from grpo_min.tokenizer import END, VOCAB_SIZE, decode, encode_prompt

# About the arithmetic task, once it thinks.
BASE = dict(layers=3, width=96, prompts=32, prompt_length=14, group_size=8, new=24)
GROWTH = {"completions per prompt": ("group_size", [2, 4, 8, 16]), "tokens per completion": ("new", [8, 16, 24, 40]),
          "width of the model": ("width", [64, 96, 128, 192])}
OTHERS = ["TRL GRPO", "generate()"]
SMALL_GPT2 = dict(layers=4, width=128, prompts=32, prompt_length=6, group_size=16, new=8)


@dataclass
class BenchmarkConfig:
    """Measure seconds per step by phase, tokens per second and the share of the machine's limit."""
    out: str = option("runs/benchmark", "folder to write benchmark.json, .md and .png into")
    rounds: int = option(5, "turns that each setting takes")
    steps: int = option(4, "steps per turn; the first is not counted")
    against: str = option("", "what else does the same work: trl", ["", "trl"])
    quick: bool = option(False, "a smoke test: two settings")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])


def endless(layers, width):
    """A model with random weights that never says END."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=128, layers=layers, heads=width // 32, width=width))

    def head(states):
        logits = GPT.head(model, states)
        logits[..., END] = -1e9
        return logits
    model.head = head
    return model


def random_words(prompt_length, count=1000):
    """Prompts of so many tokens, those around the text included."""
    words = [text for text in map(decode, ([i] for i in range(6, VOCAB_SIZE))) if text[0] == " " and text[1:].isalpha()]
    chosen = np.random.default_rng(0).choice(words, (count, prompt_length - len(encode_prompt(""))))
    return ["".join(row) for row in chosen]


def steps_of(loop, config, layers, width, prompts, prompt_length, group_size, new):
    """Take some steps of a loop -> their rows of metrics, without the first."""
    config_class = {grpo: grpo.GRPOConfig, ppo: ppo.PPOConfig}[loop]
    path = Path(config.out) / f"prompts-{prompt_length}.jsonl"
    save_file(path, "\n".join(json.dumps(dict(prompt=text)) for text in random_words(prompt_length)).encode())
    settings = config_class(run="", steps=config.steps, prompts_per_step=prompts, group_size=group_size,
                            max_new_tokens=new, device=config.device, prompts=str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        _, rows = loop.train(settings, reward=lambda prompts, completions, **columns: [len(c) % 7 for c in completions],
                             model=endless(layers, width).to(pick_device(config.device)))
    assert all(row["length"] == new for row in rows), "or the work is not what is counted"
    return rows[1:]


def products(layers, width, prompts, prompt_length, group_size, new):
    """The matrix products of each phase -> {phase: [(times, batch, m, k, n)]}: so many times `batch` products of m x k
    by k x n. The prompt is run once per prompt, and a completion's last token is never read. With the gradient there
    are two more of each."""
    heads, rows, head_width = width // 32, prompts * group_size, 32

    def linear(tokens, times=1):
        return [(layers * times, 1, tokens, k * width, n * width) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))]

    def attention(batch, queries, keys, times=1):
        return [(layers * times, batch, queries, head_width, keys), (layers * times, batch, queries, keys, head_width)]

    def head(times, tokens):
        return [(times, 1, tokens, width, VOCAB_SIZE)]

    prompt = linear(prompts * prompt_length) + attention(prompts * heads, prompt_length, prompt_length)
    sample = prompt + head(new, rows) + linear(rows, new - 1)
    sample += attention(prompts * heads, group_size, prompt_length, new - 1)
    sample += [product for t in range(1, new) for product in attention(rows * heads, 1, t)]
    read = new - 1
    trunk = prompt + linear(rows * read) + attention(prompts * heads, group_size * read, prompt_length)
    trunk += attention(rows * heads, read, read)
    score = trunk + head(1, rows * new)

    def with_gradient(products):
        return [one for times, batch, m, k, n in products
                for one in ((times, batch, m, k, n), (times, batch, m, n, k), (times, batch, k, m, n))]

    return dict(sample=sample, score=score, update=with_gradient(score), critic=trunk + with_gradient(trunk))


def unshared(of):
    """The matrix products of sampling where every prompt is run once per completion, as others do."""
    return products(**dict(of, prompts=of["prompts"] * of["group_size"], group_size=1))["sample"]


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


def measure(config):
    """Let all settings take turns -> their records, and the best rate and bandwidth of each turn."""
    work = [("GRPO", BASE), ("PPO", BASE)]
    work += [("GRPO", dict(BASE, **{name: value})) for name, values in GROWTH.values() for value in values
             if value != BASE[name] and not config.quick]
    if config.against:
        work += [("GRPO", SMALL_GPT2)] + [(name, of) for of in (SMALL_GPT2, BASE) for name in OTHERS]
    turns = [turn_of(name, config, of) for name, of in work]
    device, records, best = pick_device(config.device), [], []
    for number, (name, of) in enumerate(work, start=1):
        print(f"memory of setting {number} of {len(work)}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            records.append(dict(name=name, work=of, rows=[], alone=[],
                                peak_memory_mb=process.submit(peak_memory, name, config, of).result()))
    start = time.perf_counter()
    for turn in range(config.rounds):
        left = (time.perf_counter() - start) / turn * (config.rounds - turn) if turn else 0
        print(f"turn {turn + 1} of {config.rounds}" + (f", {left:.0f} s left" if turn else ""), flush=True)
        best.append(rates(device))
        for record, take in zip(records, turns):
            record["rows"] += take()
            record["alone"].append({phase: seconds_alone(of_phase, device) for phase, of_phase in
                                    {**products(**record["work"]), "unshared": unshared(record["work"])}.items()})
    rate, bandwidth = map(max, zip(*best))
    for record in records:
        of, rows, alone = record["work"], record.pop("rows"), record.pop("alone")
        record["seconds"] = {phase: float(np.median([row.get(f"seconds_{phase}", 0.0) for row in rows]))
                             for phase in PHASES}
        totals = [sum(row.get(f"seconds_{phase}", 0.0) for phase in PHASES) for row in rows]
        record["step"] = [float(np.median(totals)), min(totals), max(totals)]
        ours = {phase: seconds for phase, seconds in record["seconds"].items()
                if seconds and record["name"] not in OTHERS}
        counted = products(**of)
        record["share_of_products"] = {phase: float(np.median([turn[phase] for turn in alone])) / seconds
                                       for phase, seconds in ours.items()}
        if "sample" in ours:
            record["share_of_unshared"] = float(np.median([turn["unshared"] for turn in alone])) / ours["sample"]
        record["share_of_limit"] = {phase: least_seconds(counted[phase], rate, bandwidth) / seconds
                                    for phase, seconds in ours.items()}
        record["tokens_per_second"] = of["prompts"] * of["group_size"] * of["new"] / record["step"][0]
    return records, best


def turn_of(name, config, of):
    """A function that takes some steps -> their rows of metrics."""
    if name in OTHERS:
        return {"TRL GRPO": trl_steps, "generate()": generate_steps}[name](config, of)
    return lambda: steps_of({"GRPO": grpo, "PPO": ppo}[name], config, **of)


def peak_memory(name, config, of):
    """Megabytes that a process needs to take one turn, with torch and all it imports. On CUDA: what was allocated."""
    turn_of(name, config, of)()
    return peak_memory_mb(pick_device(config.device))


def gpt2(of):
    """transformers' GPT-2 of this shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=128, n_layer=of["layers"], n_head=of["width"] // 32, n_embd=of["width"],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=1,
        eos_token_id=1, pad_token_id=0))


def random_ids(prompt_length, count):
    """Token ids (count, prompt_length)."""
    return np.random.default_rng(0).integers(6, VOCAB_SIZE, (count, prompt_length))


def generate_steps(config, of):
    """A function that lets transformers' generate() sample as many completions -> rows {seconds_sample}."""
    device = pick_device(config.device)
    model = gpt2(of).to(device).eval()
    ids = torch.tensor(random_ids(of["prompt_length"], of["prompts"]), device=device)
    ids = ids.repeat_interleave(of["group_size"], dim=0)

    def steps():
        rows = []
        for _ in range(config.steps):
            seconds = seconds_of(lambda: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=of["new"], do_sample=True, top_k=0,
                suppress_tokens=[1]), device)
            rows.append(dict(seconds_sample=seconds))
        return rows[1:]
    return steps


def trl_steps(config, of):
    """A function that lets TRL's GRPO take some steps of this work -> rows {seconds_update: the whole step}.

    One generation batch, one forward and backward a step, no gradient checkpointing: TRL's fastest settings on a CPU.
    """
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        require(False, f"--against trl: {error}; pip install trl transformers datasets accelerate")
    times = []
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0", unk_token="w0")
    folder = Path(config.out) / f"trl-{of['width']}"
    gpt2(of).save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)                          # TRL reads its reference from there, too
    prompts = random_ids(of["prompt_length"], 1000)
    data = Dataset.from_dict(dict(prompt=[" ".join(f"w{i}" for i in prompt) for prompt in prompts]))
    rows = of["prompts"] * of["group_size"]
    settings = GRPOConfig(
        output_dir=str(folder), use_cpu=pick_device(config.device).type == "cpu", bf16=False, fp16=False, seed=1,
        per_device_train_batch_size=rows, gradient_accumulation_steps=1, num_generations=of["group_size"],
        max_completion_length=of["new"], temperature=1.0, beta=0.01, learning_rate=3e-4, max_steps=config.steps,
        lr_scheduler_type="constant", gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, generation_kwargs=dict(suppress_tokens=[1]))

    class Times(TrainerCallback):
        def on_step_begin(self, *arguments, **keywords):
            self.start = getattr(self, "end", time.perf_counter())

        def on_step_end(self, *arguments, **keywords):
            self.end = time.perf_counter()
            times.append(self.end - self.start)

    def reward(prompts, completions, **columns):
        return [float(len(completion) % 7) for completion in completions]
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=data,
                          processing_class=tokenizer, callbacks=[Times()])

    def steps():
        times.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return [dict(seconds_update=seconds) for seconds in times[1:]]
    return steps


def sampling_rate(record):
    """Tokens per second of the sampling alone."""
    of = record["work"]
    return of["prompts"] * of["group_size"] * of["new"] / record["seconds"]["sample"]


def tables(records, best, device):
    """The records as Markdown."""
    lines = table_row(["", "layers x width", "prompts (tokens) x completions x tokens",
                       *(f"{phase} (s)" for phase in PHASES), "step (s)", "tokens/s", "products alone: sample",
                       "update", "limit: sample", "update", "peak memory (MB)"])
    lines += table_row(["---"] * 14)
    for record in records:
        of = record["work"]
        known = {"TRL GRPO": [], "generate()": ["sample"]}.get(record["name"], PHASES)
        phases = [f"{record['seconds'][p]:.3f}" if p in known else "-" for p in PHASES]
        lines += table_row([record["name"], f"{of['layers']} x {of['width']}",
                            "{prompts} ({prompt_length}) x {group_size} x {new}".format(**of), *phases,
                            "{:.3f} ({:.3f} to {:.3f})".format(*record["step"]), f"{record['tokens_per_second']:.0f}",
                            *(f"{record[share][p]:.0%}" if p in record[share] else "-" for share in
                              ("share_of_products", "share_of_limit") for p in ("sample", "update")),
                            f"{record['peak_memory_mb']:.0f}"])
    trl = ""
    for record in records:
        work = ("{prompts} prompts of {prompt_length} tokens x {group_size} completions of {new} by a model of "
                "{layers} x {width}".format(**record["work"]))
        if record["name"] in OTHERS:
            trl = f", TRL {version('trl')}, transformers {version('transformers')}"
            ours = next(r for r in records if r["name"] == "GRPO" and r["work"] == record["work"])
            who, what, own = (("A step of TRL's GRPO", "a step of ours", ours["step"][0])
                              if record["name"] == "TRL GRPO" else
                              ("transformers' generate()", "our sampling", ours["seconds"]["sample"]))
            lines += ["", f"{who} on {work} takes {record['step'][0] / own:.2f} times as long as {what}."]
        elif record["name"] == "GRPO" and record["work"] in (BASE, SMALL_GPT2):
            lines += ["", f"Sampling {work}: {sampling_rate(record):.0f} tokens per second. Where each prompt is run "
                      "once per completion, the matrix products alone would take "
                      f"{record['share_of_unshared']:.0%} of our time."]
    rate, bandwidth = zip(*best)
    lines += ["", "Median (lowest to highest). Products alone: the share of a phase that its matrix products take when "
              "nothing else is done. Limit: the share that they would take at the best rate and bandwidth seen here, "
              f"{max(rate) / 1e9:.0f} Gflop/s and {max(bandwidth) / 1e9:.0f} GB/s (lowest of the turns "
              f"{min(rate) / 1e9:.0f} and {min(bandwidth) / 1e9:.0f}). {torch.get_num_threads()} threads; "
              f"{machine(device)}{trl}, {date.today()}.", ""]
    return "\n".join(lines)


def plot(records, path):
    """Seconds of a step of GRPO as one thing grows, by phase."""
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3.6 * len(GROWTH), 3.2), sharey=True)
    for axis, (label, (name, _)) in zip(axes, GROWTH.items()):
        rest = {key: value for key, value in BASE.items() if key != name}
        chosen = sorted((r for r in records if r["name"] == "GRPO" and rest.items() <= r["work"].items()),
                        key=lambda record: record["work"][name])
        x = [record["work"][name] for record in chosen]
        for phase in PHASES:
            if any(record["seconds"][phase] for record in chosen):
                axis.plot(x, [record["seconds"][phase] for record in chosen], marker="o", label=phase)
        axis.plot(x, [record["step"][0] for record in chosen], marker="o", color="black", label="step")
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
    text = tables(records, best, device)
    save_file(out / "benchmark.json", json.dumps(dict(records=records, rates=best), indent=1).encode())
    save_file(out / "benchmark.md", text.encode())
    plot(records, out / "benchmark.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
