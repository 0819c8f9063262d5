"""The golden cases, as described by index.json; file names and sizes carry no meaning."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(os.environ.get("SHARDLOSS_GOLDEN") or Path(__file__).parent / "data")
STRATEGIES = ("div", "mod")
LARGE_LOGIT = 100.0  # the README's looser tolerance is for logits of several hundred


@dataclass(frozen=True)
class Cut:
    """A cut of a table: K shards placed by "div" or "mod"."""

    num_shards: int
    placement: str

    def __str__(self) -> str:
        return f"{self.num_shards}{self.placement}"


@dataclass(frozen=True)
class Case:
    """A golden case: its metadata, and its arrays, which are loaded on first use."""

    meta: dict[str, Any]

    def __str__(self) -> str:
        return str(self.meta["case"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the case by name."""
        with np.load(FOLDER / self.meta["file"], allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.meta["arrays"]

    @property
    def family(self) -> str:
        """The family of the op that computed the case."""
        return str(self.meta["family"])

    @property
    def dtype(self) -> str:
        """The dtype of the float arrays."""
        return str(self.meta["dtype"])

    @property
    def cut(self) -> Cut | None:
        """The framework's own cut of the table if it has more than one shard, else None."""
        num_shards = int(self.meta.get("num_shards", 1))
        return Cut(num_shards, self.meta["partition_strategy"]) if num_shards > 1 else None

    def content(self, *names: str) -> bytes:
        """Return a 16-byte digest of the named arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(repr((name, self[name].dtype.str, self[name].shape)).encode() + self[name].tobytes())
        return digest.digest()

    def has_large_logits(self) -> bool:
        """Return True if a logit, computed from the arrays, exceeds LARGE_LOGIT in magnitude."""
        if "inputs" in self:
            logits = self["inputs"].astype(np.float64) @ self["weights"].astype(np.float64).T + self["biases"]
        else:
            logits = self["logits"] if "logits" in self else self["input"]
        return bool(np.abs(logits).max() > LARGE_LOGIT)

    def tolerance(self) -> float:
        """Return the README's tolerance, relative to max(1, the largest magnitude of the expected array)."""
        if self.dtype == "float64":
            return 1e-12
        return 1e-4 if self.has_large_logits() else 5e-6


def load(*families: str) -> list[Case]:
    """Return the cases of the given families, or of all families if none is given, in the order of the index."""
    index = json.loads((FOLDER / "index.json").read_text())
    return [Case(meta) for meta in index if not families or meta["family"] in families]


def cuts_of(case: Case, shard_counts: tuple[int, ...]) -> list[Cut]:
    """Return every number of shards with either placement, and the framework's own cut; one shard is listed once."""
    cuts = [Cut(num_shards, placement) for num_shards in shard_counts for placement in STRATEGIES]
    cuts = [cut for cut in cuts if str(cut) != "1mod"]
    own = case.cut
    return cuts if own is None or own in cuts else [*cuts, own]


def assert_matches(actual: np.ndarray | None, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Assert equal shapes, and no difference above tolerance * max(1, largest expected magnitude)."""
    assert actual is not None, f"{what} is missing"
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, expected {expected.shape}"
    expected = expected.astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=tolerance * scale, err_msg=what)
