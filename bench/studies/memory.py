"""Whether memory stays flat: the resident memory of a run after so many images.

    python -m cloudrt.bench.studies.memory IMAGES --model MODEL --count 5000 -o FILE.json

The images are read again and again, in order, until there were `count`; rows go to a journalled submission.
"""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from cloudrt.bench.machine import machine, versions

from cloudrt.images.image import ImageFile, find_images
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.system.statistics import memory, peak_memory

EVERY = 500


def watch(segmenter: Segmenter, files: list[ImageFile], count: int) -> dict[str, Any]:
    """Return MB after each `EVERY` images, and the peak."""
    resident: dict[str, float | None] = {}
    with TemporaryDirectory() as folder, open_submission(Path(folder) / "s.csv", segmenter.labels) as submission:
        for number, result in enumerate(segmenter.predict(islice(cycle(files), count)), 1):
            submission.add(result.image, result.rle, result.error, result.batch, result.batch_size)
            if number % EVERY == 0:
                resident[str(number)] = memory()
    return {"images": count, "distinct_images": len(files), "resident_mb": resident, "peak_mb": peak_memory()}


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True))
@click.option("--count", type=click.IntRange(EVERY), default=5000, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(images: Path, model: Path | None, count: int, output: Path | None) -> None:
    """Segment IMAGES until there were COUNT, and say what memory was held on the way."""
    with Segmenter(model) as segmenter:
        how = segmenter.plan.describe()
        found = watch(segmenter, find_images(images), count)
    text = json.dumps({"machine": machine(), "versions": versions(), "plan": how, **found}, indent=2)
    click.echo(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
