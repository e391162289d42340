"""What a benchmark measures, and on which images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cloudrt.errors import DataError
from cloudrt.options import RunOptions

DEFAULT = ("stages", "pipeline", "throughput", "accuracy", "post-process", "search", "latency", "start-up")
PARTS = (*DEFAULT, "host", "scaling")
"""The last two take long: host times many batch sizes, scaling runs thousands of images."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Parameters
    ----------
    models
        Artifacts. Accuracy compares all of them; every other part measures the first. Without any, ./model.onnx or the
        model that ships with the package.
    data
        Folder of images; None draws synthetic ones.
    truth
        Table of RLE rows on the label grid, such as train.csv, for the images in `data`.
    max_images
        Maximum number of images; 0 takes 6, or more to fill whole batches.
    run
        How to run the model. `threads` also applies to the peers.
    checkpoints
        The best.pth files that the artifact was exported from, one for each network; the notebook's way then runs them
        in PyTorch.
    baseline
        The fp32 artifact for plain ONNX Runtime and OpenVINO; None takes the first model.
    repeat
        Number of timed passes of each way.
    only
        Which of `PARTS` to measure; empty measures `DEFAULT`.

    Raises
    ------
    DataError
        A file is missing, a number is out of range, or `truth` is given without `data` or the accuracy part.
    """

    models: tuple[Path, ...] = ()
    data: Path | None = None
    truth: Path | None = None
    max_images: int = 0
    run: RunOptions = field(default_factory=RunOptions)
    checkpoints: tuple[Path, ...] = ()
    baseline: Path | None = None
    repeat: int = 5
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in (*self.models, *self.checkpoints, self.data, self.truth, self.baseline):
            if path is not None and not path.exists():
                raise DataError(f"{path} is missing")
        if self.max_images < 0 or self.repeat < 1:
            raise DataError(
                f"max_images must be 0 or more and repeat at least 1, found {self.max_images}, {self.repeat}"
            )
        if self.truth and not self.data:
            raise DataError("--truth needs the images it belongs to: give their folder with --data")
        if self.truth and "accuracy" not in self.parts:
            raise DataError("--truth is for the accuracy part: add --only accuracy, or leave --truth out")

    @property
    def model(self) -> Path | None:
        """The first of the models."""
        return self.models[0] if self.models else None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to measure."""
        return self.only or DEFAULT

    def command(self) -> list[str]:
        """Return the command line of these options. Folders, which may contain a user's name, become DIR."""
        words = ["cloudrt-bench", *(model.name for model in self.models), *(["--data", "DIR"] if self.data else [])]
        words += ["--truth", self.truth.name] if self.truth else []
        words += ["--provider", self.run.provider, "--repeat", str(self.repeat)]
        words += ["--max-images", str(self.max_images)] if self.max_images else []
        words += ["--baseline", self.baseline.name] if self.baseline else []
        words += _run_words(self.run)
        words += [word for part in self.only for word in ("--only", part)]
        return words + [word for path in self.checkpoints for word in ("--checkpoint", path.name)]


def _run_words(run: RunOptions) -> list[str]:
    """Return the command-line options that differ from the defaults, without the provider."""
    default, engine = RunOptions(), getattr(run, run.provider.replace("-", "_"), None)
    streams, graph = getattr(engine, "streams", 0), getattr(engine, "graph", None)
    layout = getattr(engine, "channels_last", None)
    words = ["--batch-size", str(run.batch_size)] if run.batch_size else []
    words += ["--threads", str(run.threads)] if run.threads else []
    for name in ("compute_precision", "decoder"):
        if getattr(run, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", getattr(run, name)]
    words += ["--streams", str(streams)] if streams else []
    words += [] if graph is None else ["--cuda-graph" if graph else "--no-cuda-graph"]
    words += [] if layout is None else ["--channels-last" if layout else "--no-channels-last"]
    words += ["--devices", ",".join(map(str, run.devices))] if run.devices is not None else []
    words += ["--allow-cpu"] if run.allow_cpu else []
    return words + (["--max-megapixels", f"{run.max_pixels / 1e6:g}"] if run.max_pixels != default.max_pixels else [])
