"""Imports: the runtime does not import torch, and the help of a command imports nothing slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cloudrt
from cloudrt.cli import COMMANDS

PACKAGE = Path(cloudrt.__file__).parent
TORCH = ("torch", "torchvision", "segmentation_models_pytorch", "albumentations", "timm")
CLUSTER = ("ray", "pyarrow")
SLOW = (
    *(*TORCH, *CLUSTER, "numba", "cv2", "pandas", "onnx", "onnxruntime"),
    *("openvino", "matplotlib", "scipy", "simplejpeg"),
)

# Blocks imports by name, whether or not the modules are installed; sys.argv[1] holds the names.
BLOCK = """
import sys
class Blocked:
    names = set(sys.argv.pop(1).split(","))
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)
sys.meta_path.insert(0, Blocked())
"""

RUNTIME = sorted(
    ".".join(["cloudrt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path not in (PACKAGE / "model" / "network.py", PACKAGE / "model" / "checkpoint.py")
)


def python(script: str, *arguments: str) -> str:
    """Run a script in a fresh interpreter, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runtime_imports_with_torch_blocked() -> None:
    """Every module of the runtime, commands included, in one interpreter; only two modules need torch."""
    assert {"cloudrt", "cloudrt.images.image", "cloudrt.cli.train", "cloudrt.kernels.runs"} <= set(RUNTIME)
    script = BLOCK + (
        "from importlib import import_module\n"
        "for name in sys.argv[1].split(','): import_module(name)\n"
        f"print([name for name in {TORCH} if name in sys.modules])\n"
    )
    assert python(script, ",".join(TORCH), ",".join(RUNTIME)).strip() == "[]"


def test_public_names_resolve_without_torch() -> None:
    script = BLOCK + "import cloudrt\nfor name in cloudrt.__all__: getattr(cloudrt, name)\nprint(cloudrt.__version__)"
    assert python(script, ",".join(TORCH)).strip() == cloudrt.__version__


def test_public_names_are_listed_and_others_refused() -> None:
    assert dir(cloudrt) == sorted(cloudrt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cloudrt.nothing


def test_no_public_name_is_also_that_of_a_module() -> None:
    """Importing the module would replace the function."""
    assert not set(cloudrt.__all__) & {name.split(".")[1] for name in RUNTIME if "." in name}


def test_import_cloudrt_loads_nothing_slow() -> None:
    script = f"import sys, cloudrt; print([name for name in {SLOW} if name in sys.modules])"
    assert python(script).strip() == "[]"


def written_commands() -> list[str]:
    return [name for name in COMMANDS if (PACKAGE / "cli" / f"{name}.py").is_file()]


HELP = BLOCK + (
    "from click.testing import CliRunner\n"
    "from cloudrt.cli import main\n"
    "for line in sys.argv[1].split(','):\n"
    "    result = CliRunner().invoke(main, line.split(), prog_name='cloudrt', catch_exceptions=False)\n"
    "    assert result.exit_code == 0 and 'Usage: cloudrt' in result.output, (line, result.output)\n"
    f"print([name for name in {SLOW} if name in sys.modules])\n"
)


def test_help_of_every_command_loads_nothing_slow() -> None:
    """Torch is blocked; numba, OpenCV and the others are available and must not be imported."""
    lines = ["--help", "-h", *(f"{name} {flag}" for name in written_commands() for flag in ("--help", "-h"))]
    assert python(HELP, ",".join(TORCH), ",".join(lines)).strip() == "[]"


def test_every_command_has_a_module_and_is_listed() -> None:
    assert written_commands() == list(COMMANDS)
    others = {"__init__", "bench_tables", "export_report", "infer_cluster", "infer_remote", "run_options", "types"}
    assert {path.stem for path in (PACKAGE / "cli").glob("*.py")} - others == set(COMMANDS)


@pytest.mark.parametrize("name", ["train", "export", "infer", "bench"])
def test_commands_with_their_own_names(name: str) -> None:
    script = BLOCK + f"sys.argv[1:] = ['--help']\nfrom cloudrt.cli import {name}\n{name}()"
    assert f"Usage: cloudrt-{name}" in python(script, ",".join(SLOW))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "nowhere"], "Loading PyTorch ..."),
        (["export", "best.pth"], "Loading PyTorch ..."),
        (["serve"], "Loading libraries and the model ..."),
        (["serve", "-q"], None),
    ],
)
def test_a_command_says_that_it_loads_before_it_imports_anything_slow(words: list[str], line: str | None) -> None:
    script = BLOCK + "from cloudrt.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", script, ",".join([*SLOW, "fastapi"]), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *said, error = done.stderr.splitlines()  # the first import of anything slow fails
    assert error.startswith("Error: ") and "Loading" not in done.stdout
    assert said == ([line] if line else [])
