"""Stubs of NVIDIA's driver libraries, compiled here: ONNX Runtime's GPU providers load, and find no GPU that works.

`python_with_stubs` runs code in a process that finds them before any real library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import pytest

CAPI = Path(onnxruntime.__file__).parent / "capi"

_DRIVER = r"""
#include <stdlib.h>
#include <string.h>

/* Variables: STUB_GPUS, compute capabilities such as "8.9 9.0"; STUB_CUDA, the newest CUDA version that the driver
   supports, such as 13000; STUB_FAULT, the error of cuInit. */
static int gpu(int number, int *major, int *minor) {
    const char *list = getenv("STUB_GPUS");
    for (int found = 0; list && *list; found++) {
        char *end;
        int first = strtol(list, &end, 10), second = strtol(end + 1, &end, 10);
        if (found == number) { *major = first; *minor = second; return 0; }
        list = *end ? end + 1 : end;
    }
    return 101;
}
int cuDriverGetVersion(int *version) {
    const char *text = getenv("STUB_CUDA");
    *version = text ? atoi(text) : 13000;
    return 0;
}
int cuInit(unsigned flags) {
    int a, b;
    const char *fault = getenv("STUB_FAULT");
    return fault ? atoi(fault) : gpu(0, &a, &b) ? 100 : 0;
}
int cuDeviceGetCount(int *count) { int a, b; for (*count = 0; !gpu(*count, &a, &b); ++*count); return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA Stub", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 8ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int major = 0, minor = 0, status = gpu(device, &major, &minor);
    *value = attribute == 75 ? major : minor;
    return status;
}
int cuGetErrorName(int error, const char **name) {
    *name = error == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : "CUDA_ERROR_NO_DEVICE";
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "a stub"; return 0; }
"""
_DEFINED = (
    *("cuDriverGetVersion", "cuInit", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceTotalMem_v2"),
    *("cuDeviceGetAttribute", "cuGetErrorName", "cuGetErrorString"),
)


def build_stubs(folder: Path, *users: Path) -> Path:
    """Compile libcuda, libnvidia-ml and libcurand with the functions that the libraries in `users` import.

    Skips the test where there is no compiler.
    """
    if sys.platform != "linux" or not shutil.which("gcc") or not shutil.which("nm"):
        pytest.skip("needs gcc and nm on Linux")
    folder.mkdir(parents=True, exist_ok=True)
    wanted: set[str] = set()
    for user in users:
        listed = subprocess.run(["nm", "-D", "--undefined-only", user], capture_output=True, text=True, check=True)
        wanted |= {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    driver = sorted(name for name in wanted if name[:2] == "cu" and name[2:3].isupper() and name not in _DEFINED)
    nvml = sorted(name for name in wanted if name.startswith("nvml"))
    curand = sorted(name for name in wanted if name.startswith("curand"))
    _compile(folder / "libcuda.so.1", _DRIVER + _failing(driver))
    _compile(folder / "libnvidia-ml.so.1", _failing(nvml))
    _compile(folder / "libcurand.so.10", _failing(curand))
    return folder


def python_with_stubs(stubs: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the stubs in front of the system's libraries."""
    environment: Mapping[str, str] = os.environ | {"LD_LIBRARY_PATH": str(stubs), "ORT_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _failing(names: list[str]) -> str:
    return "".join(f"int {name}(void) {{ return 999; }}\n" for name in names)


def _compile(library: Path, source: str) -> None:
    text = library.with_suffix(".c")
    text.write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), str(text)]
    subprocess.run(command, check=True)
