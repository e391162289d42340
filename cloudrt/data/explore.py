"""What a labelled data set holds, and what is doubtful in it: the figures behind `cloudrt explore`.

Each image is read once, at a small size; each mask is counted on the submission grid and then dropped. What stays of an
image is a few numbers, so that a hundred thousand images fit into memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.audit import Finding, audit_files, audit_masks, audit_rows
from cloudrt.data.duplicates import difference_hash, similar_groups
from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import NO_DATA_LEVEL, decode, read_file, resize
from cloudrt.labels import Grid, Labels
from cloudrt.masks.rle import rle_encode, rle_to_submit_grid
from cloudrt.system.overlap import overlap

BINS = 20
_LOOK = 280  # pixels of an image's longer side, as it is looked at
_MAP = 105  # pixels of the longer side of the maps of positions


@dataclass(frozen=True)
class Scene:
    """What stays of an image.

    Parameters
    ----------
    name
        As train.csv has it.
    size
        Height and width in pixels; None where it cannot be read.
    no_data
        Share of its pixels that are black.
    shares
        Share of the submission grid that each class covers, (C,); 0 where it is absent.
    digest, hash
        Of its bytes, and of its looks; see `difference_hash`.
    """

    name: str
    size: Grid | None
    no_data: float
    shares: tuple[float, ...]
    digest: str
    hash: int

    @property
    def present(self) -> tuple[bool, ...]:
        """Which classes it has."""
        return tuple(share > 0 for share in self.shares)


@dataclass
class Exploration:
    """Everything that the page shows.

    Parameters
    ----------
    labels
        Classes and grids.
    scenes
        Each image of train.csv, in its order.
    positions
        (C, h, w) float64: in how many images each cell of a coarse grid is covered by the class, in parts of one.
    findings
        What is doubtful.
    rle
        Image name -> class -> RLE on the submission grid, of the sound rows.
    """

    labels: Labels
    scenes: list[Scene]
    positions: NDArray[np.float64]
    findings: list[Finding] = field(default_factory=list)
    rle: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(N, C): which image has which class."""
        return np.array([scene.present for scene in self.scenes], bool).reshape(-1, len(self.labels.classes))

    @property
    def classes_per_image(self) -> list[int]:
        """How many images have 0, 1, ... C classes."""
        counts = np.bincount(self.present.sum(axis=1), minlength=len(self.labels.classes) + 1)
        return [int(count) for count in counts]

    def correlation(self) -> NDArray[np.float64]:
        """Return Pearson's r between the presences of two classes over the images, (C, C): the phi coefficient; NaN
        where a class is in all images or in none.
        """
        present = self.present.astype(np.float64)
        centred = present - present.mean(axis=0) if len(present) else present
        spread = np.sqrt((centred**2).sum(axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(centred.T @ centred / np.outer(spread, spread))

    def area_histogram(self, index: int) -> list[int]:
        """Return how many images have a class covering each twentieth of the grid."""
        shares = [scene.shares[index] for scene in self.scenes if scene.shares[index] > 0]
        return _histogram(shares)

    def no_data_histogram(self) -> list[int]:
        """Return how many images lack data in each twentieth of their pixels."""
        return _histogram([scene.no_data for scene in self.scenes if scene.size])

    def kinds(self) -> list[tuple[str, list[Finding]]]:
        """Return the findings by kind, in the order in which they were looked for."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return list(kinds.items())


def explore(data: DataFolder, threads: int = 1, advance: Callable[[int], object] | None = None) -> Exploration:
    """Read every row and every image of a data set.

    Parameters
    ----------
    data
        The data set.
    threads
        That read images.
    advance
        Called with 1 for each image.

    Raises
    ------
    DataError
        train.csv is no table, or holds no row that names an image.
    """
    labels = data.labels
    texts, findings = audit_rows(data.train_csv, labels)
    if not texts:
        raise DataError(f"{data.train_csv} names no image")
    scale = _MAP / max(labels.submit_grid)
    height, width = (max(1, round(side * scale)) for side in labels.submit_grid)
    exploration = Exploration(labels, [], np.zeros((len(labels.classes), height, width)), findings)
    kept: list[Finding] = []
    with ThreadPoolExecutor(threads) as pool:
        seen = overlap(pool, lambda one: _look(data, *one), texts.items(), 4 * threads)
        for scene, rle, maps, found in seen:
            exploration.scenes.append(scene)
            exploration.rle[scene.name] = rle
            exploration.positions += maps
            kept += found
            if advance:
                advance(1)
    findings += kept
    findings += audit_files(data.train_images, texts)
    findings += _sizes(exploration.scenes)
    findings += _twins(exploration.scenes, labels)
    return exploration


def _look(
    data: DataFolder, name: str, texts: dict[str, str]
) -> tuple[Scene, dict[str, str], NDArray[np.float64], list[Finding]]:
    labels = data.labels
    masks = np.stack([rle_to_submit_grid(texts.get(label, ""), labels) for label in labels.classes])
    scale = _MAP / max(labels.submit_grid)
    height, width = (max(1, round(side * scale)) for side in labels.submit_grid)
    maps = np.stack(
        [cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) for mask in masks]
    )
    shares = tuple(float(mask.mean()) for mask in masks)
    size, no_data, digest, looks = None, 0.0, "", 0
    findings: list[Finding] = []
    dark = None
    try:
        content = read_file(data.train_images / name)
        digest = hashlib.sha256(content).hexdigest()
        image = decode(content)
        size = (image.shape[0], image.shape[1])
        small = _LOOK / max(size)
        looked = resize(image, (max(1, round(size[0] * small)), max(1, round(size[1] * small))))
        dark = (looked.max(axis=2) <= NO_DATA_LEVEL).astype(np.uint8)
        no_data, looks = float(dark.mean()), difference_hash(looked)
    except ImageError as error:
        findings.append(Finding("Unreadable image", name, str(error)))
    findings += audit_masks(name, labels, masks, shares, dark)
    rle = {label: rle_encode(mask) for label, mask in zip(labels.classes, masks, strict=True) if mask.any()}
    return Scene(name, size, no_data, shares, digest, looks), rle, maps, findings


def _sizes(scenes: list[Scene]) -> Iterator[Finding]:
    """Yield the images of another size than most."""
    sizes = Counter(scene.size for scene in scenes if scene.size)
    if len(sizes) < 2:
        return
    (height, width), _ = sizes.most_common(1)[0]
    for scene in scenes:
        if scene.size and scene.size != (height, width):
            yield Finding(
                "Other size", scene.name, f"is {scene.size[1]}x{scene.size[0]}, most images are {width}x{height}"
            )


def _twins(scenes: list[Scene], labels: Labels) -> Iterator[Finding]:
    """Yield the images that are the same file or look nearly alike, and those of them whose classes differ."""
    sound = [scene for scene in scenes if scene.size and scene.hash]  # a flat image is like no other
    groups: dict[int, list[Scene]] = defaultdict(list)
    for scene, group in zip(sound, similar_groups([scene.hash for scene in sound]).tolist(), strict=True):
        groups[group].append(scene)
    for members in groups.values():
        first = members[0]
        for scene in members[1:]:
            same = [one.name for one in members[: members.index(scene)] if one.digest == scene.digest]
            if same:
                yield Finding("Duplicate", scene.name, f"is the same file as {same[0]}")
            else:
                yield Finding("Duplicate", scene.name, f"looks nearly like {first.name}")
    for members in groups.values():
        sets = {scene.present for scene in members}
        if len(sets) > 1:
            words = "; ".join(f"{scene.name}: {_classes(scene, labels)}" for scene in members[:6])
            yield Finding("Twins that disagree", members[0].name, f"{words}{'; ...' if len(members) > 6 else ''}")


def _classes(scene: Scene, labels: Labels) -> str:
    return ", ".join(label for label, there in zip(labels.classes, scene.present, strict=True) if there) or "none"


def _histogram(shares: list[float]) -> list[int]:
    return [int(count) for count in np.histogram(shares, BINS, (0, 1))[0]]
