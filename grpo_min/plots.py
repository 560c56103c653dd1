"""Figures. Every axis has a name and a unit."""
import matplotlib

matplotlib.use("Agg")      # draws into files, needs no screen
import matplotlib.pyplot as plt                                                               # noqa: E402
import numpy as np                                                                            # noqa: E402

PANELS = [      # (columns of metrics.csv, label of the y axis)
    (["reward"], "reward"), (["accuracy", "thinking"], "share of completions"), (["kl"], "KL to the reference (nats)"),
    (["length"], "completion length (tokens)"), (["entropy"], "entropy (nats per token)"),
    (["explained_variance"], "explained variance"), (["equal_groups"], "share of all-equal groups"),
    (["grad_norm"], "gradient norm"),
]


def plot_curves(rows, path):
    """The curves of one run from its rows of metrics: a panel for each quantity that was measured."""
    panels = [(names, label) for names, label in PANELS if any(row.get(names[0], "") != "" for row in rows)]
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(3.2 * ((len(panels) + 1) // 2), 5.2), squeeze=False)
    for axis, (names, label) in zip(axes.flat, panels):
        for name in names:
            points = [(row["step"] + 1, row[name]) for row in rows if row.get(name, "") != ""]
            axis.plot(*zip(*points), label=name.replace("_", " "))
        axis.set(xlabel="step", ylabel=label)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    finish(figure, path)


def smooth(values, window=5):
    """Means of up to `window` neighbours to the left."""
    return [np.mean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def plot_comparison(records, path):
    """Algorithms side by side, from the records that compare.py makes: a line per seed, smoothed over 5 steps."""
    names = list(dict.fromkeys(record["algorithm"] for record in records))
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6))
    arithmetic = records[0]["reward"] == "correct"
    curves = [("reward", "completions", "reward"), ("reward", "seconds", "reward"),
              ("kl", "completions", "KL to the reference\n(nats per completion)"),
              ("length", "completions", "completion length (tokens)"),
              ("thinking", "completions", "share of thinking answers") if arithmetic else
              ("entropy", "completions", "entropy (nats per token)")]
    for axis, (column, against, label) in zip(axes.flat, curves):
        for record in records:
            rows = [row for row in record["rows"] if row[column] != ""]
            seconds = np.cumsum([sum(row.get(f"seconds_{phase}", 0) for phase in record["seconds"]) for row in rows])
            x = seconds if against == "seconds" else [row["completions"] for row in rows]
            axis.plot(x, smooth([row[column] for row in rows]), color=colours[record["algorithm"]], lw=1.2, alpha=0.8)
        axis.set(xlabel="seconds of training" if against == "seconds" else "completions sampled", ylabel=label)
    stacked(axes[1, 1], names, [[np.mean([r["seconds"][phase] for r in records if r["algorithm"] == name])
                                 for name in names] for phase in records[0]["seconds"]],
            list(records[0]["seconds"]), "seconds per step")
    of_name = [next(record["state_bytes"] for record in records if record["algorithm"] == name) for name in names]
    parts = max(of_name, key=len)
    stacked(axes[1, 2], names, [[state.get(part, 0) / 1e6 for state in of_name] for part in parts], list(parts),
            "model state (MB)")
    handles = [plt.Line2D([], [], color=colours[name], label=name) for name in names]
    axes[1, 3].axis("off")
    axes[1, 3].legend(handles=handles, loc="center", frameon=False, title="one line per seed", fontsize=11)
    finish(figure, path)


def stacked(axis, names, parts, labels, ylabel):
    """Stacked bars: parts[i][j] is the height of part i in the bar of names[j]."""
    bottom = np.zeros(len(names))
    for i, (heights, label) in enumerate(zip(parts, labels)):
        axis.bar(names, heights, 0.6, bottom, label=label, color=plt.cm.Greys(0.25 + 0.6 * i / len(labels)))
        bottom += heights
    axis.set(ylabel=ylabel, ylim=(0, bottom.max() * 1.6))
    axis.legend(frameon=False, fontsize=8, ncol=2, loc="upper left")


def plot_calibration(calibration, path):
    """The reward model's calibration: rows of [predicted probability, share that went so, pairs]."""
    figure, axis = plt.subplots(figsize=(4, 4))
    axis.plot([0.5, 1], [0.5, 1], color="grey", lw=1, label="perfect")
    axis.plot(*zip(*[(predicted, seen) for predicted, seen, _ in calibration]), marker="o", label="reward model")
    for predicted, seen, count in calibration:
        axis.annotate(f"{count} pairs", (predicted, seen), xytext=(5, -12), textcoords="offset points", fontsize=8)
    axis.set(xlabel="predicted probability of the likelier choice", ylabel="share of pairs that went so",
             xlim=(0.5, 1.05), ylim=(0.45, 1.05))
    axis.legend(frameon=False)
    finish(figure, path)


def finish(figure, path):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
