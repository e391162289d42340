"""Everything that the bytes of a submission depend on: runs with equal identities write the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.plan import Plan
from cloudrt.errors import DataError
from cloudrt.options import CPU_PROVIDERS, RunOptions
from cloudrt.system.machine import describe_machine
from cloudrt.system.versions import OPENCV, package_versions

RESUME_HINT = "Use the options of that run, or `overwrite=True`"


@dataclass(frozen=True)
class Identity:
    """Everything that the results of a run depend on.

    Parameters
    ----------
    artifact
        SHA-256 of the artifact's file.
    provider, batch_size, streams, compute_precision, cuda_graph, channels_last
        See `cloudrt.engines.plan.Plan`.
    device
        Model of the CPU or GPU; "" with remote servers.
    precision
        Precision of the artifact.
    threads
        Number of CPU threads of each stage, never 0.
    decoder, max_pixels
        See `cloudrt.options.RunOptions`.
    versions
        Distribution -> version, for the libraries that results depend on.
    images
        Number of images.
    inputs
        SHA-256 over the keys of the images and the sizes of their files, in order.
    tiling
        Overlap of tiles and bounds of panoramas, as text; "" without tiles.
    simplify
        Pixels by which outlines of polygons may deviate; "" for formats without polygons.
    partition_size, partition_format
        Partitions of a run on a cluster; 0 and "" on a single machine.
    """

    artifact: str
    provider: str
    batch_size: int
    streams: int
    compute_precision: str
    cuda_graph: bool
    channels_last: bool
    device: str
    precision: str
    threads: int
    decoder: str
    max_pixels: int
    versions: dict[str, str] = field(default_factory=dict)
    images: int = 0
    inputs: str = ""
    tiling: str = ""
    simplify: str = ""
    partition_size: int = 0
    partition_format: str = ""

    def plan(self) -> Plan:
        """Return the plan of the run, with the default of `pinned`, which is not recorded."""
        return Plan(
            provider=self.provider,
            batch_size=self.batch_size,
            streams=self.streams,
            compute_precision=self.compute_precision,
            cuda_graph=self.cuda_graph,
            channels_last=self.channels_last,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the identity from the values that `to_dict` returned.

        Raises
        ------
        DataError
            Missing or unknown keys, or values of other types.
        """
        kinds = {one.name: str(one.type).partition("[")[0] for one in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(kinds):
            raise DataError("the record of a run has other fields than this version of cloudrt writes")
        wrong = [name for name, value in values.items() if type(value).__name__ != kinds[name]]
        if wrong:
            raise DataError(f"the record of a run holds a value of the wrong type: {', '.join(wrong)}")
        return cls(**values)

    def differences(self, other: Identity) -> list[str]:
        """Return a description of each value that differs from `other`, the current run."""
        ours, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return [
            f"{name} was {_brief(ours.get(name, 'absent'))}, now {_brief(theirs.get(name, 'absent'))}"
            + " (digests of the names and sizes of the images)" * (name == "inputs")
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        ]

    def require_same(self, other: Identity, where: str) -> None:
        """Check that a run with identity `other` may continue the run with this identity.

        Raises
        ------
        DataError
            The identities differ; the message names every difference.
        """
        differences = self.differences(other)
        if differences:
            raise DataError(f"{where} belongs to another run: {'; '.join(differences)}. {RESUME_HINT}")


def identify(artifact: str, precision: str, plan: Plan, options: RunOptions, threads: int) -> Identity:
    """Return the identity of a run on this machine.

    Parameters
    ----------
    artifact, precision
        SHA-256 and precision of the artifact.
    plan, options, threads
        How it runs.
    """
    packages = ["cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", *OPENCV, "simplejpeg"]
    if options.decoder == "gpu":
        packages += ["nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"]
    if plan.provider in ("cuda", "tensorrt"):
        packages += ["nvidia-cudnn-cu13", "nvidia-cublas"]
    if plan.provider == "tensorrt":
        packages += ["tensorrt", "tensorrt-cu12", "tensorrt-cu13"]
    if plan.provider == "tensorrt-rtx":
        packages += tensorrt_rtx.PACKAGES
    machine = describe_machine()
    on_cpu, remote = plan.provider in CPU_PROVIDERS, plan.provider == "remote"
    return Identity(
        artifact=artifact,
        provider=plan.provider,
        batch_size=plan.batch_size,
        streams=plan.streams,
        compute_precision=plan.compute_precision,
        cuda_graph=plan.cuda_graph,
        channels_last=plan.channels_last,
        device="" if remote else machine.cpu if on_cpu else machine.gpus[options.gpus[0]],
        precision=precision,
        threads=threads,
        decoder=options.decoder,
        max_pixels=options.max_pixels,
        versions=package_versions(*packages),
    )


def _brief(value: Any) -> Any:
    """Return the first digits of a SHA-256, and other values as they are."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "versions"} | {
        f"{name} version": value for name, value in values["versions"].items()
    }
