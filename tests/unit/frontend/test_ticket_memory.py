"""Open tickets and applied steps keep what a commit or its repeat needs, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import chain

import pytest
import torch
from shardloss_server.config import Limits
from shardloss_server.frontend import owner, validate
from shardloss_server.frontend.pipeline import kept_bytes
from shardloss_server.frontend.request import SampledSoftmax, Want
from shardloss_server.machine import memory_limit_bytes
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard import gradient
from shardloss_server.shard.record import TableSpec

from ..cases import D, N, V, randn, sampler
from ..front import Front, Table, request_of

RATE = 0.3
LABELS = torch.full((N, 1), 3)


def table_of(front: Front) -> Table:
    """Return a random table of three shards on two workers."""
    return front.table(randn(V, D), randn(V))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield every tensor in a value of dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def test_tickets_keep_hidden_once(front: Front) -> None:
    """Over the micro-batches of a step they keep at most 1.25 times the bytes of hidden, all of which is counted."""
    num_rows, dim, num_parts = 64, 256, 8
    table = front.table(randn(V, dim), dtype="float32", count_labels=True)
    before, hidden_bytes = front.catalog.budget.num_bytes, num_rows * dim * 4
    for part in range(num_parts):
        request = request_of(randn(num_rows, dim).float(), torch.full((num_rows, 1), 3), want=Want(hidden_grad=True))
        assert table.loss(replace(request, session="session", step=1, part=part)).ticket
    counted = front.catalog.budget.num_bytes - before
    tickets = table.owner.sessions._sessions["session"].tickets.values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in chain(*map(tensors_in, tickets))}
    assert num_parts * hidden_bytes < sum(storages.values()) <= counted <= 1.25 * num_parts * hidden_bytes
    table.owner.sessions.clear()
    assert front.catalog.budget.num_bytes == before


def test_half_a_million_rows_of_1024_columns_fit_the_default_limit() -> None:
    """128 micro-batches of [4096, 1024] and the reply of the last one are below the default of 2.5 GiB."""
    num_rows, dim = 4096, 1024
    zeros, sgd = Initializer("zeros", 0.0, 0), OptimizerSpec("sgd")
    spec = TableSpec("t", V, dim, "float32", True, Placement("mod", V, 1), zeros, sgd)
    hidden = torch.empty(num_rows, dim, device="meta")
    request = request_of(hidden, torch.zeros(num_rows, 1, dtype=torch.int64), want=Want(hidden_grad=True))
    kept = 128 * kept_bytes(request, spec) + validate.reply_bytes(request, spec)
    assert kept <= 5 * 2**29
    assert Limits().max_ticket_bytes == min(5 * 2**29, memory_limit_bytes() // 6)


def test_a_late_repeat_is_scored_again_and_leaves_the_ticket(front: Front) -> None:
    """After the session's next loss a repeat gets the same ticket and, at the same version, the same bits."""
    table = table_of(front)
    request = replace(request_of(randn(N, D), LABELS), session="session", step=1, digest=b"one")
    first = table.loss(request)
    second = table.loss(replace(request, part=1))
    again = table.loss(request)
    assert (again.ticket, again.version) == (first.ticket, first.version)
    assert again.loss is not None
    assert first.loss is not None
    assert torch.equal(again.loss, first.loss)
    assert table.loss(replace(request, part=1)).ticket == second.ticket
    table.commit(1, [(first.ticket, torch.ones(N)), (second.ticket, torch.ones(N))], RATE)
    assert table.owner.sessions.num_open == 0


@pytest.mark.parametrize("is_large", [True, False])
def test_the_shards_forget_a_large_step_that_all_have_applied(
    front: Front, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    """Its parts are freed instead of kept until the next step; a small step is kept, without a further call."""
    monkeypatch.setattr(owner, "KEPT_RECORD_BYTES", 0 if is_large else 1 << 30)
    table = table_of(front)
    ticket = table.open(request_of(randn(N, D), LABELS), 1)
    version = table.commit(1, [(ticket, torch.ones(N))], RATE).version
    versions = front.group.applied_versions(table.owner.key).result(60.0)  # behind the call that forgets
    assert set(versions) == {version}
    by_worker = [front.group.start(worker, "records_since", table.owner.key, 0).result(60.0) for worker in range(2)]
    assert {bool(records) for by_shard in by_worker for records in by_shard.values()} == {not is_large}
    assert front.group.repair(table.owner.key, 60.0) == version


@pytest.mark.parametrize("num_hard_negatives", [0, 2])
def test_a_step_is_the_same_whatever_is_copied_at_once(
    front: Front, monkeypatch: pytest.MonkeyPatch, num_hard_negatives: int
) -> None:
    """Parts whose hidden is summed one after another give the rows that one copy of all hidden gives."""
    weights, biases, hiddens = randn(V, D), randn(V), [randn(N, D) for _ in range(3)]
    sampled = SampledSoftmax(sampler("uniform", V), "every", None, num_hard_negatives) if num_hard_negatives else None
    rows = []
    for group_bytes in (gradient.GROUP_BYTES, 2 * N * D * 8, 1):
        monkeypatch.setattr(gradient, "GROUP_BYTES", group_bytes)
        table = front.table(weights, biases)
        requests = [request_of(hidden, torch.arange(N)[:, None] % V, sampled=sampled) for hidden in hiddens]
        tickets = [table.open(request, 1, part) for part, request in enumerate(requests)]
        table.commit(1, [(ticket, torch.ones(N)) for ticket in tickets], RATE)
        rows.append(table.read())
    assert not torch.equal(rows[0][0], weights)
    for found in rows[1:]:
        for one, other in zip(found, rows[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
