"""The plots of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cloudrt.train.curves import plot_curves

from cloudrt.labels import CLOUDS, class_colours


def test_classes_have_the_colours_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: dict[str, Any] = {}
    plot = axes.Axes.plot

    def record(self: Any, *args: Any, **style: Any) -> Any:
        drawn[style["label"]] = style.get("color")
        return plot(self, *args, **style)

    monkeypatch.setattr(axes.Axes, "plot", record)
    names = ("train_loss", "valid_loss", "dice", "all_empty", "encoder_lr", "decoder_lr", "memory_mb")
    row = {"epoch": 1.0, **dict.fromkeys(names, 0.5), **{f"dice_{label}": 0.5 for label in CLOUDS.classes}}
    plot_curves([row, row | {"epoch": 2.0}], tmp_path / "curves.png")
    assert [drawn[label] for label in CLOUDS.classes] == class_colours(len(CLOUDS.classes))
