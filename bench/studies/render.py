"""The figures in README and docs, rendered from the JSON files in `bench/results`.

    python -m cloudrt.bench.studies.render README.md docs/benchmarks.md docs/how-to/train.md

replaces the text between `<!-- figures: NAME -->` and `<!-- end -->` with the result of `BLOCKS[NAME]`. A test checks
that the pages are up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from cloudrt.errors import DataError
from cloudrt.system.files import replacing

from .blocks import BLOCKS

_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return a page with the text between each pair of markers rendered again.

    Raises
    ------
    DataError
        A marker has a name that `BLOCKS` lacks.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise DataError(f"no figures are named {found[2]}; there are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}"

    return _MARKED.sub(block, text)


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def render(pages: tuple[Path, ...]) -> None:
    """Render the figures of bench/results between the markers of PAGES, Markdown files."""
    for page in pages:
        filled = fill(page.read_text(encoding="utf-8"))
        with replacing(page) as partial:
            partial.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    render()
