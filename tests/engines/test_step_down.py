"""A batch size that is halved when memory runs out: no image is lost, and each result has its batch size."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from support.plain import SIZE, picture, pictures, plain_answers
from support.tiny import SMALL_GRIDS, tiny_model, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import MemoryExhausted, ProviderError
from cloudrt.inference.journal import Journal
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import parse_artifact


def fits(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let batches of more than `most` images run out of memory; return the sizes that are tried."""
    tried: list[int] = []
    real = OrtEngine.run

    def run(self: OrtEngine, batch: NDArray[np.uint8]) -> object:
        tried.append(len(batch))
        if len(batch) > most:
            raise MemoryExhausted("cuda has no memory for this")
        return real(self, batch)

    monkeypatch.setattr(OrtEngine, "run", run)
    return tried


@pytest.mark.parametrize("size", [4, 7, 16])
def test_no_image_is_lost_when_memory_runs_out(
    model: Path, monkeypatch: pytest.MonkeyPatch, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    tried = fits(2, monkeypatch)
    inputs: list[Any] = [*pictures(20)]
    inputs[5:5] = [b"no image", b"nor this"]
    with Segmenter(model, provider="cpu", batch_size=size) as segmenter:
        results = list(segmenter.predict(inputs))
        assert segmenter.batch_size <= 2
        assert segmenter.identity().batch_size == size  # what the run began with
        rules = segmenter.artifact.rules
    assert [result.image for result in results] == [f"image-{number}" for number in range(22)]
    for result, image in zip(results, inputs, strict=True):
        assert (result.error is not None) == isinstance(image, bytes)
        if not isinstance(image, bytes):
            assert result.rle == plain_answers(model, image, rules)
        assert result.batch_size == segmenter.batch_size
        assert result.batch <= int(result.image.split("-")[1]) < result.batch + 2 * result.batch_size + 2
    assert sum(one == size for one in tried) == 1
    assert f"continuing with batches of {size // 2}" in caplog.text


def test_a_single_image_that_does_not_fit_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits(0, monkeypatch)
    before = threading.active_count()
    with (
        Segmenter(model, provider="cpu", batch_size=4) as segmenter,
        pytest.raises(MemoryExhausted, match="no memory for this"),
    ):
        list(segmenter.predict([picture(1)] * 9))
    assert threading.active_count() == before


def test_batches_that_fail_at_once_step_down_once() -> None:
    """Two streams run out of memory together: the second finds that the batch is halved already."""
    meet = threading.Barrier(2, timeout=10)
    proto = tiny_model(SIZE, SMALL_GRIDS)
    artifact = parse_artifact(proto, "m")

    class Failing:
        streams = 2

        def __init__(self, batch_size: int) -> None:
            self.batch_size, self.artifact = batch_size, artifact

        def run(self, batch: NDArray[np.uint8]) -> Any:
            if len(batch) > 4:
                meet.wait()
                raise MemoryExhausted("both")
            return np.zeros((len(batch), *artifact.output_shape), np.uint8), None

        def close(self) -> None: ...

    pool = EnginePool(lambda device, size: Failing(size), (0,), 8)  # type: ignore[arg-type,return-value]
    sizes = []

    def work() -> None:
        try:
            pool.run([picture(1)] * 8)
        except MemoryExhausted as reason:
            pool.step_down(8, reason)
            sizes.append(pool.batch_size)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sizes == [4, 4]
    assert pool.slots == 2
    with pytest.raises(MemoryExhausted, match="8 images do not fit into batches of 4"):
        pool.run([picture(1)] * 8)
    assert len(pool.run([picture(1)] * 3)[0]) == 3


@pytest.mark.parametrize("after", [3, 9, 16, 21])
def test_a_run_that_stepped_down_resumes_with_its_batch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    for number in range(24):
        write_jpeg(tmp_path / "in" / f"{number:02}.jpg", number)
    tried = fits(2, monkeypatch)
    words = [str(tmp_path / "in"), "-m", str(model), "--provider", "cpu", "--batch-size", "8"]
    assert CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "whole.csv")]).exit_code == 0
    real, left = Journal.add, [after]

    def stop(self: Journal, record: Any) -> None:
        real(self, record)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        assert CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv")]).exit_code == 130
    tried.clear()
    done = CliRunner().invoke(infer, [*words, "-o", str(tmp_path / "s.csv"), "--resume"])
    assert done.exit_code == 0, done.output
    assert set(tried) == {2}  # it did not run out of memory again
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("streams", [1, 2])
def test_engines_that_cannot_be_opened_again_end_the_run(streams: int) -> None:
    """No thread waits for an engine that cannot be opened."""
    artifact = parse_artifact(tiny_model(SIZE, SMALL_GRIDS), "m")

    class Small:
        def __init__(self, batch_size: int) -> None:
            if batch_size < 8:
                raise ProviderError("the driver is gone")
            self.batch_size, self.artifact, self.streams = batch_size, artifact, streams

        def run(self, batch: NDArray[np.uint8]) -> Any:
            raise MemoryExhausted("no memory")

        def close(self) -> None: ...

    pool = EnginePool(lambda device, size: Small(size), (0,), 8)  # type: ignore[arg-type,return-value]
    errors: list[str] = []

    def work() -> None:
        try:
            try:
                pool.run([picture(1)])
            except MemoryExhausted as reason:
                pool.step_down(8, reason)
                pool.run([picture(1)])
        except ProviderError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert errors and set(errors) == {"the driver is gone"}


def test_a_batch_size_that_another_thread_has_reduced_is_recorded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one image fits into a batch of either size, so that the engine itself raises no MemoryExhausted."""
    real, run, runs = EnginePool.run_each, OrtEngine.run, list[int]()

    def reduced(self: EnginePool, *given: Any) -> Any:
        if self.batch_size == 4:
            self.resize(2)
        return real(self, *given)

    def counted(self: OrtEngine, images: NDArray[np.uint8]) -> Any:
        runs.append(len(images))
        return run(self, images)

    with Segmenter(model, provider="cpu", batch_size=4) as segmenter:
        monkeypatch.setattr(EnginePool, "run_each", reduced)
        monkeypatch.setattr(OrtEngine, "run", counted)
        [result] = segmenter.predict([picture(1)])
    assert (runs, result.batch_size) == ([2], 2)
