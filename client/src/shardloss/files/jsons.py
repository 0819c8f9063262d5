"""Strict JSON: UTF-8 without a byte order mark, names that occur once, and no NaN."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from typing import Any

from shardloss.errors import BadFile

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8 with a byte order mark",
}


def object_in(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in raw; `what` names it in errors.

    Raises:
        BadFile: the bytes are not one JSON object in plain UTF-8.
    """
    coding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), None)
    if coding is None and b"\0" in raw[:4]:
        coding = "UTF-16 or UTF-32"
    if coding is not None:
        raise BadFile(f"{what} is in {coding}; it must be in plain UTF-8")
    try:
        found = parsed(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what} is not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(found, dict):
        raise BadFile(f"{what} is not a JSON object")
    return found


def parsed(text: str) -> Any:
    """Return the value in a JSON text.

    Raises:
        ValueError, RecursionError: the text is not JSON, or an object has a name twice.
    """
    return json.loads(text, object_pairs_hook=distinct, parse_constant=refused)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, whose names must be distinct.

    Raises:
        ValueError: a name occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0][:40]!r} occurs twice")
    return found


def refused(constant: str) -> None:
    """Raise ValueError for NaN and infinities, which are not JSON."""
    raise ValueError(f"{constant} is not a number")
