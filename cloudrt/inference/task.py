"""The inputs, options and outputs of a run as one object, and the summary that a run returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloudrt.arguments import check_number, check_path, check_type, shown
from cloudrt.engines.plan import Plan
from cloudrt.errors import DataError
from cloudrt.geo.bounds import Bounds, check_bounds
from cloudrt.geo.positions import world_files
from cloudrt.geo.tiling import OVERLAP, Tiling
from cloudrt.images.image import ImageFile
from cloudrt.images.inputs import check_keys, searched_folders
from cloudrt.inference.identity import Identity
from cloudrt.inference.outputs import OUTLINES, PLACED, SIMPLIFY, SUFFIXES, FormatOptions, require_packages
from cloudrt.inference.submission import RunPaths
from cloudrt.model.artifact import default_model
from cloudrt.options import RunOptions, RunSettings
from cloudrt.system.paths import check_outputs, check_pictures, check_suffixes
from cloudrt.system.suggest import check_name


@dataclass(frozen=True)
class InferTask:
    """The inputs, options and outputs of a run.

    Parameters
    ----------
    inputs
        Folders, images, patterns and lists; see `cloudrt.images.inputs.list_inputs`.
    output
        Path of the submission; its suffix decides the format. See `RunPaths` for the other files.
    model
        Path of the artifact. None uses ./model.onnx if it exists, else the model that ships with the package.
    run
        Options of the run.
    sample
        A sample_submission.csv: only its images are predicted, in its order.
    format
        One of `SUFFIXES`, such as "csv", which must match the suffix; "" follows the suffix.
    resume, overwrite
        Whether to continue an interrupted run, and whether to replace existing outputs.
    report, report_images
        Whether to write an HTML report, and how many images it shows.
    stats, masks, overlays, save_probabilities
        Where to write statistics (JSON), masks (a folder of PNG, or GeoTIFF if the position is known), overlays (a
        folder of JPEG) and probabilities (.npz).
    tile
        Whether images larger than the artifact's field of view are cut into tiles; the formats with positions imply it.
    overlap
        Overlap of neighbouring tiles, as a fraction of a tile; None uses `OVERLAP`.
    bounds
        West, south, east and north, in degrees, of the images without tags or a world file.
    simplify
        Outlines in GeoJSON and GeoParquet may deviate by this many pixels of the masks; None uses `SIMPLIFY`.

    Raises
    ------
    DataError
        An invalid format, suffix or value, a value of the wrong type, or options that contradict each other.
    """

    inputs: tuple[str | Path, ...]
    output: Path = Path("submission.csv")
    model: Path | None = None
    run: RunOptions = field(default_factory=RunOptions)
    sample: Path | None = None
    format: str = ""
    resume: bool = False
    overwrite: bool = False
    report: bool = False
    report_images: int = 24
    stats: Path | None = None
    masks: Path | None = None
    overlays: Path | None = None
    save_probabilities: Path | None = None
    tile: bool = False
    overlap: float | None = None
    bounds: Bounds | None = None
    simplify: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.format:
            check_name("format", self.format, tuple(SUFFIXES))
        by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}.get(self.output.suffix.lower())
        if by_suffix is None or (self.format and self.format != by_suffix):
            known = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
            asked = f" and `format={self.format!r}`" if self.format else ""
            raise DataError(f"`output={self.output}`{asked}: the suffix decides the format: {known}")
        object.__setattr__(self, "format", by_suffix)
        if self.resume and self.overwrite:
            raise DataError("`resume` and `overwrite` exclude each other: give one of them")
        if self.resume and self.save_probabilities:
            raise DataError("`save_probabilities` stores all images of a run: it cannot be combined with `resume`")
        if self.save_probabilities and self.save_probabilities.suffix != ".npz":
            raise DataError(f"`save_probabilities={self.save_probabilities}`: the file name must end in .npz")
        if self.tiling is not None and self.save_probabilities:
            raise DataError("`save_probabilities` stores images of one size: it cannot be combined with `tile`")
        if self.bounds is not None:
            object.__setattr__(self, "bounds", check_bounds(self.bounds, f"bounds {shown(self.bounds)}"))
            if self.tiling is None:
                raise DataError("`bounds` places panoramas: it needs `tile=True`, or a `format` with positions")
        if self.overlap is not None and self.tiling is None:
            raise DataError("`overlap` applies to tiles: it needs `tile=True`, or a `format` with positions")
        if self.simplify is not None:
            if self.format not in OUTLINES:
                raise DataError(f"`simplify` applies to outlines: it needs `format` {' or '.join(OUTLINES)}")
            if not 0 <= check_number("simplify", self.simplify) < float("inf"):
                raise DataError(f"simplify must be 0 or more pixels, found {shown(self.simplify)}")

    def _check_types(self) -> None:
        """Raise DataError for values of the wrong type; otherwise they fail later, or count as True, such as "no"."""
        check_type("format", self.format, str, "a name")
        for name in ("resume", "overwrite", "report", "tile"):
            check_type(name, getattr(self, name), bool, "True or False")
        check_type("report_images", self.report_images, int, "a whole number")
        if self.report_images < 0:
            raise DataError(f"report_images must be 0 or more, found {shown(self.report_images)}")
        for one in self.inputs:
            check_path("each of the inputs", one)
        for name in ("output", "model", "sample", "stats", "masks", "overlays", "save_probabilities"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles; None for images that are resized whole."""
        placed = self.format in PLACED
        overlap = OVERLAP if self.overlap is None else self.overlap
        return Tiling(overlap, self.bounds, placed) if self.tile or placed else None

    def format_options(self) -> FormatOptions:
        """Return the options of the output format."""
        return FormatOptions(SIMPLIFY if self.simplify is None else self.simplify, self.overwrite)

    def require_packages(self, names: Iterable[str]) -> None:
        """Import what the run needs for images of these file names, so that it fails early if something is missing."""
        tagged = any(name.lower().endswith((".tif", ".tiff")) for name in names)
        require_packages(self.format, geotiff=self.tiling is not None and (tagged or self.masks is not None))

    def complete(self, identity: Identity) -> Identity:
        """Return a copy of an identity with the task's options that the output depends on: tiles and outlines."""
        simplify = str(float(self.format_options().simplify)) if self.format in OUTLINES else ""
        return replace(identity, tiling=str(self.tiling or ""), simplify=simplify)

    @property
    def paths(self) -> RunPaths:
        """Paths of the output and of the files named after it."""
        return RunPaths(self.output)

    def check(self, files: Sequence[ImageFile], *, begun: bool) -> None:
        """Check, before anything slow, that the outputs can be written and replace neither inputs nor each other.

        Parameters
        ----------
        files
            The images.
        begun
            Whether there is an interrupted run, whose files `resume` replaces.

        Raises
        ------
        DataError
            See `check_outputs` and `check_keys`; or there is an interrupted run, and neither `resume` nor `overwrite`
            is set.
        """
        named, follow, written, folders = self._outputs()
        remote = self.run.remote
        rules = Path(remote.rules) if remote.rules else None
        model = rules if remote.urls else self.model or default_model()
        reads: dict[str, Path | None] = {"`model`": model, "`sample`": self.sample}
        reads |= {f"input {one}": Path(one) for one in self.inputs if "://" not in str(one)}
        stores = {"`output`": self.output if self.format == "zarr" else None}
        images = [file.path for file in files]
        if self.tiling is not None:
            images += [world for path in images for world in world_files(path)]
        check_outputs(
            named | follow | written | {"the journal": self.paths.journal},
            reads,
            folders=folders,
            stores=stores,
            images=images,
            overwrite=True,
        )
        check_pictures(folders, searched_folders(self.inputs))
        check_suffixes({"`stats`": self.stats}, ".json")
        self.check_existing(begun or (self.paths.journal.is_file() and not self.resume))
        if self.masks or self.overlays:
            check_keys(files)

    def check_existing(self, begun: bool) -> None:
        """Check that outputs which exist may be replaced; called again when this run has locked its journal.

        Parameters
        ----------
        begun
            Whether there is an interrupted run, whose files `resume` replaces.

        Raises
        ------
        DataError
            There is an interrupted run, and neither `resume` nor `overwrite` is set; or an output exists that this run
            may not replace. `resume` replaces the files of the interrupted run, but not `stats`.
        """
        if begun and not (self.resume or self.overwrite):
            raise DataError(
                f"{self.paths.journal} belongs to an interrupted run: use `resume=True` or `overwrite=True`"
            )
        named, follow, written, folders = self._outputs()
        check_outputs(written, overwrite=self.overwrite)
        continues = self.overwrite or (self.resume and begun)
        check_outputs(named, folders=folders, overwrite=continues)
        check_outputs(follow, overwrite=continues or self.format == "zarr")

    def _outputs(self) -> tuple[dict[str, Path | None], ...]:
        """Return four dictionaries, name -> path or None.

        They hold the output and the report; the failures and the record, which are replaced together with the output;
        the files of other options; and folders.
        """
        paths, store = self.paths, self.format == "zarr"  # a folder, to which days are appended
        return (
            {"`output`": None if store else self.output, "the report": paths.report if self.report else None},
            {"the list of failures": paths.failures, "the record of the run": paths.record},
            {"`stats`": self.stats, "`save_probabilities`": self.save_probabilities},
            {"`masks`": self.masks, "`overlays`": self.overlays},
        )


@dataclass(frozen=True)
class RunSummary:
    """The result of a run.

    Parameters
    ----------
    output
        Path of the submission.
    images, failed, rows_with_mask
        Number of images, of failed images and of rows that are not empty, including those of the resumed run.
    resumed
        Number of images that the resumed run had finished.
    seconds
        Duration of this run in seconds, without opening the model.
    plan
        Provider, batch size and so on that were used.
    failures, report
        Paths of the files that were written, or None.
    first_error
        Why the first failed image failed; "" if none did.
    already_finished
        Whether the output was complete already, so that nothing was run or written; `failed` and `rows_with_mask` are
        0 then.
    """

    output: Path
    images: int
    failed: int
    rows_with_mask: int
    resumed: int
    seconds: float
    plan: Plan
    failures: Path | None = None
    report: Path | None = None
    first_error: str = ""
    already_finished: bool = False

    @property
    def images_per_second(self) -> float:
        """Images per second of this run, without the resumed images."""
        return (self.images - self.resumed) / self.seconds if self.seconds > 0 else 0.0


class InferSettings(RunSettings, total=False):
    """Keyword arguments of `infer`: the fields of `RunOptions` and of `InferTask`."""

    sample: Path | None
    format: str
    resume: bool
    overwrite: bool
    report: bool
    report_images: int
    stats: Path | None
    masks: Path | None
    overlays: Path | None
    save_probabilities: Path | None
    tile: bool
    overlap: float | None
    bounds: Bounds | None
    simplify: float | None
