"""Headless Chromium, started for each page: what a page contains after its scripts have run; script errors fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="Chromium is not installed")
"""Skips a test where Chromium is missing, except in CI, where the test fails."""

PROBE = """
<script>
addEventListener("load", () => {
  const answer = (() => { %s })();
  parent.postMessage(JSON.stringify(answer), "*");
});
</script>
"""
FRAME = """<!DOCTYPE html>
<pre id="answer"></pre>
<script>
addEventListener("message", (event) => { document.getElementById("answer").textContent = event.data; });
</script>
<style>body { margin: 0 } iframe { width: %dpx; height: %dpx; border: 0; display: block }</style>
<iframe src="%s"></iframe>
"""


def chromium(folder: Path) -> list[str]:
    """Return the command of headless Chromium with its profile in `folder`."""
    assert CHROMIUM, "Chromium is not installed"
    switches = (
        *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-extensions"),
        *("disable-background-networking", "hide-scrollbars", f"user-data-dir={folder / 'profile'}"),
    )
    return [CHROMIUM, *(f"--{switch}" for switch in switches)]


def browse(folder: Path, *words: str) -> str:
    """Run Chromium, and return its standard output; fail if the console of the page has an entry."""
    command = [
        *chromium(folder),
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def ask(page: Path, folder: Path, script: str, width: int = 1280) -> str:
    """Run `script`, a function's body, in a page that has loaded, and return what it returns, as JSON."""
    copy = folder / f"{page.stem}.ask.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE % script + "</body>"), encoding="utf-8")
    dom = browse(folder, "--dump-dom", _frame(copy, folder, width, 844).as_uri())
    found = re.search(r'<pre id="answer">(.+?)</pre>', dom, re.DOTALL)
    assert found, dom
    return unescape(found[1])


def photograph(page: Path, picture: Path, folder: Path, width: int, height: int) -> None:
    """Write a PNG of a page on a screen of `width` x `height` pixels, which may be narrower than Chromium's windows."""
    frame = _frame(page, folder, width, height)
    browse(folder, f"--screenshot={picture}", f"--window-size={width},{height}", frame.as_uri())


def _frame(page: Path, folder: Path, width: int, height: int) -> Path:
    frame = folder / f"{page.stem}.{width}.html"
    frame.write_text(FRAME % (width, height, page.as_uri()), encoding="utf-8")
    return frame
