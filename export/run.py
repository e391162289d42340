"""Everything `cloudrt-export` does, from checkpoints to artifacts, their figures, a Triton model and an engine.

ExportRequest -> checks -> ExportSource -> export, once per precision -> ExportSummary
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from cloudrt.engines.choice import choose_provider, open_engine
from cloudrt.engines.tensorrt_check import TensorrtCheck, check, require_tensorrt
from cloudrt.errors import CloudrtError, ParityError
from cloudrt.model.artifact import parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.model.parity import Verdict
from cloudrt.system.files import replacing
from cloudrt.system.machine import describe_machine
from cloudrt.system.progress import ProgressBar

from .export import Exported, Target, export
from .gate import make_title
from .request import ExportRequest
from .source import ExportSource
from .triton import write_repository

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecisionResult:
    """The result of one precision: the artifact or the reason for its refusal, and every figure with its limit."""

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
    try:
        with progress(f"Comparing {target.precision}", len(source.compared.names)) as advance:
            done = export(source, output, target, advance)
    except ParityError as error:
        report(PrecisionResult(error.title, error.verdicts, None, error))
        raise
    report(PrecisionResult(make_title(target.precision, done.parity), done.parity.verdicts(done.tolerances), done))
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
