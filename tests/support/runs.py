"""Runs of `cloudrt-infer` with ONNX Runtime's CPU provider in batches of 4."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cloudrt.cli.infer import infer


def words(images: Path, model: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a run; options in `more` replace earlier ones."""
    return [str(images), "-m", str(model), "-o", str(output), "--provider", "cpu", "--batch-size", "4", *more]


def run(images: Path, model: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(infer, words(images, model, output, *more))


def refused(done: Result) -> str:
    """Return the last line of a run that could not start."""
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output and "unexpected" not in done.output
    return str(done.output).splitlines()[-1]


def stopped(images: Path, model: Path, output: Path, *more: str) -> bytes:
    """Stop a run just before it writes the CSV; return its journal."""

    def stop(*_: object) -> None:
        raise RuntimeError("power")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudrt.inference.submission.Submission.write", stop)
        assert run(images, model, output, *more).exit_code != 0
    return output.with_name(f"{output.name}.journal").read_bytes()
