"""Run a benchmark: cloudrt and its peers, such as the notebook's way, on the same images in the same run.

    images -> open model and peers -> compare results -> time the parts -> BenchResult -> table, bench.json

Nothing is timed before the results agree: on our probability maps, the notebook's post-processing must give our RLE
texts byte for byte. From files to submission, the two decode and resize differently, so the Dice between the
submissions is reported instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import write_submission
from cloudrt.inference.task import InferTask
from cloudrt.masks.postprocess import apply_rules
from cloudrt.system.files import replacing, sha256
from cloudrt.system.progress import ProgressBar
from cloudrt.system.statistics import peak_memory

from . import notebook, peers, pipeline, postprocess
from .accuracy import check_models, measure_accuracy, read_truth
from .accuracy import rounds as accuracy_rounds
from .agreement import compare_rows, compare_submissions, open_networks
from .ceilings import measure_ceilings
from .figures import BenchResult
from .host import measure_host
from .host import passes as passes_of_host
from .latency import REQUESTS, measure_latency
from .networks import list_openers, open_peer
from .options import BenchOptions
from .pipeline import PipelineTime
from .scaling import COUNTS, measure_scaling
from .search import label_maps, measure_search
from .stages import Stage, StageTime, measure, passes
from .startup import measure_startup
from .throughput import measure_throughput
from .workload import Workload, infer, load, make_workload, open_images

ROUNDS = 2
"""Number of times that accuracy runs each model in each provider, if the images make a single chunk."""


def bench(options: BenchOptions, output: Path, progress: ProgressBar) -> BenchResult:
    """Run the benchmark and write `output`, a JSON file, atomically.

    Raises
    ------
    AgreementError
        A peer gave other results than cloudrt.
    CloudrtError
        A model, the provider, the images, the truth or the output cannot be used, or the command that the start-up part
        times failed.
    """
    check_models([*options.models, *([options.baseline] if options.baseline else [])])
    with (
        replacing(output) as partial,
        TemporaryDirectory(prefix="cloudrt-bench-") as scratch,
        Segmenter(options.model, options.run) as segmenter,
    ):
        partial.touch()
        folder = Path(scratch)
        files, images = open_images(options.data, options.max_images, segmenter, folder, progress)
        truth = read_truth(options.truth, files, segmenter.labels) if options.truth else None
        work = make_workload(segmenter, files, folder)
        peer, skipped = open_peer(options, work)
        found = BenchResult(options, _describe(segmenter), images, peer.name, compare_rows(work), skipped)
        parts = options.parts
        _measure_pipeline_and_stages(found, work, peer, progress)
        if "throughput" in parts:
            found.throughput = measure_throughput(work, progress)
        if "accuracy" in parts:
            models = options.models or (segmenter.model,)
            with progress("Measuring accuracy", accuracy_rounds(models, files, ROUNDS)) as advance:
                found.accuracy = measure_accuracy(models, files, truth, folder, ROUNDS, advance)
        if "post-process" in parts:
            _measure_postprocess(found, work, progress)
        if "search" in parts:
            with progress("Measuring the search", 4) as advance:
                labelled = label_maps([levels for levels, _ in work.maps], work.rules)
                found.search = measure_search(labelled, advance)
        if "latency" in parts:
            with progress("Measuring latency", REQUESTS) as advance:
                found.latency = measure_latency(work, advance)
        if "start-up" in parts:
            with progress("Measuring start-up", 1) as advance:
                found.startup = measure_startup(segmenter.model, files[0].path, folder)
                advance()
        if "scaling" in parts:
            with progress("Measuring scaling", COUNTS[0] + sum(COUNTS)) as advance:
                found.scaling = measure_scaling(work, advance)
        if "host" in parts:
            with progress("Measuring the host", passes_of_host(options.repeat)) as advance:
                found.host = measure_host(work, options.repeat, advance)
        found.peak_rss_mb = peak_memory()
        partial.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return found


def _measure_pipeline_and_stages(
    found: BenchResult, work: Workload, peer: notebook.Network, progress: ProgressBar
) -> None:
    parts, repeat = found.options.parts, found.options.repeat
    if "stages" in parts:
        stages = list_stages(work, peer)
        if "pipeline" in parts:
            stages = stages[:-1]  # the pipeline part measures the whole pipeline and all peers
        with progress("Measuring stages", passes(stages, repeat)) as advance:
            found.stages = measure(stages, len(work.files), repeat, advance)
    if "pipeline" in parts:
        whole = _measure_pipeline(found, work, peer, progress)
        found.pipeline = whole
        found.ceilings = measure_ceilings(work, whole)
        if found.stages:
            found.stages.append(StageTime("end to end", whole.whole, whole.peers[_notebooks_way(peer)]))
    if found.stages or found.pipeline:
        found.agreement = compare_submissions(found.agreement, work.labels, work.folder)


def _measure_pipeline(
    found: BenchResult, work: Workload, peer: notebook.Network, progress: ProgressBar
) -> PipelineTime:
    plain, skipped = open_networks(list_openers(found.options, work), work)
    found.skipped |= skipped

    def write(network: notebook.Network, name: str, make_rows: notebook.RowMaker) -> Callable[[], None]:
        return lambda: notebook.write_submission(work.folder / name, work.files, network, work.artifact, make_rows)

    others = {f"plain {name}": write(network, "plain.csv", peers.opencv_rows) for name, network in plain.items()}
    others[_notebooks_way(peer)] = write(peer, "notebook.csv", notebook.rle_rows)
    repeat = found.options.repeat
    with progress("Measuring the pipeline", pipeline.rounds(others, repeat)) as advance:
        return pipeline.measure_pipeline(work, lambda: write_ours(work), others, repeat, advance)


def _notebooks_way(peer: notebook.Network) -> str:
    """Return the name of the notebook's way among the peers of the pipeline."""
    return f"the notebook's way, {peer.name}"


def write_ours(work: Workload) -> None:
    """Write the submission as `cloudrt.infer` does, journal included."""
    write_submission(work.segmenter, work.files, InferTask((), work.folder / "ours.csv"))


def _measure_postprocess(found: BenchResult, work: Workload, progress: ProgressBar) -> None:
    sets = {kind: postprocess.draw_maps(kind) for kind in postprocess.KINDS}
    sets["network"] = [
        postprocess.Map(one, rule.threshold, rule.min_area)
        for levels, _ in work.maps[:4]
        for one, rule in zip(levels, work.rules, strict=True)
    ]
    with progress("Measuring post-processing", 3 * len(sets)) as advance:
        found.postprocess = postprocess.measure(sets, advance)
        for kind, maps in sets.items():
            found.rle[kind] = postprocess.measure_rle(maps)
            advance()
    found.skipped |= peers.missing()


def list_stages(work: Workload, peer: notebook.Network) -> list[Stage]:
    """Return the stages; cloudrt and the notebook each process the output of their own previous stage."""
    size, rules = work.artifact.input_size, work.rules
    theirs = [peer(image) for image in work.loaded]
    return [
        Stage(
            "decode",
            lambda: [load(work.segmenter, file) for file in work.files],
            lambda: [notebook.read_image(file.path, size) for file in work.files],
        ),
        Stage("infer", lambda: infer(work.segmenter, work.loaded), lambda: [peer(image) for image in work.loaded]),
        Stage(
            "post-process",
            lambda: [apply_rules(levels, rules, presence) for levels, presence in work.maps],
            lambda: [notebook.rle_rows(probability, rules, presence) for probability, presence in theirs],
        ),
        Stage(
            "end to end",
            lambda: write_ours(work),
            lambda: notebook.write_submission(work.folder / "notebook.csv", work.files, peer, work.artifact),
        ),
    ]


def _describe(segmenter: Segmenter) -> dict[str, Any]:
    artifact, plan = segmenter.artifact, segmenter.plan
    return {
        "file": segmenter.model.name,
        "sha256": sha256(segmenter.model),
        "architecture": artifact.architecture,
        "encoder": artifact.encoder,
        "precision": artifact.precision,
        "input_size": list(artifact.input_size),
        "rules": [rule.to_dict() for rule in artifact.rules],
        "provider": plan.provider,
        "plan": plan.describe(),
        "passed_over": plan.passed_over,
        "batch_size": segmenter.batch_size,
        "streams": plan.streams,
        "compute": plan.compute_precision,
        "threads": segmenter.threads,
    }
