"""The whole path of a request, from validation to committed rows, without a server, for the tests of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.pipeline import Pipeline
from shardloss_server.frontend.request import CommitPart, CommitReply, CommitRequest, LossReply, LossRequest, Want
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import RowGradient, TableSpec
from torch import Tensor

EVERYTHING = Want(hidden_grad=True, table_grad=True)


class Front:
    """A front end over two worker threads."""

    def __init__(self) -> None:
        self.group = LocalGroup(2)
        limits = Limits(max_tables=1 << 16)
        self.catalog = Catalog(self.group, limits)
        self.pipeline = Pipeline(self.catalog, limits)
        self._names = count()

    def table(
        self,
        weights: Tensor,
        biases: Tensor | None = None,
        *,
        num_shards: int = 3,
        strategy: str = "div",
        dtype: str = "float64",
        count_labels: bool = False,
    ) -> Table:
        """Create a table with the given weights [V, D] and biases [V] that plain SGD trains."""
        num_classes, dim = weights.shape
        spec = TableSpec(
            f"table-{next(self._names)}",
            num_classes,
            dim,
            dtype,
            biases is not None,
            Placement(strategy, num_classes, num_shards),
            Initializer("zeros", 0.0, 0),
            OptimizerSpec("sgd"),
            count_labels,
        )
        table = Table(self, spec)
        table.write(weights, biases)
        return table

    def close(self) -> None:
        self.group.close()


@dataclass
class Table:
    """One table of a front end, and the calls of one session."""

    front: Front
    spec: TableSpec

    def __post_init__(self) -> None:
        self.owner = self.front.catalog.create(self.spec, soon())[0]

    def write(self, weights: Tensor, biases: Tensor | None) -> None:
        """Overwrite every row."""
        self.owner.write(torch.arange(self.spec.num_classes), weights, biases, soon())

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all weights [V, D] in storage dtype and biases [V], in class order."""
        rows = self.owner.read(torch.arange(self.spec.num_classes), soon())
        return rows.rows, rows.biases

    def loss(self, request: LossRequest) -> LossReply:
        """Return the answer to a request, which is addressed to this table."""
        return self.front.pipeline.loss(replace(request, table=self.spec.name), soon())

    def open(self, request: LossRequest, step: int, part: int = 0) -> str:
        """Score a part and return its ticket."""
        return self.loss(replace(request, session="session", step=step, part=part, want=Want())).ticket

    def commit(self, step: int, parts: list[tuple[str, Tensor]], learning_rate: float) -> CommitReply:
        """Commit one step over tickets, each with its g."""
        given = tuple(CommitPart(ticket, g) for ticket, g in parts)
        request = CommitRequest(self.spec.name, "session", step, given, learning_rate, 1.0, None, b"%d" % step)
        return self.front.pipeline.commit(request, soon())

    def dense(self, gradient: RowGradient) -> tuple[Tensor, Tensor]:
        """Return a gradient as dense weights [V, D] and biases [V]."""
        weights = torch.zeros(self.spec.num_classes, self.spec.dim, dtype=gradient.rows.dtype)
        biases = torch.zeros(self.spec.num_classes, dtype=gradient.rows.dtype)
        weights[gradient.class_ids], biases[gradient.class_ids] = gradient.rows, gradient.biases
        return weights, biases


def soon() -> Deadline:
    return Deadline.after(60.0)


def request_of(hidden: Tensor, labels: Tensor, **options: Any) -> LossRequest:
    """Return a request without a session that wants every gradient; label -1 is ignored."""
    plain: dict[str, Any] = {
        "table": "",
        "session": "",
        "step": 0,
        "part": 0,
        "after_step": None,
        "label_weights": None,
        "ignore_index": -1,
        "sampled": None,
        "upstream": None,
        "commit_now": None,
        "want": EVERYTHING,
        "digest": b"",
        "max_reply_bytes": 1 << 40,
    }
    return LossRequest(hidden=hidden, labels=labels, **(plain | options))
