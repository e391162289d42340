"""The bench: cloudrt beside the notebook's way, on the same images in the same run.

    images -> both ways opened -> answers compared -> stages timed in turns -> Bench -> table, bench.json

No time counts before the answers agree: on our probability maps, the notebook's post-processing must give our RLE texts
byte for byte. End to end the two ways decode and resize differently, so there the Dice between them is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cloudrt.files import replacing
from cloudrt.images import Image, ImageFile, load_image
from cloudrt.pipeline import Segmenter
from cloudrt.postprocess import apply_rules
from cloudrt.submission import open_submission

from . import notebook, pipeline, postprocess
from .agreement import Maps, compare_rows, compare_submissions
from .figures import PARTS, Bench, Options
from .machine import peak_rss_mb
from .pictures import Progress, open_images
from .pipeline import PipelineTime
from .search import label_maps, measure_search
from .stages import Measured, Stage, measure, passes
from .startup import measure_startup


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
        whole = None
        if "pipeline" in parts:
            whole = _measure_pipeline(options, segmenter, peer, files, loaded, maps, folder, progress)
        alone, rle = _measure_postprocess(segmenter, maps, progress) if "post-process" in parts else ([], {})
        search = None
        if "search" in parts:
            with progress("Measuring the search", 4) as advance:
                labelled = label_maps([levels for levels, _ in maps], segmenter.artifact.rules)
                search = measure_search(labelled, advance)
        startup = measure_startup() if "start-up" in parts else None
        done = Bench(
            options, _describe(segmenter), pictures, peer.name, skipped, measured, whole, agreement, peak_rss_mb(),
            alone, rle, search, startup,
        )  # fmt: skip
    with replacing(output) as partial:
        partial.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
    return done


def _measure_pipeline(
    options: Options, segmenter: Segmenter, peer: notebook.Network, files: Sequence[ImageFile],
    loaded: Sequence[Image], maps: Maps, folder: Path, progress: Progress,
) -> PipelineTime:  # fmt: skip
    size, labels, rules = segmenter.artifact.input_size, segmenter.labels, segmenter.artifact.rules
    plain = notebook.OnnxNetwork(options.baseline or segmenter.model, options.threads)
    others = {
        f"plain {plain.name}": lambda: pipeline.write_plain(folder / "plain.csv", files, size, plain, labels, rules),
        f"the notebook's way, {peer.name}": lambda: notebook.write_submission(
            folder / "notebook.csv", files, size, peer, labels, rules
        ),
    }
    with progress("Measuring the pipeline", pipeline.rounds(others, options.repeat)) as advance:
        return pipeline.measure_pipeline(
            segmenter, files, loaded, maps, lambda: write_ours(segmenter, files, folder / "ours.csv"), others,
            options.repeat, advance,
        )  # fmt: skip


def write_ours(segmenter: Segmenter, files: Sequence[ImageFile], path: Path) -> None:
    """Write the submission of `files`, journal and all."""
    with open_submission(path, segmenter.labels) as submission:
        for result in segmenter.predict(files):
            submission.add(result.image, result.rle, result.error)


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
            lambda: write_ours(segmenter, files, folder / "ours.csv"),
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
        "plan": segmenter.plan.describe(),
        "passed_over": segmenter.plan.passed_over,
        "batch_size": segmenter.batch_size,
        "streams": segmenter.plan.streams,
        "compute": segmenter.plan.compute,
        "threads": segmenter.threads,
    }
