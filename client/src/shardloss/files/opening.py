"""Open any file from which a table can be imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import ModuleType

from shardloss.errors import BadFile
from shardloss.files import npy, safetensors, sharded
from shardloss.files.facts import Facts, check_tensors
from shardloss.files.foreign import SUFFIXES
from shardloss.files.stored import Stored, reading, regular

FORMATS: Mapping[str, ModuleType] = {"safetensors": safetensors, "numpy": npy}


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened file: its tensors by name, and the facts of its table, or None if it is not an exported table.

    is_array is True for a .npy file, whose one tensor has no name of its own.
    """

    path: Path
    facts: Facts | None
    tensors: Mapping[str, Stored]
    is_array: bool

    def tensor(self, name: str, what: str, rank: int) -> Stored:
        """Return the tensor of that name, which must have that rank and at least one element.

        Raises:
            BadFile: there is no such tensor; the message lists tensors of the file with similar names.
        """
        found = self.tensors.get(name)
        if found is None:
            near = get_close_matches(name, list(islice(self.tensors, 5000)), 10, 0.0)
            names = ", ".join(each[:60] if each.isprintable() else repr(each[:60]) for each in near)
            more = f" and {len(self.tensors) - len(near)} more" if len(self.tensors) > len(near) else ""
            raise BadFile(f"{self.path} has no tensor {name!r} for {what}; it has {names or 'none'}{more}")
        if len(found.shape.sizes) != rank or 0 in found.shape.sizes:
            raise BadFile(f"{self.path}: {name} is {found.shape}; {what} must have rank {rank} and not be empty")
        return found


def open_file(path: str | Path) -> Opened:
    """Open a safetensors or .npy file, the index of a sharded checkpoint, or a folder; only headers are read.

    A folder is a table that `export_table` wrote, or contains the index of a checkpoint or one safetensors file.

    Raises:
        BadFile: the file is none of these, truncated, or inconsistent; other formats are named.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            where = f"{path} is a link to {path.readlink()}, which" if path.is_symlink() else path
            raise BadFile(f"{where} does not exist")
    if path.is_dir():
        path = file_in(path)
    reader = reader_of(path)
    facts, tensors = reader.opened(path)
    if facts is not None:
        check_tensors(facts, tensors, path)
    return Opened(path, facts, tensors, is_array=reader is npy and facts is None)


def reader_of(path: Path) -> ModuleType:
    """Return the module that reads a file, by its content, or else by its suffix."""
    if path.is_dir():
        return npy
    with regular(path) as file:
        head = file.read(8)
    if head.startswith(npy.MAGIC) or path.suffix.lower() == ".npy":
        return npy
    is_json = head.startswith(b"{") and b"\0" not in head  # the length of a header ends with zero bytes
    return sharded if path.suffix.lower() == ".json" or is_json else safetensors


def file_in(folder: Path) -> Path:
    """Return the file to read in a folder, or the folder itself if it may be an exported table.

    Raises:
        BadFile: the folder contains no such file, or several; the message names them.
    """
    with reading(folder):
        names = sorted(path.name for path in folder.iterdir())
    if npy.SPEC_FILE in names or any(name.endswith(".npy") for name in names):
        return folder
    indexes = [name for name in names if sharded.SUFFIX in name and name.endswith(".json")]
    whole = [name for name in names if name.endswith(".safetensors")]
    # the shards of an index are not choices of their own; a whole file of the index's name is
    chosen = indexes + [name for name in whole if not indexes or f"{name}.index.json" in indexes]
    if len(chosen) == 1:
        return folder / chosen[0]
    if chosen:
        raise BadFile(f"{folder} contains {' and '.join(chosen[:4])}: name the one to read")
    other = next((name for name in names if Path(name).suffix in SUFFIXES), None)
    hint = f"; {other} is {SUFFIXES[Path(other).suffix][0]}" if other else ""
    raise BadFile(f"{folder} contains no exported table, no *.safetensors and no *{sharded.SUFFIX}.json{hint}")
