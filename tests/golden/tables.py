"""Golden cases on every cut of a table, in process and on Ray workers."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import shardloss
from shardloss_server.rpc.serve import Server

from ..extent import EVERYTHING, sample
from .cases import Case, Cut, cuts_of

LOCAL_SHARDS = (1, 2, 3, 7)  # 7 shards are uneven if V = 29, and some are empty if V = 3
RAY_SHARDS = (2, 3)  # on two workers: one shard each; two and one
RAY_EVERY = 5  # every fifth case also runs on Ray
KEPT_TABLES = 32  # half of a server's limit


def runs(cases: list[Case], local_shards: tuple[int, ...] = LOCAL_SHARDS) -> list[object]:
    """Return each case on one cut in process and every fifth on Ray; two cases of each family use every cut on both.

    The cut rotates, so the cases of a family cover all cuts. A case that the framework computed on several shards is
    cut as the framework cut it. `make test-long` runs every case on every cut.
    """
    chosen: list[Any] = []
    for place, case in enumerate(cases):
        family = [other for other in cases if other.family == case.family]
        local, ray = cuts_of(case, local_shards), cuts_of(case, RAY_SHARDS)
        if not EVERYTHING and case not in (family[0], family[min(len(family) // 2 | 1, len(family) - 1)]):
            local = [case.cut] if case.cut is not None else sample(local, 1, place)
            ray = sample(ray, 1, 3 * place // (2 * RAY_EVERY)) if place % RAY_EVERY == 0 else []
        chosen += [pytest.param("local", case, cut, id=f"{case}-local-{cut}") for cut in local]
        chosen += [pytest.param("ray", case, cut, id=f"{case}-ray-{cut}", marks=pytest.mark.ray) for cut in ray]
    return sorted(chosen, key=lambda run: str(run.values[0]))


class Tables:
    """Tables filled with golden weights: one per content and cut; the least recently used one is deleted first."""

    def __init__(self, client: shardloss.LossClient) -> None:
        self._client = client
        self._kept: OrderedDict[tuple[bytes, Cut], shardloss.Table] = OrderedDict()
        self._names = (f"golden-{i}" for i in itertools.count())

    def fresh(self, weights: np.ndarray, biases: np.ndarray | None, cut: Cut) -> shardloss.Table:
        """Return a new table, filled by WriteRows; the caller deletes it."""
        table = self._client.create_table(
            next(self._names),
            num_classes=len(weights),
            dim=weights.shape[1],
            dtype=weights.dtype.name,
            bias=biases is not None,
            num_shards=cut.num_shards,
            placement=cut.placement,
            initializer=shardloss.Zeros(),
        )
        table.write_rows(np.arange(len(weights)), weights, biases)
        return table

    def filled(self, weights: np.ndarray, biases: np.ndarray | None, cut: Cut) -> shardloss.Table:
        """Return a shared table with these rows, which must not be trained."""
        content = weights.dtype.str.encode() + weights.tobytes() + (b"" if biases is None else biases.tobytes())
        key = (content, cut)
        if key not in self._kept:
            if len(self._kept) >= KEPT_TABLES:
                self._client.delete_table(self._kept.popitem(last=False)[1].name)
            self._kept[key] = self.fresh(weights, biases, cut)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Delete every kept table."""
        while self._kept:
            self._client.delete_table(self._kept.popitem()[1].name)


def tables_of(server: Server) -> Iterator[Tables]:
    with shardloss.connect(server.address) as client:
        tables = Tables(client)
        yield tables
        tables.clear()


def dense(gradient: shardloss.TableGradient | None, like: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a table gradient as (rows [V, D], biases [V]), asserting that its class ids ascend without repeats."""
    assert gradient is not None
    assert (np.diff(gradient.class_ids) > 0).all()
    rows = np.zeros(like.shape, dtype=gradient.rows.dtype)
    rows[gradient.class_ids] = gradient.rows
    if gradient.biases is None:
        return rows, None
    biases = np.zeros(len(like), dtype=gradient.biases.dtype)
    biases[gradient.class_ids] = gradient.biases
    return rows, biases
