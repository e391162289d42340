"""The plot of the Dice surfaces and the HTML page of `cloudrt tune`.

matplotlib is imported only when a plot is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.masks.rule import Rule
from cloudrt.reports.page import data_uri, write_page
from cloudrt.search.choose import RuleChoice
from cloudrt.search.tables import DiceTables
from cloudrt.search.tuned import Tuned


def plot_surfaces(tuned: Tuned) -> bytes:
    """Return a PNG with the mean Dice of every threshold and min area, one panel per class.

    The colours span the range of 0.1 below the maximum; lower values have the darkest colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = tuned.labels.classes
    columns = min(2, len(classes))
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(6.6 * columns, 4.3 * rows + 0.5), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for index, panel in enumerate(panels):
        if index >= len(classes):
            panel.set_axis_off()
            continue
        _draw_panel(panel, figure, tuned, index)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_panel(panel: Any, figure: Any, tuned: Tuned, index: int) -> None:
    tables, choice = tuned.tables, tuned.choices[index]
    surface = choice.surface
    top = float(surface.max())
    thresholds, areas = tables.thresholds, tables.min_areas
    columns = np.arange(len(thresholds))
    rows = np.arange(len(areas))
    mesh = panel.pcolormesh(columns, rows, surface.T, vmin=top - 0.1, vmax=top, cmap="viridis", rasterized=True)
    figure.colorbar(mesh, ax=panel, label="mean Dice", extend="min")
    if min(surface.shape) > 1:
        panel.contour(columns, rows, surface.T, [top - 0.02, top - 0.01, top - 0.005], colors="white", linewidths=0.7)
    panel.set_title(f"{tuned.labels.classes[index]}: {words(choice.rule)}", loc="left", fontsize=10.5)
    panel.set_xlabel("threshold, level 0 to 255")
    panel.set_ylabel("min area, pixels")
    ticks = np.unique(np.linspace(0, len(thresholds) - 1, 9).round().astype(int))
    panel.set_xticks(ticks, [str(thresholds[tick]) for tick in ticks])
    shown = rows[:: max(1, math.ceil(len(rows) / 14))]
    panel.set_yticks(shown, [f"{areas[tick]:,}" for tick in shown])
    marks = [
        (choice.fold_rules, "o", "white", "folds", 5),
        ((choice.peak,), "^", "#ff7a45", "highest point", 8),
    ]
    if tuned.before:
        marks.append(((tuned.before[index][0],), "s", "#56b4e9", "before", 7))
    marks.append(((choice.rule,), "*", "#ff3b6b", "chosen", 14))
    for rules, marker, colour, name, size in marks:
        x, y = zip(*(_place(tables, rule) for rule in rules), strict=True)
        panel.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="black", label=name, clip_on=False)


def _place(tables: DiceTables, rule: Rule) -> tuple[int, int]:
    return int(np.searchsorted(tables.thresholds, rule.threshold)), int(
        np.searchsorted(tables.min_areas, rule.min_area)
    )


def words(rule: Rule) -> str:
    """Describe a rule: "> 128, area > 9,000, empty unless 200 pixels > 200"."""
    parts = [f"> {rule.threshold}", f"area > {rule.min_area:,}"]
    if rule.gate_pixels:
        parts.append(f"empty unless {rule.gate_pixels:,} pixels > {rule.gate_threshold}")
    if rule.presence:
        parts.append(f"empty unless presence ≥ {rule.presence}")
    return ", ".join(parts)


def span(choice: RuleChoice) -> str:
    """Return the ranges of the thresholds and min areas that the folds chose: "118–131, 9,000–11,000"."""
    parts = []
    for values in ([r.threshold for r in choice.fold_rules], [r.min_area for r in choice.fold_rules]):
        low, high = min(values), max(values)
        parts.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    return ", ".join(parts)


def kept_because(choice: RuleChoice) -> str:
    """Return why the previous rule was kept.

    Example: "the new rule (> 128, area > 9,000) would change the out-of-fold Dice by -0.0012 ± 0.0020".
    """
    change = f"{choice.gain:+.4f} ± {choice.gain_error:.4f}"
    return f"the new rule ({words(choice.found)}) would change the out-of-fold Dice by {change}"


def write_tune_page(tuned: Tuned, plot: bytes, facts: Mapping[str, str], path: Path) -> None:
    """Write the HTML page atomically.

    Parameters
    ----------
    tuned
        The result of tuning.
    plot
        From `plot_surfaces`.
    facts
        Names and values for the top of the page.
    path
        The HTML file.
    """
    write_page(
        path,
        "tune.html",
        tuned.labels,
        tuned=tuned,
        plot=data_uri(plot, "png"),
        facts=facts,
        words=words,
        span=span,
        kept_because=kept_because,
        dice=dice,
    )


def dice(value: float) -> str:
    """Return a Dice with four decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.4f}"
