"""What all commands share: handling of signals and errors, and logging to the terminal."""

from __future__ import annotations

import errno
import inspect
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import IO, Any, ParamSpec, TypeVar
from unicodedata import category

import click

from cloudrt.errors import CloudrtError
from cloudrt.system.option_names import command_options, with_options
from cloudrt.system.versions import install_command

P = ParamSpec("P")
R = TypeVar("R")


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: errors become one line on stderr and exit status 2, without a traceback.

    With -v, which every command has, the traceback of an unexpected error is printed before that line. For a missing
    optional package, the line says how to install it. After SIGINT the command cleans up and exits with status
    130; after SIGTERM or SIGHUP, with 143; after the reader closed the output pipe, with 141.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _open_streams()
        _silence_opencv()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # print ? for characters that the terminal cannot encode
                stream.reconfigure(errors="replace")
        try:
            with _stops_on_signals():
                return command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except CloudrtError as error:
            raise Failure(with_options(str(error), command_options())) from error
        except KeyboardInterrupt as interrupt:
            click.echo("Interrupted: no output was left incomplete", err=True)
            raise SystemExit(128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)) from None
        except BrokenPipeError:
            with suppress(OSError):
                click.echo("Stopped: the reader of the output closed it", err=True)
            for stream in (sys.stdout, sys.stderr):  # flushing the buffers at exit would fail again
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise SystemExit(_CLOSED_PIPE) from None
        except OSError as error:
            # Full disks and missing permissions: the operating system's message is the most helpful one.
            remedy = _REMEDIES.get(error.errno or 0, "")
            raise Failure(f"{error.filename or 'cloudrt'}: {error.strerror or error}{remedy}") from error
        except MemoryError as error:
            raise Failure("out of memory: use a smaller --batch-size, fewer --threads or smaller images") from error
        except Exception as error:
            extra = _EXTRAS.get((error.name or "").split(".")[0]) if isinstance(error, ModuleNotFoundError) else None
            if isinstance(error, ModuleNotFoundError) and extra:
                raise Failure(f"{error.name} is not installed: {install_command(extra)}") from error
            if _verbose():
                click.echo(printable(traceback.format_exc()), err=True, nl=False)
            first = (str(error).splitlines() or [""])[0]
            raise Failure(
                f"unexpected {type(error).__name__}: {first} (-v prints the traceback; please report it)"
            ) from error

    return wrapped if "verbose" in inspect.signature(command).parameters else _verbose_option(wrapped)


_REMEDIES = {
    errno.ENOSPC: ": free space on this disk, or write to another one",
    errno.EDQUOT: ": free space within the quota, or write to another disk",
    errno.EFBIG: ": raise the limit on the size of files (ulimit -f), or write to another disk",
}


def _note_verbose(context: click.Context, _option: click.Parameter, value: bool) -> None:
    context.meta[__name__] = value


_verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_note_verbose,
    help="Also print details, such as the traceback of an unexpected error.",
)


def _verbose() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(__name__) or context.params.get("verbose"))


def _silence_opencv() -> None:
    """Turn off OpenCV's own warnings about files, unless -v is given; it reads the variable when it is imported."""
    if not _verbose():
        os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")


def _open_streams() -> None:
    """Open closed standard streams on the null device.

    Otherwise, the first files that the run opens would get their file descriptors, and receive what libraries print to
    stderr. Python's `sys.stdout` stays None if it was closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the process


_CLOSED_PIPE = 141
"""The exit status that a shell reports for a program ended by SIGPIPE."""


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM and SIGHUP, which schedulers, shutdowns and closed terminals send."""


@contextmanager
def _stops_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, so that clean-up runs.

    An exception that a library raises instead, such as an ImportError, becomes KeyboardInterrupt again.
    """
    received: list[KeyboardInterrupt] = []

    def stop(number: int, _frame: object) -> None:
        received.append(KeyboardInterrupt() if number == signal.SIGINT else _Terminated())
        raise received[-1]

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    # With nohup, SIGHUP is ignored; in a background job of a script, SIGINT is. Both stay ignored. None is a handler
    # that was not set from Python, which could not be set again.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if received:
            raise received[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_EXTRAS = {
    "torch": "train",
    "segmentation_models_pytorch": "train",
    "albumentations": "train",
    "onnxscript": "train",
    "onnxslim": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "openvino": "openvino",
    "pyarrow": "parquet",
    **dict.fromkeys(("rasterio", "shapely", "geopandas", "pyproj", "xarray", "zarr", "h5netcdf"), "geo"),
    "ray": "ray",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "uvicorn": "serve",
    "tritonclient": "remote",
}


class Failure(click.ClickException):
    """The command could not run: one line on stderr, exit status 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line; if stderr cannot be written, only the exit status reports the failure."""
        try:
            super().show(file)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # flushing the buffer at exit would fail again

    def format_message(self) -> str:
        """Return one line, without terminal escapes; names of files may contain line breaks."""
        return printable(self.message.replace("\n", "\\n"))


def printable(text: str) -> str:
    """Return text from untrusted sources for the terminal: control characters except newline and tab are escaped."""
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode() if category(one) in _CONTROLS and one not in "\n\t" else one
        for one in text
    )


_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control and format characters, surrogates, line and paragraph separators."""


def log_to_stderr(name: str, level: int) -> None:
    """Print the log records of logger `name` and its children, from `level` up, to stderr, one line each.

    With -v, INFO includes DEBUG.
    """
    import logging

    options = command_options()  # other threads have no context

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "Warning: " if record.levelno >= logging.WARNING else ""
            message = with_options(record.getMessage(), command_options() or options).replace("\n", "\\n")
            click.echo(printable(prefix + message), err=True)

    log = logging.getLogger(name)
    if not log.handlers:
        log.addHandler(Echo())
    log.setLevel(logging.DEBUG if level == logging.INFO and _verbose() else level)
