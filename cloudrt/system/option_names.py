"""Names of parameters in messages: the library writes `overwrite=True`, and the command line prints --overwrite."""

from __future__ import annotations

import re
from collections.abc import Collection

import click


def with_options(text: str, options: Collection[str]) -> str:
    """Replace parameters of the Python interface in a message by options, such as those of `command_options`.

    The library names parameters in backquotes: `overwrite=True` becomes --overwrite, and `threads` --threads.
    """

    def option(match: re.Match[str]) -> str:
        name, value = f"--{match[1].replace('_', '-')}", (match[2] or "True").strip("\"'")
        if name not in options:
            return match[0]
        return name if value == "True" else f"{name} {value}"

    return re.sub(r"`(\w+)(?:=([^`]+))?`", option, text)


def command_options() -> Collection[str]:
    """Return the options of the running command, such as "--output"."""
    context = click.get_current_context(silent=True)
    return {option for parameter in context.command.params for option in parameter.opts} if context else ()
