"""Switch off the usage reports and update checks of the libraries that cloudrt imports.

onnxruntime reads its variable when it is imported (since 1.31 it records events and tries to send them;
`disable_telemetry_events` does not stop that), so `import cloudrt` sets all of them first. Processes that cloudrt
starts inherit them. A variable that the user has set stays as it is.

OpenVINO reports each import with a user id, and no variable switches that off. Without the package openvino_telemetry
it uses a stub that does nothing, so that package is hidden from this process.
"""

from __future__ import annotations

import os
import sys

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: events in ~/.cache/Microsoft/DeveloperTools, sent to Microsoft
    "NO_ALBUMENTATIONS_UPDATE": "1",  # albumentations: asks the registry for a newer version at import
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub: the versions of libraries in requests
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray: usage statistics of a cluster
}
"""Variable -> value that switches reports off."""


def disable_telemetry() -> None:
    """Set the variables of `SWITCHES` that the user has not set, and hide the package that OpenVINO reports with."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it fails
