"""A complete run of inference, from inputs to outputs; the library function behind `cloudrt-infer`.

    inputs --list--> images --Segmenter.predict--> results --> journal --> submission, failures, report
                                                       `--> masks, overlays, probabilities, statistics

`infer` lists the images, checks the outputs, opens the model, and segments the images that the resumed run, if any, did
not finish. Messages for the user are logged to children of the logger `cloudrt`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from cloudrt.arguments import check_callable, check_path, check_type
from cloudrt.engines.trial import COMPARED
from cloudrt.errors import ProviderError
from cloudrt.geo.tiles import MORE_PIXELS
from cloudrt.geo.tiling import check_tiles
from cloudrt.images.image import ImageFile
from cloudrt.images.inputs import digest_keys, list_inputs, load_sample
from cloudrt.inference.identity import Identity
from cloudrt.inference.model_source import describe_model, require_rules
from cloudrt.inference.paint import paint
from cloudrt.inference.panorama_checks import Check, panorama_checks
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.inference.submission import Submission, open_submission, read_recorded
from cloudrt.inference.task import InferSettings, InferTask, RunSummary
from cloudrt.options import RunOptions, RunSettings
from cloudrt.search.probabilities import write_probabilities
from cloudrt.system.files import replacing
from cloudrt.system.overlap import overlap
from cloudrt.system.progress import ProgressBar, no_progress
from cloudrt.system.suggest import check_name

logger = logging.getLogger(__name__)


def infer(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path = "submission.csv",
    model: str | Path | None = None,
    *,
    progress: ProgressBar = no_progress,
    **settings: Unpack[InferSettings],
) -> RunSummary:
    """Segment images and write the submission, as `cloudrt-infer` does.

    Parameters
    ----------
    inputs
        One or several folders, images, glob patterns, or text files that list images.
    output
        Path of the submission: .csv, .parquet, .json (COCO), .geojson, .geoparquet or .zarr.
    model
        Path of the artifact. None uses ./model.onnx if it exists, else the model that ships with the package.
    progress
        Opens a progress bar; see `ProgressBar`.
    **settings
        Fields of `InferTask` and of `cloudrt.RunOptions`.

    Returns
    -------
    RunSummary
        Counts, duration and paths. Failed images do not raise an exception; `RunSummary.failed` counts them.

    Raises
    ------
    CloudrtError
        The run cannot start (wrong options, missing files, a provider that cannot run here), or the provider fails
        during the run.
    ModuleNotFoundError, OSError
        A package that the output format needs is not installed; an output cannot be written.

    Examples
    --------
    >>> summary = cloudrt.infer("test_images", "submission.csv", provider="cpu", report=True)  # doctest: +SKIP
    """
    for name in settings:
        check_name("option", name, tuple(InferSettings.__annotations__))
    ours: dict[str, Any] = {name: value for name, value in settings.items() if name in _TASK_FIELDS}
    for name in ("sample", "stats", "masks", "overlays", "save_probabilities"):
        ours |= {name: check_path(name, ours[name])} if ours.get(name) is not None else {}
    check_type("inputs", inputs, (str, Path, Sequence, Set, Iterator), "a path or several")
    check_callable("progress", progress)
    run: Any = {name: value for name, value in settings.items() if name not in ours}
    task = InferTask(
        inputs=(inputs,) if isinstance(inputs, str | Path) else tuple(inputs),
        output=check_path("output", output),
        model=check_path("model", model) if model is not None else None,
        run=RunOptions().changed(**run),
        **ours,
    )
    return run_task(task, progress)


_TASK_FIELDS = frozenset(InferSettings.__annotations__) - frozenset(RunSettings.__annotations__)


def run_task(task: InferTask, progress: ProgressBar = no_progress, *, resumable: bool = True) -> RunSummary:
    """Run a task; see `infer`. A run that is not `resumable` leaves no journal if it is interrupted."""
    model, artifact = describe_model(task.model, task.run)
    require_rules(artifact, model)
    if task.tiling is not None:
        check_tiles(artifact, task.tiling)
    files = list_inputs(task.inputs, task.sample, artifact.labels)
    recorded = read_recorded(task.paths) if task.resume else None
    begun = task.paths.journal.is_file()
    task.require_packages(file.path.name for file in files)
    if begun or not recorded:
        task.check(files, begun=begun)
    checks = panorama_checks(task, artifact.labels.classes)
    plan = recorded.plan() if recorded else None
    sample = partial(load_sample, files, artifact.input_size, COMPARED, task.run.max_pixels)
    with Segmenter(
        model,
        task.run,
        plan=plan if plan and plan.satisfies(task.run) else None,
        samples=sample if len(files) >= COMPARED else None,
    ) as segmenter:
        _announce(segmenter)
        identity = replace(task.complete(segmenter.identity()), images=len(files), inputs=digest_keys(files))
        if recorded and not begun:
            recorded.require_same(identity, str(task.output))
            logger.info("%s: already finished, nothing to do", task.output)
            return RunSummary(
                output=task.output,
                images=len(files),
                failed=0,
                rows_with_mask=0,
                resumed=len(files),
                seconds=0.0,
                plan=segmenter.plan,
                already_finished=True,
            )
        began = time.perf_counter()
        try:
            done = write_submission(segmenter, files, task, identity if resumable else None, progress, checks)
        except (KeyboardInterrupt, OSError, ProviderError):
            if task.paths.journal.exists():
                logger.warning(
                    "%s contains the finished images; `resume=True` continues from there", task.paths.journal
                )
            raise
        seconds = time.perf_counter() - began
        if task.stats:
            _write_stats(task.stats, segmenter, done, identity)
        return RunSummary(
            output=task.output,
            images=done.images,
            failed=done.failed,
            rows_with_mask=done.rows_with_mask,
            resumed=done.resumed,
            seconds=seconds,
            plan=segmenter.plan,
            failures=task.paths.failures if done.failed else None,
            report=task.paths.report if task.report else None,
            first_error=done.first_error,
        )


def write_submission(
    segmenter: Segmenter,
    files: Sequence[ImageFile],
    task: InferTask,
    identity: Identity | None = None,
    progress: ProgressBar = no_progress,
    checks: Sequence[Check] = (),
) -> Submission:
    """Segment images and write the outputs of a task.

    Parameters
    ----------
    segmenter
        The open model.
    files
        The images, in the order of their rows.
    task
        The outputs to write.
    identity
        Identity of the run; a run without one cannot be resumed.
    progress
        Opens a progress bar.
    checks
        Checks that each panorama must pass; see `panorama_checks`.
    """
    labels, began = segmenter.labels, time.perf_counter()
    page = maps = None
    if task.report:
        from cloudrt.reports.submission_page import Report

        limit = segmenter.options.max_pixels * (MORE_PIXELS if task.tiling else 1)
        page = Report(labels, task.report_images, limit)
        if task.tiling:
            from cloudrt.geo.frequency_maps import FrequencyMaps

            maps = FrequencyMaps(labels.classes)
    keys = [file.key for file in files]
    with ExitStack() as stack:
        submission = stack.enter_context(
            open_submission(
                task.output,
                labels,
                identity,
                keys=keys,
                resume=task.resume,
                form=task.format,
                options=task.format_options(),
                check=task.check_existing if identity else None,
            )
        )
        if task.resume:
            _resume(segmenter, submission, task)
        painters = stack.enter_context(ThreadPoolExecutor(segmenter.threads, "paint"))

        def painted(results: Iterable[tuple[ImageFile, Result]]) -> Iterable[tuple[ImageFile, Result]]:
            if not (task.masks or task.overlays):
                return results
            return overlap(painters, partial(paint, segmenter, task), results, 2 * segmenter.threads)

        def show(file: ImageFile, result: Result) -> None:
            if page:
                page.add(result.image, file.path, None if result.error else result.rle, result.error, result.labels)
            if maps and result.place and result.error is None:
                maps.add(result.rle, result.place)

        for file, result in painted(submission.finished(files)):
            show(file, result)
            if result.place and result.error is None:
                for check in checks:
                    check.check(result.image, result.place)
        keep = None
        if task.save_probabilities:
            keep = stack.enter_context(write_probabilities(task.save_probabilities, labels)).keep
        left = files[submission.resumed :]
        advance = stack.enter_context(progress("Segmenting", len(left)))
        predicted = (
            segmenter.predict(left, keep)
            if task.tiling is None
            else predict_panoramas(segmenter, left, task.tiling, checks)
        )
        # Close it explicitly: the garbage collector could do so on a pipeline thread, which would wait for itself.
        stack.enter_context(closing(predicted))
        for file, result in painted(zip(left, predicted, strict=True)):
            submission.add(result.image, result.rle, result.error, result.batch, result.batch_size, place=result.place)
            show(file, result)
            advance(failed=submission.failed, bottleneck=segmenter.stats.limiting())
        # Write the report before the rows: a run with rows counts as finished. If the report came last and the run were
        # killed before it, `resume` would not write it.
        if page:
            facts = _facts(segmenter, submission, time.perf_counter() - began)
            page.write(task.paths.report, facts, maps.draw() if maps else None)
    return submission


def _announce(segmenter: Segmenter) -> None:
    artifact, plan = segmenter.artifact, segmenter.plan
    height, width = artifact.input_size
    logger.info(
        "%s: %s with %s, %s, %dx%d; %s, %d threads",
        *(segmenter.model, artifact.architecture, artifact.encoder, artifact.precision, width, height),
        *(plan.describe(), segmenter.threads),
    )


def _resume(segmenter: Segmenter, submission: Submission, task: InferTask) -> None:
    if submission.resumed:
        logger.info("%s: %d images are finished, continuing", task.paths.journal, submission.resumed)
    else:
        logger.info("Nothing to resume: starting with the first image")
    segmenter.shrink(submission.journal.size)


def _write_stats(path: Path, segmenter: Segmenter, done: Submission, identity: Identity) -> None:
    counts = {"images": done.images, "resumed": done.resumed, "failed": done.failed, "masks": done.rows_with_mask}
    values = {"identity": identity.to_dict()} | counts | segmenter.stats.to_dict()
    with replacing(path) as partial_path:
        partial_path.write_text(json.dumps(values, indent=2) + "\n")


def _facts(segmenter: Segmenter, submission: Submission, seconds: float) -> dict[str, str]:
    artifact = segmenter.artifact
    height, width = artifact.input_size
    return {
        "Model": segmenter.model.name,
        "Network": f"{artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}",
        "Held-out Dice": f"{artifact.validation_dice:.4f}",
        "Provider": segmenter.plan.describe().removeprefix("provider "),
        "Images per second": f"{(submission.images - submission.resumed) / seconds:.1f}",
    }
