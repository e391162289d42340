"""The package as it is installed: a wheel, alone, in an empty environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from support.paths import ROOT, setup_metadata

from cloudrt.system.versions import VERSION

TEXTS = (".py", ".md", ".ipynb", ".html", ".sh", ".yml", ".Dockerfile")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    (built,) = out.glob("*.whl")
    return built


def test_no_text_installs_cloudrt_from_an_index() -> None:
    """cloudrt is on no index: commands in code, docs and messages install from a checkout or from a wheel."""
    folders = ("cloudrt", "train", "export", "bench", "docs", "docker", "examples", ".github")
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    assert len(files) > 200
    for path in files:
        found = re.findall(r"pip install(?: -\S+)* ['\"]?cloudrt(?![-\w])", path.read_text("utf-8"))
        assert not found, path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cloudrt"}
    assert not [name for name in names if name.startswith(("cloudrt/bench/studies/", "cloudrt/bench/results/"))]
    for wanted in (
        "cloudrt/train/loop.py",
        "cloudrt/export/graph.py",
        "cloudrt/bench/__init__.py",
        "cloudrt/kernels/runs.py",
        "cloudrt/cli/infer.py",
        "cloudrt/reports/templates/report.html",
        "cloudrt/model/shipped/clouds.onnx",
        "cloudrt/py.typed",
    ):
        assert wanted in names
    assert wheel.stat().st_size < 20e6


def test_metadata_are_those_of_setup_cfg_and_links_are_files(wheel: Path) -> None:
    """Links of the description are absolute, because a package index shows it without the other files."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    found = message_from_bytes(archive.read(name))
    stated = setup_metadata()
    assert (found["Version"], found["Author"]) == (VERSION, stated["author"])
    assert found["Author-Email"] == stated["author_email"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert [url.split(", ")[0] for url in found.get_all("Project-URL", [])] == ["Documentation", "Source", "Changelog"]
    description = str(found.get_payload())
    here = re.escape(stated["url"])
    targets = re.findall(r"\]\(([^)]+)\)", description)
    files = [match[1] for one in targets if (match := re.fullmatch(rf"{here}/(?:blob|raw)/v{VERSION}/(.+)", one))]
    assert len(files) >= 10 and "![The report of a run" in description
    assert f"({stated['url']}/raw/v{VERSION}/docs/images/report.jpg)" in description
    assert all((ROOT / file.partition("#")[0]).exists() for file in files)
    assert all(one.startswith("https://") for one in targets)


def test_the_version_is_stated_once_and_copies_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {VERSION}\n" in citation and f'- name: "{setup_metadata()["author"]}"' in citation
    assert setup_metadata()["version"] == "attr: cloudrt.system.versions.VERSION"
    assert f"\n## [{VERSION}] - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for page in ("README.md", "docs/install.md"):
        wheels = re.findall(r"cloudrt-([\d.]+)-py3", (ROOT / page).read_text(encoding="utf-8"))
        assert wheels and set(wheels) == {VERSION}


def test_wheel_alone_runs_commands_without_torch(wheel: Path, tmp_path: Path) -> None:
    """The unpacked wheel, where torch and other packages of extras cannot be imported."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    blocked = "torch", "torchvision", "segmentation_models_pytorch", "albumentations", "timm", "matplotlib", "openvino"
    for name in blocked:
        (site / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is not installed', name='{name}')\n")
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "import cloudrt; assert cloudrt.__file__.startswith(sys.path[0]), cloudrt.__file__;"
        "from cloudrt.cli import infer; infer()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(site), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--provider" in done.stdout

    train = subprocess.run(
        [sys.executable, "-c", script.replace("infer", "train"), str(site), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert train.returncode == 2
    assert "train.csv is missing" in train.stderr
