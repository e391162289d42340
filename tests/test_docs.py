"""README and docs: every command and snippet runs or says why not, and the site builds with every page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.paths import PAGES, ROOT, setup_metadata
from support.snippets import blocks, check, commands, run, run_python
from support.tiny import tiny_artifact

from cloudrt.cli import COMMANDS, main
from cloudrt.model.parity import TOLERANCES
from cloudrt.system.versions import VERSION

WITH_BLOCKS = [page for page in PAGES if any(block.language in ("sh", "bash", "python") for block in blocks(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def predict(root: Path) -> None:
    """Write the submission that some pages start from."""
    words = ["infer", str(root / "images"), "--model", str(root / "model.onnx"), "--provider", "cpu"]
    result = CliRunner().invoke(main, [*words, "--output", str(root / "submission.csv")])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The folder in which pages start: data, images, models and the results of earlier steps."""
    from support.networks import make_checkpoint

    root = tmp_path_factory.mktemp("workshop")
    shutil.copytree(scenes, root / "data")
    with zipfile.ZipFile(root / "understanding_cloud_organization.zip", "w") as archive:
        for file in sorted(scenes.rglob("*")):
            archive.write(file, file.relative_to(scenes))
    shutil.copytree(scenes, root / "steel")
    images = sorted((scenes / "test_images").iterdir())
    for folder in ("test_images", "images", "in"):
        shutil.copytree(scenes / "test_images", root / folder)
    for name, image in zip(("a", "b", "first", "second"), images, strict=False):
        shutil.copy(image, root / "test_images" / f"{name}.jpg")
    for name in ("model", "a", "b"):
        tiny_artifact(root / f"{name}.onnx")
    for seed, name in enumerate("ab"):
        make_checkpoint(root / f"{name}.pth", seed=seed)
    labelled = sorted(path.name for path in (scenes / "train_images").iterdir())
    for name in ("mine", "first"):
        run_folder = root / "runs" / name
        run_folder.mkdir(parents=True)
        shutil.copy(root / "a.pth", run_folder / "best.pth")
        shutil.copy(root / "model.onnx", run_folder / "model.onnx")
        (run_folder / "held_out.txt").write_text("\n".join(labelled))
    truth = (scenes / "test_truth.csv").read_text()
    (root / "truth.csv").write_text(truth)
    # Rows for images/ too.
    (root / "train.csv").write_text((scenes / "train.csv").read_text() + truth.partition("\n")[2])
    return root


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page.stem in ("cpu", "other-data", "triton") else page
        for page in WITH_BLOCKS
    ],
    ids=name_of,
)
def test_every_command_and_snippet_runs(
    page: Path, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    text = page.read_text(encoding="utf-8")
    if not re.search("^cloudrt-infer", text, re.MULTILINE):
        predict(folder)
    for name in re.findall(r"--name (\w+)", text):
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # the page makes it
    names: dict[str, object] = {"__name__": "snippet"}
    for block in blocks(page):
        if block.language in ("sh", "bash"):
            told = commands(block)
            for line, words in told:
                check(words)
                if not block.excuse:
                    run(line, words, block.status if words is told[-1][1] else 0)
        elif block.language == "python" and block.excuse:
            compile(block.text, str(page), "exec")
        elif block.language == "python":
            run_python(block.text, names)


def test_every_excuse_names_what_is_missing_here() -> None:
    excuses = [block.excuse for page in PAGES for block in blocks(page) if block.excuse]
    assert all(re.search("(needs (a|an|the|several|docker|Slurm)|trains for)( |$)", excuse) for excuse in excuses)


def test_every_language_is_known() -> None:
    known = {"sh", "bash", "python", "json", "text", "ini", ""}
    for page in PAGES:
        assert {block.language for block in blocks(page)} <= known, page


def test_the_site_builds_strictly_and_every_page_is_in_it(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"cloudrt {command}" in html
    assert "--report-images" in html and "--save-probabilities" in html
    api = (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
    assert "gate_threshold" in api and "batch_size" in api
    home = setup_metadata()["url"]
    for name in ("index.html", "how-to/train.html"):
        html = (tmp_path / "site" / name).read_text(encoding="utf-8")
        assert f'<a href="{home}"' in html and f"cloudrt {VERSION}" in html and "model-card.html" in html
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html").exists()


def test_data_json_of_the_docs_is_accepted(tmp_path: Path) -> None:
    from cloudrt.data.folder import read_labels

    text = next(block.text for block in blocks(ROOT / "docs" / "how-to" / "other-data.md") if block.language == "json")
    (tmp_path / "data.json").write_text(text)
    labels = read_labels(tmp_path)
    assert labels.to_dict() == json.loads(text)


def test_bench_fields_are_all_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    stored = json.loads((ROOT / "bench" / "results" / "cpu-full-originals.json").read_text())
    assert f"`schema` is {stored['schema']}" in text
    assert [field for field in stored if f"`{field}`" not in text] == []


def test_limits_of_files_are_those_of_the_code() -> None:
    from cloudrt.geo.positions import WORLD_BYTES
    from cloudrt.images.headers import MAX_CHUNKS, MAX_PIXELS, MAX_SEGMENTS
    from cloudrt.images.image import MAX_FILE_BYTES, MAX_SCANS
    from cloudrt.images.inputs import MAX_LIST_BYTES
    from cloudrt.images.tiff import MAX_ENTRIES, MAX_VALUES
    from cloudrt.masks.table import MAX_COMMAS
    from cloudrt.search import probabilities

    text = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    section = text.partition("## Limits")[2].partition("\n## ")[0]
    for limit in (
        f"{MAX_FILE_BYTES // 2**30} GiB;",
        f"{MAX_LIST_BYTES // 2**20} MiB",
        f"{MAX_PIXELS // 10**6} megapixels",
        f"{MAX_SCANS} scans",
        f"{MAX_SEGMENTS:,} segments",
        f"{MAX_CHUNKS:,} chunks",
        f"{MAX_ENTRIES:,} entries",
        f"{MAX_VALUES:,} numbers",
        f"{WORLD_BYTES:,} bytes",
        f"{MAX_COMMAS} commas",
        f"{probabilities.MAX_LABELS_BYTES // 2**20} MiB of `labels`",
        f"{probabilities.MAX_MAP_BYTES // 2**30} GiB of maps",
        f"{probabilities.MAX_MEMBERS:,} arrays",
    ):
        assert limit in section, limit


def test_limits_of_the_gate_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "explanation" / "gate.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    for column, precisions in ((1, ["fp32"]), (2, ["fp16"]), (3, ["int8", "bf16"])):
        assert rows[0][column].split(", ") == precisions
        mean, dice, empty = (row[column].removeprefix("at most ").removeprefix("at least ") for row in rows[2:])
        for name in precisions:
            limits = TOLERANCES[name]
            assert (float(mean), float(dice), float(empty.rstrip("%")) / 100) == pytest.approx(
                (limits.mean_difference, limits.dice, limits.empty_mismatch)
            )


def test_model_card_is_a_page_of_the_site() -> None:
    page = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    card = ROOT / re.findall('--8<-- "([^"]+)"', page)[0]
    assert card.read_text(encoding="utf-8").startswith("# Model card")


def title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def test_every_guide_names_the_folder_it_starts_from() -> None:
    for page in (ROOT / "docs" / "how-to").glob("*.md"):
        words = " ".join(page.read_text(encoding="utf-8").split())
        assert re.search(r"(commands|snippets) on this page [^.]*in (a|any|the) folder", words), page


def test_titles_and_navigation_agree() -> None:
    """The navigation takes the titles of the pages; the start page links to each guide by its title."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert not re.findall(r"- [^:\n]+: \S+\.md", navigation)
    links = re.findall(r"\[([^\]]+)\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    named = {target: text for text, target in links if text[0].isupper()}
    guides = {f"how-to/{page.name}" for page in (ROOT / "docs" / "how-to").glob("*.md")}
    assert guides <= set(named)
    pages = {target: title(ROOT / "docs" / target) for target in named if target != "model-card.md"}
    assert {target: named[target] for target in pages} == pages | {"reference/python.md": "Python reference"}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_file_that_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
