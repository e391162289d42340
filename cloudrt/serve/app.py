"""The application: the API /v1, health, metrics and the pages, on one Segmenter.

    client --admission (503)--> body (408, 413) --Batcher--> JSON, PNG or GeoJSON

A request holds one of `ServeSettings.queue` slots from before its body is read until its answer is sent, its client
has disconnected or a time limit has passed, which bounds the memory. The Open Inference Protocol is in
`inference_protocol`, the pages in `pages`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from cloudrt.errors import ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.inference.model_source import require_rules
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rule import Rule
from cloudrt.serve import geojson, pages
from cloudrt.serve.answers import (
    ModelAnswer,
    ModelsAnswer,
    Problem,
    SegmentAnswer,
    Segmented,
    StatusAnswer,
    json_answer,
    picture_jpeg,
    png_answer,
)
from cloudrt.serve.batcher import Batcher, together
from cloudrt.serve.errors import handle_errors
from cloudrt.serve.inference_protocol import protocol_router
from cloudrt.serve.metrics import MeasureRequests, Metrics
from cloudrt.serve.parameters import GEOJSON, PNG, accepted, changed_rules, refuse_unknown, request_bounds
from cloudrt.serve.sending import SendInPieces
from cloudrt.serve.settings import ServeSettings
from cloudrt.serve.uploads import read_images, unless_gone
from cloudrt.system.versions import VERSION

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}


def create_app(segmenter: Segmenter, settings: ServeSettings | None = None) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    segmenter
        The open model; it stays open when the application stops.
    settings
        See `ServeSettings`.

    Raises
    ------
    ArtifactError
        The artifact has no rules.
    """
    settings = settings or ServeSettings()
    require_rules(segmenter.artifact, segmenter.model)
    metrics = Metrics()
    batcher = Batcher(segmenter, settings.queue, settings.delay_s, metrics.batch.observe)
    metrics.in_progress.set_function(lambda: batcher.in_progress)
    metrics.queue.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="cloudrt",
        version=VERSION,
        summary="Segmentation of cloud organisations in satellite images.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    handle_errors(app)
    model = _describe(batcher, settings)
    protected = [Depends(_token_check(settings.token))]
    app.include_router(_status_router(batcher))
    app.include_router(_segment_router(batcher, settings, metrics, model), dependencies=protected)
    app.include_router(protocol_router(batcher, settings, model.name, protected))
    app.include_router(pages.pages_router(app, segmenter.artifact, model))
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Accept", "Authorization", "Content-Type", "Inference-Header-Content-Length"],
            expose_headers=["Inference-Header-Content-Length", "Retry-After"],
        )
    app.add_middleware(SendInPieces, limit_s=settings.transfer_timeout_s)
    app.add_middleware(MeasureRequests, metrics=metrics)
    return app


def _describe(batcher: Batcher, settings: ServeSettings) -> ModelAnswer:
    segmenter = batcher.segmenter
    artifact = segmenter.artifact
    classes = artifact.labels.classes
    return ModelAnswer(
        name=settings.name or segmenter.model.stem,
        classes=list(classes),
        grid=artifact.labels.submit_grid,
        input_size=artifact.input_size,
        rules={name: rule.to_dict() for name, rule in zip(classes, artifact.rules, strict=True)},
        precision=artifact.precision,
        provider=segmenter.plan.provider,
        batch_size=segmenter.batch_size,
        has_presence=batcher.has_presence,
        validation_dice=artifact.validation_dice,
        max_upload_bytes=settings.max_upload_bytes,
        max_pixels=segmenter.options.max_pixels,
    )


def _token_check(token: str) -> Any:
    """Return a dependency that refuses requests without the token."""

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if token and not (given and hmac.compare_digest(given.credentials.encode(), token.encode())):
            raise HTTPException(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})

    return check


def _status_router(batcher: Batcher) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/healthz")
    async def healthz() -> StatusAnswer:
        """Whether the server runs."""
        return StatusAnswer(status="ok")

    @router.get("/readyz", responses={503: {"model": Problem, "description": "The model can no longer run."}})
    async def readyz() -> StatusAnswer:
        """Whether the model can run; the server does not listen before the model is open."""
        if not batcher.segmenter.pool.usable:
            raise HTTPException(503, "the model can no longer run: restart the server")
        return StatusAnswer(status="ready")

    return router


def _segment_router(batcher: Batcher, settings: ServeSettings, metrics: Metrics, model: ModelAnswer) -> APIRouter:
    unauthorised: dict[int | str, dict[str, Any]] = {401: {"model": Problem, "description": "No valid token."}}
    router = APIRouter(tags=["segmentation"], responses=unauthorised)
    labels = batcher.segmenter.labels
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": words}
        for status, words in (
            (400, "Malformed form or parameters, several images where one is expected, or no such class."),
            (406, "None of JSON, PNG and GeoJSON is accepted."),
            (408, "The body did not arrive in time."),
            (413, "The body is too large."),
            (422, "All images failed, with the reasons as in failures.csv; or an invalid parameter."),
            (501, "GeoJSON, but the extra geo is not installed."),
            (503, "Too many requests are in progress; see Retry-After."),
        )
    }
    sound = {"content": {PNG: {}, GEOJSON: {}}, "description": "The masks."}

    @router.post(
        "/v1/segment",
        response_model=SegmentAnswer,
        responses={200: sound, **errors},
        openapi_extra=_BODY,
        dependencies=[Depends(batcher.request)],
    )
    async def segment(
        request: Request,
        label: Annotated[str | None, Query(alias="class", description="PNG, GeoJSON: this class alone.")] = None,
        levels: Annotated[bool, Query(description="JSON: include the probability.")] = False,
        rules: Annotated[
            str | None, Query(description='Changes of the rules, in JSON: {"Fish": {"threshold": 120}}.')
        ] = None,
        bounds: Annotated[
            str | None, Query(description="GeoJSON: west, south, east and north of the images: -61,10,-40,24.")
        ] = None,
    ) -> Response:
        """Segment images.

        The body is an image, or several as multipart/form-data. The answer is JSON, or with `Accept: image/png` the
        masks of one image: of one class in black and white, or of all classes in colour on a transparent background.
        With `Accept: application/geo+json` it is a polygon for each component, in longitude and latitude if the
        position of the image is known, from its GeoTIFF tags, `bounds` or its name, else in pixels of the grid.
        """
        refuse_unknown(request.query_params, ("class", "levels", "rules", "bounds"))
        kind = accepted(request.headers.get("accept", ""))
        if kind == GEOJSON and (missing := geojson.missing_packages()):
            raise HTTPException(501, missing)
        if label is not None and label not in labels.classes:
            raise HTTPException(400, f"no class named {label!r}: {', '.join(labels.classes)}")
        applied, box = changed_rules(rules, labels, batcher.segmenter.artifact.rules), request_bounds(bounds)
        locate = None
        if kind == GEOJSON:
            locate = partial(geojson.locate, labels=labels, bounds=box, max_pixels=model.max_pixels)
        images = await read_images(request, settings)
        if kind == PNG and len(images) > 1:
            raise HTTPException(400, f"{PNG} needs a request with one image, found {len(images)}")
        results = await unless_gone(request, _segment_all(batcher, images, metrics, applied, locate))
        names = [name for name, _ in images]
        failures = [(name, one) for name, one in zip(names, results, strict=True) if isinstance(one, str)]
        if len(failures) == len(images):
            raise HTTPException(422, failures[0][1] if len(images) == 1 else _list(failures))
        if kind == PNG:
            (found,) = results
            assert not isinstance(found, str)
            return await batcher.call(png_answer, found.texts, labels, label)
        if kind == GEOJSON:
            text = await batcher.call(geojson.feature_collection, names, results, labels, label)
            return Response(text, media_type=GEOJSON)
        return await batcher.call(json_answer, model.name, labels, names, results, levels)

    @router.get("/v1/models")
    async def models() -> ModelsAnswer:
        """Describe the model."""
        return ModelsAnswer(models=[model])

    @router.get(
        "/v1/scenes/{seed}.jpg",
        response_class=Response,
        dependencies=[Depends(batcher.request)],
        responses={
            200: {"content": {"image/jpeg": {}}, "description": "The image."},
            422: errors[422],
            503: errors[503],
        },
    )
    async def scene(seed: Annotated[int, Path(ge=0, lt=pages.SCENES, description="Number of the scene.")]) -> Response:
        """Draw a synthetic scene for trying the model."""
        return Response(await batcher.call(_draw, seed), media_type="image/jpeg")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _segment_all(
    batcher: Batcher,
    images: list[tuple[str, bytes]],
    metrics: Metrics,
    rules: Sequence[Rule],
    locate: Callable[[str, bytes], MaskGrid] | None,
) -> list[Segmented | str]:
    """Return the result of each image, or the reason of its failure; `locate` returns its place."""

    async def one(name: str, data: bytes) -> Segmented | str:
        try:
            texts, outputs = await batcher.segment(data, rules)
            return Segmented(texts, outputs, await batcher.call(locate, name, data) if locate else None)
        except ImageError as error:
            metrics.failures.inc()
            return str(error)

    return await together(one(name, data) for name, data in images)


def _list(failures: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {reason}" for name, reason in failures)


def _draw(seed: int) -> bytes:
    from cloudrt.data.scenes import draw_scene

    return picture_jpeg(draw_scene(seed, (700, 1050)).image)
