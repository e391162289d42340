"""bench.html: the figures of bench.json as a page."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from cloudrt.labels import CLOUDS
from cloudrt.reports.page import data_uri, write_page

from .figures import three_digits
from .stages import NOISY


def write_bench_page(values: dict[str, Any], path: Path) -> None:
    """Render the content of a bench.json to `path`, atomically."""
    accuracy, throughput = values["accuracy"], values["throughput"]
    write_page(
        path,
        "bench.html",
        CLOUDS,
        bench=values,
        front=plot_front(accuracy) if accuracy else None,
        curves=plot_throughput(throughput) if throughput else None,
        noisy=[
            stage["name"]
            for stage in values["stages"]
            if any(stage[way]["iqr_s"] > NOISY * stage[way]["median_s"] for way in ("ours", "notebook"))
        ],
        three=three_digits,
    )


def plot_front(accuracy: dict[str, Any]) -> str:
    """Return a plot of Dice against images per second with the Pareto front as a line, as the data URI of a PNG."""
    figure, panel = _figure()
    ways = sorted(accuracy["ways"], key=lambda way: way["timing"]["images_per_second"])
    front = [(way["timing"]["images_per_second"], way["dice"]) for way in ways if way["front"]]
    panel.step(*zip(*front, strict=True), where="pre", color="#56b4e9", linewidth=1.2, zorder=1)
    panel.set_xlabel("images per second, files to CSV")
    panel.set_ylabel(f"Dice against {accuracy['against']}")
    fastest = ways[-1]["timing"]["images_per_second"]
    panel.set_xlim(0, 1.3 * fastest)  # starts at 0; the margin is for the label of the last point
    scores = [way["dice"] for way in ways]
    room = max(0.01, 0.4 * (max(scores) - min(scores)))
    panel.set_ylim(min(scores) - room, max(scores) + room)
    figure.draw_without_rendering()  # computes sizes and ticks
    panel.set_yticks([tick for tick in panel.get_yticks() if panel.get_ylim()[0] <= tick <= 1])  # no Dice is above 1
    points = [(way["timing"]["images_per_second"], way["dice"]) for way in ways]
    places = [tuple(72 / figure.dpi * panel.transData.transform(point)) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for way, point, place in zip(ways, points, places, strict=True):
        panel.scatter(*point, s=60, color="#1b5fa8" if way["front"] else "#9aa7b8", zorder=2)
        text = f"{way['model']}\n{way['precision']}, {way['provider']}"
        left, up, box = _free_place(text, place, taken)
        taken.append(box)
        far = {"arrowstyle": "-", "color": "#9aa7b8", "linewidth": 0.8} if abs(up) > 27 else None
        panel.annotate(text, point, (left, up), textcoords="offset points", fontsize=8, arrowprops=far)
    return _uri(figure)


Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""


def _free_place(text: str, place: tuple[float, float], taken: list[Box]) -> tuple[float, float, Box]:
    """Return the offsets of a label beside a point, and its box, which overlaps none of `taken` if there is room."""
    width, height = 4.7 * max(map(len, text.splitlines())), 20
    tries = [(left, up) for up in (5, -25, 33, -53, 61, -81) for left in (6, -6 - width)]
    boxes = [(place[0] + left, place[1] + up, place[0] + left + width, place[1] + up + height) for left, up in tries]
    free = [
        all(box[2] < old[0] or old[2] < box[0] or box[3] < old[1] or old[3] < box[1] for old in taken) for box in boxes
    ]
    best = free.index(True) if any(free) else 0
    return *tries[best], boxes[best]


def plot_throughput(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Return a plot of images per second against batch size and threads, as the data URI of a PNG."""
    figure, panel = _figure()
    for (what, points), marker in zip(curves.items(), ("o", "s"), strict=False):
        x = [point[what.replace(" ", "_")] for point in points]
        panel.errorbar(
            x,
            [point["images_per_second"] for point in points],
            [point["iqr"] / 2 for point in points],
            marker=marker,
            capsize=3,
            label=what,
        )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_ylim(bottom=0)
    panel.set_xlabel(" or ".join(curves))
    panel.set_ylabel("images per second, engine alone")
    panel.legend(frameon=False)
    return _uri(figure)


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
    return data_uri(content.getvalue(), "png")
