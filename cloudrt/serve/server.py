"""Running the application with uvicorn until SIGINT or SIGTERM; requests that were accepted are finished first."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress

import uvicorn

from cloudrt.errors import DataError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.app import create_app
from cloudrt.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

GRACE_S = 60
"""Seconds in which accepted requests are finished after SIGTERM."""


def serve(segmenter: Segmenter, settings: ServeSettings) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Raises
    ------
    DataError
        The address cannot be used.
    """
    app = create_app(segmenter, settings)
    with _listen(settings) as listener:
        _announce(segmenter, settings, listener.getsockname()[1])
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, server_header=False
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
            uvicorn.Server(config).run([listener])
    logger.info("Stopped; every accepted request was answered")


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise DataError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; use another --host or --port"
        ) from error


def _announce(segmenter: Segmenter, settings: ServeSettings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reach = "this machine only; --host 0.0.0.0 opens it to the network" if settings.is_local else "the network"
    logger.info("%s: %s, %d threads", segmenter.model, segmenter.plan.describe(), segmenter.threads)
    logger.info("http://%s:%d: reachable from %s; the interface is described at /docs", host, port, reach)
    if not settings.is_local and not settings.token:
        logger.warning("No --token: everyone who can reach this address can use the server")
