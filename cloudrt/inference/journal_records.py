"""The records of a journal, one per line: 8 hexadecimal digits of the CRC-32 of the JSON, a space, and the JSON."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from cloudrt.geo.mask_grid import MaskGrid


@dataclass(frozen=True)
class Record:
    """One finished image.

    Parameters
    ----------
    key
        Key of its rows.
    texts
        RLE texts, one per class.
    error
        Reason of the failure, or None.
    batch
        Position of the first image of its batch.
    size
        Batch size of that batch, which is smaller than the identity's after running out of memory.
    place
        Grid and position of a panorama's masks.
    """

    key: str
    texts: tuple[str, ...]
    error: str | None
    batch: int
    size: int = 0
    place: MaskGrid | None = None


def encode(record: Record, position: int) -> bytes:
    """Return the JSON of a record.

    RLE texts are inserted as they are: `json.dumps` would spend most of its time searching them for characters to
    escape.
    """
    texts = '","'.join(record.texts)
    place = f',"place":{compact(record.place.to_dict())}' if record.place else ""
    return (
        f'{{"position":{position},"key":{json.dumps(record.key)},"texts":["{texts}"],"error":{json.dumps(record.error)},'
        f'"batch":{record.batch},"size":{record.size}{place}}}'
    ).encode()


def decode(values: dict[str, Any]) -> tuple[Any, Record]:
    """Return the position and the record in the values of a line; KeyError, TypeError or ValueError if malformed."""
    return values["position"], Record(
        str(values["key"]),
        tuple(values["texts"]),
        values["error"],
        int(values["batch"]),
        int(values["size"]),
        MaskGrid.from_dict(values["place"]) if "place" in values else None,
    )


def compact(values: dict[str, Any]) -> str:
    """Return JSON without spaces."""
    return json.dumps(values, separators=(",", ":"))


def pack(text: bytes) -> bytes:
    """Return the line of a JSON text."""
    return b"%08x %s\n" % (_checksum(text), text)


def _checksum(text: bytes) -> int:
    """Return the CRC-32, computed in parts small enough that zlib does not release the GIL.

    See `FLUSH_SECONDS` in `journal.py`.
    """
    view, found = memoryview(text), 0
    for begin in range(0, len(text), 4096):
        found = zlib.crc32(view[begin : begin + 4096], found)
    return found


def unpack(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line, or None if it is incomplete or damaged."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    text = line[9:-1]
    if b"%08x" % zlib.crc32(text) != line[:8]:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
