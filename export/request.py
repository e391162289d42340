"""What to export, checked before anything slow starts: the checkpoints, the precisions, and the files to write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloudrt.engines.tensorrt_check import TARGETS
from cloudrt.errors import DataError
from cloudrt.images.image import find_images
from cloudrt.model.parity import TOLERANCES, Tolerances
from cloudrt.system.paths import check_outputs, check_suffixes

from .export import PRECISIONS, Target
from .source import SourceOptions
from .triton import NAME, repository_files


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
        Unknown precision, options that contradict each other, or an output that cannot be written.
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
        if self.precision not in (*PRECISIONS, "all"):
            raise DataError(f"precision must be one of {', '.join(PRECISIONS)} and all, found {self.precision!r}")
        if any(math.isnan(value) for value in self.limits.values()):
            raise DataError("nan is not a limit: give a number")
        if self.precision == "all" and (self.triton or self.build_engine):
            raise DataError("--triton and --build-engine need a single artifact: give one --precision")
        self._check_outputs()

    def _check_outputs(self) -> None:
        reads: dict[str, Path | None] = {
            f"checkpoint {number}": path for number, path in enumerate(self.checkpoints, 1)
        }
        files = {"--stats": self.figures} | {f"the {name} artifact": path for name, path in self.outputs.items()}
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
        check_suffixes({"--stats": self.figures}, ".json")

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
