"""The page of `cloudrt explore`."""

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
"""Findings of a kind on the page."""
DOUBTFUL = 12
"""Images with findings that are shown."""
MUCH = 0.2
"""Share of an image without data that counts as much."""
_MAP_WIDTH = 525


def write_exploration(
    exploration: Exploration,
    folder: Path,
    path: Path,
    name: str,
    facts: Mapping[str, str],
    shown: int = 12,
    chosen: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Write the page to `path`, whole or not at all.

    Parameters
    ----------
    exploration
        What is shown.
    folder
        Of the images, some of which are read again.
    path
        The HTML file.
    name
        Of the data set.
    facts
        Names and values for the top of the page.
    shown
        Random images.
    chosen
        Names of images to show besides.
    seed
        Of the random ones.

    Raises
    ------
    DataError
        A chosen image that train.csv does not name.
    """
    scenes = exploration.scenes
    names = [scene.name for scene in scenes]
    for one in chosen:
        if one not in exploration.rle:
            raise DataError(f"{one} is not in train.csv; its images have names such as {names[0]}")
    readable = {scene.name for scene in scenes if scene.size}
    random = sorted(Random(seed).sample(sorted(readable), min(shown, len(readable))))
    concerned = dict.fromkeys(_image_of(finding, exploration) for finding in exploration.findings)
    doubtful = [one for one in concerned if one in readable][:DOUBTFUL]

    def cards(wanted: Sequence[str]) -> Iterator[Card]:
        for one in wanted:
            yield make_card(exploration.labels, one, folder / one, exploration.rle[one], side=picture_side(len(wanted)))

    no_data = np.array([scene.no_data for scene in scenes if scene.size] or [0.0])
    present = exploration.present
    write_page(
        path,
        "explore.html",
        exploration.labels,
        name=name,
        facts=facts,
        images=len(scenes),
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
    """Write all findings as a CSV of kind, key, line and reason, whole or not at all."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "key", "line", "reason"])
        writer.writerows([one.kind, one.key, one.line or "", one.reason] for one in findings)


def _named(finding: Finding) -> tuple[str, str]:
    """Return what a finding is about, with its line, and the finding."""
    return f"{finding.key}, line {finding.line:,}" if finding.line else finding.key, finding.reason


def _image_of(finding: Finding, exploration: Exploration) -> str:
    """Return the image that a finding is about: its key is the image's, or that of a row of it."""
    return finding.key if finding.key in exploration.rle else finding.key.rpartition("_")[0]


def _class_rows(exploration: Exploration) -> Iterator[dict[str, Any]]:
    for index, label in enumerate(exploration.labels.classes):
        shares = np.array([scene.shares[index] for scene in exploration.scenes])
        present = shares[shares > 0]
        yield {
            "label": label,
            "images": len(present),
            "median": float(np.median(present)) if len(present) else 0.0,
            "pixels": float(shares.mean()),
            "histogram": exploration.area_histogram(index),
        }


def _maps(exploration: Exploration) -> Iterator[dict[str, Any]]:
    """Yield for each class the map of where it lies, each spread over all colours, with its range."""
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
    """Return the RGB image of an (H, W) map of levels, in viridis."""
    scale = _MAP_WIDTH / levels.shape[1]
    large = cv2.resize(levels, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(cv2.applyColorMap(large, cv2.COLORMAP_VIRIDIS)[..., ::-1], np.uint8)
