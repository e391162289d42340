"""Generated requests (schemathesis): no status 500, and every answer is as the OpenAPI description says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.server import serving
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.settings import ServeSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (8, 8), SMALL_GRIDS, presence=True)
    limits = ServeSettings(max_upload_bytes=50_000)
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter, serving(segmenter, limits) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests(described: Any, mode: GenerationMode) -> None:
    checked = 0
    for found in described.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not (operation.body or operation.query or operation.path_parameters):
            continue  # it has no input that could be invalid

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=6, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=120)

        check()
        checked += 1
    assert checked >= 4
