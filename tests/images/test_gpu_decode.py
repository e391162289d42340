"""The GPU's decoder, driven on the CPU: nvImageCodec has a backend for it. What the GPU itself does is not run here."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from support.pictures import FILES, encoded, imread
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

import cloudrt.images.gpu_decode
from cloudrt.cli.infer import infer
from cloudrt.errors import DataError, ProviderError
from cloudrt.images.decoding import Decoded, Decoding, open_decoder
from cloudrt.images.gpu_decode import GpuJpegDecoder
from cloudrt.images.headers import MAX_PIXELS, has_end
from cloudrt.images.image import ImageFile, decode, load_image, resize
from cloudrt.system.nvidia import Driver, nvidia_driver
from cloudrt.system.statistics import StageStats

INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None
needs_codec = pytest.mark.skipif(not INSTALLED, reason="nvImageCodec is not installed")
SIZE = (64, 96)


@pytest.fixture(scope="module")
def decoder() -> GpuJpegDecoder:
    return GpuJpegDecoder(on_cpu=True)


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
        found += [One(key, group.images[row], group.errors.get(row)) for row, key in enumerate(group.keys)]
    return found


@needs_codec
def test_a_batch_of_jpegs_is_what_opencv_reads(decoder: GpuJpegDecoder, tmp_path: Path) -> None:
    files = [write_jpeg(tmp_path / f"{seed}.jpg", seed, (100 + seed, 151)).path for seed in range(5)]
    images = decoder.decode([file.read_bytes() for file in files])
    for file, image in zip(files, images, strict=True):
        wanted = cv2.cvtColor(imread(file), cv2.COLOR_BGR2RGB).astype(int)
        assert image is not None and image.shape == wanted.shape
        # Decoders differ in how they enlarge the colours; brightness is the same.
        assert abs(image.astype(int) - wanted).mean() < 2
        assert abs(image.mean(axis=2) - wanted.mean(axis=2)).mean() < 2


@needs_codec
def test_inputs_of_every_kind_as_the_cpus_decoder_has_them(decoder: GpuJpegDecoder, tmp_path: Path) -> None:
    """Keys, order and failures are the same; the pixels are those of a full decode, which the CPU's is near to."""
    inputs: list[object] = [write_jpeg(tmp_path / f"{seed}.jpg", seed) for seed in range(40)]
    jpeg = encoded("JPEG")
    for name, make in FILES.items():
        (tmp_path / f"odd {name}.jpg").write_bytes(make())
        inputs.append(ImageFile(f"odd {name}.jpg", tmp_path / f"odd {name}.jpg"))
    inputs[7:7] = [jpeg[: len(jpeg) // 2], jpeg[:-2], b"", b"text", jpeg, np.zeros((30, 40, 3), np.uint8)]
    inputs[20:20] = [str(tmp_path / "gone.jpg"), np.zeros((3, 4), np.uint8), encoded("PNG"), tmp_path / "0.jpg"]
    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(1) as gpu:
        ours = one_by_one(Decoding(SIZE, MAX_PIXELS, StageStats(2), decoder).run(inputs, threads, empty, 3, gpu))  # type: ignore[arg-type]
        theirs = one_by_one(Decoding(SIZE, MAX_PIXELS, StageStats(2)).run(inputs, threads, empty, 3))  # type: ignore[arg-type]
    assert [one.key for one in ours] == [one.key for one in theirs]
    assert [one.error for one in ours] == [one.error for one in theirs]
    assert sum(one.error is not None for one in ours) >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.image.shape == (*SIZE, 3)
        assert abs(one.image.astype(int) - other.image).mean() < 4, one.key
    for file in inputs[:7]:
        assert isinstance(file, ImageFile)
        full = resize(decode(file.path.read_bytes()), SIZE).astype(int)
        assert abs(full - next(one.image for one in ours if one.key == file.key)).mean() < 1


def test_a_cut_jpeg_has_no_end() -> None:
    jpeg = encoded("JPEG")
    assert has_end(jpeg) and has_end(jpeg + b"\0" * 9)
    assert not any(has_end(jpeg[:length]) for length in range(0, len(jpeg) - 1, 7))
    assert not has_end(b"")
    thumbnail = b"\xff\xd8\xff\xe1\x00\x06\xff\xd9\xff\xd9"  # an end inside a segment before the scan
    assert not has_end(thumbnail + jpeg[2:-2])


@needs_codec
def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudrt.images.gpu_decode, "nvidia_driver", lambda: None)
    with pytest.raises(ProviderError, match="no NVIDIA GPU, or no driver: use --decoder cpu"):
        open_decoder("gpu", 2, 0)
    monkeypatch.setattr(cloudrt.images.gpu_decode, "nvidia_driver", lambda: Driver((13, 0), ("H200",)))
    monkeypatch.setattr(cloudrt.images.gpu_decode, "find_spec", lambda name: None)
    with pytest.raises(ProviderError, match=r"not installed: pip install 'cloudrt\[gpu-decode\]'"):
        open_decoder("gpu", 2, 0)
    assert open_decoder("cpu", 2, 0) is None
    with pytest.raises(DataError, match="cpu, gpu"):
        open_decoder("tpu", 2, 0)


@needs_codec
def test_the_command_runs_with_it(decoder: GpuJpegDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_artifact(tmp_path / "model.onnx", SIZE, SMALL_GRIDS)
    for seed in range(20):
        write_jpeg(tmp_path / "in" / f"{seed}.jpg", seed)
    (tmp_path / "in" / "bad.jpg").write_bytes(encoded("JPEG")[:700])
    words = [str(tmp_path / "in"), "-m", str(model), "--provider", "cpu", "--batch-size", "4", "--decoder", "gpu"]
    refused = CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv")])
    assert refused.exit_code == 2
    assert "--decoder gpu cannot run here" in refused.output
    monkeypatch.setattr("cloudrt.inference.pipeline.open_decoder", lambda *_: decoder)
    done = CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv")])
    assert done.exit_code == 1, done.output
    assert "21 images" in done.output and "1 failed" in done.output


@pytest.mark.cuda
@pytest.mark.skipif(nvidia_driver() is None or not INSTALLED, reason="needs an NVIDIA GPU")
def test_the_gpu_decodes_as_the_cpu_does(tmp_path: Path) -> None:
    file = write_jpeg(tmp_path / "0.jpg", 0, (1400, 2100)).path
    (image,) = GpuJpegDecoder().decode([file.read_bytes()])
    assert image is not None
    assert abs(image.astype(int) - load_image(file, (1400, 2100))).mean() < 2
