"""Progress of long work: the interface of progress bars in library functions, and the bars that the commands show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import click


class Advance(Protocol):
    """Report that `n` more steps are done; `fields`, such as `dice=0.61`, are shown beside the bar."""

    def __call__(self, n: int = 1, **fields: Any) -> object: ...


ProgressBar = Callable[[str, int], AbstractContextManager[Advance]]
"""`bar(description, total)` is a context manager that shows a progress bar and yields its `Advance`."""


@contextmanager
def no_progress(_description: str, _total: int) -> Iterator[Advance]:
    """Show no progress."""
    yield lambda *_, **__: None


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """Show progress with rate and ETA: a live bar on a terminal; elsewhere, a line every ten seconds and at the end."""
    bar = _live_bar if sys.stderr.isatty() else _plain_lines
    with bar(description, total) as advance:
        yield advance


@contextmanager
def _plain_lines(description: str, total: int) -> Iterator[Advance]:
    done, began, last_printed = 0, time.monotonic(), time.monotonic()

    def advance(n: int = 1, **fields: Any) -> None:
        nonlocal done, last_printed
        done += n
        now = time.monotonic()
        if done >= total or now - last_printed >= 10:
            last_printed = now
            rate = done / max(now - began, 1e-9)
            shown = [f"{description}: {done}/{total}", f"{rate:.1f}/s"]
            if 0 < done < total:
                shown.append(f"{(total - done) / rate:.0f} s left")
            click.echo(", ".join([*shown, *_words(fields)]), err=True)

    yield advance


@contextmanager
def _live_bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f}/s" if speed else "-/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[notes]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, notes="")

        def advance(n: int = 1, **fields: Any) -> None:
            progress.update(task, advance=n, notes=" ".join(_words(fields)))

        yield advance


def _words(fields: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()]
