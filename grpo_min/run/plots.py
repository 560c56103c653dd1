"""Figures. Every axis has a name and a unit."""
import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

PANELS = [  # (columns of metrics.csv, label of the y axis)
    (["reward"], "reward"), (["accuracy", "thinking"], "share of completions"),
    (["kl"], "KL to the reference (nats)"), (["length"], "completion length (tokens)"),
    (["entropy"], "entropy (nats per token)"),
    (["explained_variance", "explainable_variance"], "share of the returns' variance"),
    (["equal_groups"], "share of all-equal groups"), (["grad_norm"], "gradient norm"),
]


def plot_curves(rows, path):
    """The curves of one run's rows of metrics: a panel for each quantity measured."""
    measured = {name for row in rows for name, value in row.items() if value != ""}
    panels = [(names, label) for names, label in PANELS if names[0] in measured]
    width = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, width, figsize=(3.2 * width, 5.2), squeeze=False)
    for axis, (names, label) in zip(axes.flat, panels):
        for name in names:
            points = [(row["step"] + 1, row[name]) for row in rows
                      if row.get(name, "") != ""]
            axis.plot(*zip(*points), "-" if len(points) > 10 else ".-",
                      label=name.replace("_", " "))
        axis.set(xlabel="step", ylabel=label)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    finish(figure, path)


def plot_calibration(calibration, path):
    """Calibration: rows of [predicted probability, share that went so, pairs]."""
    figure, axis = plt.subplots(figsize=(4, 4))
    axis.plot([0.5, 1], [0.5, 1], color="grey", lw=1, label="perfect")
    predictions, shares, _ = zip(*calibration)
    axis.plot(predictions, shares, marker="o", label="reward model")
    for predicted, share, count in calibration:
        axis.annotate(f"{count} pairs", (predicted, share), xytext=(5, -12),
                      textcoords="offset points", fontsize=8)
    axis.set(xlabel="predicted probability of the likelier choice",
             ylabel="share of pairs that went so", xlim=(0.5, 1.05), ylim=(0.45, 1.05))
    axis.legend(frameon=False)
    finish(figure, path)


def finish(figure, path):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("tight")
    figure.savefig(path, dpi=120)
    plt.close(figure)
