"""Runs that are repeated or resumed on a cluster; the workers run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.files import contents
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.cluster import driver
from cloudrt.cluster.listing import ListedImage
from cloudrt.cluster.nodes import Share
from cloudrt.cluster.partitions import Partitions
from cloudrt.cluster.worker import Job
from cloudrt.engines.plan import Plan
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.pipeline import Segmenter

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (64, 96), SMALL_GRIDS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, and one worker in this process."""

    @contextmanager
    def local(_address: object) -> Iterator[None]:
        yield

    def settle(job: Job, _share: Share) -> tuple[Plan, Identity]:
        with Segmenter(model, job.options) as segmenter:
            return segmenter.plan, segmenter.identity()

    def run(
        job: Job,
        parts: Sequence[Sequence[ListedImage]],
        todo: Sequence[int],
        _share: Share,
        done: Callable[..., object],
    ) -> None:
        assert job.out
        for number in todo:
            with Segmenter(model, job.options) as segmenter:
                found = list(segmenter.predict([one.source(()) for one in parts[number]]))
            rows = [Record(one.image, tuple(one.rle.values()), one.error, 0) for one in found]
            Partitions(job.out, job.form, SMALL_GRIDS, run=job.run).write(number, rows)
            done({"number": number, "images": len(rows), "failed": sum(one.error is not None for one in rows)})

    for name, fake in {
        "connected": local,
        "watched": local,
        "list_nodes": list,
        "share_out": lambda *_: Share(1, 1, 0),
        "check_nodes": lambda *_: None,
        "settle": settle,
        "run_partitions": run,
    }.items():
        monkeypatch.setattr(driver, name, fake)
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_jpeg(tmp_path / "in" / f"{number}.jpg", number)
    return tmp_path


def spread(model: Path, *more: str) -> Result:
    words = ["in", "-m", str(model), "-o", "s.csv", "--provider", "cpu", "--batch-size", "2", "--partition-size", "2"]
    return CliRunner().invoke(infer, [*words, "--cluster", "local", *more])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time of the last change, in nanoseconds, and the bytes of each file."""
    return {name: ((folder / name).stat().st_mtime_ns, data) for name, data in contents(folder).items()}


def test_quiet_prints_nothing_and_a_finished_run_is_not_merged_again(here: Path, model: Path) -> None:
    done = spread(model, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    written, files = snapshot(here), contents(here)
    done = spread(model, "--resume")
    assert done.exit_code == 0 and done.output.splitlines() == ["s.csv: already finished, nothing to do"]
    assert snapshot(here) == written
    (here / "s.csv").write_text("mine")
    done = spread(model, "--resume")
    assert done.exit_code == 2 and "s.csv was changed after the run that wrote it" in done.output
    assert (here / "s.csv").read_text() == "mine"
    (here / "s.csv").unlink()  # as a run that was killed before it merged
    done = spread(model, "--resume")
    assert done.exit_code == 0 and "s.csv: 3 images" in done.output
    assert contents(here) == files


def test_a_merge_that_was_killed_is_done_again(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("power")

    assert spread(model).exit_code == 0
    older = contents(here)
    write_jpeg(here / "in" / "3.jpg", 3)
    assert spread(model, "-o", "other.csv").exit_code == 0
    wanted = (here / "other.csv").read_bytes(), (here / "other.run.json").read_bytes()
    for name in ("write_rows", "write_run_record"):  # before the output is replaced, and after it
        for path, data in older.items():
            (here / path).write_bytes(data)
        with monkeypatch.context() as patch:
            patch.setattr(driver, name, die)
            assert spread(model, "--overwrite").exit_code == 2
        done = spread(model, "--resume")
        assert done.exit_code == 0 and "s.csv: 4 images" in done.output, done.output
        assert ((here / "s.csv").read_bytes(), (here / "s.run.json").read_bytes()) == wanted
        assert "already finished" in spread(model, "--resume").output
    for path, data in older.items():  # killed before the merge began
        if "/" not in path:
            (here / path).write_bytes(data)
    done = spread(model, "--resume")
    assert done.exit_code == 0 and (here / "s.csv").read_bytes() == wanted[0], done.output


def test_a_resumed_run_replaces_no_output_but_its_own(here: Path, model: Path) -> None:
    assert spread(model, "--partitions", "rows").exit_code == 0
    (here / "s.run.json").unlink()  # as a run that was killed after it had written its output
    files = contents(here)
    for name in ("mine.csv", "mine.failures.csv", "mine.run.json"):
        (here / name).write_text("mine")
        done = spread(model, "--partitions", "rows", "--resume", "-o", "mine.csv")
        assert done.exit_code == 2 and f"{name} exists: give another --output" in done.output
        assert contents(here) == files | {name: b"mine"}
        (here / name).unlink()
    for output in ("s.csv", "new.csv", "new.csv", "s.csv"):
        done = spread(model, "--partitions", "rows", "--resume", "-o", output)
        assert done.exit_code == 0 and (here / output).read_bytes() == files["s.csv"], done.output


@pytest.mark.parametrize("place", ["in", ".", "in/../in"])
def test_partitions_are_not_written_among_the_images(here: Path, model: Path, place: str) -> None:
    before = snapshot(here)
    done = spread(model, "--partitions", place)
    assert done.exit_code == 2 and "--partitions" in done.output.splitlines()[-1], done.output
    assert snapshot(here) == before
