"""The structure of the package as installed: order of imports, type checks of calls to stages, length of modules, and
unique class names.

A forbidden import fails in `make lint`, and so does a wrong argument to a stage.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.paths import ROOT

CONFIG = str(ROOT / "setup.cfg")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package as installed, where train, export and bench are parts of cloudrt."""
    folder = tmp_path / "build" / "layout" / "cloudrt"
    ignored = shutil.ignore_patterns("__pycache__", "shipped", "results")
    shutil.copytree(ROOT / "cloudrt", folder, ignore=ignored)
    for stage in ("train", "export", "bench"):
        shutil.copytree(ROOT / stage, folder / stage, ignore=ignored)
    return folder


def modules() -> list[Path]:
    return [path for folder in ("cloudrt", "train", "export", "bench") for path in (ROOT / folder).rglob("*.py")]


def lint_imports(package: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", CONFIG]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)


def test_the_layers_are_kept(package: Path) -> None:
    done = lint_imports(package)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "imported", "named"),
    [
        ("masks/rle.py", "cloudrt.engines.base", "cloudrt.masks is not allowed to import cloudrt.engines"),
        ("inference/run.py", "cloudrt.cli.infer", "cloudrt.inference is not allowed to import cloudrt.cli"),
        ("train/loop.py", "cloudrt.export.export", "cloudrt.train is not allowed to import cloudrt.export"),
        ("train/loop.py", "cloudrt.cli.train", "cloudrt.train is not allowed to import cloudrt.cli"),
    ],
)
def test_a_forbidden_import_fails(package: Path, module: str, imported: str, named: str) -> None:
    with (package / module).open("a") as file:
        file.write(f"\nimport {imported}\n")
    done = lint_imports(package)
    assert done.returncode == 1, done.stderr
    assert named in done.stdout


def test_a_wrong_argument_to_a_stage_fails(package: Path, tmp_path: Path) -> None:
    """Checks only the two modules, because `make lint` takes a minute for all."""
    (package / "cli" / "wrong.py").write_text(
        "from cloudrt.train.config import TrainConfig\n\nTrainConfig(epochs=1)\nTrainConfig(nonsense='x')\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", CONFIG, "--follow-imports", "skip"]
    command += ["--cache-dir", str(tmp_path / "mypy")]
    files = [str(package.relative_to(tmp_path) / module) for module in ("cli/wrong.py", "train/config.py")]
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if "wrong.py" in line and ": error: " in line]
    assert len(errors) == 1, done.stdout
    assert "wrong.py:4: " in errors[0]
    assert 'Unexpected keyword argument "nonsense"' in errors[0]


def test_no_module_has_more_than_300_lines() -> None:
    lengths = {str(path): path.read_bytes().count(b"\n") for path in modules()}
    assert len(lengths) > 200
    assert {path: length for path, length in lengths.items() if length > 300} == {}


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules()]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(names) > 250
    assert [name for name, times in names.items() if times > 1] == []


def test_no_test_imports_another_test() -> None:
    """Nor does it import a file of fixtures, such as tests/geo/conftest.py."""
    paths = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in paths if path.parent.name != "support"}
    assert len(tests) > 100
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported: list[str] = []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, path
                imported = [node.module or "", *(name.name for name in node.names)]
            elif isinstance(node, ast.Import):
                imported = [name.name for name in node.names]
            assert not tests & {part for name in imported for part in name.split(".")}, path
