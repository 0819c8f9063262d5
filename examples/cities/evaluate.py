"""Exact figures over all classes, and the baselines that they stand beside."""

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

BLOCK = 1024  # names that are encoded and asked at once


@dataclass(frozen=True, slots=True)
class Figures:
    """How well a ranking of cities finds the right one.

    nll: mean negative log likelihood, nats; the shares of names whose city ranks first, or among the first ten; mrr:
    mean reciprocal rank; gap: mean sampled minus exact loss of a batch, nats, None where nothing is sampled.
    """

    nll: float
    hit_at_1: float
    hit_at_10: float
    mrr: float
    gap: float | None = None


def figures(summary: shardloss.EvaluationSummary, gap: float | None = None) -> Figures:
    """Means over the evaluated names."""
    return Figures(summary.mean_loss, summary.hit_rate(1), summary.hit_rate(10), summary.mrr(), gap)


def sample(dataset: Dataset, settings: Settings) -> NDArray[np.int64]:
    """The held-out names to evaluate: num_eval of them, drawn by the seed, or all."""
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
    """Exact loss and rank over all classes of the names of index, asked of the live table block by block."""
    blocks = np.array_split(index, max(1, -(-len(index) // BLOCK)))
    asked = ((encoded(dataset, encoder, block), dataset.class_ids[block]) for block in blocks)
    summary = table.evaluate_batches(asked, ignore_index=None, progress=progress)
    return figures(summary, sampling_gap(dataset, encoder, table, index, settings))


def sampling_gap(
    dataset: Dataset, encoder: Encoder, table: shardloss.Table, index: NDArray[np.int64], settings: Settings
) -> float:
    """How far training's loss is from the exact one: mean difference in nats over one batch out of index."""
    batch = index[:: max(1, len(index) // settings.batch)][: settings.batch]
    loss = shardloss.SampledSoftmax(settings.num_sampled, sampler=settings.sampler, seed=settings.seed)
    hidden = encoded(dataset, encoder, batch)
    return table.sampling_gap(hidden, dataset.class_ids[batch], loss, ignore_index=None).mean_gap


def baseline(dataset: Dataset, index: NDArray[np.int64]) -> Figures:
    """Without looking at the name: always answer the most populous cities, which have the lowest class ids.

    nll is that of guessing each city as often as training names it; a held-out city has two training names at least.
    """
    count = np.bincount(dataset.class_ids[dataset.training], minlength=dataset.num_classes)
    class_ids = dataset.class_ids[index]
    likely = shardloss.Evaluation(-np.log(count[class_ids] / count.sum()), class_ids + 1, version=0, last_version=0)
    return figures(likely.summary())
