"""Progress where there is no terminal: plain lines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cloudrt.system.progress import progress_bar


def test_lines_before_the_first_step_have_no_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0, 0, 20, 25, 40])
    monkeypatch.setattr("cloudrt.system.progress.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with progress_bar("Segmenting", 4) as advance:
        advance(0)
        advance(1)  # less than ten seconds after the last line
        advance(1, failed=0)
    assert capsys.readouterr().err.splitlines() == [
        "Segmenting: 0/4, 0.0/s",
        "Segmenting: 2/4, 0.1/s, 40 s left, failed 0",
    ]
