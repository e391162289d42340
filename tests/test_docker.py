"""The Dockerfiles: hadolint has no findings, and the extras and the command that they name exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, setup_config

from cloudrt.cli import COMMANDS

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def test_there_are_two_dockerfiles() -> None:
    assert len(FILES) == 2


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_no_findings(tmp_path: Path) -> None:
    assert HADOLINT
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN cd /tmp\n")
    for files, status in ((FILES, 0), ([wrong], 1)):
        done = subprocess.run([HADOLINT, *map(str, files)], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_dockerfile_names_exists(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    extras = re.search(r"'\.\[(.+?)\]'", text)
    assert extras and set(extras[1].split(",")) <= set(setup_config()["options.extras_require"])
    command = re.search(r'ENTRYPOINT \["cloudrt", "(.+?)"', text)
    assert command and command[1] in COMMANDS
    assert "/readyz" in text and "USER 10001" in text
