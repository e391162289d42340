"""Running the application with uvicorn; it ends on SIGINT, SIGTERM or SIGHUP, after the requests in progress."""

from __future__ import annotations

import logging
import signal
import socket
from contextlib import suppress

import uvicorn

from cloudrt.errors import DataError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.app import create_app
from cloudrt.serve.connections import connection_type, most_connections
from cloudrt.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Largest number of connections that wait to be accepted."""
GRACE_S = 60
"""Seconds after the signal in which the requests in progress are finished; then their connections are closed."""


def bind(settings: ServeSettings) -> socket.socket:
    """Return a socket with the address of the server, which does not listen yet; call it before a model is opened.

    Raises
    ------
    DataError
        The address cannot be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _unusable(settings, error) from error
    return listener


def serve(segmenter: Segmenter, settings: ServeSettings, listener: socket.socket) -> None:
    """Serve a model at the address of `listener`, from `bind`, until SIGINT, SIGTERM or SIGHUP.

    Raises
    ------
    ArtifactError
        The artifact has no rules.
    DataError
        Another program has begun to listen on the address.
    """
    app = create_app(segmenter, settings)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _unusable(settings, error) from error
    _announce(segmenter, settings, listener.getsockname()[1])
    config = uvicorn.Config(
        app,
        http=connection_type(settings.transfer_timeout_s),
        log_level="warning",
        access_log=False,
        # asyncio accepts up to `backlog` connections per iteration, for a few iterations, before any is closed.
        backlog=min(BACKLOG, most_connections() // 8),
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
    )
    server = uvicorn.Server(config)
    hang_up = getattr(signal, "SIGHUP", None)  # uvicorn handles the two other signals only
    if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
        signal.signal(hang_up, server.handle_exit)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        server.run([listener])
    logger.info("Stopped")


def _unusable(settings: ServeSettings, error: OSError) -> DataError:
    place, reason = f"{settings.host}:{settings.port}", error.strerror or error
    return DataError(f"cannot listen on {place}: {reason}; use another --host or --port")


def _announce(segmenter: Segmenter, settings: ServeSettings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reach = "this machine only; --host 0.0.0.0 opens it to the network" if settings.is_local else "the network"
    logger.info("%s: %s, %d threads", segmenter.model, segmenter.plan.describe(), segmenter.threads)
    logger.info("http://%s:%d: reachable from %s; the API is described at /docs", host, port, reach)
    if not settings.is_local and not settings.token:
        logger.warning("No --token: everyone who can reach this address can use the server")
