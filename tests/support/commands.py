"""Commands run in this process."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result


def invoke(command: click.Command, *words: object, status: int | None = None) -> Result:
    """Run a command; any exception but its exit is raised.

    Parameters
    ----------
    command
        The command.
    words
        Its arguments.
    status
        The expected exit status; None accepts any.
    """
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert status is None or result.exit_code == status, result.output
    return result
