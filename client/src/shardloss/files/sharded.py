"""Sharded checkpoints: an index in JSON that names, for each tensor, the safetensors file next to it that has it.

    {"metadata": {...}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors", ...}}

Source: save_torch_state_dict of huggingface_hub, which writes such files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from shardloss.errors import BadFile
from shardloss.files import safetensors
from shardloss.files.facts import Facts
from shardloss.files.jsons import object_in
from shardloss.files.stored import Stored, reading, regular

MAX_INDEX_BYTES = 100_000_000
SUFFIX = ".safetensors.index"  # of an index's name, before .json or .VARIANT.json


def opened(path: Path) -> tuple[Facts | None, Mapping[str, Stored]]:
    """Return no facts, and the tensors of a sharded checkpoint by its index.

    Raises:
        BadFile: the file is not an index, or names a file outside its folder.
    """
    with regular(path) as file:
        raw = file.read(MAX_INDEX_BYTES + 1)
    if len(raw) > MAX_INDEX_BYTES:
        raise BadFile(f"{path} has more than {MAX_INDEX_BYTES} bytes: it is not the index of a checkpoint")
    files = object_in(raw, str(path)).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise BadFile(f"{path} is JSON, but not the index of a checkpoint: it has no weight_map of names")
    for name in set(files.values()):
        if not is_inside(name):
            raise BadFile(f"{path} names the file {name[:80]!r}, which is not in its folder: such files are not read")
    return None, Sharded(path, files)


def is_inside(name: str) -> bool:
    """Return True if a file name of an index stays in the index's folder."""
    place = PurePosixPath(name)
    return bool(place.name) and not place.is_absolute() and ".." not in place.parts and name.isprintable()


class Sharded(Mapping[str, Stored]):
    """The tensors of a sharded checkpoint by name; a shard is opened once one of its tensors is asked for."""

    def __init__(self, index: Path, files: Mapping[str, str]) -> None:
        self._index, self._files = index, files
        self._shards: dict[str, Mapping[str, Stored]] = {}

    def __getitem__(self, name: str) -> Stored:
        """Return a tensor.

        Raises:
            KeyError: the index has no such tensor.
            BadFile: its shard is missing or invalid, or lacks the tensor.
        """
        file = self._files[name]
        path = self._index.parent / file
        if file not in self._shards:
            with reading(path):
                if not path.exists():
                    raise BadFile(f"{path} does not exist, but {self._index.name} names it for {name[:60]!r}")
            self._shards[file] = safetensors.opened(path)[1]
        if name not in self._shards[file]:
            raise BadFile(f"{path} has no tensor {name[:60]!r}, which {self._index.name} says it has")
        return self._shards[file][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
