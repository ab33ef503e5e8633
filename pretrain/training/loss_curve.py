"""The plot of a run's losses."""

from __future__ import annotations

from pathlib import Path

from pretrain.common.files import write_figure
from pretrain.common.plots import plot_text
from pretrain.run_directory import RunDirectory


def plot_loss_curve(
    directory: RunDirectory, title: str, bigram_entropy: float | None
) -> Path | None:
    """Draw the training and validation loss, and bits per byte, into the run directory.

    Dotted lines are where phases begin. The training loss is that of the logged steps, and its mean
    over the steps between them. ``bigram_entropy``, in bits per byte, is drawn beside the bits per
    byte. Returns the plot's path, or None where no loss is logged.
    """
    from matplotlib.figure import Figure

    rows = directory.read_metrics()
    train = [r for r in rows if r.get("loss") is not None]
    valid = [
        (r["tokens"], r["valid_loss"], r["valid_bits_per_byte"])
        for r in rows
        if r.get("valid_loss") is not None
    ]
    if not train:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [r["tokens"] for r in train]
    # Runs of earlier versions logged no means.
    means = [r.get("loss_mean", r["loss"]) for r in train]
    steps = [r["loss"] for r in train]
    if steps != means:
        left.plot(
            tokens, steps, color="tab:blue", alpha=0.3, linewidth=1, label="training, one step"
        )
    left.plot(tokens, means, color="tab:blue", linewidth=1, label="training, mean of steps")
    if valid:
        left.plot(
            *zip(*[v[:2] for v in valid], strict=True),
            "o-",
            color="tab:orange",
            markersize=4,
            label="validation",
        )
    left.set(xlabel="tokens", ylabel="loss (nats per token)", title=plot_text(title))
    left.legend()
    points = [(tokens, bits) for tokens, _, bits in valid if bits is not None]
    if points:
        right.plot(*zip(*points, strict=True), "o-", color="tab:orange", label="validation")
        right.annotate(
            f"{points[-1][1]:.3f}",
            points[-1],
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
        )
    if bigram_entropy is not None:
        right.axhline(
            bigram_entropy, color="gray", linestyle="--", label=f"byte bigrams {bigram_entropy:.2f}"
        )
    right.set(xlabel="tokens", ylabel="bits per byte", title="held-out text")
    right.legend()
    borders = [(r["tokens"], r["phase_name"]) for r in rows if r.get("phase_begins", 1) > 1]
    for axes in (left, right):
        for at, name in borders:
            axes.axvline(at, color="gray", linewidth=0.8, linestyle=":")
            axes.annotate(
                plot_text(name),
                (at, 1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                xytext=(2, -8),
                fontsize=7,
                color="gray",
            )
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    path = directory.loss_plot
    path.parent.mkdir(exist_ok=True)
    write_figure(path, figure, dpi=120)
    return path
