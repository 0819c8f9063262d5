"""The oracle of the trainer tests: the same trainer with torch alone and a local table in place of the remote one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import shardloss
import torch
from shardloss_server.numerics import reference
from torch import Tensor

NUM_CLASSES, DIM, NUM_FEATURES = 23, 5, 4  # V > S + N so that a sampled step leaves rows untouched; ugly on purpose
torch.sparse.check_sparse_tensor_invariants.enable()  # without an explicit choice torch warns
BATCH, NUM_SAMPLED, SAMPLER_SEED = 7, 6, 11


@dataclass(frozen=True)
class Run:
    """The loss of every step, and the table and encoder after the last step."""

    losses: list[float]
    weights: Tensor
    biases: Tensor
    encoder: Tensor


def batches(num_steps: int, dtype: torch.dtype, seed: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features [N, F] and labels [N] of each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        features = torch.randn(BATCH, NUM_FEATURES, generator=generator, dtype=torch.float64)
        yield features.to(dtype), torch.randint(0, NUM_CLASSES, (BATCH,), generator=generator)


def encoder(dtype: torch.dtype) -> torch.nn.Linear:
    """Return the trainer's own layer, with the same initial values in every run."""
    torch.manual_seed(5)
    return torch.nn.Linear(NUM_FEATURES, DIM, dtype=torch.float64).to(dtype)


def remote_run(table: shardloss.Table, sampled: bool, lr: float, num_steps: int, dtype: torch.dtype) -> Run:
    """Train against the service and return the run."""
    net = encoder(dtype)
    head = table.sampled_softmax(NUM_SAMPLED, seed=SAMPLER_SEED) if sampled else table.softmax()
    optimizers = [head.optimizer(lr), torch.optim.SGD(net.parameters(), 0.1)]
    losses = []
    for features, labels in batches(num_steps, dtype):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = head(net(features), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    weights, biases = table_of(table)
    return Run(losses, weights, biases, net.weight.detach())


def local_run(
    table: shardloss.Table,
    sampled: bool,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    num_steps: int,
    dtype: torch.dtype,
) -> Run:
    """Train with torch alone from the table's current rows; `make` builds the optimizer of (weights, biases)."""
    net = encoder(dtype)
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    biases = biases.detach()[:, None].clone().requires_grad_()
    optimizers = [make([weights, biases]), torch.optim.SGD(net.parameters(), 0.1)]
    losses = []
    for step, (features, labels) in enumerate(batches(num_steps, dtype), start=1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if sampled:
            loss = sampled_loss(table, step, weights, biases, net(features), labels).mean()
        else:
            loss = torch.nn.functional.cross_entropy(net(features) @ weights.T + biases[:, 0], labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return Run(losses, weights.detach(), biases.detach()[:, 0], net.weight.detach())


def sampled_loss(
    table: shardloss.Table, step: int, weights: Tensor, biases: Tensor, hidden: Tensor, labels: Tensor
) -> Tensor:
    """Return the reference loss over the service's own draw, with sparse gradients for the touched rows only."""
    draw = table.sample_candidates(NUM_SAMPLED, seed=SAMPLER_SEED, step=step, labels=labels.numpy()[:, None])
    sampled = torch.from_numpy(draw.sampled.copy())
    touched, place = torch.unique(torch.cat([sampled, labels]), return_inverse=True)
    rows = torch.nn.functional.embedding(touched, weights, sparse=True)
    row_biases = torch.nn.functional.embedding(touched, biases, sparse=True)[:, 0]
    return reference.sampled_softmax(
        rows,
        row_biases,
        hidden,
        place[len(sampled) :, None],
        place[: len(sampled)],
        torch.from_numpy(draw.true_expected_count.copy()).to(hidden.dtype),
        torch.from_numpy(draw.sampled_expected_count.copy()).to(hidden.dtype),
    )


def table_of(table: shardloss.Table) -> tuple[Tensor, Tensor]:
    """Return all rows [V, D] and biases [V] of a table."""
    rows = table.read_rows(torch.arange(NUM_CLASSES).numpy())
    assert rows.biases is not None
    return torch.from_numpy(rows.rows.copy()), torch.from_numpy(rows.biases.copy())
