"""Open any file from which a table can be imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from shardloss.errors import BadFile
from shardloss.files import npy, safetensors
from shardloss.files.facts import Facts, check_tensors
from shardloss.files.stored import Stored

FORMATS: Mapping[str, ModuleType] = {"safetensors": safetensors, "numpy": npy}


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened file: its tensors by name, and the facts of its table, or None if it is not an exported table."""

    path: Path
    facts: Facts | None
    tensors: Mapping[str, Stored]

    def tensor(self, name: str, what: str, rank: int) -> Stored:
        """Return the tensor of that name, which must have that rank.

        Raises:
            BadFile: there is no such tensor; the message lists the tensors of the file.
        """
        found = self.tensors.get(name)
        if found is None:
            names = ", ".join(f"{one} {stored.shape}" for one, stored in list(self.tensors.items())[:20])
            raise BadFile(f"{self.path} has no tensor {name!r} for {what}; it has {names or 'none'}")
        if len(found.shape.sizes) != rank:
            raise BadFile(f"{self.path}: {name} is {found.shape}; {what} must have rank {rank}")
        return found


def open_file(path: str | Path) -> Opened:
    """Open a safetensors file, a .npy file, or a folder that `export_table` wrote; only headers are read.

    Raises:
        BadFile: the file is none of these, truncated, or inconsistent.
    """
    path = Path(path)
    if not path.exists():
        raise BadFile(f"{path} does not exist")
    is_numpy = path.is_dir() or path.suffix == ".npy"
    facts, tensors = FORMATS["numpy" if is_numpy else "safetensors"].opened(path)
    if facts is not None:
        check_tensors(facts, tensors, path)
    return Opened(path, facts, tensors)
