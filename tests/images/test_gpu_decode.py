"""nvImageCodec's decoder, with its CPU backend; one test, marked cuda, uses the GPU backends."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from support.gpu_session import OnTheCpu, stand_in_for_a_gpu
from support.pictures import FILES, encoded, imread, opencv
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

import cloudrt.images.gpu_decode
from cloudrt.cli.infer import infer
from cloudrt.engines.gpu_images import DeviceResize, GpuImages, axis_weights, open_decoder
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import DataError, MemoryExhausted, ProviderError
from cloudrt.images.decoding import Decoded, Decoding, Input
from cloudrt.images.gpu_decode import GpuJpegDecoder
from cloudrt.images.headers import MAX_PIXELS, has_end
from cloudrt.images.image import ImageFile, decode, load_image
from cloudrt.images.resize import resize
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.system.cuda import CAPTURE, Batch, DeviceArray, HostDevice
from cloudrt.system.nvidia import Driver, nvidia_driver
from cloudrt.system.statistics import StageStats

INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None
needs_codec = pytest.mark.skipif(not INSTALLED, reason="nvImageCodec is not installed")
SIZE = (64, 96)


@pytest.fixture(scope="module")
def jpegs() -> GpuJpegDecoder:
    return GpuJpegDecoder(on_cpu=True)


@pytest.fixture(scope="module")
def decoder(jpegs: GpuJpegDecoder) -> GpuImages:
    return GpuImages(SIZE, jpegs, HostDevice())


def on_host(array: DeviceArray) -> NDArray[np.uint8]:
    """Return a copy of an array whose device is the host."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
    return np.ctypeslib.as_array(memory).reshape(array.shape).copy()


class One(NamedTuple):
    """An input of a group."""

    key: str
    image: NDArray[np.uint8]
    error: str | None


def empty() -> NDArray[np.uint8]:
    return np.full((9, *SIZE, 3), 77, np.uint8)


def one_by_one(groups: Iterable[Decoded]) -> list[One]:
    found: list[One] = []
    for group in groups:
        assert group.number == len(found)
        assert len(group.keys) == len(group.images)
        images = on_host(group.images) if isinstance(group.images, DeviceArray) else group.images
        found += [One(key, images[row], group.errors.get(row)) for row, key in enumerate(group.keys)]
    return found


@needs_codec
def test_a_batch_of_jpegs_is_what_opencv_reads(jpegs: GpuJpegDecoder, tmp_path: Path) -> None:
    files = [write_jpeg(tmp_path / f"{seed}.jpg", seed, (100 + seed, 151)).path for seed in range(5)]
    decoded = jpegs.decode([file.read_bytes() for file in files])
    for file, found in zip(files, decoded, strict=True):
        wanted = cv2.cvtColor(imread(file), cv2.COLOR_BGR2RGB).astype(int)
        assert found is not None and found.shape == wanted.shape
        image = on_host(found)
        # Decoders upsample chroma differently; luminance is the same.
        assert abs(image.astype(int) - wanted).mean() < 2
        assert abs(image.mean(axis=2) - wanted.mean(axis=2)).mean() < 2


@needs_codec
@pytest.mark.parametrize("stays", [False, True])
def test_inputs_of_every_kind_give_what_the_cpus_decoder_gives(decoder: GpuImages, tmp_path: Path, stays: bool) -> None:
    """Keys, order and failures are the same; the pixels are close to the CPU's.

    They stay on the device or are copied to the host.
    """
    inputs: list[object] = [write_jpeg(tmp_path / f"{seed}.jpg", seed) for seed in range(40)]
    jpeg = encoded("JPEG")
    for name, make in FILES.items():
        (tmp_path / f"odd {name}.jpg").write_bytes(make())
        inputs.append(ImageFile(f"odd {name}.jpg", tmp_path / f"odd {name}.jpg"))
    inputs[7:7] = [jpeg[: len(jpeg) // 2], jpeg[:-2], b"", b"text", jpeg, np.zeros((30, 40, 3), np.uint8)]
    inputs[20:20] = [str(tmp_path / "gone.jpg"), np.zeros((3, 4), np.uint8), encoded("PNG"), tmp_path / "0.jpg"]
    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(1) as gpu:
        take: Callable[[], Batch] = (lambda: decoder.empty(9)) if stays else empty
        stats = StageStats(2)
        ours = one_by_one(Decoding(SIZE, MAX_PIXELS, stats, decoder).run(inputs, threads, take, 3, gpu))  # type: ignore[arg-type]
        theirs = one_by_one(Decoding(SIZE, MAX_PIXELS, StageStats(2)).run(inputs, threads, empty, 3))  # type: ignore[arg-type]
    assert stats.count == len(inputs)
    assert [one.key for one in ours] == [one.key for one in theirs]
    assert [one.error for one in ours] == [one.error for one in theirs]
    assert sum(one.error is not None for one in ours) >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.image.shape == (*SIZE, 3)
        assert abs(one.image.astype(int) - other.image).mean() < 4, one.key


def test_a_cut_jpeg_has_no_end() -> None:
    jpeg = encoded("JPEG")
    assert has_end(jpeg) and has_end(jpeg + b"\0" * 9)
    assert not any(has_end(jpeg[:length]) for length in range(0, len(jpeg) - 1, 7))
    assert not has_end(b"")
    thumbnail = b"\xff\xd8\xff\xe1\x00\x06\xff\xd9\xff\xd9"  # an end inside a segment before the scan
    assert not has_end(thumbnail + jpeg[2:-2])


SIZES = [(64, 96), (65, 97), (64, 200), (200, 96), (350, 525), (1400, 2100), (30, 40), (30, 300), (128, 192)]
EIGHTHS = [(512 // eighths, 768 // eighths) for eighths in range(1, 9)]


@pytest.mark.parametrize("size", [*SIZES, *EIGHTHS])
def test_the_device_resizes_as_the_cpu_does(size: tuple[int, int]) -> None:
    """They differ by one level at most, rarely when shrinking; OpenCV enlarges in fixed point."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    found = np.empty((2, *SIZE, 3), np.uint8)
    arrays = [DeviceArray(array.ctypes.data, array.shape) for array in (images, found)]
    DeviceResize(SIZE, ("cpu", 0)).run(*arrays)
    wanted = np.stack([load_image(image, SIZE, MAX_PIXELS) for image in images])
    difference = abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    shrinks = size[0] >= SIZE[0] and size[1] >= SIZE[1]
    assert difference.mean() < (0.15 if shrinks else 0.3)  # means of four pixels often end in .5


@needs_codec
@pytest.mark.parametrize("size", [(350, 525), (1400, 2100), (101, 155)])
def test_the_device_decodes_as_libjpeg_does(decoder: GpuImages, size: tuple[int, int]) -> None:
    """At a smaller scale; without colours, which decoders upsample differently."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 1), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 1.5).reshape(size)
    _, content = cv2.imencode(".jpg", cv2.normalize(smooth, np.empty_like(smooth), 0, 255, cv2.NORM_MINMAX))
    batch = np.empty((1, *SIZE, 3), np.uint8)
    assert decoder.decode([content.tobytes()], batch, [0]) == [True]
    wanted = load_image(content.tobytes(), SIZE, MAX_PIXELS).astype(int)
    full = resize(decode(content.tobytes()), SIZE).astype(int)
    assert abs(batch[0] - wanted).mean() < 0.2 and abs(batch[0] - wanted).max() <= 2
    assert abs(full - wanted).mean() > 1  # a full decode differs more


@needs_codec
def test_long_images_are_left_to_the_cpu(decoder: GpuImages) -> None:
    """The matrix of the long side would take 162 MB."""
    batch = empty()
    files = [opencv(".jpg", np.full((side, 200, 3), 90, np.uint8)) for side in (2000, 9000)]
    assert decoder.decode(files, batch, [0, 1]) == [True, False]
    assert abs(batch[0].astype(int) - 90).max() <= 1 and (batch[1] == 77).all()
    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(1) as gpu:
        groups = Decoding(SIZE, MAX_PIXELS, StageStats(2), decoder).run(files, threads, empty, 3, gpu)
        (found,) = groups
    assert not found.errors and isinstance(found.images, np.ndarray) and abs(found.images.astype(int) - 90).max() <= 1


@needs_codec
def test_images_of_one_size_are_resized_together(
    jpegs: GpuJpegDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of at most `PIXELS` pixels; images that cannot be decoded are left out."""
    sizes = [(100, 150), (120, 150), (100, 150), None, (100, 150), (120, 150)]
    files = [write_jpeg(tmp_path / f"{row}.jpg", row, size).path if size else None for row, size in enumerate(sizes)]
    decoder, shapes = GpuImages(SIZE, jpegs, HostDevice()), []
    run = DeviceResize.run

    def noted(self: DeviceResize, images: DeviceArray, resized: DeviceArray) -> None:
        shapes.append(images.shape)
        run(self, images, resized)

    monkeypatch.setattr(DeviceResize, "run", noted)
    monkeypatch.setattr("cloudrt.engines.gpu_images.PIXELS", 2 * 100 * 150)
    rows = [5, 4, 3, 2, 1, 0]
    batch = np.full((7, *SIZE, 3), 9, np.uint8)
    done = decoder.decode([file.read_bytes() if file else b"no image" for file in files], batch, rows)
    assert done == [bool(file) for file in files]
    assert sorted(shapes) == [(1, 100, 150, 3), (1, 120, 150, 3), (1, 120, 150, 3), (2, 100, 150, 3)]
    for file, row in zip(files, rows, strict=True):
        if file:
            assert abs(batch[row].astype(int) - load_image(decode(file.read_bytes()), SIZE, MAX_PIXELS)).mean() < 1
    assert (batch[6] == 9).all()


@pytest.mark.parametrize(("source", "target"), [(100, 7), (7, 7), (7, 100), (2100, 288), (3, 2)])
def test_weights_are_means(source: int, target: int) -> None:
    weights = axis_weights(source, target)
    assert weights.shape == (target, source)
    assert weights.sum(axis=1) == pytest.approx(1)
    assert weights.min() >= 0
    if target < source:  # every pixel counts the same
        assert weights.sum(axis=0) == pytest.approx(target / source, rel=1e-5)


@needs_codec
def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudrt.images.gpu_decode, "nvidia_driver", lambda: None)
    with pytest.raises(ProviderError, match="no NVIDIA GPU, or no driver: use `decoder='cpu'`"):
        open_decoder("gpu", SIZE, 2, 0)
    monkeypatch.setattr(cloudrt.images.gpu_decode, "nvidia_driver", lambda: Driver((13, 0), ("H200",)))
    monkeypatch.setattr(cloudrt.images.gpu_decode, "find_spec", lambda name: None)
    with pytest.raises(ProviderError, match=r"not installed: pip install '\.\[gpu-decode\]'"):
        open_decoder("gpu", SIZE, 2, 0)
    assert open_decoder("cpu", SIZE, 2, 0) is None
    with pytest.raises(DataError, match="cpu, gpu"):
        open_decoder("tpu", SIZE, 2, 0)


@needs_codec
def test_images_stay_on_the_device(decoder: GpuImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine reads the batch where the decoder wrote it; results equal those of images copied to the host.

    The device is simulated in host memory. The last batch is not full, a PNG and a failure are among the JPEGs, and
    memory runs out at the first batch.
    """
    model = tiny_artifact(tmp_path / "model.onnx", SIZE, SMALL_GRIDS)
    inputs: list[Input] = [write_jpeg(tmp_path / f"{seed}.jpg", seed, (90 + 7 * seed, 150)) for seed in range(21)]
    inputs[5:5] = [encoded("PNG"), encoded("JPEG")[:700]]
    with Segmenter(model, provider="cpu", batch_size=4, threads=2) as segmenter:
        segmenter.decoding.decoder = decoder
        wanted = [(result.rle, result.error) for result in segmenter.predict(inputs)]
    assert sum(error is not None for _, error in wanted) == 1
    loaded = load_model(model)
    artifact = parse_artifact(loaded, model)
    with Segmenter(model, provider="cpu", batch_size=1, threads=2) as segmenter:
        segmenter.pool.close()
        stand_in_for_a_gpu(monkeypatch)
        run, sizes = OnTheCpu.run_with_iobinding, list[int]()

        def short(self: OnTheCpu, binding: object, options: onnxruntime.RunOptions) -> None:
            size = self.real.get_inputs()[0].shape[0]
            sizes.append(size)
            if size > 4 and sizes.count(size) > 4:  # the first four are warm-up runs
                raise RuntimeError("CUDA failure 2: out of memory")
            run(self, binding, options)

        monkeypatch.setattr(OnTheCpu, "run_with_iobinding", short)
        monkeypatch.setattr(OrtEngine, "empty", None)  # no batch on the host is requested
        segmenter.pool = EnginePool(lambda _, size: OrtEngine(loaded, artifact, "cuda", size, 1), (0,), 8)
        segmenter.decoding.decoder = decoder
        found = [(result.rle, result.error) for result in segmenter.predict(inputs)]
        assert segmenter.batch_size == 4
    assert found == wanted


def test_decoding_waits_while_a_graph_is_captured() -> None:
    called = threading.Event()

    class Decoder:
        def decode(self, files: list[bytes], stream: int) -> list[None]:
            called.set()
            return [None] * len(files)

    images = GpuImages(SIZE, Decoder(), HostDevice())  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        with CAPTURE:
            done = pool.submit(images.decode, [b""], empty(), [0])
            assert not called.wait(0.2)
        assert done.result(60) == [False] and called.is_set()


@needs_codec
@pytest.mark.parametrize(
    ("call", "text", "kind", "words"),
    [
        ("copy", "CUDA failure 719: lost ; cudaMemcpyAsync", ProviderError, "failed: .*719.*: cloudrt doctor"),
        ("allocate", "CUDA failure 2: out of memory ; cudaMalloc", MemoryExhausted, "memory: .*: use a smaller"),
    ],
)
def test_a_gpu_that_fails_while_it_decodes_ends_the_run(
    jpegs: GpuJpegDecoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    text: str,
    kind: type[Exception],
    words: str,
) -> None:
    """One line with a remedy: images are neither failures nor decoded on the CPU instead."""

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(HostDevice, call, fail)
    model = tiny_artifact(tmp_path / "model.onnx", SIZE, SMALL_GRIDS)
    with Segmenter(model, provider="cpu", batch_size=4, threads=2) as segmenter:
        segmenter.decoding.decoder = GpuImages(SIZE, jpegs, HostDevice())
        with pytest.raises(kind, match=f"^decoder gpu .*{words}") as caught:
            list(segmenter.predict([encoded("JPEG")] * 9))
    assert type(caught.value) is kind and "\n" not in str(caught.value)


@needs_codec
def test_the_command_runs_with_it(decoder: GpuImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_artifact(tmp_path / "model.onnx", SIZE, SMALL_GRIDS)
    for seed in range(20):
        write_jpeg(tmp_path / "in" / f"{seed}.jpg", seed)
    (tmp_path / "in" / "bad.jpg").write_bytes(encoded("JPEG")[:700])
    words = [str(tmp_path / "in"), "-m", str(model), "--provider", "cpu", "--batch-size", "4", "--decoder", "gpu"]
    with monkeypatch.context() as patch:
        patch.setattr(cloudrt.images.gpu_decode, "nvidia_driver", lambda: None)
        refused = CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv")])
    assert refused.exit_code == 2
    assert "decoder gpu cannot run here" in refused.output
    monkeypatch.setattr("cloudrt.inference.pipeline.open_decoder", lambda *_: decoder)
    done = CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv")])
    assert done.exit_code == 1, done.output
    assert "21 images" in done.output and "1 failed" in done.output


@pytest.mark.cuda
@pytest.mark.skipif(nvidia_driver() is None or not INSTALLED, reason="needs an NVIDIA GPU")
def test_the_gpu_decodes_as_the_cpu_does(tmp_path: Path) -> None:
    file = write_jpeg(tmp_path / "0.jpg", 0, (1400, 2100)).path
    decoder = open_decoder("gpu", (1400, 2100), 2, 0)
    assert decoder is not None
    image = np.empty((1, 1400, 2100, 3), np.uint8)
    assert decoder.decode([file.read_bytes()], image, [0]) == [True]
    assert abs(image[0].astype(int) - load_image(file, (1400, 2100))).mean() < 2
