"""Exact figures over all classes, and the baselines that they stand beside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shardloss
from numpy.typing import NDArray

from examples.cities.dataset import Dataset
from examples.cities.encoder import Encoder
from examples.cities.settings import Settings
from examples.cities.train import encoded

TOP = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """Mean negative log likelihood in nats, and the shares of names whose city ranks first, or among the first ten."""

    nll: float
    hit_at_1: float
    hit_at_10: float


def figures(loss: NDArray[np.floating], rank: NDArray[np.integer]) -> Figures:
    """Means over loss [N] and rank [N], 1 being the best."""
    return Figures(float(loss.mean()), float((rank == 1).mean()), float((rank <= TOP).mean()))


def sample(dataset: Dataset, settings: Settings) -> NDArray[np.int64]:
    """The held-out names to evaluate: num_eval of them, drawn by the seed, or all."""
    if settings.num_eval is None or settings.num_eval >= len(dataset.held_out):
        return dataset.held_out
    rng = np.random.default_rng(settings.seed + 1)
    return np.sort(rng.choice(dataset.held_out, settings.num_eval, replace=False))


def evaluate(dataset: Dataset, encoder: Encoder, table: shardloss.Table, index: NDArray[np.int64]) -> Figures:
    """Exact loss and rank over all classes of the names of index, asked of the live table."""
    answer = table.evaluate(encoded(dataset, encoder, index), dataset.class_ids[index], ignore_index=None)
    assert answer.rank is not None
    return figures(answer.loss, answer.rank)


def baseline(dataset: Dataset, index: NDArray[np.int64]) -> Figures:
    """Without looking at the name: always answer the most populous cities, which have the lowest class ids.

    nll is that of guessing each city as often as training names it; a held-out city has two training names at least.
    """
    count = np.bincount(dataset.class_ids[dataset.training], minlength=dataset.num_classes)
    class_ids = dataset.class_ids[index]
    return figures(-np.log(count[class_ids] / count.sum()), class_ids + 1)
