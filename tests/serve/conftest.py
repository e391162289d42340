"""A server for clouds.onnx in the folder that the fixture `folder` of each module returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import Server, serving

from cloudrt.inference.pipeline import Segmenter


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Iterator[Segmenter]:
    with Segmenter(folder / "clouds.onnx", provider="cpu", batch_size=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(segmenter: Segmenter) -> Iterator[Server]:
    with serving(segmenter) as running:
        yield running
