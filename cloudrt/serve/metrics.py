"""Metrics in Prometheus' text format, counted for one application."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "cloudrt_requests", "Finished requests by path and status.", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "cloudrt_request_seconds",
            "Duration of requests, until the answer is sent.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch = Histogram("cloudrt_batch_images", "Images per batch.", buckets=_IMAGES, registry=registry)
        self.in_progress = Gauge("cloudrt_requests_in_progress", "Requests in progress.", registry=registry)
        self.queue = Gauge("cloudrt_queue_images", "Decoded images that wait for an engine.", registry=registry)
        self.failures = Counter("cloudrt_failed_images", "Images that failed.", registry=registry)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self.registry)


class MeasureRequests:
    """Middleware that counts requests, records their duration, and adds X-Content-Type-Options to the answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # no answer: the client has disconnected

        async def record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, receive, record)
        except Exception:  # the server answers with status 500
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")  # a template: few values
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
