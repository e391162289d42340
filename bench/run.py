"""The bench: cloudrt beside the notebook's way, on the same images in the same run.

    images -> both ways opened -> answers compared -> stages timed in turns -> Bench -> table, bench.json

No time counts before the answers agree: on our probability maps, the notebook's post-processing must give our RLE texts
byte for byte. End to end the two ways decode and resize differently, so there the Dice between them is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cloudrt.errors import DataError
from cloudrt.files import replacing
from cloudrt.images import Image, ImageFile, load_image
from cloudrt.pipeline import Segmenter
from cloudrt.postprocess import apply_rules
from cloudrt.submission import open_submission

from . import notebook, postprocess
from .agreement import Agreement, Maps, compare_rows, compare_submissions
from .machine import machine, peak_rss_mb, versions
from .pictures import Progress, open_images
from .search import SearchTime, label_maps, measure_search
from .stages import Measured, Stage, measure, passes
from .startup import measure_startup

SCHEMA = 2

PARTS = ("stages", "post-process", "search", "start-up")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Parameters
    ----------
    model
        The artifact; ./model.onnx, else the shipped one, where it is None.
    data
        A folder of images; made-up scenes where it is None.
    images
        At most so many; 0 is 12 or more, so that they fill whole batches.
    provider, batch_size, threads
        Those of `cloudrt.Segmenter`; threads other than 0 hold for the notebook's way too.
    checkpoint
        The best.pth that the artifact was exported from: the notebook's way runs it in PyTorch.
    repeat
        Passes of each way that count.
    only
        Which of `PARTS` to measure; all where there are none.
    """

    model: Path | None = None
    data: Path | None = None
    images: int = 0
    provider: str = "auto"
    batch_size: int = 0
    threads: int = 0
    checkpoint: Path | None = None
    repeat: int = 5
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images < 0 or self.repeat < 1:
            raise DataError(f"at least one image and one repetition, found {self.images} and {self.repeat}")

    def command(self) -> list[str]:
        """Return the command line of these options; folders, which may be named after their user, as DIR."""
        words = ["cloudrt-bench", *([self.model.name] if self.model else []), *(["--data", "DIR"] if self.data else [])]
        words += ["--provider", self.provider, "--repeat", str(self.repeat)]
        words += ["--images", str(self.images)] if self.images else []
        words += ["--batch-size", str(self.batch_size)] if self.batch_size else []
        words += ["--threads", str(self.threads)] if self.threads else []
        words += [word for part in self.only for word in ("--only", part)]
        return words + (["--checkpoint", self.checkpoint.name] if self.checkpoint else [])


@dataclass(frozen=True)
class Bench:
    """What one run found.

    Parameters
    ----------
    options
        What was asked for.
    model
        The artifact and how it ran.
    images
        How many there were, of what size, and where they came from.
    peer
        The network of the notebook's way.
    skipped
        Peers that were not measured: name -> why.
    stages, agreement, peak_rss_mb
        The figures of decode, infer, post-process and the whole; memory is that of the process, both ways together.
    postprocess, rle
        Post-processing, and RLE alone, beside peers on one thread.
    search
        The exact search beside the nested loops.
    startup
        What a new process waits for.
    """

    options: Options
    model: dict[str, Any]
    images: dict[str, Any]
    peer: str
    skipped: dict[str, str]
    stages: list[Measured]
    agreement: Agreement
    peak_rss_mb: float | None
    postprocess: list[postprocess.Measured]
    rle: dict[str, Any]
    search: SearchTime | None
    startup: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "machine": machine(),
            "versions": versions(),
            "command": self.options.command(),
            "model": self.model,
            "images": self.images,
            "notebook": self.peer,
            "skipped": self.skipped,
            "stages": [stage.to_dict() for stage in self.stages],
            "agreement": vars(self.agreement),
            "peak_rss_mb": self.peak_rss_mb,
            "postprocess": [measured.to_dict() for measured in self.postprocess],
            "rle": self.rle,
            "search": self.search.to_dict() if self.search else None,
            "startup": self.startup,
        }


def bench(options: Options, output: Path, progress: Progress) -> Bench:
    """Measure, and write `output`, a JSON file, whole or not at all.

    Raises
    ------
    AgreementError
        The notebook's post-processing gave another text than ours on the same map.
    CloudrtError
        The model, the provider or the images cannot be used.
    """
    with (
        TemporaryDirectory(prefix="cloudrt-bench-") as scratch,
        Segmenter(options.model, options.provider, batch_size=options.batch_size, threads=options.threads) as segmenter,
    ):
        folder = Path(scratch)
        peer, skipped = open_peer(options, segmenter)
        files, pictures = open_images(options.data, options.images, segmenter, folder, progress)
        loaded = [load_image(file.path, segmenter.artifact.input_size) for file in files]
        maps = infer(segmenter, loaded)
        agreement = compare_rows(segmenter, files, maps)
        parts = options.only or PARTS
        measured: list[Measured] = []
        if "stages" in parts:
            stages = list_stages(segmenter, peer, files, loaded, maps, folder)
            with progress("Measuring stages", passes(stages, options.repeat)) as advance:
                measured = measure(stages, len(files), options.repeat, advance)
            agreement = compare_submissions(agreement, segmenter.labels, folder)
        alone, rle = _measure_postprocess(segmenter, maps, progress) if "post-process" in parts else ([], {})
        search = None
        if "search" in parts:
            with progress("Measuring the search", 4) as advance:
                labelled = label_maps([levels for levels, _ in maps], segmenter.artifact.rules)
                search = measure_search(labelled, advance)
        startup = measure_startup() if "start-up" in parts else None
        done = Bench(
            options, _describe(segmenter), pictures, peer.name, skipped, measured, agreement, peak_rss_mb(),
            alone, rle, search, startup,
        )  # fmt: skip
    with replacing(output) as partial:
        partial.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
    return done


def _measure_postprocess(
    segmenter: Segmenter, maps: Maps, progress: Progress
) -> tuple[list[postprocess.Measured], dict[str, Any]]:
    rules = segmenter.artifact.rules
    sets = {kind: postprocess.draw_maps(kind) for kind in postprocess.KINDS}
    sets["network"] = [
        postprocess.Map(one, rule.threshold, rule.min_area)
        for levels, _ in maps[:8]
        for one, rule in zip(levels, rules, strict=True)
    ]
    with progress("Measuring post-processing", 3 * len(sets)) as advance:
        measured = postprocess.measure(sets, advance)
        rle = {}
        for kind, each in sets.items():
            rle[kind] = postprocess.measure_rle(each)
            advance()
    return measured, rle


def open_peer(options: Options, segmenter: Segmenter) -> tuple[notebook.Network, dict[str, str]]:
    """Return the network of the notebook's way, and the peers that are left out: name -> why."""
    reason = "no --checkpoint was given"
    if options.checkpoint:
        try:
            return notebook.TorchNetwork(options.checkpoint, segmenter.artifact, options.threads), {}
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed: pip install 'cloudrt[train]'"
    return notebook.OnnxNetwork(segmenter.model, options.threads), {notebook.TorchNetwork.name: reason}


def list_stages(
    segmenter: Segmenter,
    peer: notebook.Network,
    files: Sequence[ImageFile],
    loaded: Sequence[Image],
    maps: Maps,
    folder: Path,
) -> list[Stage]:
    """Return the stages, each way with its own functions, on the form that the stage before it produces."""
    size, labels, rules = segmenter.artifact.input_size, segmenter.labels, segmenter.artifact.rules
    theirs = [peer(image) for image in loaded]

    def ours_end_to_end() -> None:
        with open_submission(folder / "ours.csv", labels) as submission:
            for result in segmenter.predict(files):
                submission.add(result.image, result.rle, result.error)

    return [
        Stage(
            "decode",
            lambda: [load_image(file.path, size) for file in files],
            lambda: [notebook.read_image(file.path, size) for file in files],
        ),
        Stage("infer", lambda: infer(segmenter, loaded), lambda: [peer(image) for image in loaded]),
        Stage(
            "post-process",
            lambda: [apply_rules(levels, rules, presence) for levels, presence in maps],
            lambda: [notebook.rle_rows(probability, rules, presence) for probability, presence in theirs],
        ),
        Stage(
            "end to end",
            ours_end_to_end,
            lambda: notebook.write_submission(folder / "notebook.csv", files, size, peer, labels, rules),
        ),
    ]


def infer(segmenter: Segmenter, images: Sequence[Image]) -> Maps:
    """Run the engine on batches, the last one padded, as the pipeline does."""
    maps: Maps = []
    for begin in range(0, len(images), segmenter.batch_size):
        chosen = images[begin : begin + segmenter.batch_size]
        probability, presence = segmenter.pool.run(chosen)
        maps += [(probability[i], None if presence is None else presence[i]) for i in range(len(chosen))]
    return maps


def _describe(segmenter: Segmenter) -> dict[str, Any]:
    artifact = segmenter.artifact
    return {
        "file": segmenter.model.name,
        "sha256": hashlib.sha256(segmenter.model.read_bytes()).hexdigest(),
        "architecture": artifact.architecture,
        "encoder": artifact.encoder,
        "precision": artifact.precision,
        "input_size": list(artifact.input_size),
        "rules": [rule.to_dict() for rule in artifact.rules],
        "provider": segmenter.plan.provider,
        "passed_over": segmenter.plan.passed_over,
        "batch_size": segmenter.batch_size,
        "streams": segmenter.plan.streams,
        "compute": segmenter.plan.compute,
        "threads": segmenter.threads,
    }
