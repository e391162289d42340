"""The images of a run, from folders and object stores, with the keys and the order of `cloudrt.images.inputs`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudrt.cluster.storage import Place, is_uri, open_place
from cloudrt.images.image import ImageFile, StoredImage
from cloudrt.images.inputs import join, list_inputs, read_sample
from cloudrt.labels import Labels


@dataclass(frozen=True)
class ListedImage:
    """An image to predict.

    Parameters
    ----------
    key
        Key of its rows.
    store
        Number of the store that holds it; -1 for a local path.
    path
        Path in the store, or local path.
    size
        Size of the file in bytes; -1 if it is missing.
    """

    key: str
    store: int
    path: str
    size: int

    def source(self, stores: Sequence[Place]) -> ImageFile | StoredImage:
        """Return the image as an input of `Segmenter`."""
        if self.store < 0:
            return ImageFile(self.key, Path(self.path))
        place, path = stores[self.store], self.path
        return StoredImage(self.key, lambda: place.read_image(path), lambda suffix: place.read_beside(path, suffix))


def pack(images: Sequence[ListedImage]) -> bytes:
    """Serialise images."""
    return json.dumps([[one.key, one.store, one.path, one.size] for one in images]).encode()


def unpack(data: bytes) -> list[ListedImage]:
    """Return the images that `pack` serialised."""
    return [ListedImage(*values) for values in json.loads(data)]


def cut(images: Sequence[ListedImage], size: int) -> list[Sequence[ListedImage]]:
    """Return partitions of `size` images; the last one may be smaller."""
    return [images[begin : begin + size] for begin in range(0, len(images), size)]


def list_images(
    inputs: Sequence[str], sample: Path | None, endpoint: str | None, labels: Labels
) -> tuple[list[ListedImage], list[Place], list[str]]:
    """Return the images, the stores that hold them, and the local paths that must exist on every machine.

    Raises
    ------
    DataError
        See `cloudrt.images.inputs.list_inputs`.
    """
    stores: list[Place] = []
    local = [str(Path(one).absolute()) for one in inputs if not is_uri(one)]
    found: list[tuple[str, str, ListedImage]] = []
    for one in inputs:
        if is_uri(one):
            place = open_place(one, endpoint)
            for item in place.images():
                image = ListedImage(item.key, len(stores), item.path, item.size)
                found.append((item.key, f"{one}: {item.key}", image))
            stores.append(place)
        else:
            for file in list_inputs([one], None, labels):
                path = str(file.path.absolute())
                size = file.path.stat().st_size if file.path.is_file() else -1
                found.append((file.key, path, ListedImage(file.key, -1, path, size)))
    images = join(found)
    folders = [next(str(path) for path in (Path(one), *Path(one).parents) if path.exists()) for one in local]
    if sample is None:
        return list(images.values()), stores, folders
    # As on a single machine, a missing image is listed with the path where it should be.
    home = next((Path(one) for one in local if Path(one).is_dir()), Path(local[0]).parent if local else None)
    number = -1 if home else 0
    base = str(home) if home else stores[0].path
    wanted = read_sample(sample, labels)
    return [images.get(name, ListedImage(name, number, f"{base}/{name}", -1)) for name in wanted], stores, folders
