"""A folder of NumPy files: NAME.npy per tensor, and spec.json, which marks the uint16 files that contain bfloat16."""

from __future__ import annotations

import ast
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from numpy.lib import format as npy_format

from shardloss.errors import BadFile
from shardloss.files.facts import Facts, shapes
from shardloss.files.foreign import HEAD_BYTES, format_of
from shardloss.files.jsons import object_in
from shardloss.files.stored import STORAGE, Shape, Stored, reading, regular, reserve

SPEC_FILE = "spec.json"
MAX_SPEC_BYTES = 1 << 20
MAX_HEADER_BYTES = 10_000  # NumPy's own limit, because headers are parsed as Python literals
MAX_RANK = 64
MAGIC = b"\x93NUMPY"
LENGTHS = {
    1: ("<H", 10),
    2: ("<I", 12),
    3: ("<I", 12),
}  # of the header, by version: its own format, and the header's start
LONG = re.compile(r"(\d)L\b")  # a number written by Python 2
NAMES = {dtype.str: name for name, dtype in STORAGE.items() if name != "bfloat16"}


def begin(part: Path, wanted: Mapping[str, Shape], facts: Facts) -> dict[str, Stored]:  # noqa: ARG001 (as safetensors)
    """Create a folder with a file for each of the wanted tensors, to be filled later."""
    part.mkdir(exist_ok=True)
    return {name: begin_one(part / f"{name}.npy", name, shape) for name, shape in wanted.items()}


def begin_one(path: Path, name: str, shape: Shape) -> Stored:
    """Create the file of one tensor, to be filled later."""
    with path.open("wb") as file:
        header = {"descr": STORAGE[shape.dtype].str, "fortran_order": False, "shape": shape.sizes}
        npy_format.write_array_header_1_0(file, header)
        offset = file.tell()
    reserve(path, offset + shape.num_bytes)
    return Stored(path, name, shape, offset)


def seal(part: Path, facts: Facts) -> None:
    """Write the facts, and flush all files to disk."""
    (part / SPEC_FILE).write_text(json.dumps(facts.to_json(), indent=1))
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def opened(path: Path) -> tuple[Facts | None, dict[str, Stored]]:
    """Return the facts and tensors of a folder; a single .npy file has no facts, and one tensor named "weights".

    Raises:
        BadFile: the folder is not an exported table, or one of its files is not an array of numbers.
    """
    if not path.is_dir():
        return None, {"weights": opened_one(path, "weights", None)}
    facts = Facts.from_json(spec_in(path / SPEC_FILE), path)
    known = shapes(facts.spec, with_counts=True)
    with reading(path):
        names = sorted(file.stem for file in path.glob("*.npy"))
    return facts, {name: opened_one(path / f"{name}.npy", name, known.get(name)) for name in names}


def spec_in(path: Path) -> Any:
    """Read the spec.json of a folder.

    Raises:
        BadFile: the file does not exist, is too large, or is not JSON.
    """
    with regular(path) as file:
        raw = file.read(MAX_SPEC_BYTES + 1)
    if len(raw) > MAX_SPEC_BYTES:
        raise BadFile(f"{path} has more than {MAX_SPEC_BYTES} bytes: it is not the spec of a table")
    return object_in(raw, str(path))


def opened_one(path: Path, name: str, expected: Shape | None) -> Stored:
    """Return the tensor of a .npy file, reading only its header; nothing is ever unpickled.

    Raises:
        BadFile: the file is not an array of numbers, or is truncated.
    """
    with regular(path) as file:
        descr, fortran, sizes = header_of(file, path)
        offset, num_bytes = file.tell(), os.fstat(file.fileno()).st_size
    is_bfloat16 = expected is not None and expected.dtype == "bfloat16" and descr == STORAGE["bfloat16"].str
    if not isinstance(descr, str) or not (is_bfloat16 or descr in NAMES):
        raise BadFile(f"{path} {unread(descr)}")
    if fortran and len(sizes) > 1:
        raise BadFile(f"{path} is in Fortran order: save numpy.ascontiguousarray(array)")
    shape = Shape("bfloat16" if is_bfloat16 else NAMES[descr], sizes)
    if offset + shape.num_bytes != num_bytes:
        what = f"{shape} takes {shape.num_bytes} bytes, but the file has {num_bytes - offset}"
        is_short = offset + shape.num_bytes > num_bytes
        raise BadFile(f"{path}: {what}: {'it was cut off' if is_short else 'something follows the array'}")
    return Stored(path, name, shape, offset)


def unread(descr: Any) -> str:
    """Return why arrays of a dtype, as a header describes it, are not read."""
    if not isinstance(descr, str):
        return "has records of several fields: save one field as an array of its own"
    if "O" in descr:
        return "contains pickled objects, which are never read: save an array of numbers"
    if descr.startswith(">") and "<" + descr[1:] in NAMES:
        return f"is big-endian ({descr}): save array.astype('<{descr[1:]}')"
    return f"has dtype {descr[:20]!r}; use one of {', '.join(NAMES.values())}"


def header_of(file: BinaryIO, path: Path) -> tuple[Any, bool, tuple[int, ...]]:
    """Read the dtype's description, the order and the shape in the header of a .npy file, and stop at its end.

    Source: numpy.lib.format, which warns, and advises, where this reader refuses.

    Raises:
        BadFile: the file has no valid header.
    """
    head = file.read(HEAD_BYTES)
    if not head.startswith(MAGIC) or len(head) < 12:
        known = None if head.startswith(MAGIC) else format_of(path, head)
        raise BadFile(f"{path} is not a .npy file{f' but {known}' if known else ': it has no complete header'}")
    version, (kind, start) = (head[6], head[7]), LENGTHS.get(head[6], ("", 0))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise BadFile(f"{path} has version {version[0]}.{version[1]} of the .npy format; 1.0, 2.0 and 3.0 are read")
    length = struct.unpack_from(kind, head, 8)[0]
    if length > MAX_HEADER_BYTES:
        raise BadFile(f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    file.seek(start)
    raw = file.read(length)
    if len(raw) < length:
        raise BadFile(f"{path} was cut off: its header alone takes {length} bytes")
    return described(raw, path)


def described(raw: bytes, path: Path) -> tuple[Any, bool, tuple[int, ...]]:
    """Return the dtype's description, the order and the shape in a header.

    Raises:
        BadFile: the header is not the dictionary that it should be.
    """
    try:
        if b"\\" in raw:  # Python would warn of an unknown escape sequence
            raise ValueError("a backslash")
        found = ast.literal_eval(LONG.sub(r"\1", raw.decode("utf-8").strip()))
        descr, fortran, sizes = found["descr"], found["fortran_order"], found["shape"]
    except Exception:  # literals fail in many ways
        raise BadFile(f"{path} is not a .npy file: its header is not a dictionary of dtype, order and shape") from None
    if not isinstance(sizes, tuple) or not isinstance(fortran, bool) or len(found) != 3 or len(sizes) > MAX_RANK:
        raise BadFile(f"{path} is not a .npy file: its header has a malformed shape or order")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise BadFile(f"{path} has the shape {str(sizes)[:60]}, in which {str(size)[:20]} is not a size")
    return descr, fortran, sizes
