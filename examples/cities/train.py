"""The training loop: the encoder here, the class table in the service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import shardloss
import torch
from numpy.typing import NDArray

from examples.cities.dataset import Dataset
from examples.cities.encoder import Encoder, RowAdagrad
from examples.cities.settings import Settings

TABLE = "cities"


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of a training run, step by step, and the rows per step.

    losses [steps] are means over a batch; seconds [steps] are the ends of steps, in seconds from the start.
    """

    losses: list[float]
    seconds: list[float]
    batch: int

    @property
    def train_s(self) -> float:
        """Seconds of training."""
        return self.seconds[-1]

    @property
    def rows_per_s(self) -> float:
        """Training examples per second, over the whole run."""
        return self.batch * len(self.losses) / self.train_s


def make_encoder(settings: Settings) -> Encoder:
    """Return the encoder with its initial random weights."""
    torch.manual_seed(settings.seed)
    return Encoder(settings.num_buckets, settings.dim, settings.encoder_stddev)


def make_table(client: shardloss.LossClient, num_classes: int, settings: Settings) -> shardloss.Table:
    """Create the class table, all zeros: a city's row becomes a sum of the encodings of its names."""
    return client.create_table(
        TABLE,
        num_classes=num_classes,
        dim=settings.dim,
        num_shards=settings.num_workers,
        optimizer=shardloss.RowAdagrad(initial_accumulator_value=settings.initial_accumulator),
        initializer=shardloss.Zeros(),
        placement="mod",  # spreads the populous cities evenly over the workers
    )


def batches(training: NDArray[np.int64], settings: Settings) -> Iterator[NDArray[np.int64]]:
    """Yield num_steps batches, uniform over the training names: every name occurs once before any is repeated."""
    rng = np.random.default_rng(settings.seed)
    waiting = training[:0]
    for _ in range(settings.num_steps):
        while len(waiting) < settings.batch:
            waiting = np.concatenate([waiting, rng.permutation(training)])
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]


def train(
    dataset: Dataset, encoder: Encoder, table: shardloss.Table, settings: Settings, on_step: Callable[[Curve], None]
) -> Curve:
    """Run the steps of settings, or as many as max_train_s allows; call on_step with the curve after each.

    The table's step runs in parallel with the encoder's, since neither needs the other's result.
    """
    head = table.sampled_softmax(
        settings.num_sampled, sampler=settings.sampler, seed=settings.seed, reduction="sum", ignore_index=None
    )
    table_optimizer = head.optimizer(lr=settings.table_lr)
    optimizer = RowAdagrad(encoder.weight, settings.encoder_lr, settings.initial_accumulator)
    curve = Curve([], [], settings.batch)
    began = time.monotonic()
    with ThreadPoolExecutor(1, "commit") as commits:
        for index in batches(dataset.training, settings):
            encoded = encoder(dataset.bags.take(index))
            hidden = encoded.detach().requires_grad_()
            loss = head(hidden, torch.from_numpy(dataset.class_ids[index]))
            loss.backward()
            committed = commits.submit(table_optimizer.step)
            encoded.backward(hidden.grad)
            optimizer.step()
            optimizer.zero_grad()
            committed.result()
            curve.losses.append(float(loss.detach()) / len(index))
            curve.seconds.append(time.monotonic() - began)
            on_step(curve)
            if curve.train_s >= settings.max_train_s:
                break
    return curve


@torch.no_grad()
def encoded(dataset: Dataset, encoder: Encoder, index: NDArray[np.int64], block: int = 4096) -> NDArray[np.float32]:
    """Return hidden [N, D] of the names of index [N]."""
    pieces = [encoder(dataset.bags.take(index[start : start + block])) for start in range(0, len(index), block)]
    hidden: NDArray[np.float32] = torch.cat(pieces).numpy()
    return hidden
