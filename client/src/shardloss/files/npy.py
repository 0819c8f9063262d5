"""A folder of NumPy files: NAME.npy per tensor, and spec.json, which marks the uint16 files that contain bfloat16."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from shardloss.errors import BadFile
from shardloss.files.facts import Facts, shapes
from shardloss.files.stored import STORAGE, Shape, Stored, reading, reserve

SPEC_FILE = "spec.json"
MAX_SPEC_BYTES = 1 << 20
NAMES = {dtype: name for name, dtype in STORAGE.items() if name != "bfloat16"}


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
    with reading(path):
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise BadFile(f"{path} has more than {MAX_SPEC_BYTES} bytes: it is not the spec of a table")
        raw = path.read_bytes()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadFile(f"{path} is not JSON") from None


def opened_one(path: Path, name: str, expected: Shape | None) -> Stored:
    """Return the tensor of a .npy file, reading only its header; nothing is ever unpickled.

    Raises:
        BadFile: the file is not an array of numbers, or is truncated.
    """
    with reading(path), path.open("rb") as file:
        sizes, fortran, dtype = header_of(file, path)
        offset, num_bytes = file.tell(), path.stat().st_size
    if dtype.hasobject:
        raise BadFile(f"{path} contains pickled objects, which are never read: save an array of numbers")
    is_bfloat16 = expected is not None and expected.dtype == "bfloat16" and dtype == STORAGE["bfloat16"]
    if not is_bfloat16 and dtype not in NAMES:
        raise BadFile(f"{path} has dtype {dtype}; use one of {', '.join(STORAGE)}")
    if fortran and len(sizes) > 1:
        raise BadFile(f"{path} is in Fortran order: save numpy.ascontiguousarray(array)")
    shape = Shape("bfloat16" if is_bfloat16 else NAMES[dtype], tuple(sizes))
    if not sizes or offset + shape.num_bytes != num_bytes:
        what = f"{shape} takes {shape.num_bytes} bytes, but the file has {num_bytes - offset}"
        raise BadFile(f"{path}: {what}: it was cut off, or is not an array")
    return Stored(path, name, shape, offset)


def header_of(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the shape, order and dtype of a .npy file.

    Raises:
        BadFile: the file has no valid header.
    """
    try:
        version = npy_format.read_magic(file)
        read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
        return read(file)
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python literals, which fail in many ways
        raise BadFile(f"{path} is not a .npy file: {str(error)[:120]}") from None
