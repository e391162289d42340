"""The commands with names of their own: `cloudrt-train` and so on."""

from __future__ import annotations

import click
import pytest

from cloudrt import cli
from cloudrt.system.versions import VERSION


@pytest.mark.parametrize("name", ["train", "export", "infer", "bench"])
def test_each_prints_its_version(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"cloudrt-{name}", "--version"])
    for _ in range(2):  # the shared command is not changed
        with pytest.raises(SystemExit) as stop:
            cli._run(name)
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"cloudrt-{name}, version {VERSION}\n"
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    assert not any(option.name == "version" for option in command.params)
