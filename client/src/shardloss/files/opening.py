"""Opens any file that a table can come from."""

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
    """A file that was looked at: its tensors by name; facts is None where no table was exported to it."""

    path: Path
    facts: Facts | None
    tensors: Mapping[str, Stored]

    def tensor(self, name: str, what: str, rank: int) -> Stored:
        """A tensor of so many sizes.

        Raises:
            BadFile: there is none of that name or rank; says which are there.
        """
        found = self.tensors.get(name)
        if found is None:
            names = ", ".join(f"{one} {stored.shape}" for one, stored in list(self.tensors.items())[:20])
            raise BadFile(f"{self.path} has no tensor {name!r} for the {what}; it has {names or 'none'}")
        if len(found.shape.sizes) != rank:
            raise BadFile(f"{self.path}: {name} is {found.shape}; the {what} need rank {rank}")
        return found


def open_file(path: str | Path) -> Opened:
    """A safetensors file, a .npy file, or a folder that `export_table` wrote; nothing but headers is read.

    Raises:
        BadFile: it is none of these, is cut off, or does not hold what it says.
    """
    path = Path(path)
    if not path.exists():
        raise BadFile(f"{path} does not exist")
    is_numpy = path.is_dir() or path.suffix == ".npy"
    facts, tensors = FORMATS["numpy" if is_numpy else "safetensors"].opened(path)
    if facts is not None:
        check_tensors(facts, tensors, path)
    return Opened(path, facts, tensors)
