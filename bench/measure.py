"""The bench: cloudrt beside the notebook's way, on the same images in the same run.

    images -> both ways opened -> answers compared -> stages timed in turns -> Bench -> table, bench.json

No time counts before the answers agree: on our probability maps, the notebook's post-processing must give our RLE texts
byte for byte. End to end the two ways decode and resize differently, so there the Dice between them is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cloudrt.images.image import Image, ImageFile, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.masks.postprocess import apply_rules
from cloudrt.system.files import replacing
from cloudrt.system.statistics import peak_memory

from . import networks, notebook, peers, pipeline, postprocess
from .accuracy import check_models, measure_accuracy, read_truth
from .accuracy import rounds as accuracy_rounds
from .agreement import Maps, compare_rows, compare_submissions
from .ceilings import measure_ceilings
from .figures import Bench, Options
from .latency import REQUESTS, measure_latency
from .pictures import Progress, open_images
from .pipeline import PipelineTime
from .scaling import COUNTS, measure_scaling
from .search import label_maps, measure_search
from .stages import Stage, StageTime, measure, passes
from .startup import measure_startup
from .throughput import measure_throughput

ROUNDS = 2
"""Of each model in each provider."""


def bench(options: Options, output: Path, progress: Progress) -> Bench:
    """Measure, and write `output`, a JSON file, whole or not at all.

    Raises
    ------
    AgreementError
        The notebook's post-processing gave another text than ours on the same map.
    CloudrtError
        A model, the provider, the images, the truth or the output cannot be used; said before anything is measured.
    """
    check_models([*options.models, *([options.baseline] if options.baseline else [])])
    with (
        replacing(output) as partial,
        TemporaryDirectory(prefix="cloudrt-bench-") as scratch,
        Segmenter(options.model, provider=options.provider, batch_size=options.batch_size, threads=options.threads) as segmenter,
    ):
        partial.touch()
        folder = Path(scratch)
        files, pictures = open_images(options.data, options.images, segmenter, folder, progress)
        truth = read_truth(options.truth, files, segmenter.labels) if options.truth else None
        loaded = [load_image(file.path, segmenter.artifact.input_size) for file in files]
        maps = infer(segmenter, loaded)
        peer, skipped = open_peer(options, segmenter, loaded, maps)
        setting = Setting(options, segmenter, peer, files, loaded, maps, folder, progress)
        agreement = compare_rows(segmenter, files, maps)
        parts = options.parts
        stages = _measure_stages(setting) if "stages" in parts else []
        whole = ceilings = None
        if "pipeline" in parts:
            whole, others = _measure_pipeline(setting)
            skipped |= others
            ceilings = measure_ceilings(segmenter, files, maps, whole, folder)
            if stages:
                stages.append(StageTime("end to end", whole.whole, whole.peers[_notebooks_way(peer)]))
        if stages:
            agreement = compare_submissions(agreement, segmenter.labels, folder)
        throughput = accuracy = search = latency = startup = scaling = None
        if "throughput" in parts:
            with progress("Measuring throughput", 12) as advance:
                throughput = measure_throughput(segmenter, loaded, advance)
        if "accuracy" in parts:
            models = options.models or (segmenter.model,)
            with progress("Measuring accuracy", accuracy_rounds(models, files, ROUNDS)) as advance:
                accuracy = measure_accuracy(models, files, truth, folder, ROUNDS, advance)
        alone, rle = _measure_postprocess(segmenter, maps, progress) if "post-process" in parts else ([], {})
        if alone:
            skipped |= peers.missing()
        if "search" in parts:
            with progress("Measuring the search", 4) as advance:
                labelled = label_maps([levels for levels, _ in maps], segmenter.artifact.rules)
                search = measure_search(labelled, advance)
        if "latency" in parts:
            with progress("Measuring latency", REQUESTS) as advance:
                latency = measure_latency(segmenter.model, segmenter.plan.provider, segmenter.threads, files, advance)
        if "start-up" in parts:
            with progress("Measuring start-up", 1) as advance:
                startup = measure_startup(segmenter.model, files[0].path, folder)
                advance()
        if "scaling" in parts:
            with progress("Measuring scaling", COUNTS[0] + sum(COUNTS)) as advance:
                scaling = measure_scaling(segmenter, files, folder, advance)
        done = Bench(
            options,
            _describe(segmenter),
            pictures,
            peer.name,
            skipped,
            stages,
            whole,
            agreement,
            peak_memory(),
            alone,
            rle,
            search,
            startup,
            ceilings,
            throughput,
            accuracy,
            latency,
            scaling,
        )
        partial.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
    return done


@dataclass(frozen=True)
class Setting:
    """What every part works with."""

    options: Options
    segmenter: Segmenter
    peer: notebook.Network
    files: Sequence[ImageFile]
    loaded: Sequence[Image]
    maps: Maps
    folder: Path
    progress: Progress


def _measure_stages(setting: Setting) -> list[StageTime]:
    stages = list_stages(setting.segmenter, setting.peer, setting.files, setting.loaded, setting.maps, setting.folder)
    if "pipeline" in setting.options.parts:
        stages = stages[:-1]  # the whole is measured there, beside all peers
    repeat = setting.options.repeat
    with setting.progress("Measuring stages", passes(stages, repeat)) as advance:
        return measure(stages, len(setting.files), repeat, advance)


def _measure_pipeline(setting: Setting) -> tuple[PipelineTime, dict[str, str]]:
    """Return the times, and the peers that are left out: name -> why."""
    segmenter, files, folder, options = setting.segmenter, setting.files, setting.folder, setting.options
    size, labels, rules = segmenter.artifact.input_size, segmenter.labels, segmenter.artifact.rules
    openers = list_openers(options, segmenter)
    plain, skipped = networks.open_networks(openers, setting.loaded, setting.maps, rules)

    def write(network: notebook.Network) -> Callable[[], None]:
        return lambda: pipeline.write_plain(folder / "plain.csv", files, size, network, labels, rules)

    others: dict[str, Callable[[], object]] = {f"plain {name}": write(network) for name, network in plain.items()}
    others[_notebooks_way(setting.peer)] = lambda: notebook.write_submission(
        folder / "notebook.csv", files, size, setting.peer, labels, rules
    )
    with setting.progress("Measuring the pipeline", pipeline.rounds(others, options.repeat)) as advance:
        times = pipeline.measure_pipeline(
            segmenter,
            files,
            setting.loaded,
            setting.maps,
            lambda: write_ours(segmenter, files, folder / "ours.csv"),
            others,
            options.repeat,
            advance,
        )
    return times, skipped


def _notebooks_way(peer: notebook.Network) -> str:
    """Return its name among the peers of the whole."""
    return f"the notebook's way, {peer.name}"


def list_openers(options: Options, segmenter: Segmenter) -> dict[str, Callable[[], notebook.Network]]:
    """Return the peers of the pipeline: name -> how each is opened."""
    model, threads, artifact = options.baseline or segmenter.model, options.threads, segmenter.artifact
    openers: dict[str, Callable[[], notebook.Network]] = {
        "ONNX Runtime": lambda: networks.OnnxNetwork(model, threads),
        "OpenVINO": lambda: networks.OpenvinoNetwork(model, threads),
    }
    checkpoint = options.checkpoint
    if checkpoint:
        device = "cuda" if segmenter.plan.provider in ("cuda", "tensorrt") else "cpu"
        openers |= {
            "PyTorch channels last": lambda: networks.TorchGraph(checkpoint, artifact, device, threads=threads),
            "PyTorch torch.compile": lambda: networks.TorchGraph(
                checkpoint, artifact, device, compiled=True, threads=threads
            ),
        }
    return openers


def write_ours(segmenter: Segmenter, files: Sequence[ImageFile], path: Path) -> None:
    """Write the submission of `files`, journal and all."""
    with open_submission(path, segmenter.labels) as submission:
        for result in segmenter.predict(files):
            submission.add(result.image, result.rle, result.error)


def _measure_postprocess(
    segmenter: Segmenter, maps: Maps, progress: Progress
) -> tuple[list[postprocess.PostprocessTime], dict[str, Any]]:
    rules = segmenter.artifact.rules
    sets = {kind: postprocess.draw_maps(kind) for kind in postprocess.KINDS}
    sets["network"] = [
        postprocess.Map(one, rule.threshold, rule.min_area)
        for levels, _ in maps[:4]
        for one, rule in zip(levels, rules, strict=True)
    ]
    with progress("Measuring post-processing", 3 * len(sets)) as advance:
        measured = postprocess.measure(sets, advance)
        rle = {}
        for kind, each in sets.items():
            rle[kind] = postprocess.measure_rle(each)
            advance()
    return measured, rle


def open_peer(
    options: Options, segmenter: Segmenter, loaded: Sequence[Image], maps: Maps
) -> tuple[notebook.Network, dict[str, str]]:
    """Return the network of the notebook's way, and the peers that are left out: name -> why.

    Raises
    ------
    ArtifactError
        The checkpoint is not that of the artifact.
    """
    title, reason = networks.TorchNetwork.name, "no --checkpoint was given"
    if options.checkpoint:
        try:
            peer = networks.TorchNetwork(options.checkpoint, segmenter.artifact, options.threads)
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed: pip install 'cloudrt[train]'"
        else:
            opened, skipped = networks.open_networks({title: lambda: peer}, loaded, maps, segmenter.artifact.rules)
            if opened:
                return peer, {}
            reason = skipped[title]
    return networks.OnnxNetwork(segmenter.model, options.threads), {title: reason}


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
    """Run the engine on batches, the last one padded, as many at a time as it has streams, as the pipeline does."""
    size = segmenter.batch_size
    batches = [images[begin : begin + size] for begin in range(0, len(images), size)]
    maps: Maps = []
    with ThreadPoolExecutor(segmenter.pool.slots) as streams:
        for chosen, (probability, presence) in zip(batches, streams.map(segmenter.pool.run, batches), strict=True):
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
