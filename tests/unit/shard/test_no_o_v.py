"""The cost of a sampled step does not grow with V: the step reads and writes only the rows that it touches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.plan import plan
from shardloss_server.frontend.request import LossRequest, SampledSoftmax, SampledValues, Want
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Record, StepKey, TableSpec, Upstream
from shardloss_server.shard.table import ShardTable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...extent import scaled

SMALL, LARGE = 100_000, scaled(1_000_000, 10_000_000)
D, N, S = 4, 7, 50  # N * S, and anything else that a step may create, is far below V
Call = tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


class Watch(TorchDispatchMode):
    """A recorder of tensor operations, and of those that use at least `limit` elements outside the table.

    The table's own storage may be read by a gather (index), written by its inverse (index_put_), and viewed: each of
    these costs in proportion to what it returns or is given, not to the storage.
    """

    GATHERS = (
        "aten::index.Tensor",
        "aten::index_select",
        "aten::_embedding_bag_forward_only",
        "aten::index_put_",
        "aten::index_copy_",
    )

    def __init__(self, limit: int, own: list[Tensor]) -> None:
        super().__init__()
        self.limit, self.own = limit, {tensor.untyped_storage().data_ptr() for tensor in own}
        self.calls: list[Call] = []
        self.offences: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs or {}), result)
        )
        # the size V differs between the tables, so it is recorded as -1
        self.calls.append((func.name(), self.sizes(given), self.sizes(made)))
        if any(x.numel() >= self.limit and not self.is_free(func, x) for x in (*given, *made)):
            self.offences.append(f"{func.name()}: {[tuple(x.shape) for x in (*given, *made)]}")
        return result

    def is_free(self, func: Any, tensor: Tensor) -> bool:
        owned = tensor.untyped_storage().data_ptr() in self.own
        return owned and (func.is_view or func.name() in self.GATHERS)

    def sizes(self, tensors: list[Tensor]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(-1 if n >= self.limit else n for n in x.shape) for x in tensors)


def make_table(num_classes: int, kind: str, strategy: str, dtype: str) -> ShardTable:
    optimizers = {
        "sgd": OptimizerSpec("sgd", momentum=0.9, weight_decay=0.01),
        "adagrad": OptimizerSpec("adagrad", eps=1e-10),
        "sparse_adam": OptimizerSpec("sparse_adam", beta1=0.9, beta2=0.99, eps=1e-8),
    }
    placement = Placement(strategy, num_classes, 1)
    zeros = Initializer("zeros", 0.0, 0)  # initializing 10 million rows would be the slowest part of the test
    table = ShardTable(TableSpec("table", num_classes, D, dtype, True, placement, zeros, optimizers[kind]), 0, 8)
    table.fill_()
    return table


def watched_step(table: ShardTable, hit_removal: str) -> Iterator[tuple[str, Watch]]:
    """Run plan, score, gradient and apply_ of one batch, each watched. All ids are below SMALL: the same for any V."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 60, (S,), generator=generator)  # repeats and hits
    ids[:5] = torch.tensor([SMALL - 1, 77_777, 4097, 4097, 0])
    labels = torch.randint(-1, 60, (N, 2), generator=generator)
    labels[0, 0] = SMALL - 2
    values = SampledValues(ids, torch.ones(N, 2), torch.ones(S))
    request = LossRequest(
        table="table",
        session="",
        step=1,
        part=0,
        after_step=None,
        hidden=torch.randn(N, D, generator=generator),
        labels=labels,
        label_weights=None,
        ignore_index=-1,
        sampled=SampledSoftmax(values, hit_removal),
        upstream=None,
        commit_now=None,
        want=Want(),
        digest=b"",
        max_reply_bytes=1 << 40,
    )
    own = [table.weights, table.biases, *table.weight_state.values(), *table.bias_state.values()]

    def watch() -> Watch:
        return Watch(SMALL, own)

    with torch.no_grad():
        with watch() as planning:
            part = plan(request, table.spec, ClassCounts(table.spec.num_classes, False))
        with watch() as scoring:
            score = table.score(part, True)
        upstream = Upstream(score.statistics.lse, torch.ones(N))
        with watch() as grading:
            table.gradient(part, upstream)
        record = Record(table.version + 1, StepKey("a", table.version + 1, b""), 0.1, 0, (part,), (upstream,))
        with watch() as applying:
            table.apply_(record)
    yield from {"plan": planning, "score": scoring, "gradient": grading, "apply_": applying}.items()


CASES = [
    ("adagrad", "div", "float32", "every"),
    ("sgd", "mod", "float32", "last"),
    ("sparse_adam", "div", "bfloat16", "none"),
]


@pytest.mark.parametrize("kind, strategy, dtype, hit_removal", CASES)
def test_a_sampled_step_does_not_know_how_many_classes_there_are(
    kind: str, strategy: str, dtype: str, hit_removal: str
) -> None:
    """With V = 1e5 and a larger V, the same operations of the same sizes run, and only gathers read V elements."""
    small, large = (
        dict(watched_step(make_table(num_classes, kind, strategy, dtype), hit_removal))
        for num_classes in (SMALL, LARGE)
    )
    for stage in ("plan", "score", "gradient", "apply_"):
        assert small[stage].calls, stage
        assert small[stage].offences == large[stage].offences == [], stage
        assert small[stage].calls == large[stage].calls, stage


def test_a_sampled_step_changes_the_rows_it_touches() -> None:
    """The watched step moves the rows of its candidates and labels, and no other row."""
    table = make_table(SMALL, "adagrad", "div", "float32")
    list(watched_step(table, "none"))
    assert table.version == 1
    moved = torch.nonzero(table.weights.any(1))[:, 0]
    assert {SMALL - 1, SMALL - 2, 77_777, 4097, 0} <= set(moved.tolist())
    assert len(moved) < S + 2 * N


def test_the_watch_sees_what_it_must() -> None:
    """A sum over the table, a tensor of V elements and a copy of the table are reported; a gather is not."""
    weights = torch.zeros(SMALL, D)
    for offence in (weights.sum, lambda: torch.zeros(SMALL), weights.clone, lambda: weights.add_(1.0)):
        with Watch(SMALL, [weights]) as watch:
            offence()
        assert watch.offences
    with Watch(SMALL, [weights]) as watch:
        index = torch.tensor([3, 5])
        weights[index] = weights[index] + 1.0
        weights[index, None].sum()
    assert not watch.offences
