"""How an artifact runs: one frozen object that every command, the cluster, the server and the benchmarks pass whole.

`RunOptions` holds what a user asks for. `cloudrt.engines.plan` measures what "auto", 0 or None leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self, TypedDict

from cloudrt.arguments import check_number, check_switch, check_type, check_whole, shown
from cloudrt.errors import DataError
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.system.suggest import check_name

PROVIDERS = ("auto", "tensorrt", "tensorrt-rtx", "cuda", "openvino", "cpu")
"""Names of the providers; "auto" chooses one of the others."""
GPU_PROVIDERS = ("tensorrt", "tensorrt-rtx", "cuda")
"""The providers that need an NVIDIA GPU."""
TENSORRT_PROVIDERS = ("tensorrt", "tensorrt-rtx")
"""The providers that build an engine for each model and batch size."""
CPU_PROVIDERS = ("openvino", "cpu")
"""The providers that run on the CPU."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""Precisions that OpenVINO can compute in; the other providers use the artifact's precision."""
DECODERS = ("cpu", "gpu")
TOKEN = "CLOUDRT_TOKEN"
"""Environment variable with the bearer token that a server requires and that clients send."""
MAX_BATCH, MAX_THREADS, MAX_STREAMS = 65_536, 4_096, 64


@dataclass(frozen=True)
class GpuOptions:
    """Options that the GPU providers share.

    Parameters
    ----------
    streams
        Number of batches computed at once on each GPU; 0 measures the best number.
    graph
        Whether to run each batch as a captured CUDA graph; None measures whether that is faster.

    Raises
    ------
    DataError
        A value of the wrong type or out of range; a graph with more than one stream.
    """

    streams: int = 0
    graph: bool | None = None

    def __post_init__(self) -> None:
        check_whole("streams", self.streams, 0, MAX_STREAMS)
        check_switch("graph", self.graph)
        if self.graph and self.streams > 1:
            raise DataError("a CUDA graph runs one batch at a time: use one stream with it")


@dataclass(frozen=True)
class CudaOptions(GpuOptions):
    """Options of ONNX Runtime's CUDA provider; see also `GpuOptions`.

    Parameters
    ----------
    channels_last
        Whether convolutions run in NHWC layout with their bias fused (`prefer_nhwc` with `fuse_conv_bias`); None
        measures whether that is faster.
    """

    channels_last: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("channels_last", self.channels_last)


@dataclass(frozen=True)
class TensorrtOptions(GpuOptions):
    """Options of ONNX Runtime's TensorRT provider; see `GpuOptions`."""


@dataclass(frozen=True)
class TensorrtRtxOptions(GpuOptions):
    """Options of the TensorRT for RTX provider, for which `streams` is at most 1; see `GpuOptions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streams > 1:
            raise DataError(f"tensorrt-rtx runs one batch at a time: `streams={self.streams}` is too many")


@dataclass(frozen=True)
class OpenvinoOptions:
    """Options of OpenVINO.

    Parameters
    ----------
    streams
        Number of batches in flight, which share the CPU threads; 0 measures the best number.

    Raises
    ------
    DataError
        A value out of range.
    """

    streams: int = 0

    def __post_init__(self) -> None:
        check_whole("streams", self.streams, 0, MAX_STREAMS)


@dataclass(frozen=True)
class RemoteOptions:
    """Servers of the Open Inference Protocol that run the network instead of this machine.

    Parameters
    ----------
    urls
        Addresses such as "http://HOST:8000" and "grpc://HOST:8001"; if empty, the network runs on this machine.
    model
        Name of the model on the servers.
    rules
        Path of an artifact whose metadata is used instead of that of the servers; "" uses that of the servers.
    streams
        Number of concurrent requests; 0 means two per server.
    attempts
        Number of times that a batch is sent before the run stops.
    timeout_s
        Time limit of a request and its response, in seconds.

    Raises
    ------
    DataError
        A malformed URL, no model name, or a value out of range.
    """

    urls: tuple[str, ...] = ()
    model: str = ""
    rules: str = ""
    streams: int = 0
    attempts: int = 8
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_type("remote.urls", self.urls, (tuple, list), "a tuple of URLs")
        object.__setattr__(self, "urls", tuple(self.urls))  # JSON has lists
        check_type("remote.model", self.model, str, "a name")
        check_type("remote.rules", self.rules, str, 'the path of an artifact as text, or ""')
        for url in self.urls:
            check_type("remote.urls", url, str, "a tuple of URLs")
            scheme, found, address = url.partition("://")
            if scheme not in ("http", "https", "grpc", "grpcs") or not found or not address:
                raise DataError(f"`remote={url}`: expected http://HOST:PORT or grpc://HOST:PORT")
        if self.urls and not self.model:
            raise DataError("`remote` needs `model=NAME`, the name of the model on the servers")
        check_whole("streams", self.streams, 0, MAX_STREAMS)
        check_whole("attempts", self.attempts, 1, 1_000)
        if not check_number("timeout_s", self.timeout_s) > 0:
            raise DataError(f"timeout_s must be a positive number, found {shown(self.timeout_s)}")


@dataclass(frozen=True)
class RunOptions:
    """How to run an artifact.

    Parameters
    ----------
    provider
        One of `PROVIDERS`. "auto" measures once for each artifact and machine, and takes the fastest provider whose
        output agrees with that of ONNX Runtime's CPU provider in fp32; see `cloudrt.engines.plan.make_plan`.
    batch_size
        Number of images per batch; the last batch is padded. 0 measures the best number, except that the TensorRT
        providers use 32, and remote servers 32 or the largest number that they accept, if that is smaller.
    compute_precision
        One of `PRECISIONS`: the precision that OpenVINO computes in. All but "auto" need the provider "openvino".
        "auto" takes a lower one than fp32 for fp16 and int8 artifacts if the CPU supports it and the results agree.
    threads
        Number of CPU threads of each stage; 0 uses all cores that this process may use.
    devices
        GPU numbers; one engine runs on each. All GPUs must be of the same model. If devices are given, CPU providers
        are refused. None means GPU 0, if the provider needs a GPU.
    allow_cpu
        With a GPU provider, allow convolutions, resizes and normalisations to run on the CPU.
    decoder
        One of `DECODERS`: "cpu", or "gpu" for nvImageCodec; the CPU decodes what that cannot decode.
    max_pixels
        Image files with more pixels are reported as failures; an image that is cut into tiles may have 10 times as
        many. Arrays are not checked.
    cuda, tensorrt, tensorrt_rtx, openvino
        Options of the provider of that name; other providers ignore them.
    remote
        Servers that run the network; then `provider`, `compute_precision` and `decoder` must have their defaults.

    Raises
    ------
    DataError
        A value of the wrong type or out of range; the message names the option.
    """

    provider: str = "auto"
    batch_size: int = 0
    compute_precision: str = "auto"
    threads: int = 0
    devices: tuple[int, ...] | None = None
    allow_cpu: bool = False
    decoder: str = "cpu"
    max_pixels: int = MAX_PIXELS
    cuda: CudaOptions = field(default_factory=CudaOptions)
    tensorrt: TensorrtOptions = field(default_factory=TensorrtOptions)
    tensorrt_rtx: TensorrtRtxOptions = field(default_factory=TensorrtRtxOptions)
    openvino: OpenvinoOptions = field(default_factory=OpenvinoOptions)
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    def __post_init__(self) -> None:
        check_name("provider", self.provider, PROVIDERS)
        check_name("compute precision", self.compute_precision, PRECISIONS)
        check_name("decoder", self.decoder, DECODERS)
        check_whole("batch_size", self.batch_size, 0, MAX_BATCH)
        check_whole("threads", self.threads, 0, MAX_THREADS)
        check_whole("max_pixels", self.max_pixels, 1, 2**62)
        check_type("allow_cpu", self.allow_cpu, bool, "True or False")
        for name, kind in _NESTED.items():
            check_type(name, getattr(self, name), kind, f"of type {kind.__name__}")
        devices = self.gpus
        if not isinstance(devices, tuple) or not all(type(one) is int and one >= 0 for one in devices):
            raise DataError(f"devices must be a tuple of GPU numbers such as (0, 1), found {shown(devices)}")
        if not devices or len(set(devices)) < len(devices):
            raise DataError(f"devices must be one or more GPU numbers without repetition, found {shown(devices)}")
        if self.remote.urls and (self.provider != "auto" or self.compute_precision != "auto" or self.decoder != "cpu"):
            raise DataError("`remote` does not work with `provider`, `compute_precision` or `decoder`")
        if self.compute_precision != "auto" and self.provider not in ("auto", "openvino"):
            found = f"`compute_precision={self.compute_precision!r}`"
            raise DataError(f"{found} applies to `provider='openvino'`; other providers use the artifact's precision")

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs that a GPU provider runs on."""
        return (0,) if self.devices is None else self.devices

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some options changed.

        Raises
        ------
        DataError
            An unknown option (the message suggests similar names) or an invalid value.
        """
        known = tuple(one.name for one in fields(self))
        for name in changes:
            check_name("option", name, known)
        if isinstance(changes.get("devices"), list | range):
            changes["devices"] = tuple(changes["devices"])
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return options from the values that `to_dict` returned; missing keys have the default values.

        Raises
        ------
        DataError
            An unknown key or an invalid value.
        """
        check_type("options", values, Mapping, "a dictionary")
        try:
            made = {name: _NESTED[name](**value) if name in _NESTED else value for name, value in values.items()}
        except TypeError as error:
            raise DataError(f"invalid provider options: {error}") from error
        return cls().changed(**made)


_NESTED: dict[str, Any] = {one.name: one.default_factory for one in fields(RunOptions) if callable(one.default_factory)}


class RunSettings(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments."""

    provider: str
    batch_size: int
    compute_precision: str
    threads: int
    devices: tuple[int, ...] | None
    allow_cpu: bool
    decoder: str
    max_pixels: int
    cuda: CudaOptions
    tensorrt: TensorrtOptions
    tensorrt_rtx: TensorrtRtxOptions
    openvino: OpenvinoOptions
    remote: RemoteOptions
