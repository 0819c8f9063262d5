"""Safetensors files, written and read in place: the library can neither write in pieces nor read bfloat16 into NumPy.

    file      header length u64 (little-endian), header, tensors
    header    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {name: string}}

data_offsets are relative to the end of the header; the tensors fill the rest of the file without gaps. Source:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardloss.errors import BadFile
from shardloss.files.facts import Facts
from shardloss.files.foreign import HEAD_BYTES, format_of
from shardloss.files.jsons import object_in, parsed
from shardloss.files.stored import STORAGE, Shape, Stored, regular, reserve

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
SPARE_BYTES = 64  # blanks after the header, whose numbers may grow when it is sealed
METADATA = "__metadata__"
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
CODES = {name: code for code, name in NAMES.items()}
BITS = {"C64": 64, "U64": 64, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}  # of dtypes not read
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
MAX_RANK = 64  # NumPy's
CODE = re.compile(r"[A-Z][A-Z0-9_]{0,19}")


def begin(part: Path, shapes: Mapping[str, Shape], facts: Facts) -> dict[str, Stored]:
    """Create a file with room for tensors of these shapes, to be filled later."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + shape.num_bytes
        entries[name] = {"dtype": CODES[shape.dtype], "shape": list(shape.sizes), "data_offsets": [first, end]}
    header = written(entries, facts)
    length = (len(header) + SPARE_BYTES + 7) // 8 * 8
    part.write_bytes(LENGTH.pack(length) + header.ljust(length))
    reserve(part, LENGTH.size + length + end)
    start = LENGTH.size + length
    return {name: Stored(part, name, shape, start + entries[name]["data_offsets"][0]) for name, shape in shapes.items()}


def written(entries: Mapping[str, Any], facts: Facts) -> bytes:
    """Return the header; each fact is a string of JSON, because metadata can contain only strings."""
    metadata = {f"shardloss.{name}": json.dumps(value) for name, value in facts.to_json().items()}
    return json.dumps({METADATA: metadata, **entries}, separators=(",", ":")).encode()


def seal(part: Path, facts: Facts) -> None:
    """Write the final facts into the header, and flush the file to disk."""
    with part.open("r+b") as file:
        length = LENGTH.unpack(file.read(LENGTH.size))[0]
        entries = json.loads(file.read(length))
        del entries[METADATA]
        file.seek(LENGTH.size)
        file.write(written(entries, facts).ljust(length))
        file.flush()
        os.fsync(file.fileno())


def opened(path: Path) -> tuple[Facts | None, dict[str, Stored]]:
    """Return the facts of a file's table, or None if it is not an exported table, and the file's tensors.

    Raises:
        BadFile: the file is not a safetensors file, or is truncated.
    """
    header, start, size = header_of(path)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"{path}: its metadata is not a map of strings")
    covered, tensors = [], {}
    for name, entry in header.items():
        code, sizes, begin_at, end_at = checked_entry(name, entry, path)
        covered.append((begin_at, end_at))
        tensors[name] = Stored(path, name, Shape(NAMES.get(code, code), sizes), start + begin_at)
        bits = 8 * STORAGE[NAMES[code]].itemsize if code in NAMES else BITS.get(code)
        if bits is not None and bits * math.prod(sizes) != 8 * (end_at - begin_at):
            what = f"has {end_at - begin_at} bytes, which do not fit {tensors[name].shape}"
            raise BadFile(f"{path}: {name[:60]!r} {what}")
    check_cover(sorted(covered), size - start, path)
    return facts_in(metadata, path), tensors


def header_of(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset at which the tensors begin, and the size of the file in bytes.

    Raises:
        BadFile: the file is of another format, which the message names, or its header is cut off or malformed.
    """
    with regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        length = LENGTH.unpack_from(head)[0] if len(head) >= LENGTH.size else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH.size):
            raise BadFile(f"{path} {misread(path, head, length, size)}")
        file.seek(LENGTH.size)
        raw = file.read(length)
    what = f"{path} is not a safetensors file: its header"
    header = object_in(raw, what)
    if not raw.startswith(b"{"):
        raise BadFile(f"{what} must begin with {{, without blanks")
    return header, LENGTH.size + length, size


def misread(path: Path, head: bytes, length: int, size: int) -> str:
    """Return why a file whose first bytes are no header's length cannot be read."""
    if head[LENGTH.size : LENGTH.size + 1] == b"{" and length > MAX_HEADER_BYTES:
        return f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
    if head[LENGTH.size : LENGTH.size + 2] == b'{"':
        return f"was cut off: its header alone takes {length} bytes, but the file has {size}"
    known = format_of(path, head)
    return f"is not a safetensors file{f' but {known}' if known else ': it does not begin with a header'}"


def checked_entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, sizes, first byte and end byte of a tensor from its entry in the header.

    Raises:
        BadFile: the entry is malformed.
    """
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadFile(f"{path}: the header's entry {name[:60]!r} is not a tensor")
    code, sizes, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*sizes, *place] if isinstance(sizes, list) and isinstance(place, list) else [None]
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers) or len(place) != 2:
        raise BadFile(f"{path}: the header's entry {name[:60]!r} has a malformed shape or byte range")
    if not isinstance(code, str) or not CODE.fullmatch(code):
        raise BadFile(f"{path}: the header's entry {name[:60]!r} has no valid dtype: {str(code)[:40]!r}")
    if place[0] > place[1] or len(sizes) > MAX_RANK or math.prod(sizes) >= 1 << 63:
        raise BadFile(f"{path}: the header's entry {name[:60]!r} has an impossible shape or byte range")
    return code, tuple(sizes), place[0], place[1]


def check_cover(covered: list[tuple[int, int]], num_bytes: int, path: Path) -> None:
    """Check that the tensors follow each other without gaps, up to the end of the file.

    Raises:
        BadFile: there is a gap or an overlap, or the file is too long or too short.
    """
    end = 0
    for first, last in covered:
        if first != end:
            raise BadFile(f"{path}: its tensors overlap or leave a gap at byte {min(first, end)}")
        end = last
    if end != num_bytes:
        what = "it was cut off" if end > num_bytes else "something follows them"
        raise BadFile(f"{path}: its tensors take {end} bytes, but the file has {num_bytes}: {what}")


def facts_in(metadata: Mapping[str, str], path: Path) -> Facts | None:
    """Return the facts in the metadata, or None if the file is not an exported table."""
    ours = {name.removeprefix("shardloss."): value for name, value in metadata.items() if name.startswith("shardloss.")}
    if not ours:
        return None
    try:
        found = {name: parsed(value) for name, value in ours.items()}
    except (ValueError, RecursionError):
        raise BadFile(f"{path}: the description of its table is not JSON") from None
    return Facts.from_json(found, path)
