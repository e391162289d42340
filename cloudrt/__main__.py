"""Entry points of the commands, and `python -m cloudrt`.

Importing the command line and its libraries can take seconds. Until a command begins, Ctrl-C ends the process with
one line and the status of `cloudrt.system.terminal.reports_errors`, instead of a traceback.
"""

from __future__ import annotations

import os
import signal
from functools import partial


def _end(_number: int, _frame: object) -> None:
    try:
        os.write(2, b"Interrupted: no output was left incomplete\n")
    finally:
        os._exit(128 + signal.SIGINT)


def _run(name: str) -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in background jobs
        signal.signal(signal.SIGINT, _end)
    from cloudrt import cli

    try:
        getattr(cli, name)()
    except OSError as error:  # the text of --help or --version; commands report their own errors
        os.write(2, f"Error: stdout cannot be written: {error.strerror}\n".encode())
        os._exit(2)


main = partial(_run, "main")
train, export, infer, bench = (partial(_run, name) for name in ("train", "export", "infer", "bench"))


if __name__ == "__main__":
    main()
