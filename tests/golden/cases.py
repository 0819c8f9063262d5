"""The golden cases by what index.json says of them; file names and sizes carry no meaning here."""

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
LARGE_LOGIT = 100.0  # the README's looser tolerance is for logits of several hundreds


@dataclass(frozen=True)
class Cut:
    """How a table is cut: K shards placed by "div" or "mod"."""

    num_shards: int
    placement: str

    def __str__(self) -> str:
        return f"{self.num_shards}{self.placement}"


@dataclass(frozen=True)
class Case:
    """One golden case: its meta, and its arrays once they are asked for."""

    meta: dict[str, Any]

    def __str__(self) -> str:
        return str(self.meta["case"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by name."""
        with np.load(FOLDER / self.meta["file"], allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.meta["arrays"]

    @property
    def family(self) -> str:
        """The op whose output this is."""
        return str(self.meta["family"])

    @property
    def dtype(self) -> str:
        """dtype of the float arrays."""
        return str(self.meta["dtype"])

    @property
    def cut(self) -> Cut | None:
        """The framework's own cut of the table, where it had more than one shard."""
        num_shards = int(self.meta.get("num_shards", 1))
        return Cut(num_shards, self.meta["partition_strategy"]) if num_shards > 1 else None

    def content(self, *names: str) -> bytes:
        """16 bytes that tell apart the contents of arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(repr((name, self[name].dtype.str, self[name].shape)).encode() + self[name].tobytes())
        return digest.digest()

    def has_large_logits(self) -> bool:
        """Whether a logit is above LARGE_LOGIT, by the arrays themselves."""
        if "inputs" in self:
            logits = self["inputs"].astype(np.float64) @ self["weights"].astype(np.float64).T + self["biases"]
        else:
            logits = self["logits"] if "logits" in self else self["input"]
        return bool(np.abs(logits).max() > LARGE_LOGIT)

    def tolerance(self) -> float:
        """The README's tolerance, relative to max(1, the largest magnitude of the expected array)."""
        if self.dtype == "float64":
            return 1e-12
        return 1e-4 if self.has_large_logits() else 5e-6


def load(*families: str) -> list[Case]:
    """The cases of some families, in the index's order; of all of them where none is named."""
    index = json.loads((FOLDER / "index.json").read_text())
    return [Case(meta) for meta in index if not families or meta["family"] in families]


def cuts_of(case: Case, shard_counts: tuple[int, ...]) -> list[Cut]:
    """Every count of shards by either placement, and the framework's own cut; one shard is the same by both."""
    cuts = [Cut(num_shards, placement) for num_shards in shard_counts for placement in STRATEGIES]
    cuts = [cut for cut in cuts if str(cut) != "1mod"]
    own = case.cut
    return cuts if own is None or own in cuts else [*cuts, own]


def assert_matches(actual: np.ndarray | None, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Shapes are equal and no entry is further off than tolerance * max(1, largest expected magnitude)."""
    assert actual is not None, f"{what} did not come"
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, not {expected.shape}"
    expected = expected.astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=tolerance * scale, err_msg=what)
