"""Where the network of a run comes from: an artifact on this machine, or the servers of `--remote`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cloudrt.engines.base import Engine
from cloudrt.engines.choice import open_engine
from cloudrt.engines.plan import Plan, Samples, make_plan
from cloudrt.errors import ArtifactError
from cloudrt.model.artifact import Artifact, default_model, parse_artifact, read_artifact
from cloudrt.model.onnx_file import load_with_content
from cloudrt.options import RunOptions
from cloudrt.system.machine import usable_cpus


@dataclass(frozen=True)
class ModelSource:
    """A model, the plan of its run, and a way to open it.

    Parameters
    ----------
    path
        Path of the artifact, or the model's name on the servers.
    artifact
        Metadata of the model.
    sha256
        SHA-256 of the artifact's file, or `RemoteModel.digest`.
    plan
        The plan of the run.
    open_engine
        Opens an engine on a device, given its number, for a batch size.
    """

    path: Path
    artifact: Artifact
    sha256: str
    plan: Plan
    open_engine: Callable[[int, int], Engine]


def local_model(
    model: str | Path | None, options: RunOptions, plan: Plan | None, samples: Samples | None
) -> ModelSource:
    """Load an artifact and plan its run; the parameters and errors are those of `Segmenter`."""
    path = Path(model) if model is not None else default_model()
    loaded, content = load_with_content(path)
    artifact = parse_artifact(loaded, path)
    planned = make_plan(loaded, artifact, options, plan, samples)
    threads = options.threads or usable_cpus()

    def open_one(device: int, batch_size: int) -> Engine:
        return open_engine(loaded, planned.provider, batch_size, threads, planned.options(device, options.allow_cpu))

    return ModelSource(path, artifact, sha256(content).hexdigest(), planned, open_one)


def remote_model(options: RunOptions, plan: Plan | None) -> ModelSource:
    """Connect to the servers of `options`; the errors are those of `Segmenter`."""
    from cloudrt.engines.remote import BATCH_SIZE, RemoteEngine, connect

    remote = connect(options.remote)
    size = options.batch_size or min(BATCH_SIZE, remote.largest_batch)
    return ModelSource(
        path=Path(options.remote.model),
        artifact=remote.artifact,
        sha256=remote.digest,
        plan=plan or Plan("remote", size, remote.streams),
        open_engine=lambda _, batch_size: RemoteEngine(remote, batch_size),
    )


def describe_model(model: Path | None, options: RunOptions) -> tuple[Path, Artifact]:
    """Return the path of the artifact, or its name on the servers of `options`, and its metadata.

    Raises
    ------
    ArtifactError, ProviderError
        See `Segmenter`.
    """
    if options.remote.urls:
        from cloudrt.engines.remote import connect

        return Path(options.remote.model), connect(options.remote).artifact
    path = model or default_model()
    return path, read_artifact(path)


def require_rules(artifact: Artifact, model: Path) -> None:
    """Check that an artifact has rules, without which there are probabilities but no masks.

    Raises
    ------
    ArtifactError
        It has none; the message says how to find rules.
    """
    if not artifact.rules:
        raise ArtifactError(f"{model} has no rules, as its network was never validated: find them with cloudrt tune")
