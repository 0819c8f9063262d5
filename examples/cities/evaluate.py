"""Exact figures over all classes, and the baseline to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import shardloss
from numpy.typing import NDArray

from examples.cities.dataset import Dataset
from examples.cities.encoder import Encoder
from examples.cities.settings import Settings
from examples.cities.train import encoded

BLOCK = 1024  # names that are encoded and evaluated at once


@dataclass(frozen=True, slots=True)
class Figures:
    """The quality of a ranking of cities.

    nll: mean negative log likelihood, nats; hit_at_1 and hit_at_10: share of names whose city ranks first, or among the
    first ten; mrr: mean reciprocal rank; gap: mean sampled minus exact loss of a batch, nats, or None without sampling.
    """

    nll: float
    hit_at_1: float
    hit_at_10: float
    mrr: float
    gap: float | None = None


def figures(summary: shardloss.EvaluationSummary, gap: float | None = None) -> Figures:
    """Return the means over the evaluated names."""
    return Figures(summary.mean_loss, summary.hit_rate(1), summary.hit_rate(10), summary.mrr(), gap)


def sample(dataset: Dataset, settings: Settings) -> NDArray[np.int64]:
    """Return the held-out names to evaluate: num_eval of them, drawn with the seed, or all."""
    if settings.num_eval is None or settings.num_eval >= len(dataset.held_out):
        return dataset.held_out
    rng = np.random.default_rng(settings.seed + 1)
    return np.sort(rng.choice(dataset.held_out, settings.num_eval, replace=False))


def evaluate(
    dataset: Dataset,
    encoder: Encoder,
    table: shardloss.Table,
    index: NDArray[np.int64],
    settings: Settings,
    progress: Callable[[int], None],
) -> Figures:
    """Return exact figures over all classes for the names of index, evaluated block by block on the live table."""
    blocks = np.array_split(index, max(1, -(-len(index) // BLOCK)))
    asked = ((encoded(dataset, encoder, block), dataset.class_ids[block]) for block in blocks)
    summary = table.evaluate_batches(asked, ignore_index=None, progress=progress)
    return figures(summary, sampling_gap(dataset, encoder, table, index, settings))


def sampling_gap(
    dataset: Dataset, encoder: Encoder, table: shardloss.Table, index: NDArray[np.int64], settings: Settings
) -> float:
    """Return the mean of training's sampled loss minus the exact loss, in nats, over one batch of index."""
    batch = index[:: max(1, len(index) // settings.batch)][: settings.batch]
    loss = shardloss.SampledSoftmax(settings.num_sampled, sampler=settings.sampler, seed=settings.seed)
    hidden = encoded(dataset, encoder, batch)
    return table.sampling_gap(hidden, dataset.class_ids[batch], loss, ignore_index=None).mean_gap


def baseline(dataset: Dataset, index: NDArray[np.int64]) -> Figures:
    """Return the figures of always answering the most populous cities, which have the lowest class ids.

    nll is that of guessing each city as often as training names it; a held-out city has at least two training names.
    """
    count = np.bincount(dataset.class_ids[dataset.training], minlength=dataset.num_classes)
    class_ids = dataset.class_ids[index]
    likely = shardloss.Evaluation(-np.log(count[class_ids] / count.sum()), class_ids + 1, version=0, last_version=0)
    return figures(likely.summary())
