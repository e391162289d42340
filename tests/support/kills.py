"""Run commands in a process, and kill it (SIGKILL) at a chosen change of a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = """
import atexit, os, signal, sys
folder, left = os.path.realpath(sys.argv.pop(1)), int(sys.argv.pop(1))
count = 0

def changes(event, arguments):
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")

def hook(event, arguments):
    global count
    if changes(event, arguments) and isinstance(arguments[0], (str, os.PathLike)):
        if os.path.abspath(os.fspath(arguments[0])).startswith(folder + os.sep):
            if count == left:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

from cloudrt.cli import main
sys.addaudithook(hook)
atexit.register(lambda: print("writes", count))
main()
"""


QUIET = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run_and_kill(words: Sequence[str | Path], folder: Path, after: int = -1) -> tuple[int, int]:
    """Run `cloudrt` in a process that is killed at its next change below `folder` after `after` changes.

    Parameters
    ----------
    words
        The command and its arguments.
    folder
        The folder below which changes are counted: files opened for writing, renamed, removed or truncated by
        name, and folders made.
    after
        Number of changes before the kill; -1 never kills.

    Returns
    -------
    status, changes
        Exit status, -9 if the process was killed, and the number of changes.
    """
    command = [sys.executable, "-c", SCRIPT, str(folder), str(after), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET, check=False)
    if done.returncode == -signal.SIGKILL:
        return done.returncode, after
    assert done.returncode == 0, done.stderr
    return 0, int(done.stdout.rpartition("writes ")[2])
