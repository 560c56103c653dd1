"""What is written about runs, as Markdown: the tables of a comparison, the page of answers, the pipeline's seconds.

Memory of the model state is not measured but counted: `state_bytes`.
"""
import os
from datetime import date

import numpy as np
import torch

from grpo_min.metrics import peak_memory_mb
from grpo_min.ppo import PPOConfig
from grpo_min.sample import ask

QUESTIONS = ["start with 3, times 9, minus 7, plus 8.", "start with 6, plus 8, times 3.",
             "hello! what does a cow eat?", "please tell me, what is a young swan called?"]
PHASES = ["sample", "score", "critic", "update"]        # of a step, each with its seconds
COLUMNS = {     # reward: [(heading, set, figure, form)]
    "correct": [("accuracy", "arithmetic_test", "accuracy", "{:.1%}"),
                ("greedy", "arithmetic_test", "accuracy_greedy", "{:.1%}"),
                ("pass@4", "arithmetic_test", "pass@4", "{:.1%}"),
                ("thinking", "arithmetic_test", "thinking", "{:.1%}"),
                ("one more operation", "arithmetic_longer", "accuracy", "{:.1%}"),
                ("length (tokens)", "arithmetic_test", "length", "{:.1f}")],
    "learned": [("gold score", "animals_test", "gold", "{:.2f}"),
                ("way to the maximum", "animals_test", "progress", "{:.1%}"),
                ("wins against SFT", "animals_test", "win_rate", "{:.1%}"),
                ("correct", "animals_test", "correct", "{:.1%}"),
                ("length (tokens)", "animals_test", "length", "{:.1f}")],
}


def state_bytes(policy, config):
    """Bytes of what training holds beside activations: weights, gradients and Adam's two moments of what is trained,
    and the reference's weights."""
    one = sum(p.numel() * p.element_size() for p in policy.parameters())
    state = {"policy": one, "reference": one if config.beta > 0 else 0, "gradients": one, "Adam's moments": 2 * one}
    if isinstance(config, PPOConfig):
        critic = one + (policy.config.width + 1) * 4          # the trunk and the scalar head
        state.update({"critic": critic, "gradients": one + critic, "Adam's moments": 2 * (one + critic)})
    return state


# --- tables -------------------------------------------------------------------------------------------------------

def spread(values, form):
    """Mean (lowest to highest) over seeds; of one seed the value alone."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(np.mean(values)) + (f" ({low} to {high})" if len(values) > 1 and low != high else "")


def tables(records):
    """The records as Markdown: a table per reward, of quality and of cost."""
    lines = []
    for reward in dict.fromkeys(record["reward"] for record in records):
        of_reward = [record for record in records if record["reward"] == reward]
        names = list(dict.fromkeys(record["algorithm"] for record in of_reward))
        seeds = len({record["seed"] for record in of_reward if record["algorithm"] != "SFT"})
        title = {"correct": "Arithmetic, rewarded for right answers",
                 "learned": "Animals, rewarded by the reward model"}
        lines += [f"**{title[reward]}** (held out; mean over {seeds} seed{'s' if seeds > 1 else ''}"
                  f"{', lowest to highest' if seeds > 1 else ''})", ""]
        headings = [heading for heading, *_ in COLUMNS[reward]]
        lines += table_row([""] + headings) + table_row(["---"] * (len(headings) + 1))
        for name in names:
            chosen = [record["figures"] for record in of_reward if record["algorithm"] == name]
            lines += table_row([name] + [spread([f[of_set].get(key, [None])[0] for f in chosen], form)
                                         for _, of_set, key, form in COLUMNS[reward]])
        lines += ["", *cost_table([record for record in of_reward if "run" in record]), ""]
    return "\n".join(lines)


def cost_table(records):
    headings = ["", *(f"{phase} (s)" for phase in PHASES), "step (s)", "model state (MB)", "peak memory (MB)"]
    lines = table_row(headings) + table_row(["---"] * len(headings))
    for name in dict.fromkeys(record["algorithm"] for record in records):
        chosen = [record for record in records if record["algorithm"] == name]
        lines += table_row([name, *(spread([r["seconds"][phase] for r in chosen], "{:.2f}") for phase in PHASES),
                            spread([sum(r["seconds"].values()) for r in chosen], "{:.2f}"),
                            f"{sum(chosen[0]['state_bytes'].values()) / 1e6:.1f}",
                            f"{max(r['peak_memory_mb'] for r in chosen):.0f}"])
    return lines


def table_row(cells):
    return ["| " + " | ".join(cells) + " |"]


# --- the main job -------------------------------------------------------------------------------------------------

def page(models):
    """Real answers of several models to the same questions, as Markdown: {name: policy} -> text."""
    lines = ["Two answers of each model, sampled at temperature 1.", ""]
    for question in QUESTIONS:
        lines += [f"**{question}**", ""]
        for name, policy in models.items():
            lines += [f"* {name}: " + " / ".join(f"`{text.strip()}`" for text in ask(policy, question))]
        lines += [""]
    return "\n".join(lines)


def machine(device):
    cores = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{cores}, torch {torch.__version__}"


def pipeline_table(seconds, device):
    """Seconds of each stage, peak memory and the machine, as Markdown."""
    lines = ["| stage | seconds |", "| --- | --- |", *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
             f"| **all** | **{sum(seconds.values()):.0f}** ({sum(seconds.values()) / 60:.1f} minutes) |", "",
             f"Peak memory {peak_memory_mb(device):.0f} MB; {machine(device)}, {date.today()}.", ""]
    return "\n".join(lines)
