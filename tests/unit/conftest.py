"""A table sharded over in-process workers, without a server, for the tests that score and train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shardloss_server.cluster.group import Order
from shardloss_server.cluster.worker import Worker
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.finish import merge
from shardloss_server.frontend.plan import plan
from shardloss_server.frontend.request import LossRequest, SampledSoftmax, Want
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.loss import hidden_gradient, per_example_loss
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Part, RowWrite, StepKey, TableSpec, Upstream
from torch import Tensor

from .front import Front

NAME = "table"


@dataclass(frozen=True)
class Answer:
    """The values that a trainer sees of a scored part."""

    loss: Tensor
    hidden_grad: Tensor
    lse: Tensor


class Cut:
    """A table of K shards on two workers, with the given weights [V, D] and biases [V]."""

    def __init__(
        self,
        weights: Tensor,
        biases: Tensor | None = None,
        *,
        num_shards: int = 3,
        strategy: str = "div",
        dtype: str = "float64",
        optimizer: OptimizerSpec | None = None,
    ) -> None:
        num_classes, dim = weights.shape
        placement = Placement(strategy, num_classes, num_shards)
        initializer = Initializer("zeros", 0.0, 0)
        optimizer = optimizer or OptimizerSpec("sgd")
        self.spec = TableSpec(NAME, num_classes, dim, dtype, biases is not None, placement, initializer, optimizer)
        self.workers = [Worker(index, 2) for index in range(2)]
        self.version = self.num_steps = 0
        self.ask("create", self.spec, 8, table=None)
        self.ask("fill", 0, 1)
        self.write(weights, biases)

    def ask(self, verb: str, *args: Any, table: str | None = NAME) -> list[Any]:
        """Call one method of every worker and return the answers in shard order."""
        head = () if table is None else (table,)
        answers: dict[int, Any] = {}
        for worker in self.workers:
            answers.update(getattr(worker, verb)(*head, *args))
        return [answers[k] for k in sorted(answers)]

    def write(self, weights: Tensor, biases: Tensor | None) -> None:
        """Overwrite every row as the next version."""
        self.version += 1
        self.ask("write", RowWrite(self.version, torch.arange(len(weights)), weights, biases))

    def plan(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_weights: Tensor | None = None,
        sampled: SampledSoftmax | None = None,
        step: int = 0,
    ) -> Part:
        """Return the part of a batch; label -1 is ignored."""
        request = LossRequest(
            table=NAME,
            session="",
            step=step,
            part=0,
            after_step=None,
            hidden=hidden,
            labels=labels,
            label_weights=label_weights,
            ignore_index=-1,
            sampled=sampled,
            upstream=None,
            commit_now=None,
            want=Want(),
            digest=b"",
            max_reply_bytes=1 << 40,
        )
        return plan(request, self.spec, ClassCounts(self.spec.num_classes, self.spec.count_labels))

    def score(self, part: Part) -> Answer:
        """Return loss [N], gradient of hidden [N, D] and lse [N]."""
        scores = self.ask("score", True, True, part)
        merged, mass = merge(scores), part.batch.mass
        return Answer(per_example_loss(merged, mass), hidden_gradient(merged, mass), merged.statistics.lse)

    def gradient(self, part: Part, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of sum(g * loss) in all weights [V, D] and biases [V]."""
        dtype: torch.dtype = getattr(torch, self.spec.compute_dtype)
        weights = torch.zeros(self.spec.num_classes, self.spec.dim, dtype=dtype)
        biases = torch.zeros(self.spec.num_classes, dtype=dtype)
        for shard in self.ask("gradient", Upstream(self.score(part).lse, g.to(dtype)), part):
            weights[shard.class_ids] += shard.rows
            biases[shard.class_ids] += shard.biases
        return weights, biases

    def apply(self, parts: list[Part], gs: list[Tensor], learning_rate: float) -> None:
        """Apply one optimizer step over all parts."""
        dtype: torch.dtype = getattr(torch, self.spec.compute_dtype)
        upstreams = tuple(Upstream(self.score(p).lse, g.to(dtype)) for p, g in zip(parts, gs, strict=True))
        self.version += 1
        self.num_steps += 1
        key = StepKey("session", self.num_steps, b"")
        self.ask("apply", Order(self.version, key, learning_rate, 0, upstreams), *parts)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all weights [V, D] in storage dtype and biases [V], in class order."""
        pieces = self.ask("read", torch.arange(self.spec.num_classes))
        order = torch.argsort(torch.cat([piece.class_ids for piece in pieces]))
        return torch.cat([piece.rows for piece in pieces])[order], torch.cat([piece.biases for piece in pieces])[order]


@pytest.fixture(scope="session")
def make_cut() -> Callable[..., Any]:
    """Return the class `Cut`."""
    return Cut


@pytest.fixture(scope="session")
def front() -> Iterator[Front]:
    """A front end in which no two tests train the same table."""
    front = Front()
    yield front
    front.close()
