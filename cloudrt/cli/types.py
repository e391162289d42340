"""Option types that several commands share."""

from __future__ import annotations

import re

import click


class Size(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels, as people say it; (height, width), as arrays have it."""

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
