"""Shared code of the steps of `cloudrt.bench.gpu`: the task, its images, and the loop that runs the parts of a step.

A step is a generator of parts, each a name and a function without arguments that returns plain values. The parts run
one after another. The results are written after each part, so that they are kept if the process crashes or is stopped.
In the values of a part, "result" is one line for the summary, and "error" is the reason of a failure.
"""

from __future__ import annotations

import json
import math
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.binding import open_gpu
from cloudrt.engines.libraries import load_libraries
from cloudrt.engines.onnxruntime import REFUSALS
from cloudrt.errors import CloudrtError
from cloudrt.images.image import ImageFile, find_images
from cloudrt.labels import Grid
from cloudrt.model.artifact import Artifact, parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.system.cuda import CudaDevice, HostDevice
from cloudrt.system.files import replacing
from cloudrt.system.machine import usable_cpus

from .workload import draw_scenes

NO_GPU = "no GPU"
SIZES: tuple[Grid, ...] = ((350, 525), (1400, 2100))
"""Heights and widths of the synthetic images that are drawn if no images are given."""
SECONDS = 0.3
"""Minimum duration of a timed round."""
FAULTS: tuple[type[Exception], ...] = (CloudrtError, ImportError, OSError, AssertionError, SubprocessError, *REFUSALS)
"""Errors of a part that do not stop the other parts."""

Values = dict[str, Any]
Part = tuple[str, Callable[[], Values]]


class NotRun(Exception):
    """A part that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class GpuTask:
    """Input of the steps.

    Parameters
    ----------
    model
        Path of the artifact.
    out
        Folder of the results.
    scratch
        Folder for temporary files, which all steps share.
    seconds
        Time limit of the step, in seconds.
    checkpoints
        Paths of the best.pth files that the artifact was exported from, one for each network; may be empty.
    images
        Folders of images; if empty, synthetic images are drawn.
    data
        Folder of a labelled data set; if "", a synthetic one is written.
    stand_in
        Whether the CPU is used instead of a GPU, with few images and small batches.
    """

    model: str
    out: str
    scratch: str
    seconds: float = 0.0
    checkpoints: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    data: str = ""
    stand_in: bool = False

    @property
    def provider(self) -> str:
        """The provider that runs the artifact."""
        return "cpu" if self.stand_in else "cuda"

    @property
    def threads(self) -> int:
        """Number of CPU threads."""
        return usable_cpus()

    def choose(self, on_gpu: Any, stand_in: Any) -> Any:
        """Return the setting for a GPU, or that for the CPU if it is used instead."""
        return stand_in if self.stand_in else on_gpu

    def require_gpu(self, *, unless: bool = False) -> None:
        """Raise NotRun if the CPU is used instead of a GPU, except with `unless`."""
        if self.stand_in and not unless:
            raise NotRun(NO_GPU)

    def open_device(self) -> CudaDevice | HostDevice:
        """Return the GPU, or the host if the CPU is used instead."""
        load_libraries(self.provider)
        return HostDevice() if self.stand_in else open_gpu(0)

    def load(self) -> tuple[Any, Artifact]:
        """Return the model and its metadata."""
        model = load_model(self.model)
        return model, parse_artifact(model, self.model)

    def image_sets(self) -> dict[str, list[ImageFile]]:
        """Return the images of each folder: name -> images; without any, draw some of each of `SIZES`."""
        if self.images:
            return {
                f"{number}: {Path(folder).name}": find_images(folder) for number, folder in enumerate(self.images, 1)
            }
        found = {}
        for height, width in SIZES:
            name = f"{width}x{height}"
            folder = Path(self.scratch) / name
            if not folder.is_dir():  # an earlier step may have drawn them
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a step that was stopped
                draw_scenes(partial, self.choose(96, 2), lambda: None, (height, width))
                partial.rename(folder)
            found[name] = find_images(folder)
        return found


def make_batch(size: int, input_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return (N, H, W, 3) random images; their content does not influence the rate."""
    pattern = np.random.default_rng(0).integers(0, 256, (4, *input_size, 3), np.uint8)
    return pattern[np.arange(size) % len(pattern)]


def measure_images_per_s(run: Callable[[int], float], images: int) -> float:
    """Return images/s, the best of two rounds after a warm-up.

    Parameters
    ----------
    run
        Processes `images` images the given number of times, and returns the seconds.
    """
    times = max(1, math.ceil(SECONDS / max(run(1), 1e-6)))
    return times * images / min(run(times) for _ in range(2))


def run_parts(parts: Iterator[Part], output: Path) -> None:
    """Run the parts of a step and write their values to `output` after each: name -> values."""
    found: dict[str, Values] = {}
    for name, work in parts:
        click.echo(f"== {name}")
        try:
            found[name] = work()
        except NotRun as reason:
            found[name] = {"not_run": str(reason)}
        except FAULTS as error:
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found[name] = {"error": f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"}
        with replacing(output, sync=False) as partial:
            partial.write_text(json.dumps(found, indent=2), encoding="utf-8")
