"""history.csv, curves.png and TensorBoard logs, updated after each epoch."""

from __future__ import annotations

import csv
from pathlib import Path

from cloudrt.labels import class_colours
from cloudrt.system.files import replacing


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row per epoch."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Plot loss, held-out Dice, learning rate and memory against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(18, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, dice, rate, held = figure.subplots(1, 4)
    epochs = [row["epoch"] for row in history]

    def line(axes: object, name: str, label: str, **style: object) -> None:
        axes.plot(epochs, [row[name] for row in history], marker="o", markersize=3, label=label, **style)  # type: ignore[attr-defined]

    line(loss, "train_loss", "training")
    line(loss, "valid_loss", "held out")
    loss.set_title("Loss")
    line(dice, "dice", "mean", color="black", linewidth=2)
    names = [name for name in history[0] if name.startswith("dice_")]  # in the order of the classes
    for name, colour in zip(names, class_colours(len(names)), strict=True):
        line(dice, name, name.removeprefix("dice_"), linewidth=1, color=colour)
    dice.axhline(history[-1]["all_empty"], color="grey", linestyle=":", label="all empty")
    best = max(history, key=lambda row: row["dice"])
    dice.set_title(f"Held-out Dice, best {best['dice']:.4f} at epoch {best['epoch']:.0f}")
    line(rate, "encoder_lr", "encoder")
    line(rate, "decoder_lr", "decoder", linestyle="--")
    rate.set_title("Learning rate")
    rate.set_yscale("log")
    line(held, "memory_mb", "resident")
    held.set_title("Memory of the process, MB")
    held.set_ylim(0, 1.15 * max(row["memory_mb"] for row in history))
    for axes in (loss, dice, rate, held):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def write_tensorboard(row: dict[str, float], folder: Path) -> None:
    """Append the values of an epoch to the TensorBoard log in `folder`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(row["epoch"]))
