"""The page for trying the model, and the documentation of the API.

Both are plain HTML, CSS and scripts from this server alone: the content security policy allows nothing else. The page
gets the probabilities of an image once, and applies the rules of its sliders to them in the browser.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Response
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from cloudrt.labels import class_colours
from cloudrt.model.artifact import Artifact
from cloudrt.reports.page import DASHES, percent
from cloudrt.serve.answers import ModelAnswer
from cloudrt.serve.geojson import missing_packages
from cloudrt.system.versions import VERSION

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SCENES = 1000
"""Number of different synthetic scenes."""
_KINDS = {"page.css": "text/css", "page.js": "text/javascript", "masks.js": "text/javascript"}


def pages_router(app: FastAPI, artifact: Artifact, model: ModelAnswer) -> APIRouter:
    """Return the routes of the pages. They need no token; the page asks the user for the token that the API needs."""
    router = APIRouter(include_in_schema=False)
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    height, width = artifact.labels.submit_grid
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cloudrt.serve"), PackageLoader("cloudrt.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": "{:,}".format}
    environment.globals |= {
        "classes": artifact.labels.classes,
        "colours": class_colours(len(artifact.labels.classes)),
        "dashes": DASHES,
        "width": width,
        "height": height,
        "unit": max(width, height) / 525,
        "version": VERSION,
    }

    @cache
    def render(name: str) -> str:
        values: dict[str, Any] = {}
        if name == "page.html":
            largest = max(rule.min_area for rule in artifact.rules)
            values = {
                "model": model,
                "facts": _facts(artifact, model),
                "most_area": max(width * height // 4, largest),
                "key_column": artifact.labels.key_column,
                "has_geojson": not missing_packages(),
                "scenes": SCENES,
            }
        elif name == "docs.html":
            values = _operations(app)
        return environment.get_template(name).render(values)

    @router.get("/")
    async def page() -> Response:
        return Response(render("page.html"), media_type="text/html", headers=headers)

    @router.get("/docs")
    async def docs() -> Response:
        return Response(render("docs.html"), media_type="text/html", headers=headers)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in _KINDS:
            raise HTTPException(404, f"no file {name!r}")
        return Response(render(name), media_type=_KINDS[name], headers=headers)

    return router


def _facts(artifact: Artifact, model: ModelAnswer) -> dict[str, str]:
    height, width = artifact.input_size
    return {
        "Model": model.name,
        "Network": f"{artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}",
        "Held-out Dice": f"{artifact.validation_dice:.4f}",
        "Provider": f"{model.provider}, batch {model.batch_size}",
    }


@dataclass(frozen=True)
class _Operation:
    """One operation of the OpenAPI description, as text: pairs of a name and its meaning."""

    title: str
    text: str
    parameters: list[tuple[str, str]]
    body: list[str]
    responses: list[tuple[str, str]]


def _operations(app: FastAPI) -> dict[str, Any]:
    """Return the operations of the OpenAPI description by tag, and its schemas."""
    described = app.openapi()
    groups: dict[str, list[_Operation]] = {}
    for path, methods in described["paths"].items():
        for method, found in methods.items():
            operation = _Operation(
                title=f"{method.upper()} {path}",
                text=found.get("description", found["summary"]),
                parameters=[
                    (f"{one['name']} ({one['in']})", one.get("description", "")) for one in found.get("parameters", ())
                ],
                body=list(found.get("requestBody", {}).get("content", ())),
                responses=[(status, _answer(one)) for status, one in found["responses"].items()],
            )
            groups.setdefault(found["tags"][0], []).append(operation)
    schemas = {
        name: [(key, value.get("description", "")) for key, value in schema.get("properties", {}).items()]
        for name, schema in described["components"]["schemas"].items()
    }
    return {"groups": groups, "schemas": schemas}


def _answer(response: dict[str, Any]) -> str:
    kinds = []
    for kind, content in response.get("content", {}).items():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        kinds.append(f"{kind} {name}".strip())
    return f"{response['description']} {'; '.join(kinds)}".strip()
