"""A whole run, from inputs to outputs: what `cloudrt-infer` does, from Python.

    inputs --list--> images --Segmenter.predict--> results --> journal --> submission, failures, report
                                                       `--> masks, overlays, probabilities, statistics

`infer` lists the images, decides what may be written, opens the model, and runs the images that an earlier run did not
finish. Messages for the user go to the `cloudrt` logger.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from cloudrt.engines.plan import Plan
from cloudrt.engines.trial import COMPARED
from cloudrt.errors import CloudrtError, DataError
from cloudrt.images.image import ImageFile
from cloudrt.images.inputs import check_keys, digest_keys, list_inputs, load_sample
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal import read_identity
from cloudrt.inference.outputs import FORMATS, SUFFIXES, write_masks, write_overlay
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.inference.submission import RunPaths, Submission, open_submission, read_run_record
from cloudrt.model.artifact import default_model, read_artifact
from cloudrt.model.inferred import Inferred
from cloudrt.options import RunOptions, RunSettings
from cloudrt.search.probabilities import ProbabilityWriter, write_probabilities
from cloudrt.system.files import replacing
from cloudrt.system.overlap import overlap
from cloudrt.system.paths import check_outputs
from cloudrt.system.suggest import check_name

logger = logging.getLogger(__name__)

Advance = Callable[..., object]
"""Called as images finish: `advance(n=1, **fields)`; the fields are shown beside the progress."""
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""`progress(description, total)` shows work in progress."""


@contextmanager
def no_progress(_description: str, _total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda *_, **__: None


@dataclass(frozen=True)
class InferTask:
    """What a run reads, how it runs and what it writes.

    Parameters
    ----------
    inputs
        Folders, images, patterns and lists; see `cloudrt.images.inputs.list_inputs`.
    output
        The submission; its suffix decides the format unless `format` is given. See `RunPaths` for the files beside it.
    model
        Path of the artifact; None takes ./model.onnx, else the model that ships.
    run
        How to run it.
    sample
        A sample_submission.csv: its images alone, in its order.
    format
        "csv", "parquet" or "coco"; "" follows the suffix.
    resume, overwrite
        Continue a run that was cut short; replace outputs that exist.
    report, report_images
        Whether to write an HTML report, and how many images it shows.
    stats, masks, overlays, save_probabilities
        Where to write statistics (JSON), masks (a folder of PNG), overlays (a folder of JPEG) and probabilities (.npz).

    Raises
    ------
    DataError
        Options that contradict each other.
    """

    inputs: tuple[str | Path, ...]
    output: Path = Path("submission.csv")
    model: Path | None = None
    run: RunOptions = field(default_factory=RunOptions)
    sample: Path | None = None
    format: str = ""
    resume: bool = False
    overwrite: bool = False
    report: bool = False
    report_images: int = 24
    stats: Path | None = None
    masks: Path | None = None
    overlays: Path | None = None
    save_probabilities: Path | None = None

    def __post_init__(self) -> None:
        if self.format:
            check_name("format", self.format, tuple(FORMATS))
        by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}.get(self.output.suffix.lower())
        if by_suffix is None or (self.format and self.format != by_suffix):
            known = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
            asked = f" and --format {self.format}" if self.format else ""
            raise DataError(f"--output {self.output}{asked}: the suffix decides the format: {known}")
        object.__setattr__(self, "format", by_suffix)
        if self.resume and self.overwrite:
            raise DataError("--resume continues a run, --overwrite starts over: give one of them")
        if self.resume and self.save_probabilities:
            raise DataError("--save-probabilities stores those of a whole run: it cannot be combined with --resume")
        if self.save_probabilities and self.save_probabilities.suffix != ".npz":
            raise DataError(f"--save-probabilities {self.save_probabilities}: the file name ends in .npz")

    @property
    def paths(self) -> RunPaths:
        """The output and the files beside it."""
        return RunPaths(self.output)

    def check(self, files: Sequence[ImageFile], *, begun: bool) -> None:
        """Refuse, before anything slow, outputs that would destroy something or cannot be written.

        Parameters
        ----------
        files
            The images.
        begun
            Whether there is an unfinished run, whose files `resume` replaces.

        Raises
        ------
        DataError
            See `check_outputs`; or a run that was cut short and is neither resumed nor overwritten.
        """
        paths = self.paths
        if paths.journal.is_file() and not (self.resume or self.overwrite):
            raise DataError(f"{paths.journal} belongs to a run that was cut short: --resume it, or --overwrite")
        named = {
            "--output": self.output,
            "the list of failures": paths.failures,
            "the report": paths.report if self.report else None,
            "the record of the run": paths.record,
        }
        written = {"--stats": self.stats, "--save-probabilities": self.save_probabilities}
        reads: dict[str, Path | None] = {"--model": self.model or default_model(), "--sample": self.sample}
        reads |= {f"input {one}": Path(one) for one in self.inputs if "://" not in str(one)}
        folders = {"--masks": self.masks, "--overlays": self.overlays}
        images = [file.path for file in files]
        check_outputs(
            named | written | {"the journal": paths.journal}, reads, folders=folders, images=images, overwrite=True
        )
        check_outputs(written, overwrite=self.overwrite)
        check_outputs(named, folders=folders, overwrite=self.overwrite or (self.resume and begun))
        if self.masks or self.overlays:
            check_keys(files)


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Parameters
    ----------
    output
        The submission.
    images, failed, rows_with_mask
        Counts, those of an earlier run that was resumed included.
    resumed
        Images that an earlier run had finished.
    seconds
        Duration of this run, without opening the model.
    plan
        How it ran.
    failures, report
        Paths of the files that were written; None where there is none.
    already_finished
        Whether the output was complete, and nothing was touched.
    """

    output: Path
    images: int
    failed: int
    rows_with_mask: int
    resumed: int
    seconds: float
    plan: Plan
    failures: Path | None = None
    report: Path | None = None
    already_finished: bool = False

    @property
    def images_per_second(self) -> float:
        """Rate of this run."""
        return (self.images - self.resumed) / self.seconds if self.seconds > 0 else 0.0


class InferSettings(RunSettings, total=False):
    """Keyword arguments of `infer`: the fields of `RunOptions` and of `InferTask`."""

    sample: Path | None
    format: str
    resume: bool
    overwrite: bool
    report: bool
    report_images: int
    stats: Path | None
    masks: Path | None
    overlays: Path | None
    save_probabilities: Path | None


def infer(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path = "submission.csv",
    model: str | Path | None = None,
    *,
    progress: Progress = no_progress,
    **settings: Unpack[InferSettings],
) -> RunSummary:
    """Write the submission of images: what `cloudrt-infer` does.

    Parameters
    ----------
    inputs
        One or several folders, images, patterns or lists.
    output
        .csv, .parquet, or .json (COCO).
    model
        Path of the artifact; None takes ./model.onnx, else the model that ships.
    progress
        Shows work in progress; see `Progress`.
    **settings
        Fields of `InferTask` and of `cloudrt.RunOptions`.

    Raises
    ------
    CloudrtError
        The run could not start: wrong options, missing files, a provider that cannot run here.

    Examples
    --------
    >>> summary = cloudrt.infer("test_images", "submission.csv", provider="cpu", report=True)  # doctest: +SKIP
    """
    for name in settings:
        check_name("option", name, tuple(InferSettings.__annotations__))
    ours: dict[str, Any] = {name: value for name, value in settings.items() if name in _TASK_FIELDS}
    for name in ("sample", "stats", "masks", "overlays", "save_probabilities"):
        ours |= {name: Path(ours[name])} if ours.get(name) is not None else {}
    run: Any = {name: value for name, value in settings.items() if name not in ours}
    task = InferTask(
        inputs=(inputs,) if isinstance(inputs, str | Path) else tuple(inputs),
        output=Path(output),
        model=Path(model) if model is not None else None,
        run=RunOptions().changed(**run),
        **ours,
    )
    return run_task(task, progress)


_TASK_FIELDS = frozenset(InferSettings.__annotations__) - frozenset(RunSettings.__annotations__)


def run_task(task: InferTask, progress: Progress = no_progress) -> RunSummary:
    """Do what a task describes; see `infer`."""
    model = task.model or default_model()
    artifact = read_artifact(model)
    files = list_inputs(task.inputs, task.sample, artifact.labels)
    recorded, begun = _recorded(task), task.paths.journal.is_file()
    if begun or not recorded:
        task.check(files, begun=begun)
    plan = recorded.plan() if recorded else None
    sample = partial(load_sample, files, artifact.input_size, COMPARED, task.run.max_pixels)
    with Segmenter(
        model,
        task.run,
        plan=plan if plan and plan.satisfies(task.run) else None,
        samples=sample if len(files) >= COMPARED else None,
    ) as segmenter:
        _announce(segmenter)
        identity = replace(segmenter.identity(), images=len(files), inputs=digest_keys(files))
        if recorded and not begun:
            recorded.require_same(identity, str(task.output))
            logger.info("%s: already finished, nothing to do", task.output)
            return RunSummary(task.output, len(files), 0, 0, len(files), 0.0, segmenter.plan, already_finished=True)
        began = time.perf_counter()
        try:
            done = write_submission(segmenter, files, task, identity, progress)
        except (KeyboardInterrupt, OSError, CloudrtError):
            if task.paths.journal.exists():
                logger.warning("%s holds what is finished; --resume continues from there", task.paths.journal)
            raise
        seconds = time.perf_counter() - began
        if task.stats:
            _write_stats(task.stats, segmenter, done, identity)
        return RunSummary(
            task.output,
            done.images,
            done.failed,
            done.rows_with_mask,
            done.resumed,
            seconds,
            segmenter.plan,
            failures=task.paths.failures if done.failed else None,
            report=task.paths.report if task.report else None,
        )


def write_submission(
    segmenter: Segmenter,
    files: Sequence[ImageFile],
    task: InferTask,
    identity: Identity | None = None,
    progress: Progress = no_progress,
) -> Submission:
    """Segment images and write the outputs of a task.

    Parameters
    ----------
    segmenter
        The model, open.
    files
        The images, in the order of their rows.
    task
        Says which outputs to write.
    identity
        Identity of the run; without one it cannot be resumed.
    progress
        Shows work in progress.
    """
    labels, began = segmenter.labels, time.perf_counter()
    page = None
    if task.report:
        from cloudrt.reports.submission_page import Report

        page = Report(labels, task.report_images, segmenter.options.max_pixels)
    keys = [file.key for file in files]
    with ExitStack() as stack:
        submission = stack.enter_context(
            open_submission(task.output, labels, identity, keys=keys, resume=task.resume, form=task.format)
        )
        if task.resume:
            _resume(segmenter, submission, task)
        paint = partial(_paint, segmenter, task)
        for file, record in zip(files, submission.journal.records(), strict=False):  # of the earlier run
            rle = dict(zip(labels.classes, record.texts, strict=True))
            if page:
                page.add(record.key, file.path, None if record.error else rle, record.error)
            paint((file, Result(record.key, rle, record.error, labels)))
        keep = None
        if task.save_probabilities:
            keep = _keeper(stack.enter_context(write_probabilities(task.save_probabilities, labels)))
        left = files[submission.resumed :]
        advance = stack.enter_context(progress("Segmenting", len(left)))
        painters = stack.enter_context(ThreadPoolExecutor(segmenter.threads, "paint"))
        results = zip(left, segmenter.predict(left, keep), strict=True)
        for file, result in overlap(painters, paint, results, 2 * segmenter.threads):
            submission.add(result.image, result.rle, result.error, result.batch, result.batch_size)
            if page:
                page.add(result.image, file.path, None if result.error else result.rle, result.error)
            advance(failed=submission.failed, limit=segmenter.stats.limiting())
    if page:
        page.write(task.paths.report, _facts(segmenter, submission, time.perf_counter() - began))
    return submission


def _recorded(task: InferTask) -> Identity | None:
    """Return the identity of the run to resume: cut short, or finished; None where there is nothing to resume."""
    if not task.resume:
        return None
    if task.paths.journal.is_file():
        return read_identity(task.paths.journal)
    return read_run_record(task.paths) if task.output.exists() else None


def _announce(segmenter: Segmenter) -> None:
    artifact, plan = segmenter.artifact, segmenter.plan
    height, width = artifact.input_size
    logger.info(
        "%s: %s with %s, %s, %dx%d; %s, %d threads",
        *(segmenter.model, artifact.architecture, artifact.encoder, artifact.precision, width, height),
        *(plan.describe(), segmenter.threads),
    )
    for name, reason in plan.passed_over.items():
        logger.debug("  not %s: %s", name, reason)


def _resume(segmenter: Segmenter, submission: Submission, task: InferTask) -> None:
    if submission.resumed:
        logger.info("%s: %d images are finished, continuing", task.paths.journal, submission.resumed)
    else:
        logger.info("Nothing to resume: starting with the first image")
    segmenter.shrink(submission.journal.size)


def _paint(segmenter: Segmenter, task: InferTask, pair: tuple[ImageFile, Result]) -> tuple[ImageFile, Result]:
    """Write the pictures of one image, if any are wanted."""
    file, result = pair
    texts = list(result.rle.values())
    if task.masks:
        write_masks(task.masks, result.image, texts, segmenter.labels)
    if task.overlays and result.error is None:
        write_overlay(task.overlays, result.image, file.path, texts, segmenter.labels, segmenter.options.max_pixels)
    return pair


def _keeper(writer: ProbabilityWriter) -> Callable[[Inferred], None]:
    def keep(item: Inferred) -> None:
        if item.probability is not None:
            writer.add(item.image, item.probability, item.presence)

    return keep


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
