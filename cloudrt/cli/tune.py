"""`cloudrt tune`: find the best rules of an artifact on labelled images."""

from __future__ import annotations

import json
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from cloudrt.cli.run_options import run_options, suggested_inputs, take_run_options
from cloudrt.cli.types import FILE, Numbers
from cloudrt.system.paths import check_outputs, check_pictures
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, printable, reports_errors

if TYPE_CHECKING:
    from cloudrt.masks.rule import Rule
    from cloudrt.model.artifact import Artifact
    from cloudrt.options import RunOptions
    from cloudrt.search.choose import RuleScore
    from cloudrt.search.tune import MapSource
    from cloudrt.search.tuned import Tuned


@click.command()
@click.argument("source", type=FILE, metavar="MODEL_OR_PROBABILITIES")
@click.argument("data", type=FILE)
@click.option(
    "--image-list",
    type=FILE,
    help="Text file of image names, one per line. Default: all of train.csv, or of PROBABILITIES.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="The artifact with the new rules, or a .json with the rules alone. Default: tuned.onnx, or rules.json if "
    "PROBABILITIES are given without --model.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--model", type=FILE, help="The artifact that gets the rules found on PROBABILITIES.")
@click.option("--save-probabilities", type=FILE, help="Store the network's outputs in this .npz.")
@click.option("--thresholds", type=Numbers(255), help="Levels to try, such as 100:200:5. Default: 0 to 255.")
@click.option(
    "--min-areas",
    type=Numbers(2**31 - 1),
    help="Areas to try, in pixels of the submission grid, such as 0,500,9000:25000:1000. Default: 0 to 50000 for a "
    "grid of 525x350, and in proportion for others.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="Folds of the cross-validation.")
@run_options
@reports_errors
def tune(
    source: Path,
    data: Path,
    image_list: Path | None,
    output: Path | None,
    overwrite: bool,
    model: Path | None,
    save_probabilities: Path | None,
    thresholds: tuple[int, ...] | None,
    min_areas: tuple[int, ...] | None,
    folds: int,
    **given: Any,
) -> None:
    """Find the best rule of each class by exact search on the labelled images of DATA, and write an artifact with them.

    MODEL is an .onnx of cloudrt-export. PROBABILITIES is an .npz of an earlier --save-probabilities, with which the
    network does not run again. Use images that the network was not trained on, such as those in runs/NAME/held_out.txt.

    A rule of MODEL is only replaced if the out-of-fold Dice of the new one is higher by more than the standard error of
    the difference. For a rule that is kept, the column "out of fold" has its Dice on all images, which is too high if
    the rule was chosen on them, as after cloudrt-train.

    A plot (.png) and a page (.html) of the Dice surfaces are written beside the output, and a list of the images whose
    label and prediction disagree most (.disagreements.csv), which may need another label.
    """
    from cloudrt.data.folder import open_data
    from cloudrt.images.inputs import read_names
    from cloudrt.model.artifact import read_artifact
    from cloudrt.search.probabilities import Probabilities
    from cloudrt.search.tables import THRESHOLDS
    from cloudrt.search.tune import TuneOptions, require_rows
    from cloudrt.search.tune import tune as search_rules
    from cloudrt.system.machine import usable_cpus

    _refuse_swapped(source, data)
    from_file = source.suffix == ".npz"
    target = _target(output, model, save_probabilities, from_file)
    run = take_run_options(given)
    folder = open_data(data)
    listed = read_names(image_list) if image_list else []
    rows = folder.read_train()
    require_rows(folder, rows, listed)
    for one in (source, model):
        if one and one.suffix != ".npz":
            read_artifact(one)
    models = {"the model": source, "--model": model}
    if overwrite:  # the rules of an artifact may be replaced in place
        models = {name: path for name, path in models.items() if not _same(path, target)}
    check_outputs(
        {
            "--output": target,
            "the plot of --output": target.with_suffix(".png"),
            "the page of --output": target.with_suffix(".html"),
            "the disagreements of --output": target.with_suffix(".disagreements.csv"),
            "--save-probabilities": save_probabilities,
        },
        models | {"train.csv": folder.train_csv, "data.json": data / "data.json", "--image-list": image_list},
        images=(folder.train_images / name for name in rows),
        overwrite=overwrite,
    )
    check_pictures({"the plot of --output": target.with_suffix(".png")}, folder.image_folders)
    if not (listed or from_file) and (unlisted := folder.describe_unlisted()):
        click.echo(unlisted, err=True)
    with ExitStack() as stack:
        opened, artifact, digest = _open(source, model, run, stack)
        names = listed or (opened.keys if isinstance(opened, Probabilities) else list(rows))
        options = TuneOptions(
            before=artifact.rules if artifact else (),
            thresholds=thresholds or THRESHOLDS,
            min_areas=min_areas,
            folds=folds,
            threads=run.threads or usable_cpus(),
        )
        tuned = search_rules(opened, folder, names, options, save=save_probabilities, bar=progress_bar)
    _write(tuned, artifact, digest, model or source, target, data)
    _show(tuned)
    click.echo(f"{target}: the new rules; {target.with_suffix('.html')}: open it in a browser")
    if target.suffix == ".onnx":
        click.echo(f"Next: cloudrt-infer {suggested_inputs(data)} --model {quote(str(target))}")
    if image_list is None and not from_file:
        click.echo(
            "All images of DATA were used: if the network was trained on some of them, use --image-list", err=True
        )
    for name, reason in list(tuned.failures.items())[:10]:
        click.echo(printable(f"Left out: {name} {reason}"), err=True)
    if tuned.failures:
        click.echo(f"{len(tuned.failures)} of {len(names)} images were left out", err=True)
        raise SystemExit(1)


def _refuse_swapped(source: Path, data: Path) -> None:
    """Fail if the model or the probabilities are not the first argument, and the folder the second."""
    if not (source.is_dir() or source.suffix == ".csv"):
        return
    if data.suffix in (".onnx", ".npz"):
        folder = source if source.is_dir() else source.parent
        raise Failure(f"the arguments are swapped: cloudrt tune {quote(str(data))} {quote(str(folder))}")
    what = "folder" if source.is_dir() else "table"
    raise Failure(
        f"{source} is a {what}: first give a model (.onnx) or probabilities (.npz), then the folder that contains "
        "train.csv"
    )


def _same(path: Path | None, target: Path) -> bool:
    return path is not None and path.exists() and target.exists() and path.samefile(target)


def _target(output: Path | None, model: Path | None, save_probabilities: Path | None, from_file: bool) -> Path:
    """Check that the options match, and return the path of the output."""
    if model and not from_file:
        raise Failure("--model applies to PROBABILITIES: leave it out with a MODEL")
    has_model = model is not None or not from_file
    target = output or Path("tuned.onnx" if has_model else "rules.json")
    if target.suffix not in (".onnx", ".json"):
        raise Failure(f"{target}: the output must be an .onnx, or a .json with the rules alone")
    if target.suffix == ".onnx" and not has_model:
        raise Failure(f"{target}: give the artifact that gets the rules with --model, or a .json as --output")
    if save_probabilities and from_file:
        raise Failure("--save-probabilities applies to a MODEL: PROBABILITIES are stored already")
    if save_probabilities and save_probabilities.suffix != ".npz":
        raise Failure(f"--save-probabilities {save_probabilities}: the file name must end in .npz")
    return target


def _open(
    source: Path, model: Path | None, run: RunOptions, stack: ExitStack
) -> tuple[MapSource, Artifact | None, str]:
    """Return the source of the maps, and the metadata and the SHA-256 of the artifact; None and "" without one."""
    from cloudrt.inference.pipeline import Segmenter
    from cloudrt.model.artifact import parse_artifact
    from cloudrt.model.onnx_file import load_with_content
    from cloudrt.search.probabilities import Probabilities

    if source.suffix == ".npz":
        artifact, digest = None, ""
        if model:
            loaded, content = load_with_content(model)
            artifact, digest = parse_artifact(loaded, model), sha256(content).hexdigest()
        kept = stack.enter_context(Probabilities(source))
        if artifact and artifact.labels != kept.labels:
            raise Failure(f"{model} and {source} have different classes or grids")
        return kept, artifact, digest
    segmenter = stack.enter_context(Segmenter(source, run))
    click.echo(
        f"{source}: provider {segmenter.plan.provider}, batch {segmenter.batch_size}, {segmenter.threads} threads",
        err=True,
    )
    return segmenter, segmenter.artifact, segmenter.identity().artifact


def _write(tuned: Tuned, artifact: Artifact | None, digest: str, model: Path, target: Path, data: Path) -> None:
    from cloudrt.reports.tune_page import plot_surfaces, write_tune_page
    from cloudrt.search.tuned import write_disagreements, write_tuned
    from cloudrt.system.files import replacing

    plot = plot_surfaces(tuned)
    facts = {
        "Data": f"{tuned.images:,} images of {data.resolve().name}",
        "Dice": f"{_mean([choice.score.dice for choice in tuned.choices]):.4f}",
        "Before": f"{_mean([score.dice for _, score in tuned.before]):.4f}" if tuned.before else "–",
        "Out of fold": f"{tuned.out_of_fold:.4f}",
        "Thresholds and areas tried": f"{tuned.tables.dice[0, 0].size:,} pairs per class",
    }
    if target.suffix == ".onnx":
        assert artifact is not None
        write_tuned(model, artifact, digest, tuned, target)
    else:
        rules = {label: rule.to_dict() for label, rule in zip(tuned.labels.classes, tuned.rules, strict=True)}
        with replacing(target) as partial:
            partial.write_text(json.dumps(rules, indent=2) + "\n", encoding="utf-8")
    with replacing(target.with_suffix(".png")) as partial:
        partial.write_bytes(plot)
    write_tune_page(tuned, plot, facts, target.with_suffix(".html"))
    write_disagreements(tuned, target.with_suffix(".disagreements.csv"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _show(tuned: Tuned) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cloudrt.reports.tune_page import dice, kept_because, span

    table = Table(title=f"Mean Dice of {tuned.images} images, without and with the class")
    for name in ("class", "level >", "area >", "Dice", "without", "with", "out of fold"):
        table.add_column(name, justify="left" if name == "class" else "right", no_wrap=True)

    def row(label: str, rule: Rule, score: RuleScore, last: str, style: str = "") -> None:
        levels = f"{rule.threshold}", f"{rule.min_area:,}"
        table.add_row(
            Text(label), *levels, *map(dice, (score.dice, score.negatives, score.positives)), last, style=style
        )

    for index, (label, choice) in enumerate(zip(tuned.labels.classes, tuned.choices, strict=True)):
        replaced = bool(tuned.before) and choice.rule != tuned.before[index][0]
        if replaced:
            row(label, *tuned.before[index], "", "dim")
        row(
            "" if replaced else label,
            choice.rule,
            choice.score,
            f"{dice(choice.out_of_fold)} ± {dice(choice.error)}",
        )
        table.add_section()
    if tuned.before:
        table.add_row("mean", "", "", dice(_mean([score.dice for _, score in tuned.before])), "", "", "", style="dim")
    means = dice(_mean([choice.score.dice for choice in tuned.choices])), "", "", dice(tuned.out_of_fold)
    table.add_row("" if tuned.before else "mean", "", "", *means, style="bold")
    Console().print(table)
    if tuned.before:
        click.echo("For each class: the previous rule, then the new one; a single row is a rule that did not change")
    for label, choice in zip(tuned.labels.classes, tuned.choices, strict=True):
        if choice.kept:
            click.echo(f"{label} keeps its rule: {kept_because(choice)}")
        if choice.rule.gate_pixels:
            least, level = choice.rule.gate_pixels, choice.rule.gate_threshold
            click.echo(f"{label} is empty unless at least {least:,} pixels exceed level {level}")
        if choice.rule.presence:
            click.echo(f"{label} is empty unless its presence is at least {choice.rule.presence}")
        click.echo(
            f"{label}: rules of the folds (threshold, min area): {span(choice)}; out-of-fold Dice of the highest "
            f"point, without averaging: {dice(choice.peak_out_of_fold)}"
        )
