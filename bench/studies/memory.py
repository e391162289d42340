"""Resident memory over a long run.

    python -m cloudrt.bench.studies.memory IMAGES --model MODEL --count 5000 -o FILE.json

The images are repeated in order up to `count`; the rows go to a submission with its journal.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from cloudrt.bench.workload import repeat_images

from cloudrt.images.image import ImageFile, find_images
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import write_submission
from cloudrt.inference.task import InferTask
from cloudrt.system.statistics import memory, peak_memory

from .results import save

EVERY = 500


def watch(segmenter: Segmenter, files: list[ImageFile], count: int) -> dict[str, Any]:
    """Return the resident memory in MB after each `EVERY` images, and the peak."""
    resident: dict[str, float | None] = {}
    done = 0

    def advance(**_: Any) -> None:
        nonlocal done
        done += 1
        if done % EVERY == 0:
            resident[str(done)] = memory()

    with TemporaryDirectory() as folder:
        task = InferTask((), Path(folder) / "s.csv")
        write_submission(segmenter, repeat_images(files, count), task, progress=lambda *_: nullcontext(advance))
    return {"images": count, "distinct_images": len(files), "resident_mb": resident, "peak_mb": peak_memory()}


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True))
@click.option("--count", type=click.IntRange(EVERY), default=5000, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(images: Path, model: Path | None, count: int, output: Path | None) -> None:
    """Segment COUNT images, IMAGES repeated as needed, and report the memory in use."""
    with Segmenter(model) as segmenter:
        plan = segmenter.plan.describe()
        found = watch(segmenter, find_images(images), count)
    save({"plan": plan, **found}, output)


if __name__ == "__main__":
    main()
