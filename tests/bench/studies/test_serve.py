"""The load generator of the server study: every request is answered once, and errors stop it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cloudrt.bench.studies.clients import request_of, send_all
from cloudrt.bench.studies.serve import half_load
from support.server import serving
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.inference.pipeline import Segmenter


def test_every_request_is_answered_once(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "model.onnx", (64, 96), SMALL_GRIDS)
    requests = [request_of(write_jpeg(tmp_path / f"{seed}.jpg", seed).path.read_bytes()) for seed in range(3)] * 4
    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter, serving(segmenter) as server:
        found = send_all(server.port, requests, None, 5)
        assert len(found["latency_ms"]) == 12 and min(found["latency_ms"]) > 0
        assert server.metric("cloudrt_batch_images_sum") == 12
        found = half_load(server.port, requests, 1000.0)
        assert found["images"] == 12 and found["p50_ms"] <= found["p99_ms"]
        assert server.metric("cloudrt_batch_images_sum") == 24
        with pytest.raises(ConnectionError, match="422"):
            send_all(server.port, [request_of(b"no image")], None, 1)
