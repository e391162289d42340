"""What a request asks for: the media type of the answer, changes of the rules, and the bounds of its images.

Malformed values raise HTTPException with status 400, and an Accept header without an offered media type with 406.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from fastapi import HTTPException

from cloudrt.errors import DataError
from cloudrt.geo.bounds import Bounds, parse_bounds
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule

JSON, PNG, GEOJSON = "application/json", "image/png", "application/geo+json"
_PATTERNS = (
    (JSON, (JSON, "application/*", "*/*")),
    (PNG, (PNG, "image/*")),
    (GEOJSON, (GEOJSON,)),
)


def accepted(header: str) -> str:
    """Return the offered media type that an Accept header prefers; JSON without a header."""
    choices: list[tuple[float, str]] = []
    for part in header.split(",") if header.strip() else ["*/*"]:
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            quality = float(weight)
        except ValueError:
            quality = 0.0
        choices += [(quality, offered) for offered, patterns in _PATTERNS if kind in patterns and quality > 0]
    if not choices:
        raise HTTPException(406, f"the answer can only be {JSON}, {PNG} or {GEOJSON}")
    return max(choices, key=lambda choice: choice[0])[1]


def refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse query parameters that the API does not have; FastAPI would ignore them."""
    for name in given:
        if name not in known:
            raise HTTPException(400, f"no parameter named {name!r:.80}: {', '.join(known)}")


def changed_rules(text: str | None, labels: Labels, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules of the model with the changes of a request: JSON, class -> parameter of its rule -> value."""
    if text is None:
        return tuple(rules)
    try:
        given = json.loads(text)
        if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
            raise DataError('give JSON such as {"Fish": {"threshold": 120}}')
        unknown = given.keys() - set(labels.classes)
        if unknown:
            raise DataError(f"no class named {min(unknown)!r:.80}: {', '.join(labels.classes)}")
        return tuple(
            Rule.from_dict(rule.to_dict() | given.get(label, {}))
            for label, rule in zip(labels.classes, rules, strict=True)
        )
    except json.JSONDecodeError as error:
        raise HTTPException(400, f'rules: give JSON such as {{"Fish": {{"threshold": 120}}}}: {error}') from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"rules: {error}") from error


def request_bounds(text: str | None) -> Bounds | None:
    """Return west, south, east and north in degrees."""
    try:
        return None if text is None else parse_bounds(text, "bounds")
    except DataError as error:
        raise HTTPException(400, str(error)) from error
