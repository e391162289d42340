"""Everything `cloudrt-export` does, from checkpoints to artifacts, their figures, a Triton model and an engine.

ExportRequest -> checks -> ExportSource -> export, once per precision -> ExportSummary
"""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

from cloudrt.engines.choice import choose_provider, open_engine
from cloudrt.engines.tensorrt_check import TARGETS, TensorrtCheck, check, require_tensorrt
from cloudrt.errors import CloudrtError, DataError, ParityError
from cloudrt.images.image import find_images
from cloudrt.model.artifact import load_model, parse_artifact
from cloudrt.model.parity import TOLERANCES, Tolerances, Verdict
from cloudrt.system.files import replacing
from cloudrt.system.machine import describe_machine
from cloudrt.system.paths import check_outputs, check_suffixes
from cloudrt.system.progress import ProgressBar

from .export import PRECISIONS, Exported, Target, export
from .source import ExportSource, SourceOptions
from .triton import NAME, repository_files, write_repository

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and what else to write.

    Parameters
    ----------
    checkpoints
        best.pth of one or more training runs; several become one ensemble.
    output
        Path of the artifact; None uses model.onnx beside the first checkpoint.
    precision
        One of `PRECISIONS`, or "all" for one artifact each: model.fp32.onnx and so on.
    int8_target, provider
        See `Target`.
    limits
        Fields of `Tolerances` that replace those of the precision. With "all" they never loosen fp32 and fp16.
    options
        See `SourceOptions`; `calibrate` follows the precision.
    figures
        JSON file for the measured figures.
    triton
        Folder of a Triton model repository.
    build_engine
        Whether to build TensorRT's engine.
    batch_size
        Batch size of TensorRT's engines, and maximum batch size of Triton.
    check
        "tensorrt" to build engines for `cloudrt.engines.tensorrt_check.TARGETS`, which needs no GPU.
    overwrite
        Replace outputs that exist.

    Raises
    ------
    DataError
        The options contradict each other, or an output cannot be written.
    """

    checkpoints: tuple[Path, ...]
    output: Path | None = None
    precision: str = "fp16"
    int8_target: str = "cpu"
    provider: str = "auto"
    limits: Mapping[str, float] = field(default_factory=dict)
    options: SourceOptions = field(default_factory=SourceOptions)
    figures: Path | None = None
    triton: Path | None = None
    build_engine: bool = False
    batch_size: int = 32
    check: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        for checkpoint in self.checkpoints:
            if checkpoint.suffix == ".onnx":
                raise DataError(f"{checkpoint} is an artifact already: give its checkpoint, or --check tensorrt")
        if any(math.isnan(value) for value in self.limits.values()):
            raise DataError("nan is not a limit: give a number")
        if self.precision == "all" and (self.triton or self.build_engine):
            raise DataError("--triton and --build-engine need a single artifact: give one --precision")
        self._check_outputs()

    def _check_outputs(self) -> None:
        reads: dict[str, Path | None] = {
            f"checkpoint {number}": path for number, path in enumerate(self.checkpoints, 1)
        }
        files = {"--json": self.figures} | {f"the {name} artifact": path for name, path in self.outputs.items()}
        model = repository_files(self.triton) if self.triton else ()
        check_outputs(
            files | {f"{path.name} of --triton": path for path in model},
            reads | {"--data": self.options.data},
            images=self._images(),
            overwrite=True,
        )
        # Other models in the repository are kept.
        folders = {"--triton": self.triton / NAME if self.triton else None}
        check_outputs(files, folders=folders, overwrite=self.overwrite)
        check_suffixes({"--output": self.output}, ".onnx")
        check_suffixes({"--json": self.figures}, ".json")

    def _images(self) -> Iterator[Path]:
        if self.options.data is not None:
            yield from (file.path for file in find_images(self.options.data))

    @property
    def outputs(self) -> dict[str, Path]:
        """Precision -> path of its artifact."""
        path = self.output or self.checkpoints[0].with_name("model.onnx")
        if self.precision != "all":
            return {self.precision: path}
        return {one: path.with_name(f"{path.stem}.{one}{path.suffix}") for one in PRECISIONS}

    def targets(self) -> list[Target]:
        """Return the artifacts to make, each with the provider that runs its gate; see `Target` for the errors."""
        targets = []
        for precision in self.outputs:
            tighten = self.precision == "all" and precision != "int8"
            tolerances = limited(TOLERANCES[precision], self.limits, tighten=tighten)
            target = Target(
                precision=precision,
                int8_target=self.int8_target,
                provider=self.provider,
                tolerances=tolerances,
                batch_size=self.batch_size,
                check=TARGETS if self.check else (),
            )
            targets.append(replace(target, provider=target.gate_provider()))
        return targets


def limited(default: Tolerances, limits: Mapping[str, float], *, tighten: bool = False) -> Tolerances:
    """Return tolerances with some fields replaced; with `tighten`, only by stricter values."""
    if tighten:
        stricter = {name: max if name == "dice" else min for name in limits}
        limits = {name: stricter[name](value, getattr(default, name)) for name, value in limits.items()}
    return replace(default, **limits)


@dataclass(frozen=True)
class PrecisionResult:
    """The result of one precision: the artifact or the reason of its refusal, and every figure with its limit."""

    title: str
    verdicts: Sequence[Verdict]
    exported: Exported | None
    error: ParityError | None = None


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Parameters
    ----------
    written
        The artifacts.
    refused
        Precision -> why it did not pass the gate.
    shared_rules
        Whether all checkpoints have the same rules.
    triton
        Folder of the Triton model.
    engine_seconds
        Build time of TensorRT's engine; None if none was built.
    """

    written: list[Exported]
    refused: dict[str, ParityError]
    shared_rules: bool
    triton: Path | None = None
    engine_seconds: float | None = None


def run_export(
    request: ExportRequest, progress: ProgressBar, report: Callable[[PrecisionResult], object]
) -> ExportSummary:
    """Export every precision that passes the gate.

    Parameters
    ----------
    request
        What to export.
    progress
        Opens a progress bar.
    report
        Called with the result of each precision.

    Raises
    ------
    ParityError
        The only precision asked for does not pass; nothing is written.
    CloudrtError
        A checkpoint, the images or the provider cannot be used.
    """
    # Before anything slow:
    if request.build_engine:
        choose_provider("tensorrt")
    if request.check:
        require_tensorrt()
    targets = request.targets()
    options = replace(request.options, calibrate="int8" in request.outputs)
    source = ExportSource(request.checkpoints, options)
    with progress("Running PyTorch", len(source.compared.names)) as advance:
        source.run_pytorch(advance)
    written: list[Exported] = []
    refused: dict[str, ParityError] = {}
    for target in targets:
        try:
            written.append(_export_one(source, request.outputs[target.precision], target, progress, report))
        except ParityError as error:
            if len(targets) == 1:
                raise
            refused[target.precision] = error
    if request.figures:
        write_figures(request.figures, source, written)
    triton = seconds = None
    if request.triton:
        triton = write_repository(
            request.triton, written[0].path, written[0].artifact, largest_batch=request.batch_size
        )
    if request.build_engine:
        seconds = build_engine(written[0].path, request.batch_size)
    shared = len({one.rules for one in source.ensemble.checkpoints}) == 1
    return ExportSummary(written, refused, shared, triton, seconds)


def check_artifacts(artifacts: Sequence[Path], batch_size: int) -> dict[Path, TensorrtCheck]:
    """Parse artifacts with TensorRT, build their engines for every target, and return the results.

    Raises
    ------
    ArtifactError
        A file is not an artifact, or TensorRT refuses it.
    ProviderError
        TensorRT for RTX is not installed.
    """
    require_tensorrt()
    found = {}
    for path in artifacts:
        model = load_model(path)
        found[path] = check(model, parse_artifact(model, path), batch_size)
    return found


def _export_one(
    source: ExportSource,
    output: Path,
    target: Target,
    progress: ProgressBar,
    report: Callable[[PrecisionResult], object],
) -> Exported:
    compared = source.reference
    title = f"{target.precision} compared with PyTorch fp32 on {len(compared.images)} {compared.answers.source}"
    try:
        with progress(f"Comparing {target.precision}", len(compared.images)) as advance:
            done = export(source, output, target, advance)
    except ParityError as error:
        report(PrecisionResult(title, error.verdicts, None, error))
        raise
    report(PrecisionResult(f"{title}, in {done.parity.provider}", done.parity.verdicts(done.tolerances), done))
    return done


def build_engine(artifact: Path, batch_size: int) -> float:
    """Build TensorRT's engine, which stays in the user's cache; return the seconds that it took.

    Raises
    ------
    CloudrtError
        The engine was not built.
    """
    logger.info("building TensorRT's engine, which can take minutes; later starts reuse it")
    began = perf_counter()
    try:
        open_engine(artifact, "tensorrt", batch_size).close()
    except CloudrtError as error:
        raise CloudrtError(f"{artifact} was written, but its TensorRT engine was not built: {error}") from error
    return perf_counter() - began


def write_figures(path: Path, source: ExportSource, written: Sequence[Exported]) -> None:
    """Write the measured figures, the machine and the versions as JSON, without names of files, folders or users."""
    ensemble = source.ensemble
    values = {
        "machine": asdict(describe_machine()) | {"system": f"{platform.system()} {platform.machine()}"},
        "versions": written[0].artifact.versions if written else {},
        "networks": [f"{one.config.architecture} with {one.config.encoder}" for one in ensemble.checkpoints],
        "input_size": list(ensemble.config.input_size),
        "tta": ensemble.tta,
        "calibrated_on": {"images": len(source.calibration.names), "source": source.calibration.source},
        "artifacts": [
            {
                "precision": done.artifact.precision,
                "int8_target": done.artifact.int8_target,
                "bytes": done.bytes,
                "parity": done.parity.to_dict(),
                "tolerances": asdict(done.tolerances),
                "layers": done.layers,
                "kept_fp32": list(done.artifact.kept_fp32),
                "speed_beside_fp32": done.speed,
                "tensorrt": done.tensorrt.to_dict() if isinstance(done.tensorrt, TensorrtCheck) else done.tensorrt,
            }
            for done in written
        ],
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
