"""Types of command-line options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from cloudrt.system.terminal import Failure


class FilePath(click.Path):
    """A path, converted to `Path`.

    An empty text, as from an unset shell variable, is refused, because `Path("")` is the current folder.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty text."""
        if value == "":
            name = param.get_error_hint(ctx).strip("'") if param and ctx else "the path"
            raise Failure(f"{name} is empty: give a path, or . for the current folder")
        return super().convert(value, param, ctx)


FILE = FilePath()


class Size(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels, converted to (height, width)."""

    name = "WxH"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", value.strip())
        if not match:
            self.fail(f"{value!r} is not WIDTHxHEIGHT in pixels, such as 2100x1400", param, ctx)
        return int(match[2]), int(match[1])


class KeyValue(click.ParamType[tuple[str, Any]]):
    """KEY=VALUE, converted to the key and the value, which is read as JSON if possible and else as text."""

    name = "KEY=VALUE"

    def convert(
        self, value: str | tuple[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        key, separator, text = value.partition("=")
        if not separator or not key.isidentifier():
            self.fail(f"{value}: expected KEY=VALUE, such as decoder_pyramid_channels=128", param, ctx)
        try:
            return key, json.loads(text)
        except (ValueError, RecursionError):
            return key, text


class Numbers(click.ParamType[tuple[int, ...]]):
    """Comma-separated whole numbers and ranges FIRST:LAST:STEP, LAST included: "0,500,9000:25000:1000"."""

    name = "numbers"

    def __init__(self, most: int) -> None:
        self.most = most

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10})(?::([0-9]{1,10}))?)?", part.strip())
            if not match or (match[3] and not int(match[3])):
                self.fail(
                    f"{part!r} is neither a whole number nor FIRST:LAST:STEP, such as 9000:25000:1000", param, ctx
                )
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if last < first or last > self.most:
                self.fail(f"{part!r} is not within 0..{self.most}, or LAST is less than FIRST", param, ctx)
            found = range(first, last + 1, int(match[3] or 1))
            if len(found) + len(numbers) > 10_000:
                self.fail(f"{part!r} makes more than 10,000 numbers: give a larger STEP", param, ctx)
            numbers += found
        return tuple(numbers)


class Duration(click.ParamType[float]):
    """A duration in seconds; written as 90, 45s, 90m or 2.5h."""

    name = "TIME"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse the text."""
        if isinstance(value, float):
            return value
        text = value.strip() if isinstance(value, str) else str(value)
        units = {"s": 1, "m": 60, "h": 3600}
        number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
        try:
            seconds = float(number) * units[unit]
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            self.fail(f"{value!r} is not a duration such as 90m, 2h or 300", param, ctx)
        return seconds
