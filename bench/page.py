"""bench.html: the figures of bench.json, to look at."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

from cloudrt.labels import CLOUDS
from cloudrt.page import write_page


def write_bench_page(values: dict[str, Any], path: Path) -> None:
    """Render the content of a bench.json to `path`, whole or not at all."""
    accuracy, throughput = values["accuracy"], values["throughput"]
    write_page(
        path,
        "bench.html",
        CLOUDS,
        bench=values,
        front=plot_front(accuracy) if accuracy else None,
        curves=plot_throughput(throughput) if throughput else None,
        three=three,
    )


def plot_front(accuracy: dict[str, Any]) -> str:
    """Return a PNG, as a data URI, of images per second against Dice, the front joined."""
    figure, panel = _figure()
    ways = sorted(accuracy["ways"], key=lambda way: way["timing"]["images_per_second"])
    front = [(way["timing"]["images_per_second"], way["dice"]) for way in ways if way["front"]]
    panel.step(*zip(*front, strict=True), where="pre", color="#56b4e9", linewidth=1.2, zorder=1)
    for way in ways:
        x, y = way["timing"]["images_per_second"], way["dice"]
        panel.scatter(x, y, s=60, color="#1b5fa8" if way["front"] else "#9aa7b8", zorder=2)
        panel.annotate(f"{way['model']}\n{way['precision']}, {way['provider']}", (x, y), (7, 5),
                       textcoords="offset points", fontsize=8)  # fmt: skip
    panel.set_xlabel("images per second, files to CSV")
    panel.set_ylabel(f"Dice against {accuracy['against']}")
    fastest = ways[-1]["timing"]["images_per_second"]
    panel.set_xlim(0, 1.3 * fastest)  # from nothing: half as fast is half as far; the rest is for the last one's name
    scores = [way["dice"] for way in ways]
    room = max(0.01, 0.4 * (max(scores) - min(scores)))
    panel.set_ylim(min(scores) - room, max(scores) + room)
    return _uri(figure)


def plot_throughput(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Return a PNG, as a data URI, of images per second against batch size and threads."""
    figure, panel = _figure()
    for (what, points), marker in zip(curves.items(), ("o", "s"), strict=False):
        x = [point[what.replace(" ", "_")] for point in points]
        panel.errorbar(
            x, [point["images_per_second"] for point in points], [point["iqr"] / 2 for point in points],
            marker=marker, capsize=3, label=what,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_ylim(bottom=0)
    panel.set_xlabel(" or ".join(curves))
    panel.set_ylabel("images per second, engine alone")
    panel.legend(frameon=False)
    return _uri(figure)


def three(value: float) -> str:
    """Return three digits of a number, never in powers of ten."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    return figure, panel


def _uri(figure: Any) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, format="png")
    return "data:image/png;base64," + b64encode(content.getvalue()).decode("ascii")
