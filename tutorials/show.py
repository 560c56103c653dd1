"""What the notebooks show things with: coloured tokens, tables, lines of the package, committed results."""
import contextlib
import csv
import difflib
import inspect
import io
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import Markdown, display

import grpo_min
from grpo_min import gold
from grpo_min.evaluate import interval, wilson
from grpo_min.lab import label
from grpo_min.lab.report import PHASES
from grpo_min.run.files import make_folder
from grpo_min.run.plots import plt      # which chooses a backend for files; a notebook wants its own
from grpo_min.run.rng import generator
from tutorials.tree import ACTIONS, COMPLETIONS, STATES

if get_ipython():
    get_ipython().run_line_magic("matplotlib", "inline")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "figure.constrained_layout.use": True})

FAST = bool(os.environ.get("GRPO_MIN_FAST"))         # the tests set it: the same cells with fewer steps
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tutorials/results"
PACKAGE = Path(grpo_min.__file__).parent


def table(rows, headers=None):
    """Rows (dicts, or lists with headers) as a table. Numbers get three significant digits."""
    if headers is None:
        headers, rows = list(rows[0]), [list(row.values()) for row in rows]
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in line]
             for line in lines]
    display(Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells)))


def code(thing, first=None, last=None):
    """The source of a function, class or module with its line numbers: all of it, the first line that contains the text
    `first`, or from there through the next that contains `last`. ValueError if there is no such line."""
    lines, number = inspect.getsourcelines(thing)
    number = max(number, 1)

    def line_with(text, start):
        for place in range(start, len(lines)):
            if text in lines[place]:
                return place
        raise ValueError(f"no line with {text!r} in {thing.__name__}")
    begin, end = 0, len(lines) - 1
    if first is not None:
        begin = line_with(first, 0)
        end = begin if last is None else line_with(last, begin)
    file = Path(inspect.getsourcefile(inspect.unwrap(thing)))
    name = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.name
    text = "".join(f"{number + i:4}  {lines[i].rstrip()}\n" for i in range(begin, end + 1))
    display(Markdown(f"`{name}`, line {number + begin}\n```python\n{text}```"))


def tokens(rows, numbers, limit=None, title="", label="", notes=None, form="{:+.2f}"):
    """Tokens on a ground coloured by a number each: rows of strings, rows of numbers. Blue is positive, red negative.

    limit: the number that gets the full colour (default: the largest). notes: a text behind each row. The numbers
    stand below their tokens in the format `form`; "" leaves them out.
    """
    limit = limit or max((abs(number) for row in numbers for number in row), default=1) or 1
    shown = [[token.replace("\n", "\\n").replace(" ", "\u00b7") for token in row] for row in rows]
    least = len(form.format(-limit)) - 1 if form else 1
    widths = [[max(len(token), least) + 1 for token in row] for row in shown]
    widest, note = max(map(sum, widths)), max((len(text) for text in notes or []), default=0)
    figure, axis = plt.subplots(figsize=(0.085 * (widest + note) + 0.4, 0.42 * len(rows) + (0.5 if label else 0.3)))
    for y, (row, values, wide) in enumerate(zip(shown, numbers, widths)):
        x = 0
        for token, value, w in zip(row, values, wide):
            axis.add_patch(plt.Rectangle((x, y - 0.45), w - 0.3, 0.9, color=plt.cm.RdBu(0.5 + 0.35 * max(-1, min(
                1, value / limit))), lw=0))
            axis.text(x + (w - 0.3) / 2, y - (0.17 if form else 0), token, ha="center", va="center", family="monospace",
                      fontsize=8)
            if form:
                axis.text(x + (w - 0.3) / 2, y + 0.25, form.format(value), ha="center", va="center", fontsize=6)
            x += w
        if notes:
            axis.text(widest + 1, y, notes[y], va="center", fontsize=8)
    axis.set(xlim=(-0.5, widest + note + 1), ylim=(len(rows) - 0.5, -0.5))
    axis.axis("off")
    axis.set_title(title, fontsize=9, loc="left")
    if label:
        figure.supxlabel(label, fontsize=8)
    plt.show()


def result(name):
    """Rows of a committed tutorials/results/NAME.csv; what looks like a number is one."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def loop(kind):
    """A step of "grpo" or "ppo" as boxes: trained networks are blue, frozen ones grey, what is no network white."""
    ppo, trained, frozen = kind == "ppo", "#9ecae1", "0.85"
    boxes = {"prompts": (0, 1, "white"), "policy\nsamples": (1, 1, trained), "rewards": (2, 1, "white"),
             "advantages": (3, 1, "white"), "update": (4, 1, "white"), "reward model,\nor a rule": (2, 0, frozen),
             "reference": (4, 0, frozen), "critic:\nvalue of each state" if ppo else "mean reward\nof the group":
             (3, 0, trained if ppo else "white")}
    figure, axis = plt.subplots(figsize=(10, 3.1))
    for name, (x, y, colour) in boxes.items():
        axis.text(x, y, name, ha="center", va="center", fontsize=9,
                  bbox=dict(boxstyle="round,pad=0.5", facecolor=colour, edgecolor="black"))
    for x, shape in enumerate(["Q prompts", "B completions", "(B,)", "(B, N)" if ppo else "(B, 1)"]):
        axis.annotate("", (x + 1, 1), (x, 1), arrowprops=dict(arrowstyle="->", shrinkA=38, shrinkB=38))
        axis.text(x + 0.5, 1.1, shape, fontsize=8, ha="center")
    for x, name in (2, "scores"), (3, "baseline"), (4, "KL penalty"):
        axis.annotate("", (x, 1), (x, 0), arrowprops=dict(arrowstyle="->", shrinkA=24, shrinkB=24))
        axis.text(x + 0.05, 0.52, name, fontsize=8)
    axis.annotate("", (1, 1.2), (4, 1.2), arrowprops=dict(arrowstyle="->", connectionstyle="arc3,rad=0.2"))
    trains = "the policy and the critic" if ppo else "the policy"
    axis.text(2.5, 1.9, f"7. repeat, with new weights of {trains}", ha="center", fontsize=8)
    for x, (colour, name) in enumerate([(trained, "trained"), (frozen, "frozen"), ("white", "no network")]):
        axis.text(0.45 * x - 0.1, 0, name, ha="center", va="center", fontsize=8,
                  bbox=dict(boxstyle="round", facecolor=colour, edgecolor="black"))
    axis.set(xlim=(-0.4, 4.6), ylim=(-0.35, 2.05))
    axis.axis("off")
    plt.show()


# --- 01: The words ----------------------------------------------------------------------------------------------------

def tree(edges, boxes, ends, title, limit=None, widths=None):
    """The tree of tree.py. edges, widths (states, actions); boxes, ends: texts of states and completions; limit: the
    number that colours an edge fully, if they are to be coloured."""
    heights = {c: float(row) for row, c in enumerate(COMPLETIONS)}           # completions below each other,
    for s in reversed(STATES):                                               # a state in the middle of what follows it
        heights[s] = sum(heights[s + (a,)] for a in ACTIONS) / len(ACTIONS)
    figure, axis = plt.subplots(figsize=(7.8, 4.7))
    for i, s in enumerate(STATES):
        for j, a in enumerate(ACTIONS):
            y, number = (heights[s], heights[s + (a,)]), float(edges[i, j])
            colour = plt.cm.RdBu(0.5 + 0.4 * number / limit) if limit else "lightsteelblue"
            axis.plot([len(s), len(s) + 1], y, color=colour, lw=8 * float(widths[i, j]), zorder=1)
            label = f"{a} {number:{'+' if limit else ''}.2f}"
            axis.text(len(s) + 0.62, y[0] + 0.62 * (y[1] - y[0]), label, ha="center", va="center", fontsize=7.5,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.6))
        axis.text(len(s), heights[s], boxes[i], ha="center", va="center", fontsize=8,
                  bbox=dict(boxstyle="round", facecolor="white", edgecolor="grey"))
    for c, text in zip(COMPLETIONS, ends):
        axis.text(len(c) + 0.04, heights[c], text, va="center", fontsize=8)
    axis.set(xlim=(-0.2, 3.75), ylim=(14.6, -0.6), yticks=[], xlabel="tokens written", xticks=range(4))
    axis.spines["left"].set_visible(False)
    axis.set_title(title, fontsize=10, loc="left")
    plt.show()


def bars(series, labels, xlabel, ylabel):
    """Bars beside each other: {label: a number for each of the labels}."""
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    places, width = np.arange(len(labels)), 0.8 / len(series)
    for n, (name, numbers) in enumerate(series.items()):
        axis.bar(places + (n - (len(series) - 1) / 2) * width, numbers, width, label=name)
    axis.set_xticks(places, labels, rotation=50, ha="right", fontsize=8)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if len(series) > 1:
        axis.legend()
    plt.show()


def parabola(constants, variances, marked, values):
    """The variance over a constant baseline; marked {baseline: name}; values: the variance with V(s) instead."""
    figure, axis = plt.subplots(figsize=(7.6, 3.2))
    axis.plot(constants, variances, label="a constant b")
    for b, name in marked.items():
        axis.plot(b, variances[int((constants - b).abs().argmin())], "o", label=f"b = {b:.2f}: {name}")
    axis.axhline(values, color="black", ls="--", lw=1, label="V(s): one for each state")
    axis.set(xlabel="baseline b (reward)", ylabel="variance of the estimate", ylim=(0, None))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def estimators(moves, exact, found):
    """Mean and standard deviation of k1, k2 and k3, {kind: [(mean, deviation), ..]}, as the policy moves away."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(moves, exact, color="black", lw=5, alpha=0.25, label="exact KL")
    for kind, pairs in found.items():
        means, deviations = zip(*pairs)
        left.plot(moves, means, label=kind, ls="--" if kind == "k3" else "-")
        right.plot(moves, deviations, label=kind)
    for axis, name in (left, "mean"), (right, "standard deviation"):
        axis.set(xlabel="change of one logit", ylabel=f"{name} (nats)")
        axis.legend()
    plt.show()


# --- 02: A small GPT --------------------------------------------------------------------------------------------------

def quietly(train, *arguments, **settings):
    """What a training gives back. Of what it prints only the notes are shown, not the log."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = train(*arguments, **settings)
    print("".join(f"{line}\n" for line in printed.getvalue().splitlines() if "note:" in line), end="")
    return result


@torch.no_grad()
def attention_weights(model, ids):
    """The attention weights in each layer of a GPT that reads ids (T,): (layers, H, T, T)."""
    x, layers, T = model.embed(ids[None], torch.arange(len(ids))), [], len(ids)
    for block in model.blocks:
        q, k, _ = block.attention.split(block.attention.qkv(block.norm1(x)))  # (1, H, T, E) each
        fit = (q @ k.transpose(-1, -2))[0] / q.shape[-1] ** 0.5  # (H, T, T)
        layers.append(fit.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1))
        x, _ = block(x)
    return torch.stack(layers)


def heads(model, ids, P):
    """Two heads on a text whose prompt has P tokens: the one that reads most from each "is" to the operation before it,
    and the one that reads most from the thinking to the prompt."""
    weights, T = attention_weights(model, ids), len(ids)
    text = [model.tokenizer.decode([i]).strip() for i in ids.tolist()]
    of_is = [t for t in range(T) if text[t] == "is"]
    scores = {"from 'is' to the operation": torch.stack([weights[:, :, t, t - 2] for t in of_is]).mean(0),
              "from thinking to the prompt": weights[:, :, P:-2, 1:P].sum(-1).mean(-1)}  # (layers, H) each
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.4))
    for axis, (name, score) in zip(axes, scores.items()):
        layer, head = divmod(int(score.argmax()), score.shape[1])
        axis.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(T), text, rotation=90, fontsize=8)
        axis.set_yticks(range(T), text, fontsize=8)
        axis.set(xlabel="token that is read", ylabel="token that reads")
        axis.set_title(f"{name}: layer {layer + 1}, head {head + 1}, {score.max():.0%} of its weight", fontsize=10)
        axis.axhline(P - 0.5, color="orange", lw=0.8)
        axis.axvline(P - 0.5, color="orange", lw=0.8)
    plt.show()


def padding(completion_ids, mask, tokenizer):
    """Padded completions as a rectangle of tokens; blue where the mask is True."""
    figure, axis = plt.subplots(figsize=(10, 2.4))
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for (b, t), i in zip(((b, t) for b in range(len(mask)) for t in range(mask.shape[1])), completion_ids.flatten()):
        name = {tokenizer.pad: "pad", tokenizer.end: "END"}.get(int(i), tokenizer.decode([int(i)]).strip())
        axis.text(t, b, name, ha="center", va="center", fontsize=7, color="black" if mask[b, t] else "grey")
    axis.set(xlabel="t, token of the completion", ylabel="completion b")
    plt.show()


def drawing(probs, uniforms, drawn, decode):
    """Probabilities (V,) side by side from 0 to 1, and the tokens drawn by some uniform numbers."""
    left = probs.cumsum(0) - probs
    figure, axis = plt.subplots(figsize=(10, 1.9))
    for i in (probs > 0.002).nonzero().flatten().tolist():
        axis.barh(0, probs[i], left=left[i], color=plt.cm.tab20(i % 20), edgecolor="white")
        if probs[i] > 0.025:
            axis.text(left[i] + probs[i] / 2, 0, decode([i]).strip(), ha="center", va="center", fontsize=8)
    for number, i in zip(uniforms.tolist(), drawn.tolist()):
        axis.annotate(decode([i]).strip(), (number, 0.42), (number, 0.95), ha="center", fontsize=8, rotation=40,
                      arrowprops=dict(arrowstyle="->"))
    axis.set(xlim=(0, 1), ylim=(-0.5, 1.5), yticks=[],
             xlabel="uniform number, and cumulative probability of the tokens")
    axis.spines["left"].set_visible(False)
    plt.show()


def losses(values, levels):
    """The loss of each update, and levels {name: height} to compare it with."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.plot(range(1, len(values) + 1), values)
    for name, height in levels.items():
        axis.axhline(height, color="grey", lw=0.8, ls="--")
        axis.text(len(values) * 1.01, height, f"{height:.2f}: {name}", va="center", fontsize=8)
    axis.set(xlabel="update", ylabel="loss (nats per token)", ylim=(0, None), xlim=(0, len(values)))
    plt.show()


# --- 03: Rewards ------------------------------------------------------------------------------------------------------

def paid_and_right(rows, name):
    """What a run was paid, and how often it was right: in each step (pale), and the mean of five (strong)."""
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for key, text, colour in ("reward", f"reward by `{name}`", "C1"), ("accuracy", "share of right answers", "C0"):
        steps, values = zip(*[(row["step"] + 1, row[key]) for row in rows if row.get(key, "") != ""])
        axis.plot(steps, values, color=colour, alpha=0.25)
        window = 5 if len(values) > 10 else 1
        axis.plot(steps[window - 1:], np.convolve(values, np.ones(window) / window, "valid"), color=colour, label=text)
    axis.set(xlabel="step", ylabel="mean over the completions", ylim=(0, 1.05))
    axis.legend()
    plt.show()


def noise(difference):
    """How often the better of two answers was chosen, by the distance of their gold scores (chosen minus rejected)."""
    gap, x = np.abs(difference), np.linspace(0, 8, 100)
    figure, axis = plt.subplots(figsize=(6, 2.8))
    axis.plot(x, 1 / (1 + np.exp(-x)), color="grey", label="1 / (1 + exp(-distance))")
    for low, high in [(0.05, 0.8), (0.8, 1.3), (1.3, 2), (2, 3.2), (3.2, 4.5), (4.5, 5.5), (5.5, 8)]:
        inside = (gap > low) & (gap <= high)
        share, down, up = wilson(difference[inside] > 0)
        axis.errorbar(gap[inside].mean(), share, [[share - down], [max(up - share, 0)]], fmt="o", color="C0")
    axis.set(xlabel="distance of the two gold scores", ylabel="share of choices for\nthe better answer",
             ylim=(0.4, 1.03))
    axis.legend(loc="lower right")
    plt.show()


def margins(shares):
    """The expected Bradley-Terry loss by the margin, where a share of the annotators chooses the first answer."""
    margin = torch.linspace(-1, 6, 701)
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for share in shares:
        expected = share * F.softplus(-margin) + (1 - share) * F.softplus(margin)
        best = margin[expected.argmin()]
        line, = axis.plot(margin, expected, label=f"{share:.0%} choose the first" +
                          (f": best margin {best.abs():.2f}" if share < 1 else ": no best margin"))
        if share < 1:
            axis.plot(best, expected.min(), "o", color=line.get_color())
    axis.set(xlabel="margin between the two scores", ylabel="expected loss (nats)", ylim=(0, 3))
    axis.legend()
    plt.show()


def calibration(judgements):
    """Predicted probability against what was seen, with 95% intervals, for {name: reward_model.judge(..)}."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    axis.plot([0.5, 1], [0.5, 1], color="grey", lw=1, label="perfect")
    for shift, (name, figures) in zip((-0.004, 0.004), judgements.items()):
        predicted, seen, count = np.array(figures["calibration"]).T
        limits = np.array([wilson(np.arange(n) < share * n) for share, n in zip(seen, count)])  # (bins, 3)
        error = np.maximum([seen - limits[:, 1], limits[:, 2] - seen], 0)
        axis.errorbar(predicted + shift, seen, error, fmt="o", capsize=3, label=name)
    axis.set(xlabel="probability that the model gives its favourite", ylabel="share of pairs that went so",
             ylim=(0.3, 1.03))
    axis.legend(loc="lower right")
    plt.show()


def scores(gold_scores, model_scores, right):
    """Each answer's gold score, spread a little, and the reward model's."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    spread = gold_scores + np.random.default_rng(0).uniform(-0.1, 0.1, len(gold_scores))
    for which, name in (right, "right"), (~right, "wrong"):
        axis.scatter(spread[which], model_scores[which], s=9, alpha=0.5, label=name)
    axis.set(xlabel="gold score (spread a little)", ylabel="reward model's score")
    axis.legend(loc="lower right")
    plt.show()


def simulated_annotator(policy, asked, count, path):
    """Sample pairs of answers to the questions asked (columns), choose by the gold score with Bradley-Terry noise, and
    write a file like that of grpo_min.lab.label."""
    facts = dict(zip(asked["prompt"], zip(asked["animal"], asked["attribute"])))
    rows, rng = [], random.Random(1)
    for prompt, *two in label.sample_pairs(policy, list(facts), count, [], label.LabelConfig(), generator(1, 0)):
        one, other = gold.gold_score([prompt] * 2, two, *([value] * 2 for value in facts[prompt]))
        first = rng.random() < 1 / (1 + math.exp(other - one))
        rows.append(dict(prompt=prompt, chosen=two[not first], rejected=two[first]))
    make_folder(path.parent)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- 04: GRPO ---------------------------------------------------------------------------------------------------------

def clip(eps, ratios, mask, advantages):
    """The clipped surrogate over the ratio, and where the tokens lie after some updates: ratios {updates: (B, N)}."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    r = torch.linspace(0, max(1.5, *(float(ratio[mask].max()) for ratio in ratios.values())), 300)
    for axis, sign, title in (axes[0], 1, "A > 0"), (axes[1], -1, "A < 0"):
        axis.plot(r, r * sign, ":", color="gray", label="r A, without the clip")
        axis.plot(r, torch.min(r * sign, r.clamp(1 - eps, 1 + eps) * sign), color="black", label="min(r A, clip(r) A)")
        for (n, ratio), marker in zip(ratios.items(), "os^"):
            points = ratio[mask & (advantages * sign > 0)]
            axis.plot(points, torch.min(points * sign, points.clamp(1 - eps, 1 + eps) * sign), marker, alpha=0.6,
                      label=f"tokens after {n} update(s)")
        axis.axvspan(1 - eps, 1 + eps, color="gray", alpha=0.12)
        axis.set(xlabel="ratio r", ylabel="surrogate, per |A|", title=title)
    axes[0].legend(fontsize=7)
    plt.show()


def curves(rows, columns):
    """A panel for each column of a run's metrics."""
    figure, axes = plt.subplots(1, len(columns), figsize=(2.3 * len(columns), 2.3))
    for axis, column in zip(axes, columns):
        axis.plot([row["step"] + 1 for row in rows], [row[column] for row in rows])
        axis.set(title=column, xlabel="step")
    plt.show()


def push(values, tokenizer, count=16):
    """The mean push on the logits of the first token (V,), the largest of them."""
    top = values.abs().topk(count).indices
    names = [tokenizer.decode([token]).replace(" ", "\u00b7") for token in top.tolist()]
    plt.figure(figsize=(8, 2.6))
    plt.bar(names, values[top], color=["C0" if value > 0 else "C3" for value in values[top]])
    plt.xticks(rotation=60)
    plt.ylabel("mean push on the logit")
    plt.xlabel("first token (the dot is a space)")
    plt.show()


# --- 05: PPO ----------------------------------------------------------------------------------------------------------

def values(completions):
    """Values before each token: {kind: (tokens, the critic's values, measured values, reward)}."""
    widths = [max(len(tokens), 7) for tokens, *_ in completions.values()]
    figure, axes = plt.subplots(1, len(completions), figsize=(13, 3.3), width_ratios=widths)
    for axis, (kind, (tokens, critic, measured, reward)) in zip(axes, completions.items()):
        T = len(tokens)
        axis.plot(range(T), critic[:T], "o-", label="the critic")
        axis.plot(range(T), measured[:T], "s--", label="measured")
        axis.plot(T, reward, "*", color="black", ms=10, label="the reward")
        axis.set(ylim=(-0.35, 1.25), title=kind)
        axis.set_xticks(range(T + 1), [*tokens, "(over)"], rotation=75, fontsize=8)
    axes[0].set(ylabel="value of the state before the token", xlabel="the token that is written next")
    axes[0].legend(fontsize=8, loc="lower center")
    plt.show()


def compared(runs, columns):
    """A panel for each column of metrics, a line for each run."""
    figure, axes = plt.subplots(1, len(columns), figsize=(3 * len(columns), 3))
    for axis, column in zip(axes, columns):
        for name, rows in runs.items():
            axis.plot([row["step"] + 1 for row in rows], [row[column] for row in rows], label=name)
        axis.set(title=column, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=8)
    plt.show()


def pieces(first, second, explained):
    """The pieces of the diff of two modules: {a word of it: what it says}; "": shown in full. AssertionError if a piece
    has no word in it, or a word no piece."""
    lines, used = [inspect.getsource(module).splitlines() for module in (first, second)], set()
    for piece in "\n".join(list(difflib.unified_diff(*lines, n=1, lineterm=""))[2:]).split("@@ -")[1:]:
        where, text = piece.split("\n", 1)
        changed = "\n".join(line for line in text.splitlines() if line[:1] in "+-")
        words = [word for word in explained if word in changed]
        assert words, f"nobody has explained this difference:\n{text}"
        used |= set(words)
        number = where.split("+")[1].split(",")[0]
        if "" in map(explained.get, words):
            display(Markdown(f"`ppo.py`, line {number}\n```diff\n{text.rstrip()}\n```"))
    assert used == set(explained), f"these differences are no more: {set(explained) - used}"
    display(Markdown("The other pieces: " + "; ".join(filter(None, explained.values())) + "."))


# --- 06: GRPO against PPO ---------------------------------------------------------------------------------------------

def by_setting(name, column="accuracy", factor=100):
    """{setting: that column of each seed} of a committed study."""
    values = {}
    for row in result(name):
        values.setdefault(row["setting"], []).append(factor * row[column])
    return values


def verdict(a, b):
    """Is A above B, with every seed?"""
    return "holds" if min(a) > max(b) else "does not hold" if max(a) < min(b) else "not shown"


def numbers(name, values):
    """The name, the mean, and in brackets the lowest and the highest."""
    return f"{name}: {np.mean(values):.1f}% ({min(values):.1f}% to {max(values):.1f}%)"


def learning(curves, algorithms, window=5):
    """Reward over completions and seconds, and KL over completions: a row for each task, means and range of seeds."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.2))
    for row, (task, rows) in zip(axes, curves.items()):
        for name in algorithms:
            seeds = {}
            for each in rows:
                if each["algorithm"] == name:
                    seeds.setdefault(each["seed"], []).append(each)
            seconds = np.mean([np.cumsum([sum(each[f"seconds_{phase}"] or 0 for phase in PHASES) for each in run])
                               for run in seeds.values()], axis=0)
            completions = [each["completions"] for each in next(iter(seeds.values()))]
            for axis, column, x in zip(row, ("reward", "reward", "kl"), (completions, seconds, completions)):
                values = np.array([np.convolve([each[column] for each in run], np.ones(window) / window, "valid")
                                   for run in seeds.values()])  # (seeds, steps - window + 1)
                axis.plot(x[window - 1:], values.mean(0), label=name)
                axis.fill_between(x[window - 1:], values.min(0), values.max(0), alpha=0.2, lw=0)
                axis.set(xlabel="seconds" if x is seconds else "completions", ylabel=f"{task}: {column}")
    axes[0, 0].legend(fontsize=8)
    plt.show()


def critics(rows):
    """Accuracy over what the critic explains at first, a dot for each run; the band is the runs without a critic."""
    plt.figure(figsize=(8, 3.2))
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        accuracies = [100 * row["accuracy"] for row in own]
        if own[0]["ev_first"] == "":
            plt.axhspan(min(accuracies), max(accuracies), color="grey", alpha=0.3, lw=0, label=name)
        else:
            plt.plot([max(row["ev_first"], -1) for row in own], accuracies, "o", label=name)
    plt.xlabel("explained variance, first ten steps (-1: or less)")
    plt.ylabel("accuracy (%)")
    plt.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


# --- 07: When the reward lies -----------------------------------------------------------------------------------------

def best_of_n(best_of, proxies, gold):
    """What the best of n gains by each proxy {name: (R, many)}, and what it is worth in gold (R, many)."""
    sizes = [2 ** k for k in range(gold.shape[1].bit_length())]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    for name, proxy in proxies.items():
        axes[0].plot(sizes, [best_of(proxy, proxy, n).mean() - proxy.mean() for n in sizes], "o-", label=name)
        means = np.array([interval(best_of(proxy, gold, n)) for n in sizes])                       # mean, low, high
        axes[1].plot(sizes, means[:, 0], "o-", label=name)
        axes[1].fill_between(sizes, means[:, 1], means[:, 2], alpha=0.15, lw=0)
    axes[1].plot(sizes, [best_of(gold, gold, n).mean() for n in sizes], color="grey", ls=":", label="gold itself")
    for axis, text in zip(axes, ("proxy: gain over the mean answer", "gold score")):
        axis.set(xscale="log", xlabel="n: answers to choose from", xticks=sizes, xticklabels=sizes, ylabel=text)
        axis.minorticks_off()
    axes[1].legend(title="chosen by the score of", fontsize=8)
    plt.show()


def looks(searched):
    """Proxy, gold and KL over the steps of runs {beta: looks}; the bands are 95% intervals over prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    for beta, views in searched.items():
        steps = [view["step"] for view in views]
        means = np.array([interval(view["gold"].reshape(-1, 4).mean(1)) for view in views])       # mean, low, high
        axes[0].plot(steps, [view["proxy"].mean() for view in views], label=f"beta {beta:g}")
        axes[1].plot(steps, means[:, 0])
        axes[1].fill_between(steps, means[:, 1], means[:, 2], alpha=0.15, lw=0)
        axes[2].plot(steps, [view["kl"] for view in views])
    for axis, text in zip(axes, ("proxy (reward model's score)", "gold score", "KL to the SFT model (nats)")):
        axis.set(xlabel="step (128 completions each)", ylabel=text)
    axes[0].legend()
    plt.show()


def fallen(views):
    """The step at which gold is best on even prompts, and its change from there on odd ones: [mean, low, high]."""
    by_prompt = np.array([view["gold"].reshape(-1, 4).mean(1) for view in views])  # (looks, R)
    best = int(by_prompt[:, ::2].mean(1).argmax())
    return views[best]["step"], interval((by_prompt[-1] - by_prompt[best])[1::2])


def liked_and_bad(view, prompts, count=4):
    """Of the answers in the top quarter by proxy those with the least gold, each text once."""
    liked = np.flatnonzero(view["proxy"] >= np.quantile(view["proxy"], 0.75))
    ordered = sorted(liked, key=lambda i: (view["gold"][i], -view["proxy"][i]))
    once = list({view["texts"][i]: i for i in reversed(ordered)}.values())[::-1][:count]
    table([dict(question=prompts[i], answer=f"`{' '.join(view['texts'][i].split())}`", proxy=float(view["proxy"][i]),
                gold=float(view["gold"][i])) for i in once])


def sentences(before, after, pairs, count=1):
    """The sentences of answers that have become more frequent, and in how many of some choices they stand."""
    shares = []
    for texts in before, after:
        said = Counter()
        for text in texts:
            said.update({part.strip() for part in re.findall(r"[^.!?]+[.!?]", text)})
        shares.append({sentence: number / len(texts) for sentence, number in said.items()})
    grown = sorted(shares[1], key=lambda sentence: shares[0].get(sentence, 0) - shares[1][sentence])[:count]
    table([{"sentence": sentence, "before": f"{shares[0].get(sentence, 0):.0%}", "after": f"{shares[1][sentence]:.0%}",
            **{f"in the {side}": sum(sentence in row[side] for row in pairs) for side in ("chosen", "rejected")}}
           for sentence in grown])


def overoptimisation(curves):
    """Proxy (dashed) and gold (solid) over the distance, for arms with every number of choices; means of the seeds."""
    arms = list(dict.fromkeys(row["arm"] for row in curves if row["pairs"] == 50))
    figure, axes = plt.subplots(1, len(arms), figsize=(3.4 * len(arms), 3.5), sharey=True)
    for axis, arm in zip(axes, arms):
        for colour, pairs in enumerate((4000, 1000, 200, 50)):
            views = {}                                               # {how far it was searched: rows, a seed each}
            for row in curves:
                if (row["arm"], row["pairs"]) == (arm, pairs):
                    views.setdefault(row["at"], []).append((row["kl"] ** 0.5, row["proxy"], row["gold"]))
            d, proxy, gold = np.array([np.mean(rows, axis=0) for rows in views.values()]).T
            axis.plot(d, proxy, ls="--", lw=1, color=f"C{colour}")
            axis.plot(d, gold, color=f"C{colour}", label=f"{pairs} choices")
        axis.set(title=arm, xlabel="d = sqrt(KL)" + (", bound" if "best" in arm else ""), ylim=(-2, 4.5))
    axes[0].set_ylabel("gain over the SFT model\n(dashed: proxy, solid: gold)")
    axes[0].legend(fontsize=8)
    plt.show()


# --- 08: Variants and diagnosis ---------------------------------------------------------------------------------------

def recipes(variants, fields, names):
    """What recipes change in the defaults of these fields; a dot is the default."""
    defaults = {name: getattr(variants.VariantConfig(), name) for name in fields}
    rows = [["default", *(str(value) for value in defaults.values())]]
    for recipe in names:
        changes = {**defaults, **variants.RECIPES[recipe]}
        rows.append([recipe, *("\u00b7" if changes[name] == defaults[name] else str(changes[name]) for name in fields)])
    table(rows, ["recipe", *fields])


def weights(weight, cases):
    """The weight of a token's gradient over its ratio, advantages 1 and -1: cases {label: (ratio, low, high)}."""
    ratios = torch.linspace(0.01, 5, 1000)[:, None]  # (1000, 1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for axis, advantage in zip(axes, (1.0, -1.0)):
        for (label, case), style in zip(cases.items(), ("-", "--", "-")):
            axis.plot(ratios, weight(case[0], ratios, advantage, *case[1:]), style, label=label)
        axis.set(xlabel="ratio of the token", ylabel="weight of its gradient", title=f"advantage {advantage:+.0f}")
    axes[1].legend(fontsize=8)
    plt.show()


def studies(names):
    """The accuracy of each seed in committed studies {name: what is varied}; the band is that of the first setting."""
    figure, axes = plt.subplots(1, len(names), figsize=(11, 2.9))
    for axis, (name, what) in zip(axes, names.items()):
        rows = result(name)
        settings = list(dict.fromkeys(row["setting"] for row in rows))
        heights = [settings.index(row["setting"]) for row in rows]
        axis.plot([100 * row["accuracy"] for row in rows], heights, "o", alpha=0.7)
        first = [100 * row["accuracy"] for row in rows if row["setting"] == settings[0]]
        axis.axvspan(min(first), max(first), color="C1", alpha=0.2, lw=0)
        axis.set(yticks=range(len(settings)), yticklabels=settings, title=what, xlabel="accuracy (%)")
        axis.invert_yaxis()
    plt.show()


def runs(runs, columns):
    """A panel for each column of metrics, a line for each run; the first run, the healthy one, is black."""
    figure, axes = plt.subplots(2, (len(columns) + 1) // 2, figsize=(12, 5.4))
    for axis, column in zip(axes.flat, columns):
        for number, (name, rows) in enumerate(runs.items()):
            points = [(row["step"] + 1, row[column]) for row in rows if row[column] != ""]
            if points:
                axis.plot(*zip(*points), color=f"C{number}" if number else "black", lw=1 if number else 1.8, label=name)
        axis.set(title=column, xlabel="step", yscale="symlog" if column in ("kl", "grad_norm") else "linear")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=8)
    plt.show()
