"""Decoding and resizing of JPEGs on a GPU, to batches in its memory that the engine reads.

    JPEG bytes --nvImageCodec--> images of any size --ONNX Runtime--> rows of a batch on the device

Images are reduced and resized as on the CPU: see `cloudrt.images.resize`. Both steps are linear and separable, so that
each is two matrix products, rows x image x columns. ONNX Runtime can compute them with any provider; the tests use its
CPU provider to compare them with the CPU's decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cloudrt.engines.base import DIAGNOSIS, brief, exhausted
from cloudrt.engines.binding import open_gpu
from cloudrt.engines.libraries import load_libraries
from cloudrt.engines.onnxruntime import REFUSALS
from cloudrt.errors import DataError, MemoryExhausted, ProviderError
from cloudrt.images.gpu_decode import GpuJpegDecoder
from cloudrt.images.resize import reduction_weights, scale_that_covers
from cloudrt.labels import Grid
from cloudrt.options import DECODERS
from cloudrt.system.cuda import CAPTURE, Arena, Batch, Device, DeviceArray

KEPT = 64
"""Number of resize matrices that are kept on the device; each belongs to one length of an axis."""
PIXELS = 2**25
"""Maximum number of pixels that are resized in one call (400 MB as float32, or eleven images of 2100x1400); a larger
image is resized alone."""
WEIGHTS = 2**24
"""Largest number of weights of a resize matrix (64 MB); JPEGs with longer sides are left to the CPU."""


class GpuImages:
    """Decodes JPEGs to batches on a device; see `cloudrt.images.decoding.BatchDecoder`.

    Calls of `decode` must not overlap.

    Parameters
    ----------
    size
        Height and width of the resized images.
    decoder
        Decodes to the memory of `device`.
    device
        The GPU, or `HostDevice` in tests.

    Raises
    ------
    ProviderError
        Raised by every method if the GPU fails; `MemoryExhausted` if its memory runs out.
    """

    def __init__(self, size: Grid, decoder: GpuJpegDecoder, device: Device) -> None:
        self.size, self.place = size, device.place
        self._decoder, self._device = decoder, device
        self._arena, self._stream = Arena(device.allocate), device.open_stream()
        self._resize = DeviceResize(size, device.place)

    def empty(self, count: int) -> DeviceArray:
        """Return an uninitialised array for `count` images, (count, H, W, 3) uint8, on the device."""
        with _errors_explained():
            return self._arena.on_device((count, *self.size, 3))

    def decode(self, files: Sequence[bytes], batch: Batch, rows: Sequence[int]) -> list[bool]:
        """Decode and resize each JPEG to its row of a batch; return for each whether it was decoded.

        If the batch is on the host, the resized images are copied there.
        """
        with _errors_explained():
            return self._decode(files, batch, rows)

    def _decode(self, files: Sequence[bytes], batch: Batch, rows: Sequence[int]) -> list[bool]:
        target = batch if isinstance(batch, DeviceArray) else self.empty(len(batch))
        with CAPTURE:  # an allocation by the decoder would invalidate the capture of a CUDA graph
            images = self._decoder.decode(files, getattr(self._stream, "value", None) or 0)
            self._device.wait(self._stream)
            images = [
                image if image is not None and _is_short(image.shape[:2], self.size) else None for image in images
            ]
            shapes: dict[tuple[int, ...], list[tuple[DeviceArray, int]]] = {}
            for image, row in zip(images, rows, strict=True):
                if image is not None:
                    shapes.setdefault(image.shape, []).append((image, target.address_of(row)))
            for shape, same in shapes.items():
                step = max(1, PIXELS // (shape[0] * shape[1]))
                for begin in range(0, len(same), step):
                    self._resize_all(same[begin : begin + step])
        if not isinstance(batch, DeviceArray):
            for row in [row for image, row in zip(images, rows, strict=True) if image is not None]:
                self._device.copy(batch[row].ctypes.data, target.address_of(row), batch[row].nbytes, self._stream)
            self._device.wait(self._stream)
        return [image is not None for image in images]

    def _resize_all(self, images: Sequence[tuple[DeviceArray, int]]) -> None:
        """Resize images of one shape together, each to its address; one call per image is slower."""
        several = self._arena.on_device((len(images), *images[0][0].shape))
        for row, (image, _) in enumerate(images):
            self._device.copy(several.address_of(row), image.address, image.nbytes, self._stream)
        self._device.wait(self._stream)
        resized = self.empty(len(images))
        self._resize.run(several, resized)
        for row, (_, target) in enumerate(images):
            self._device.copy(target, resized.address_of(row), prod(resized.shape[1:]), self._stream)
        self._device.wait(self._stream)

    def put(self, image: NDArray[np.uint8], batch: DeviceArray, row: int) -> None:
        """Copy an image of the network's size from the host to a row of a batch."""
        with _errors_explained():
            stream = self._device.open_stream()
            self._device.copy(batch.address_of(row), image.ctypes.data, image.nbytes, stream)
            self._device.wait(stream)


@contextmanager
def _errors_explained() -> Iterator[None]:
    """Raise errors of CUDA, nvImageCodec and ONNX Runtime as MemoryExhausted or ProviderError, with a remedy."""
    try:
        yield
    except REFUSALS as error:
        cause = error.with_traceback(None)  # the traceback refers to buffers
        if exhausted(error):
            raise MemoryExhausted(
                f"decoder gpu has too little memory: {brief(error)}: use a smaller `batch_size`, or `decoder='cpu'`"
            ) from cause
        raise ProviderError(f"decoder gpu failed: {brief(error)}: {DIAGNOSIS}") from cause


def _is_short(sides: tuple[int, ...], size: Grid) -> bool:
    """Return whether the matrices that reduce an image to cover `size` have at most `WEIGHTS` entries each."""
    eighths = scale_that_covers((sides[0], sides[1]), size)
    return all(side * (side * eighths // 8) <= WEIGHTS for side in sides)


class DeviceResize:
    """Resizes images on a device like `cloudrt.images.image.load_image` on the CPU.

    Images are first reduced like libjpeg-turbo's scaled decode, unless they are too small for it, and then resized.

    Parameters
    ----------
    size
        Height and width of the results.
    place
        ONNX Runtime's device type and number, such as ("cuda", 0) or ("cpu", 0).
    """

    def __init__(self, size: Grid, place: tuple[str, int]) -> None:
        self.size, self._place = size, place
        self._session = lru_cache(2)(self._open)
        self._on_device = lru_cache(KEPT)(self._upload)

    def run(self, images: DeviceArray, resized: DeviceArray) -> None:
        """Resize (n, H, W, 3) uint8 images on the device to `resized`, (n, *size, 3)."""
        height, width = images.shape[1:3]
        eighths = scale_that_covers((height, width), self.size)
        session = self._session(eighths < 8)
        binding = session.io_binding()
        binding.bind_input("image", *self._place, np.uint8, images.shape, images.address)
        for axis, source, target in zip(("rows", "columns"), (height, width), self.size, strict=True):
            reduced = -(-source * eighths // 8)
            binding.bind_ortvalue_input(axis, self._on_device(reduced, target, 0))
            if eighths < 8:
                binding.bind_ortvalue_input(f"reduced_{axis}", self._on_device(source, reduced, eighths))
        binding.bind_output("resized", *self._place, np.uint8, resized.shape, resized.address)
        session.run_with_iobinding(binding)

    def _open(self, reduce: bool) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        device, number = self._place
        gpu = ("CUDAExecutionProvider", {"device_id": str(number), "use_tf32": "0"})
        return onnxruntime.InferenceSession(
            _resize_graph(self.size, reduce).SerializeToString(),
            options,
            providers=[gpu] if device == "cuda" else ["CPUExecutionProvider"],
            enable_fallback=0,
        )

    def _upload(self, source: int, target: int, eighths: int) -> Any:
        weights = reduction_weights(source, eighths) if eighths else axis_weights(source, target)
        return onnxruntime.OrtValue.ortvalue_from_numpy(weights, *self._place)


def axis_weights(source: int, target: int) -> NDArray[np.float32]:
    """Return the (target, source) matrix that resizes an axis: the weights of OpenCV's INTER_AREA or INTER_LINEAR.

    If the axis shrinks, pixel i of the target is the mean of the source over [i, i + 1) * source / target. If it grows,
    pixel i is interpolated linearly at (i + 0.5) * source / target between the two nearest pixel centres of the source;
    at the edges, it is the nearest pixel.
    """
    scale = source / target
    if target >= source:
        centres = np.clip((np.arange(target) + 0.5) * scale - 0.5, 0, source - 1)
        distance = np.abs(centres[:, None] - np.arange(source))
        return np.asarray(np.maximum(0, 1 - distance), np.float32)
    first = np.arange(target)[:, None] * scale
    last = np.minimum(first + scale, np.arange(1, source + 1))
    weights = np.maximum(0, last - np.maximum(first, np.arange(source)))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _resize_graph(size: Grid, reduce: bool) -> onnx.ModelProto:
    """Return the ONNX graph image (n, H, W, 3) uint8 -> resized (n, h, w, 3) uint8.

    The image is multiplied by the inputs rows (h, H) and columns (w, W); with `reduce`, first by reduced_rows and
    reduced_columns. After each of these one or two steps, levels are rounded and clipped to 0..255.
    """
    steps = ("reduced_", "") if reduce else ("",)
    nodes, levels = [helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT)], "levels"
    for step in steps:
        found, levels = _resize_nodes(levels, step)
        nodes += found
    nodes.append(helper.make_node("Cast", [levels], ["resized"], to=TensorProto.UINT8))
    constants: dict[str, NDArray[Any]] = {
        "lines": np.array([0, 0, -1], np.int64),
        "shape": np.array([0, 0, -1, 3], np.int64),
        "black": np.array(0, np.float32),
        "white": np.array(255, np.float32),
    }
    info = helper.make_tensor_value_info
    weights = [info(f"{step}{axis}", TensorProto.FLOAT, [None, None]) for step in steps for axis in ("rows", "columns")]
    graph = helper.make_graph(
        nodes,
        "resize",
        [info("image", TensorProto.UINT8, ["n", "H", "W", 3]), *weights],
        [info("resized", TensorProto.UINT8, ["n", *size, 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _resize_nodes(levels: str, step: str) -> tuple[list[onnx.NodeProto], str]:
    """Return nodes that resize `levels`, (n, H, W, 3) float, and the name of their output, (n, h, w, 3) float.

    Both MatMul nodes multiply large matrices: rows x (H, W * 3) per image, then (n * h * 3, W) x transposed columns.
    """

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{step}{output}"], **attributes)

    return [
        node("Reshape", [levels, "lines"], "flat"),  # (n, H, W * 3)
        node("MatMul", [f"{step}rows", f"{step}flat"], "shorter"),
        node("Reshape", [f"{step}shorter", "shape"], "apart"),  # (n, h, W, 3)
        node("Transpose", [f"{step}apart"], "planes", perm=[0, 1, 3, 2]),
        node("Transpose", [f"{step}columns"], "turned", perm=[1, 0]),
        node("MatMul", [f"{step}planes", f"{step}turned"], "narrower"),  # (n, h, 3, w)
        node("Round", [f"{step}narrower"], "whole"),
        node("Clip", [f"{step}whole", "black", "white"], "bounded"),
        node("Transpose", [f"{step}bounded"], "pixels", perm=[0, 1, 3, 2]),
    ], f"{step}pixels"


def open_decoder(name: str, size: Grid, threads: int, device: int) -> GpuImages | None:
    """Open the decoder named "gpu"; return None for "cpu".

    Parameters
    ----------
    name
        One of `DECODERS`.
    size
        Height and width of the resized images.
    threads
        Number of CPU threads of the decoder.
    device
        GPU number.

    Raises
    ------
    DataError
        An unknown name.
    ProviderError
        The decoder cannot run on this machine, a CUDA library that resizing needs cannot be loaded, or the GPU fails.
    """
    if name not in DECODERS:
        raise DataError(f"decoder must be one of {', '.join(DECODERS)}, found {name!r}")
    if name == "cpu":
        return None
    with _errors_explained():
        decoder = GpuJpegDecoder(device, threads)
        load_libraries("cuda")
        return GpuImages(size, decoder, open_gpu(device))
