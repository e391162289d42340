"""The command-line options of `cloudrt.RunOptions`, shared by all commands that run an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import click

from cloudrt.options import (
    DECODERS,
    GPU_PROVIDERS,
    MAX_BATCH,
    MAX_STREAMS,
    MAX_THREADS,
    PRECISIONS,
    PROVIDERS,
    CudaOptions,
    OpenvinoOptions,
    RunOptions,
    TensorrtOptions,
    TensorrtRtxOptions,
)
from cloudrt.system.terminal import Failure

_OPTIONS = (
    click.option(
        "--provider",
        type=click.Choice(PROVIDERS),
        default="auto",
        show_default=True,
        help="auto measures once per model and machine, and uses the fastest provider whose results agree with those "
        "of cpu in fp32.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1, MAX_BATCH),
        help="Images per batch. Default: measured; 32 in TensorRT and on remote servers.",
    ),
    click.option(
        "--compute-precision",
        type=click.Choice(PRECISIONS),
        default="auto",
        show_default=True,
        help="Precision in which OpenVINO computes. auto: below fp32 for fp16 and int8 artifacts, if the CPU supports "
        "it and the results agree.",
    ),
    click.option(
        "--streams", type=click.IntRange(1, MAX_STREAMS), help="Number of concurrent batches. Default: measured."
    ),
    click.option("--cuda-graph/--no-cuda-graph", default=None, help="Use a CUDA graph. Default: measured."),
    click.option(
        "--channels-last/--no-channels-last",
        default=None,
        help="Run CUDA's convolutions in NHWC layout, with fused bias. Default: measured.",
    ),
    click.option("--devices", help="GPU numbers such as 0,1; one engine runs on each. Default: 0."),
    click.option(
        "--allow-cpu",
        is_flag=True,
        help="With a GPU provider, allow convolutions, resizes and normalisations on the CPU.",
    ),
    click.option(
        "--decoder",
        type=click.Choice(DECODERS),
        default="cpu",
        show_default=True,
        help="gpu: decode JPEGs with nvImageCodec, which detects truncated files but not all damaged ones.",
    ),
    click.option(
        "--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads per stage. Default: all usable cores."
    ),
    click.option(
        "--max-megapixels",
        type=click.FloatRange(0, 1e6, min_open=True),
        default=100,
        show_default=True,
        help="Images with more megapixels fail; those that are cut into tiles may have 10 times as many.",
    ),
)


def _refuse_device(_context: click.Context, _option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError("no option --device: use --provider, such as --provider cuda, or --devices 0 for GPU 0")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; `take_run_options` converts their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.option("--device", hidden=True, expose_value=False, callback=_refuse_device)(command)


def take_run_options(given: dict[str, Any]) -> RunOptions:
    """Remove the values of `run_options` from a command's arguments, and return them as one object.

    Raises
    ------
    Failure, DataError
        An invalid value.
    """
    megapixels, devices, streams = given.pop("max_megapixels"), given.pop("devices"), given.pop("streams") or 0
    provider, graph, layout = given.pop("provider"), given.pop("cuda_graph"), given.pop("channels_last")
    if not megapixels >= 1e-6:  # nan too
        raise Failure(f"--max-megapixels {megapixels:g}: expected at least 1e-06, which is one pixel")
    try:
        numbers = None if devices is None else tuple(int(one) for one in devices.split(","))
        if numbers and min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise Failure(f"--devices {devices}: expected GPU numbers such as 0,1") from None
    if (streams or graph is not None) and provider in ("auto", "cpu"):
        raise Failure(f"--streams and --cuda-graph need a --provider that supports them, not {provider}")
    if graph is not None and provider not in GPU_PROVIDERS:
        raise Failure(f"--cuda-graph needs --provider {' or '.join(GPU_PROVIDERS)}")
    if layout is not None and provider != "cuda":
        raise Failure("--channels-last needs --provider cuda")
    return RunOptions(
        provider=provider,
        batch_size=given.pop("batch_size") or 0,
        compute_precision=given.pop("compute_precision"),
        threads=given.pop("threads") or 0,
        devices=numbers,
        allow_cpu=given.pop("allow_cpu"),
        decoder=given.pop("decoder"),
        max_pixels=int(megapixels * 1e6),
        cuda=CudaOptions(streams, graph, layout) if provider == "cuda" else CudaOptions(),
        tensorrt=TensorrtOptions(streams, graph) if provider == "tensorrt" else TensorrtOptions(),
        tensorrt_rtx=TensorrtRtxOptions(streams, graph) if provider == "tensorrt-rtx" else TensorrtRtxOptions(),
        openvino=OpenvinoOptions(streams) if provider == "openvino" else OpenvinoOptions(),
    )


def suggested_inputs(data: Path | None) -> str:
    """Return the test_images in or beside the folder `data`, quoted for a command; a placeholder if there are none."""
    found = [folder / "test_images" for folder in (data, data.parent)] if data else []
    return next((quote(str(folder)) for folder in found if folder.is_dir()), "FOLDER_OF_IMAGES")
