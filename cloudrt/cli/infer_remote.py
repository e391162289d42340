"""`cloudrt-infer --remote`: its options, and their conversion to `cloudrt.options.RemoteOptions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cloudrt.cli.types import FILE
from cloudrt.options import RemoteOptions, RunOptions
from cloudrt.system.terminal import Failure

_OPTIONS = (
    click.option(
        "--remote",
        multiple=True,
        metavar="URL",
        help="Run the network on this server, http://HOST:PORT or grpc://HOST:PORT, where --model is the name of the "
        "model; can be repeated.",
    ),
    click.option(
        "--rules",
        type=FILE,
        help="With --remote: use the metadata of this artifact, not that of the server.",
    ),
)


def remote_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of remote servers to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_remote_options(given: dict[str, Any], clustered: bool, run: RunOptions) -> RunOptions:
    """Remove --remote, --rules and, with --remote, --model from the arguments; return the options of the run.

    Raises
    ------
    Failure, DataError
        A malformed URL, or options that contradict each other.
    """
    urls, rules = given.pop("remote"), given.pop("rules")
    if not urls:
        if rules:
            raise Failure("--rules needs --remote")
        return run
    if clustered:
        raise Failure("--remote does not work with --cluster: leave one of them out")
    if any(url.startswith("grpc") for url in urls):
        import tritonclient  # noqa: F401 - if it is missing, fail before anything slow

    name = given.pop("model")
    return run.changed(remote=RemoteOptions(urls, str(name or ""), str(rules or "")))
