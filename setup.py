"""Make the links of README.md absolute, as the page of a package index needs; everything else is in setup.cfg."""

import re
import runpy
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute_links(text: str, home: str, version: str) -> str:
    """Return Markdown whose relative links lead to the files of a version in the repository `home`."""

    def link(match: re.Match[str]) -> str:
        return f"{match[1]}[{match[2]}]({home}/{'raw' if match[1] else 'blob'}/v{version}/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", link, text)


if __name__ == "__main__":
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    version = runpy.run_path(str(ROOT / "cloudrt" / "system" / "versions.py"))["VERSION"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=absolute_links(readme, config["metadata"]["url"], version))
