"""The page to try the model on, and the documentation of the interface."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from cloudrt.model.artifact import Artifact
from cloudrt.serve.answers import ModelAnswer


def pages_router(app: FastAPI, artifact: Artifact, model: ModelAnswer) -> APIRouter:
    """Return the routes of the pages."""
    return APIRouter()
