"""Cache of tuning measurements, in the user's cache folder.

The name of a file is a digest of everything that the measurements depend on: the artifact's graph, the processor, the
GPUs, the number of threads, `allow_cpu` and the versions of the runtimes. If one of them changes, everything is
measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from cloudrt.errors import CloudrtError
from cloudrt.system.cache import cache_folder, prune
from cloudrt.system.files import replacing
from cloudrt.system.versions import package_version

logger = logging.getLogger(__name__)

FORMAT = 2
VERSIONED = (
    *("cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", "tensorrt-cu13", "tensorrt"),
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
)


class MeasurementCache:
    """The measurements of one artifact on this machine: key -> value.

    If the cache cannot be read, it is empty; if it cannot be written, values are kept in memory only.

    Parameters
    ----------
    sha256
        SHA-256 of the artifact's graph.
    threads, allow_cpu
        See `cloudrt.options.RunOptions`.
    """

    def __init__(self, sha256: str, threads: int, allow_cpu: bool) -> None:
        from cloudrt.system.machine import describe_machine

        machine = describe_machine()
        parts = [str(FORMAT), sha256, machine.cpu, *machine.features, *machine.gpus, str(threads)]
        parts += [str(allow_cpu), *(f"{name} {package_version(name)}" for name in VERSIONED)]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        self._path: Path = cache_folder("plans") / f"{name}.json"
        self._values: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            values = json.loads(self._path.read_text(encoding="utf-8"))
            self._values = values if isinstance(values, dict) else {}

    def get(self, key: str) -> Any:
        """Return the value of a key, or None."""
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def put(self, key: str, value: Any) -> None:
        """Store a value in memory and on disk."""
        self._values[key] = value
        try:
            with replacing(self._path, sync=False) as partial:
                partial.write_text(json.dumps(self._values, indent=1), encoding="utf-8")
            prune("plans", keep=self._path)
        except (OSError, CloudrtError) as error:
            logger.warning("cannot store the tuning measurements: %s", error)
