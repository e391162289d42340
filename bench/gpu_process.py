"""Run the steps of `cloudrt.bench.gpu`, each in its own process with a time limit, and determine their status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from cloudrt.system.files import replacing

from .gpu_task import GpuTask, run_parts

LEAST_S = 1.0
"""A step with less remaining time is not started."""
WORK = "import sys; from cloudrt.bench.gpu_process import work; work(*sys.argv[1:])"


@dataclass(frozen=True)
class GpuStep:
    """A step: name, what it measures, share of the total time, and the module of the function with the step's name."""

    name: str
    title: str
    minutes: float
    module: str


def run_steps(
    steps: Sequence[GpuStep], task: GpuTask, minutes: float, about: dict[str, Any], tell: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Run steps within a total time, write the record of each to `task.out`, and return the records.

    Parameters
    ----------
    steps
        The steps. Each gets its share of the remaining time, in proportion to `GpuStep.minutes`.
    task
        Input of the steps; `seconds` is set for each.
    minutes
        Total time. Steps without remaining time are recorded as not run.
    about
        Fields that every record begins with.
    tell
        Called with one line after each step.
    """
    out, end = Path(task.out), time.monotonic() + 60 * minutes
    records = []
    for number, step in enumerate(steps, 1):
        left = end - time.monotonic()
        limit = left * step.minutes / sum(one.minutes for one in steps[number - 1 :])
        if limit < LEAST_S:
            record = {"status": "not run", "reason": f"no time left of {minutes:g} minutes"}
        else:
            record = run_step(step, replace(task, seconds=limit))
        record = {"step": step.name, "title": step.title, **about, **record}
        with replacing(out / f"{step.name}.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        reason = f": {record['reason']}" if record["reason"] else ""
        tell(f"{number}/{len(steps)} {step.name}: {record['status']}, {record.get('seconds', 0):.1f} s{reason}")
        records.append(record)
    return records


def run_step(step: GpuStep, task: GpuTask) -> dict[str, Any]:
    """Run a step in its own process, and stop it and its children at the time limit.

    Its output goes to NAME.log in `task.out`.
    """
    log, results = (Path(task.out) / f"{step.name}{suffix}" for suffix in (".log", ".partial.json"))
    results.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            child_command(step, task, results),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = child.wait(task.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(child)
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        found = json.loads(results.read_text(encoding="utf-8"))
        results.unlink()
    seconds = round(time.monotonic() - began, 2)
    return judge(found, status, task.seconds, log) | {
        "seconds": seconds,
        "limit_s": round(task.seconds, 1),
        "log": log.name,
        "results": found,
    }


def child_command(step: GpuStep, task: GpuTask, results: Path) -> list[str]:
    """Return the command of the process of a step."""
    return [sys.executable, "-P", "-c", WORK, step.module, step.name, json.dumps(asdict(task)), str(results)]


def work(module: str, name: str, task: str, results: str) -> None:
    """Run a step in this process; see `child_command`."""
    step = getattr(import_module(f"cloudrt.bench.{module}"), name)
    run_parts(step(GpuTask(**json.loads(task))), Path(results))


def stop(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, and wait 10 s at most: a process blocked in the driver does not end."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(10)


def judge(found: dict[str, Any], status: int | None, limit: float, log: Path) -> dict[str, Any]:
    """Return the status of a step, "done", "failed", "timed out" or "not run", and the reason in one line.

    Parameters
    ----------
    found
        Values of the parts that are finished.
    status
        Exit status of the process; None if it was stopped at the limit.
    limit, log
        Time limit in seconds, and the file with the output of the process.
    """
    errors = [f"{name}: {values['error']}" for name, values in found.items() if "error" in values]
    left_out = [values["not_run"] for values in found.values() if "not_run" in values]
    if status is None:
        return {"status": "timed out", "reason": f"stopped after {limit:.1f} s; {len(found)} parts are finished"}
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else f"ended with status {status}"
        if status < 0:
            reason = f"crashed: {signal.Signals(-status).name}"
        return {"status": "failed", "reason": reason}
    if errors:
        more = f" ({len(errors)} of {len(found)} parts)" if len(errors) > 1 else ""
        return {"status": "failed", "reason": errors[0] + more}
    if len(left_out) == len(found):
        return {"status": "not run", "reason": left_out[0] if left_out else "nothing to do"}
    return {"status": "done", "reason": ""}
