"""Each stage alone, in units of its own work, beside what the machine could do at most.

decode          compressed bytes and decoded megapixels a second
infer           operations an image, the rate achieved, its share of the device's measured peak of matrix products
post-process    how many times as long as reading the map once
write           rows of CSV a second, journal and all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.images.image import ImageFile, decode, read_file
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.model.artifact import load_model

from .agreement import Maps
from .flops import count_flops
from .pipeline import PipelineTime

MATRIX = 2048
"""Sides of the matrices whose product tells the peak."""
SECONDS = 0.4
"""How long the peak is sought."""


@dataclass(frozen=True)
class Ceilings:
    """What came of it; rates are per second, of all threads together.

    Parameters
    ----------
    decode_mb, decode_megapixels
        Compressed megabytes, and megapixels of the whole images.
    gflop_per_image
        Of the network; see `count_flops`.
    gflops, peak_gflops
        Achieved by the engine, and by a product of two float32 matrices on the same cores; 0 where the engine is on a
        GPU and no torch with CUDA is there to measure it.
    map_reads
        Post-processing's time of one map, in times of reading it once.
    rows
        Written.
    """

    decode_mb: float
    decode_megapixels: float
    gflop_per_image: float
    gflops: float
    peak_gflops: float
    map_reads: float
    rows: float

    @property
    def peak_share(self) -> float:
        """Share of the peak that the engine achieves; above 1 where it computes in fewer bits than the peak did."""
        return self.gflops / self.peak_gflops if self.peak_gflops else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"peak_share": self.peak_share}


def measure_ceilings(
    segmenter: Segmenter, files: Sequence[ImageFile], maps: Maps, alone: PipelineTime, folder: Path
) -> Ceilings:
    """Return the ceilings, from the stages' times `alone` and from what is measured here."""
    contents = [file.path.stat().st_size for file in files]
    pixels = [decode(read_file(file.path)).size / 3 for file in files]
    flops = count_flops(load_model(segmenter.model))
    decoding, inferring = alone.stages["decode"].median, alone.stages["infer"].median
    on_gpu = segmenter.plan.provider in ("cuda", "tensorrt")
    post_process = alone.cpu_seconds["post-process"].median
    return Ceilings(
        decode_mb=float(np.mean(contents)) / decoding / 1e6,
        decode_megapixels=float(np.mean(pixels)) / decoding / 1e6,
        gflop_per_image=flops / 1e9,
        gflops=flops / inferring / 1e9,
        peak_gflops=(_gpu_peak() if on_gpu else _cpu_peak()) / 1e9,
        map_reads=post_process / _seconds(lambda: [levels.max() for levels, _ in maps]) * len(maps),
        rows=_rows(segmenter, len(files), folder),
    )


def _rows(segmenter: Segmenter, images: int, folder: Path) -> float:
    text = "1000 200 " * 150
    labels = segmenter.labels

    def write() -> None:
        with open_submission(folder / "rows.csv", labels) as submission:
            for number in range(images):
                submission.add(f"{number}.jpg", dict.fromkeys(labels.classes, text.strip()), None)

    return images * len(labels.classes) / _seconds(write)


def _seconds(work: Callable[[], object]) -> float:
    """Return the median time of `work` over a few passes, after one that does not count."""
    work()
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _cpu_peak() -> float:
    """Return the operations a second of numpy's matrix product in float32, the best of several."""
    random = np.random.default_rng(0)
    one, other = (random.random((MATRIX, MATRIX), np.float32) for _ in range(2))
    return _best(lambda: one @ other)


def _gpu_peak() -> float:
    """Return the same of torch's in fp16 on the first GPU; 0 without it."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0.0
    if not torch.cuda.is_available():
        return 0.0
    one, other = (torch.randn(4 * MATRIX, 4 * MATRIX, device="cuda", dtype=torch.float16) for _ in range(2))

    def multiply() -> None:
        one @ other
        torch.cuda.synchronize()

    return 64 * _best(multiply)


def _best(multiply: Callable[[], object]) -> float:
    multiply()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - began)
    return 2 * MATRIX**3 / best
