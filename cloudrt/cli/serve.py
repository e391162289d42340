"""`cloudrt serve`: parse, open the model, serve."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from cloudrt.cli.run_options import run_options, take_run_options
from cloudrt.cli.types import FILE
from cloudrt.options import TOKEN
from cloudrt.system.terminal import Failure, log_to_stderr, reports_errors

logger = logging.getLogger(__name__)


@click.command()
@click.argument("model", required=False, type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all interfaces.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="Port; 0 for a free one.")
@click.option("--name", help="Name of the model in URLs. Default: its file name without suffix.")
@click.option("--token", help=f"Bearer token that requests must contain. Default: the environment variable {TOKEN}.")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="Web origin that may send requests, or *; can be repeated."
)
@click.option(
    "--max-upload-mb",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Maximum size of a request, in MiB.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="Maximum number of requests in progress; further ones are answered with status 503.",
)
@click.option(
    "--delay-ms",
    type=click.FloatRange(0, 10_000),
    default=5,
    show_default=True,
    help="Maximum time that an image waits for others to fill its batch.",
)
@run_options
@click.option("-v", "--verbose", is_flag=True, help="Also print why other providers were not chosen.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@reports_errors
def serve(model: Path | None, verbose: bool, quiet: bool, **given: Any) -> None:
    """Serve MODEL over HTTP: a web page to try it, an HTTP API, and the Open Inference Protocol.

    Without MODEL, ./model.onnx is served if it exists, else the shipped model. The server listens on this machine only,
    unless --host is given. SIGTERM and Ctrl-C finish the requests in progress, for at most 60 seconds.
    """
    log_to_stderr("cloudrt", logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.info("Loading libraries and the model ...")
    import fastapi  # noqa: F401 - if it is missing, fail before anything slow
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401

    from cloudrt.inference.pipeline import Segmenter
    from cloudrt.serve.server import bind
    from cloudrt.serve.server import serve as run
    from cloudrt.serve.settings import ServeSettings

    token = given.pop("token")
    settings = ServeSettings(
        host=given.pop("host"),
        port=given.pop("port"),
        name=given.pop("name") or "",
        token=os.environ.get(TOKEN, "") if token is None else token,
        allow_origins=given.pop("allow_origin"),
        max_upload_bytes=given.pop("max_upload_mb") * 2**20,
        queue=given.pop("queue"),
        delay_s=given.pop("delay_ms") / 1000,
    )
    if given["decoder"] != "cpu":
        raise Failure(f"--decoder {given['decoder']}: the server decodes on the CPU")
    with bind(settings) as listener, Segmenter(model, take_run_options(given)) as segmenter:
        run(segmenter, settings, listener)
