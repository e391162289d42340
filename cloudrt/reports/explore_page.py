"""The HTML page and the CSV file of `cloudrt explore`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.audit import Finding
from cloudrt.data.explore import Exploration
from cloudrt.errors import DataError
from cloudrt.reports.page import Card, embed, make_card, picture_side, write_page
from cloudrt.system.files import replacing

LISTED = 10_000
"""Largest number of findings of a kind on the page."""
DOUBTFUL = 12
"""Largest number of images with findings on the page."""
MUCH = 0.2
"""Fraction of an image without data above which it is counted separately."""
_MAP_WIDTH = 525


def write_exploration(
    exploration: Exploration,
    path: Path,
    facts: Mapping[str, str],
    shown: int = 12,
    chosen: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Write the page atomically; the images on it are read again.

    Parameters
    ----------
    exploration
        The figures and findings.
    path
        The HTML file.
    facts
        Names and values for the top of the page.
    shown
        Number of random images.
    chosen
        Names of further images to show.
    seed
        Seed of the random choice.

    Raises
    ------
    DataError
        A chosen image that is not in `exploration`.
    """
    folder, names = exploration.data.train_images, [image.name for image in exploration.images]
    for name in chosen:
        if name not in exploration.rle:
            raise DataError(f"{name} is not in train.csv; its images have names such as {names[0]}")
    readable = {image.name for image in exploration.images if image.size}
    random = sorted(Random(seed).sample(sorted(readable), min(shown, len(readable))))
    concerned = dict.fromkeys(_image_of(finding, exploration) for finding in exploration.findings)
    doubtful = [name for name in concerned if name in readable][:DOUBTFUL]

    def cards(wanted: Sequence[str]) -> Iterator[Card]:
        for name in wanted:
            side = picture_side(len(wanted))
            yield make_card(exploration.labels, name, folder / name, exploration.rle[name], side=side)

    no_data = np.array([image.no_data for image in exploration.images if image.size] or [0.0])
    present = exploration.present
    write_page(
        path,
        "explore.html",
        exploration.labels,
        name=exploration.data.root.resolve().name,
        facts=facts,
        images=len(names),
        masks=int(present.sum()),
        rows=list(_class_rows(exploration)),
        per_image=exploration.classes_per_image,
        correlation=[[None if np.isnan(r) else float(r) for r in line] for line in exploration.correlation()],
        together=(present.T.astype(int) @ present.astype(int)).tolist(),
        maps=list(_maps(exploration)),
        no_data={
            "mean": float(no_data.mean()),
            "without": int((no_data == 0).sum()),
            "much": int((no_data > MUCH).sum()),
            "histogram": exploration.no_data_histogram(),
        },
        chosen=list(cards(chosen)),
        random=cards(random),
        sampled=len(random),
        findings=len(exploration.findings),
        kinds=[
            {"name": kind, "total": len(found), "findings": [_named(one) for one in found[:LISTED]]}
            for kind, found in exploration.kinds()
        ],
        doubtful=cards(doubtful),
        doubtful_number=len(doubtful),
    )


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """Write all findings atomically as a CSV of kind, key, line and reason."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "key", "line", "reason"])
        writer.writerows([one.kind, one.key, one.line or "", one.reason] for one in findings)


def _named(finding: Finding) -> tuple[str, str]:
    """Return the row or image of a finding, with its line, and the reason."""
    return f"{finding.key}, line {finding.line:,}" if finding.line else finding.key, finding.reason


def _image_of(finding: Finding, exploration: Exploration) -> str:
    """Return the image of a finding, whose key is an image or a row."""
    return finding.key if finding.key in exploration.rle else finding.key.rpartition("_")[0]


def _class_rows(exploration: Exploration) -> Iterator[dict[str, Any]]:
    for index, label in enumerate(exploration.labels.classes):
        shares = np.array([image.shares[index] for image in exploration.images])
        present = shares[shares > 0]
        yield {
            "label": label,
            "images": len(present),
            "median": float(np.median(present)) if len(present) else 0.0,
            "pixels": float(shares.mean()),
            "histogram": exploration.area_histogram(index),
        }


def _maps(exploration: Exploration) -> Iterator[dict[str, Any]]:
    """Yield the position map of each class as a picture, scaled to the full range of colours, and its range."""
    counts = exploration.present.sum(axis=0)
    for label, number, map_ in zip(exploration.labels.classes, counts, exploration.positions, strict=True):
        if not number:
            yield {"label": label, "picture": None, "low": 0.0, "high": 0.0}
            continue
        shares = map_ / number
        low, high = float(shares.min()), float(shares.max())
        levels = np.round(255 * (shares - low) / max(high - low, 1e-12)).astype(np.uint8)
        yield {"label": label, "picture": embed(_coloured(levels)), "low": low, "high": high}


def _coloured(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the RGB image, (H, W, 3) uint8, of an (H, W) map of levels in the colour map viridis."""
    scale = _MAP_WIDTH / levels.shape[1]
    large = cv2.resize(levels, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(cv2.applyColorMap(large, cv2.COLORMAP_VIRIDIS)[..., ::-1], np.uint8)
