"""The rate of each stage alone, in units of its work, and the highest rate that the machine can reach.

decode          compressed bytes and decoded megapixels per second
infer           operations per image, the rate, and its share of the measured peak of matrix products
post-process    time relative to reading the map once
write           CSV rows per second, journal included
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cloudrt.images.image import decode, read_file
from cloudrt.inference.submission import open_submission
from cloudrt.model.onnx_file import load_model

from .flops import count_flops
from .pipeline import PipelineTime
from .workload import Workload

CPU_SIDE, GPU_SIDE = 2048, 8192
"""Side of the square matrices whose product measures the peak."""
SECONDS = 0.4
"""Duration of the measurement of the peak."""


@dataclass(frozen=True)
class Ceilings:
    """Rates per second, of all threads together.

    Parameters
    ----------
    decode_mb, decode_megapixels
        Compressed megabytes, and megapixels of the full images.
    gflop_per_image
        Operations of the network; see `count_flops`.
    gflops, peak_gflops
        Rate of the engine, and of a product of two matrices: float32 in NumPy, or fp16 in PyTorch if the engine is on a
        GPU. The peak is 0 if PyTorch with CUDA is needed and not installed.
    map_reads
        Time to post-process a map, relative to reading it once.
    rows
        CSV rows.
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
        """Share of the peak that the engine reaches; above 1 if it computes in a lower precision than the peak."""
        return self.gflops / self.peak_gflops if self.peak_gflops else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"peak_share": self.peak_share}


def measure_ceilings(work: Workload, alone: PipelineTime) -> Ceilings:
    """Return the rates, from the times of the stages alone and from measurements of the machine."""
    sizes = [file.path.stat().st_size for file in work.files]
    most = work.segmenter.options.max_pixels
    pixels = [decode(read_file(file.path), max_pixels=most).size / 3 for file in work.files]
    flops = count_flops(load_model(work.segmenter.model))
    decoding, inferring = alone.stages["decode"].median, alone.stages["infer"].median
    post_process = alone.cpu_seconds["post-process"].median
    return Ceilings(
        decode_mb=float(np.mean(sizes)) / decoding / 1e6,
        decode_megapixels=float(np.mean(pixels)) / decoding / 1e6,
        gflop_per_image=flops / 1e9,
        gflops=flops / inferring / 1e9,
        peak_gflops=(_gpu_peak() if work.on_gpu else _cpu_peak()) / 1e9,
        map_reads=post_process / _seconds(lambda: [levels.max() for levels, _ in work.maps]) * len(work.maps),
        rows=_rows(work),
    )


def _rows(work: Workload) -> float:
    rle = dict.fromkeys(work.labels.classes, ("1000 200 " * 150).strip())

    def write() -> None:
        with open_submission(work.folder / "rows.csv", work.labels) as submission:
            for number in range(len(work.files)):
                submission.add(f"{number}.jpg", rle, None)

    return len(work.files) * len(rle) / _seconds(write)


def _seconds(work: Callable[[], object]) -> float:
    """Return the median time of `work` over five passes, after a warm-up."""
    work()
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _cpu_peak() -> float:
    """Return the best rate of NumPy's matrix product in float32, in operations per second."""
    random = np.random.default_rng(0)
    one, other = (random.random((CPU_SIDE, CPU_SIDE), np.float32) for _ in range(2))
    return _best(lambda: one @ other, CPU_SIDE)


def _gpu_peak() -> float:
    """Return the best rate of torch's matrix product in fp16 on the first GPU; 0 without torch or a GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return 0.0
    if not torch.cuda.is_available():
        return 0.0
    one, other = (torch.randn(GPU_SIDE, GPU_SIDE, device="cuda", dtype=torch.float16) for _ in range(2))

    def multiply() -> None:
        one @ other
        torch.cuda.synchronize()

    return _best(multiply, GPU_SIDE)


def _best(multiply: Callable[[], object], side: int) -> float:
    """Return the best rate of a product of matrices of this side, in operations per second."""
    multiply()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
