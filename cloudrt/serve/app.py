"""The application: the interface /v1, health, metrics and the pages, on one Segmenter.

    client --admission (503)--> body (408, 413) --Batcher--> JSON or PNG

A request holds one of `ServeSettings.queue` slots from before its body is read until its answer is encoded or its
client has disconnected, which bounds the memory. An answer that is being sent holds no slot. The Open Inference
Protocol is in `inference_protocol`, the pages in `pages`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from cloudrt.errors import ImageError
from cloudrt.inference.pipeline import Segmenter, require_rules
from cloudrt.labels import Labels
from cloudrt.serve import pages
from cloudrt.serve.answers import (
    ImageAnswer,
    ModelAnswer,
    ModelsAnswer,
    Problem,
    SegmentAnswer,
    StatusAnswer,
    image_answer,
    mask_png,
    masks_png,
    picture_jpeg,
)
from cloudrt.serve.batcher import Batcher, Outputs, together
from cloudrt.serve.errors import accepted, handle_errors
from cloudrt.serve.inference_protocol import protocol_router
from cloudrt.serve.metrics import MeasureRequests, Metrics
from cloudrt.serve.settings import ServeSettings
from cloudrt.serve.uploads import read_images, unless_gone
from cloudrt.system.versions import VERSION

SCENES = 1000
"""Number of different made-up scenes."""

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
        """Whether the model can run; the server does not listen before it is open."""
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
            (400, "Malformed form, several images where one is expected, or no such class."),
            (406, "Neither JSON nor PNG is accepted."),
            (408, "The body did not arrive in time."),
            (413, "The body is too large."),
            (422, "No image could be decoded, with the reason as in failures.csv; or an invalid parameter."),
            (503, "Too many requests are in progress; see Retry-After."),
        )
    }
    sound = {"content": {"image/png": {}}, "description": "The masks."}

    @router.post("/v1/segment", response_model=SegmentAnswer, responses={200: sound, **errors}, openapi_extra=_BODY)
    async def segment(
        request: Request,
        label: Annotated[str | None, Query(alias="class", description="PNG: the mask of this class alone.")] = None,
        levels: Annotated[bool, Query(description="JSON: include the probability.")] = False,
    ) -> Response:
        """Segment images.

        The body is an image, or several as multipart/form-data. The answer is JSON, or with `Accept: image/png` the
        masks of one image: of one class in black and white, or of all classes in colour on a transparent ground.
        """
        as_png = accepted(request.headers.get("accept", "")) == "image/png"
        if label is not None and label not in labels.classes:
            raise HTTPException(400, f"no class named {label!r}: {', '.join(labels.classes)}")
        with batcher.request():
            images = await read_images(request, settings)
            if as_png and len(images) > 1:
                raise HTTPException(400, f"image/png is for one image, found {len(images)}")
            results = await unless_gone(request, _segment_all(batcher, images, metrics))
            failures = [
                (name, result) for (name, _), result in zip(images, results, strict=True) if isinstance(result, str)
            ]
            if len(failures) == len(images):
                raise HTTPException(422, failures[0][1] if len(images) == 1 else _list(failures))
            if as_png:
                (found,) = results
                assert not isinstance(found, str)
                return await batcher.call(_picture, found[0], labels, label)
            return await batcher.call(_json, model, labels, [name for name, _ in images], results, levels)

    @router.get("/v1/models")
    async def models() -> ModelsAnswer:
        """Describe the model."""
        return ModelsAnswer(models=[model])

    @router.get(
        "/v1/scenes/{seed}.jpg",
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}, "description": "The image."},
            422: errors[422],
            503: errors[503],
        },
    )
    async def scene(seed: Annotated[int, Path(ge=0, lt=SCENES)]) -> Response:
        """Draw a made-up scene, to try the model on."""
        with batcher.request():
            return Response(await batcher.call(_draw, seed), media_type="image/jpeg")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _segment_all(
    batcher: Batcher, images: list[tuple[str, bytes]], metrics: Metrics
) -> list[tuple[list[str], Outputs] | str]:
    """Return the rows and outputs of each image, or the reason of its failure."""

    async def one(data: bytes) -> tuple[list[str], Outputs] | str:
        try:
            return await batcher.segment(data)
        except ImageError as error:
            metrics.failures.inc()
            return str(error)

    return await together(one(data) for _, data in images)


def _list(failures: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {reason}" for name, reason in failures)


def _picture(texts: list[str], labels: Labels, label: str | None) -> Response:
    """Return the masks of an image as a PNG: of one class, or of all if `label` is None."""
    content = masks_png(texts, labels) if label is None else mask_png(texts[labels.classes.index(label)], labels)
    return Response(content, media_type="image/png")


def _json(
    model: ModelAnswer, labels: Labels, names: list[str], results: list[tuple[list[str], Outputs] | str], levels: bool
) -> Response:
    """Return the results of images, or why they failed, as JSON."""
    answers = [
        ImageAnswer(image=name, error=result, classes={})
        if isinstance(result, str)
        else image_answer(name, labels, *result, levels=levels)
        for name, result in zip(names, results, strict=True)
    ]
    answer = SegmentAnswer(model=model.name, grid=labels.submit_grid, images=answers)
    return Response(answer.model_dump_json(), media_type="application/json")


def _draw(seed: int) -> bytes:
    from cloudrt.data.scenes import draw_scene

    return picture_jpeg(draw_scene(seed, (700, 1050)).image)
