"""The conformance suite of the port `ShardGroup`, run over every group of shards, in process and on Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from shardloss_server.cluster.fanout import FanoutGroup
from shardloss_server.cluster.group import Order, Pending, ShardMissing, Staged, WorkerLost
from shardloss_server.cluster.local import LocalGroup, LocalPending
from shardloss_server.frontend.finish import merge
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.loss import hidden_gradient, per_example_loss
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Batch, Candidates, Part, RowWrite, StepKey, TableSpec, Upstream
from shardloss_server.shard.scan import Question
from shardloss_server.shard.table import VersionGap

from ..extent import EVERYTHING, sample, turn_of
from . import oracle
from .relayed import RelayedGroup

NUM_CLASSES, DIM = 11, 5  # 11 has no common divisor with any number of shards or workers below
NUM_SHARDS = 4  # 1 and 2 workers hold equally many; of 3 workers, one holds more
TIMEOUT_S = 120.0
LEARNING_RATE = 0.3
EXACT = 1e-12
STATE = ("first_moment", "second_moment")  # the state of an optimizer of the Adam family

GROUPS = [
    *([pytest.param(1, id="local1"), pytest.param(2, id="local2")] if EVERYTHING else []),
    pytest.param(3, id="local3"),
    pytest.param("anew", id="local2-nothing-kept"),
    pytest.param("relays", id="relays"),
    pytest.param("links", id="ray2", marks=pytest.mark.ray),
    pytest.param("calls", id="ray2-without-links", marks=pytest.mark.ray),
]


@pytest.fixture(params=GROUPS, scope="module")
def group(request: pytest.FixtureRequest) -> Iterator[FanoutGroup]:
    """Every implementation of the port, with each fast path on and off; the Ray groups are shared by the session."""
    if request.param in ("links", "calls"):
        yield request.getfixturevalue("ray_workers" if request.param == "links" else "plain_workers")
        return
    if request.param == "relays":
        relayed = RelayedGroup(4, [range(2), range(2, 4)])
        yield relayed
        relayed.close()
        return
    local = LocalGroup(2, kept_bytes=0) if request.param == "anew" else LocalGroup(request.param)
    yield local
    local.close()


class Shards:
    """A table of a group, whose state can be read into the oracle."""

    def __init__(self, group: FanoutGroup, spec: TableSpec) -> None:
        self.group, self.spec, self.name = group, spec, spec.name
        self.version = 0
        self._staged: dict[int, tuple[Part, Staged]] = {}

    def read(self) -> oracle.Replica:
        """Return all rows and biases, ordered by class id."""
        pieces = self.group.read(self.name, torch.arange(self.spec.num_classes)).result(TIMEOUT_S)
        order = torch.argsort(torch.cat([piece.class_ids for piece in pieces]))
        rows, biases = torch.cat([p.rows for p in pieces]), torch.cat([p.biases for p in pieces])
        return oracle.Replica(rows[order].double().numpy(), biases[order].double().numpy())

    def staged(self, part: Part) -> Staged:
        """Return the part as it was first staged, so that its step finds what its score kept."""
        if id(part) not in self._staged:
            self._staged[id(part)] = part, self.group.stage(part)
        return self._staged[id(part)][1]

    def versions(self) -> list[int]:
        return self.group.applied_versions(self.name).result(TIMEOUT_S)

    def loss(self, part: Part) -> torch.Tensor:
        """Return the per-example losses of a part."""
        scores = self.group.score(self.name, self.group.stage(part), False, False).result(TIMEOUT_S)
        return per_example_loss(merge(scores), part.batch.mass)

    def order(self, part: Part, g: np.ndarray, step: int, version: int | None = None) -> Order:
        """Return the order of the next step, with the lse at the current version."""
        scores = self.group.score(self.name, self.staged(part), False, True).result(TIMEOUT_S)
        lse = merge(scores).statistics.lse
        version = scores[0].version + 1 if version is None else version
        key = StepKey("trainer", step, b"payload")
        return Order(version, key, LEARNING_RATE, 0, (Upstream(lse, torch.tensor(g)),))


def create(group: FanoutGroup, spec: TableSpec) -> None:
    """Create a table in two pieces."""
    group.create(spec, 8).result(TIMEOUT_S)
    for piece in range(2):
        group.fill(spec.name, piece, 2).result(TIMEOUT_S)


@pytest.fixture
def make_shards(group: FanoutGroup, fresh_name: Callable[[], str]) -> Iterator[Callable[..., Shards]]:
    """A function that creates tables, which are dropped after the test."""
    made: list[str] = []

    def make(
        num_shards: int = NUM_SHARDS, placement: str = "div", name: str | None = None, optimizer: str = "sgd"
    ) -> Shards:
        spec = spec_of(name or fresh_name(), num_shards, placement, optimizer)
        made.append(spec.name)
        create(group, spec)
        return Shards(group, spec)

    yield make
    for name in made:
        group.drop(name).result(TIMEOUT_S)


@pytest.fixture
def shards(make_shards: Callable[..., Shards]) -> Shards:
    return make_shards()


def spec_of(name: str, num_shards: int = NUM_SHARDS, placement: str = "div", optimizer: str = "sgd") -> TableSpec:
    cut = Placement(placement, NUM_CLASSES, num_shards)
    start = Initializer("normal", 0.7, 3)
    return TableSpec(name, NUM_CLASSES, DIM, "float64", True, cut, start, OptimizerSpec(optimizer))


def part_of(batch: oracle.Batch) -> Part:
    """Return the batch as a `Part` for a group; its draw must have no repeats."""
    labels = torch.tensor(batch.labels)
    weights = torch.full(labels.shape, 1.0 / labels.shape[1], dtype=torch.float64)
    planned = Batch(torch.tensor(batch.hidden), labels, weights, weights.sum(1))
    if batch.draw is None:
        return Part(planned, None)
    class_ids = torch.tensor(batch.draw.sampled)
    log_weight = -torch.tensor(batch.draw.sampled_expected_count).log()
    label_log_weight = -torch.tensor(batch.draw.true_expected_count).log()
    return Part(planned, Candidates(class_ids, log_weight, torch.full_like(log_weight, -torch.inf), label_log_weight))


def batch_of(kind: str, rng: np.random.Generator) -> oracle.Batch:
    """Return a batch of the full softmax, or of six distinct candidates, some of which may be labels."""
    batch = oracle.random_batch(rng, NUM_CLASSES, DIM, num_sampled=0 if kind == "full" else 6)
    if batch.draw is not None:
        distinct = np.sort(rng.permutation(NUM_CLASSES)[:6])
        batch = oracle.Batch(
            batch.hidden,
            batch.labels,
            type(batch.draw)(distinct, batch.draw.true_expected_count, batch.draw.sampled_expected_count),
            batch.g,
        )
    return batch


KINDS = pytest.mark.parametrize("kind", ["full", "sampled"])
CUTS = [(5, "div"), (13, "mod"), (1, "div"), (4, "mod"), (13, "div")]


def every_cut(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on two of the cuts, which depend on its name."""
    return pytest.mark.parametrize("num_shards, placement", sample(CUTS, 2, turn_of(test.__name__)))(test)


# Creating tables


@every_cut
def test_rows_begin_the_same_on_every_group_and_cut(
    make_shards: Callable[..., Shards], num_shards: int, placement: str
) -> None:
    """A row's initial values depend on the seed and the class id alone; more shards than classes are legal."""
    shards = make_shards(num_shards, placement)
    whole = LocalGroup(1)
    try:
        create(whole, spec_of("whole", 1))
        expected = Shards(whole, spec_of("whole", 1)).read()
    finally:
        whole.close()
    found = shards.read()
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert expected.rows.std() > 0.1
    assert not found.biases.any()
    assert shards.versions() == [0] * num_shards


def test_a_group_says_where_it_computes(group: FanoutGroup) -> None:
    """A group reports one device per worker; num_workers counts worker processes, so it is 0 for a LocalGroup."""
    assert group.num_workers == (0 if isinstance(group, LocalGroup) else len(group.devices))
    assert len(group.devices) >= 1
    assert all(device == "cpu" or device.startswith("cuda") for device in group.devices)


def test_every_worker_says_what_it_takes(
    group: FanoutGroup, make_shards: Callable[..., Shards], rng: np.random.Generator
) -> None:
    """The stats of each worker, in index order, hold its process, memory, cores and shards; none was restarted."""
    before = group.stats(TIMEOUT_S)
    shards = make_shards()
    shards.loss(part_of(batch_of("sampled", rng)))
    seen = group.stats(TIMEOUT_S)
    assert [one.index for one in seen] == list(range(len(group.devices)))
    assert [one.device for one in seen] == list(group.devices)
    assert all(one.num_restarts == 0 for one in seen)
    stats = [one.stats for one in seen if one.stats is not None]
    assert len(stats) == len(seen)
    assert all(one.resident_bytes > 1e7 and one.num_cores >= 1 and one.num_threads >= 1 for one in stats)
    held = [one.stats.num_shards for one in before if one.stats is not None]
    assert sum(one.num_shards for one in stats) == sum(held) + NUM_SHARDS
    is_own = isinstance(group, (LocalGroup, RelayedGroup))
    assert all((one.pid == os.getpid()) == is_own for one in stats)


def test_a_worker_that_does_not_answer_in_time_is_told_from_the_others() -> None:
    """The other workers are still reported, and the busy one is reported again once it is free."""
    group, release = LocalGroup(3), threading.Event()
    try:
        busy = group._threads[1].submit(release.wait, TIMEOUT_S)
        assert [one.stats is None for one in group.stats(0.2)] == [False, True, False]
        release.set()
        busy.result(TIMEOUT_S)
        assert [one.stats is None for one in group.stats(TIMEOUT_S)] == [False] * 3
    finally:
        release.set()
        group.close()


@pytest.mark.parametrize("error", [WorkerLost, ShardMissing, TimeoutError])
def test_a_worker_that_is_gone_is_told_from_the_others(error: type[Exception]) -> None:
    """A dead worker is reported without stats, whichever error its group raises."""

    class HalfGone(LocalGroup):
        def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
            pending = super().start(worker, method, *args)
            if worker == 0:
                assert isinstance(pending, LocalPending)
                pending.future.result(TIMEOUT_S)
                gone: Future[dict[int, Any]] = Future()
                gone.set_exception(error("it died"))
                return LocalPending(worker, gone)
            return pending

    group = HalfGone(2)
    try:
        assert [one.stats is None for one in group.stats(TIMEOUT_S)] == [True, False]
    finally:
        group.close()


def test_a_worker_in_another_process_than_before_was_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart is counted once, however often the stats are read."""
    group = LocalGroup(2)
    try:
        assert [one.num_restarts for one in group.stats(TIMEOUT_S)] == [0, 0]
        monkeypatch.setattr("os.getpid", lambda: 1)
        for _ in range(2):
            assert [one.num_restarts for one in group.stats(TIMEOUT_S)] == [1, 1]
    finally:
        group.close()


@pytest.mark.ray
def test_ray_workers_are_processes_of_their_own(ray_workers: Any) -> None:
    """No worker shares a process with another or with the front end."""
    pids = ray_workers.pids
    assert len({*pids, os.getpid()}) == ray_workers.num_workers + 1


def test_tables_of_one_group_are_apart(make_shards: Callable[..., Shards], rng: np.random.Generator) -> None:
    """A step on one table does not change another."""
    one, other = make_shards(), make_shards(3, "mod")
    before = other.read()
    step(one, batch_of("full", rng), 1)
    np.testing.assert_array_equal(other.read().rows, before.rows)
    assert (one.versions(), other.versions()) == ([1] * NUM_SHARDS, [0] * 3)


def test_a_dropped_table_is_gone_and_may_be_made_anew(
    group: FanoutGroup, shards: Shards, rng: np.random.Generator
) -> None:
    """drop frees rows and version and ignores unknown tables; a new table of the same name starts at version 0."""
    first = shards.read()
    step(shards, batch_of("full", rng), 1)
    group.drop(shards.name).result(TIMEOUT_S)
    group.drop(shards.name).result(TIMEOUT_S)
    with pytest.raises(ShardMissing):
        shards.versions()
    create(group, shards.spec)
    assert shards.versions() == [0] * NUM_SHARDS
    np.testing.assert_array_equal(shards.read().rows, first.rows)


# Scoring


@KINDS
@every_cut
def test_merged_scores_are_the_loss(
    make_shards: Callable[..., Shards], rng: np.random.Generator, kind: str, num_shards: int, placement: str
) -> None:
    """Partials and targets merged in shard order give the reference's loss and hidden gradient for every cut."""
    shards, batch = make_shards(num_shards, placement), batch_of(kind, rng)
    part, replica = part_of(batch), shards.read()
    scores = shards.group.score(shards.name, shards.group.stage(part), True, False).result(TIMEOUT_S)
    assert [shard for score in scores for shard in score.shards] == list(range(num_shards))
    assert {score.version for score in scores} == {0}
    loss = per_example_loss(merge(scores), part.batch.mass)
    np.testing.assert_allclose(loss.numpy(), replica.loss(batch), rtol=EXACT, atol=EXACT)
    gradient = hidden_gradient(merge(scores), part.batch.mass)
    np.testing.assert_allclose(gradient.numpy(), replica.gradients([batch])[2][0], rtol=EXACT, atol=EXACT)


@KINDS
@every_cut
def test_row_gradients_are_autograds(
    make_shards: Callable[..., Shards], rng: np.random.Generator, kind: str, num_shards: int, placement: str
) -> None:
    """Every shard returns the gradients of its touched rows, by ascending id, and of no other rows."""
    shards, batch = make_shards(num_shards, placement), batch_of(kind, rng)
    order = shards.order(part_of(batch), batch.g, 1)
    staged = shards.group.stage(part_of(batch))
    pieces = shards.group.gradient(shards.name, staged, order.upstreams[0]).result(TIMEOUT_S)
    assert all((np.diff(piece.class_ids.numpy()) > 0).all() for piece in pieces)
    found = oracle.Replica(np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES))
    for piece in pieces:
        class_ids = piece.class_ids.numpy()
        found.rows[class_ids], found.biases[class_ids] = piece.rows.numpy(), piece.biases.numpy()
    rows, biases, _ = shards.read().gradients([batch])
    oracle.Replica(rows, biases).assert_close(found.rows, found.biases, EXACT)
    touched = range(NUM_CLASSES) if batch.draw is None else {*batch.labels.ravel(), *batch.draw.sampled}
    assert sorted(int(i) for piece in pieces for i in piece.class_ids) == sorted(touched)


@KINDS
def test_the_same_question_gets_the_same_bits(shards: Shards, rng: np.random.Generator, kind: str) -> None:
    """Two scores of one part on one cut agree in every bit: sums are taken in shard order, not in order of arrival."""
    part = part_of(batch_of(kind, rng))
    assert torch.equal(shards.loss(part), shards.loss(part))


@KINDS
def test_an_empty_batch_is_legal(shards: Shards, rng: np.random.Generator, kind: str) -> None:
    """With N = 0 the losses have shape [0] and a step changes no row."""
    batch, before = batch_of(kind, rng).rows(slice(0, 0)), shards.read()
    assert shards.loss(part_of(batch)).shape == (0,)
    step(shards, batch, 1)
    np.testing.assert_array_equal(shards.read().rows, before.rows)
    assert shards.versions() == [1] * NUM_SHARDS


def test_no_candidates_leave_the_labels_alone_in_the_softmax(shards: Shards, rng: np.random.Generator) -> None:
    """With S = 0 each row's softmax is over its own true columns."""
    full = batch_of("sampled", rng)
    assert full.draw is not None
    nothing = type(full.draw)(np.zeros(0, dtype=np.int64), full.draw.true_expected_count, np.zeros(0))
    batch = oracle.Batch(full.hidden, full.labels, nothing, full.g)
    expected = shards.read().loss(batch)
    np.testing.assert_allclose(shards.loss(part_of(batch)).numpy(), expected, rtol=EXACT, atol=EXACT)


# Steps and writes


def step(shards: Shards, batch: oracle.Batch, number: int) -> list[int]:
    """Apply one step over one batch on all shards."""
    part = part_of(batch)
    order = shards.order(part, batch.g, number)
    return shards.group.apply(shards.name, order, [shards.staged(part)]).result(TIMEOUT_S)


@KINDS
@every_cut
def test_a_step_is_applied_on_every_shard(
    make_shards: Callable[..., Shards], rng: np.random.Generator, kind: str, num_shards: int, placement: str
) -> None:
    """apply moves every shard by one version and every row by -lr times its gradient."""
    shards, batch = make_shards(num_shards, placement), batch_of(kind, rng)
    expected = shards.read().step([batch], LEARNING_RATE)
    assert step(shards, batch, 1) == [1] * num_shards
    found = shards.read()
    expected.assert_close(found.rows, found.biases, EXACT)
    assert shards.versions() == [1] * num_shards


def test_parts_of_one_step_add_up(shards: Shards, rng: np.random.Generator) -> None:
    """A step over parts of different kinds and sizes is one SGD step over the sum of their objectives."""
    batches = [batch_of("full", rng).rows(slice(0, 2)), batch_of("sampled", rng), batch_of("full", rng)]
    expected = shards.read().step(batches, LEARNING_RATE)
    parts = [part_of(batch) for batch in batches]
    orders = [shards.order(part, batch.g, 1) for part, batch in zip(parts, batches, strict=True)]
    upstreams = tuple(order.upstreams[0] for order in orders)
    whole = Order(1, orders[0].key, LEARNING_RATE, 0, upstreams)
    shards.group.apply(shards.name, whole, [shards.staged(part) for part in parts]).result(TIMEOUT_S)
    found = shards.read()
    expected.assert_close(found.rows, found.biases, EXACT)


@KINDS
def test_a_repeated_step_of_the_present_version_is_not_applied_again(
    shards: Shards, rng: np.random.Generator, kind: str
) -> None:
    """A shard that already has the version returns it and keeps its bits."""
    batch = batch_of(kind, rng)
    part = part_of(batch)
    order, staged = shards.order(part, batch.g, 1), shards.staged(part)
    shards.group.apply(shards.name, order, [staged]).result(TIMEOUT_S)
    once = shards.read()
    assert shards.group.apply(shards.name, order, [staged]).result(TIMEOUT_S) == [1] * NUM_SHARDS
    np.testing.assert_array_equal(shards.read().rows, once.rows)
    np.testing.assert_array_equal(shards.read().biases, once.biases)


@pytest.mark.parametrize("version", [2, 3, 0, -1])
def test_only_the_next_version_is_applied(shards: Shards, rng: np.random.Generator, version: int) -> None:
    """A step that skips a version, or is for a past one, is refused and changes nothing."""
    batch, present = batch_of("full", rng), 0
    if version <= 0:
        step(shards, batch, 1)
        step(shards, batch, 2)
        present = 2
    before, part = shards.read(), part_of(batch)
    order = shards.order(part, batch.g, 9, version=version)
    with pytest.raises(VersionGap):
        shards.group.apply(shards.name, order, [shards.staged(part)]).result(TIMEOUT_S)
    np.testing.assert_array_equal(shards.read().rows, before.rows)
    assert shards.versions() == [present] * NUM_SHARDS


def test_written_rows_are_read_back(shards: Shards, rng: np.random.Generator) -> None:
    """write overwrites the given rows and biases as one version on every shard; other rows do not change."""
    before, class_ids = shards.read(), torch.tensor([9, 0, 4])
    rows, biases = torch.tensor(rng.normal(size=(3, DIM))), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    written = shards.group.write(shards.name, RowWrite(1, class_ids, rows, biases)).result(TIMEOUT_S)
    assert written == [1] * NUM_SHARDS
    before.rows[class_ids.numpy()], before.biases[class_ids.numpy()] = rows.numpy(), biases.numpy()
    found = shards.read()
    np.testing.assert_array_equal(found.rows, before.rows)
    np.testing.assert_array_equal(found.biases, before.biases)


def test_state_and_step_are_written_and_read_back(group: FanoutGroup, make_shards: Callable[..., Shards]) -> None:
    """The state of rows and biases is written on every shard; a lagging peer takes it from the record."""
    shards = make_shards(optimizer="sparse_adam")
    shards.group.write(shards.name, RowWrite(1, torch.arange(1), torch.zeros(1, DIM), None)).result(TIMEOUT_S)
    ids = torch.tensor([1, 8, 4])
    rows, biases = (torch.randn(size, dtype=torch.float64) for size in ((3, DIM), (3,)))
    of_rows = {name: torch.rand(3, DIM, dtype=torch.float64) for name in STATE}
    of_biases = {name: torch.rand(3, 1, dtype=torch.float64) for name in STATE}
    write = RowWrite(2, ids, rows, biases, of_rows, of_biases, num_commits=40)
    group.start(0, "write", shards.name, write).result(TIMEOUT_S)
    assert group.repair(shards.name, TIMEOUT_S) == 2
    pieces = group.read(shards.name, ids, True).result(TIMEOUT_S)
    assert [piece.num_commits for piece in pieces] == [40] * NUM_SHARDS
    for piece in pieces:
        mine = (piece.class_ids[:, None] == ids).int().argmax(1)
        assert torch.equal(piece.rows, rows[mine])
        for name in STATE:
            assert torch.equal(piece.weight_state[name], of_rows[name][mine])
            assert torch.equal(piece.bias_state[name], of_biases[name][mine])
    assert all(not piece.weight_state for piece in group.read(shards.name, ids).result(TIMEOUT_S))


def test_a_write_without_biases_leaves_them(shards: Shards) -> None:
    """A table keeps its biases if a write carries none."""
    ids = torch.tensor([3])
    full = torch.full((1, DIM), 2.0, dtype=torch.float64)
    shards.group.write(shards.name, RowWrite(1, ids, full, torch.tensor([5.0]))).result(TIMEOUT_S)
    shards.group.write(shards.name, RowWrite(2, ids, -full, None)).result(TIMEOUT_S)
    found = shards.read()
    assert (found.rows[3] == -2.0).all()
    assert found.biases[3] == 5.0


# Exact questions


@every_cut
def test_scans_over_slices_answer_exactly(
    make_shards: Callable[..., Shards], rng: np.random.Generator, num_shards: int, placement: str
) -> None:
    """The slices of all shards add up to log-sum-exp, the number of classes before a label and the best classes."""
    shards = make_shards(num_shards, placement)
    replica, hidden = shards.read(), rng.normal(size=(7, DIM))
    logits = hidden @ replica.rows.T + replica.biases
    labels = torch.tensor(rng.integers(0, NUM_CLASSES, 7))
    asked = shards.group.asked_logits(shards.name, torch.tensor(hidden), labels[:, None]).result(TIMEOUT_S)
    label_logits = torch.stack([answer.logits for answer in asked]).sum(0)[:, 0]
    label_keys = torch.stack([answer.keys for answer in asked]).sum(0)[:, 0]
    np.testing.assert_allclose(label_logits, logits[np.arange(7), labels], rtol=EXACT, atol=EXACT)
    question = Question(torch.tensor(hidden), labels, label_keys, 3, True)
    num_pieces = 2
    answers = [
        answer
        for piece in range(num_pieces)
        for answer in shards.group.scan(shards.name, question, piece, num_pieces).result(TIMEOUT_S)
    ]
    assert len(answers) == num_shards * num_pieces
    lse = torch.logsumexp(torch.stack([answer.lse for answer in answers]), 0)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(1)), rtol=EXACT, atol=EXACT)
    before = torch.stack([answer.num_before for answer in answers]).sum(0)
    np.testing.assert_array_equal(before, (logits > logits[np.arange(7), labels][:, None]).sum(1))
    best_logits = torch.cat([answer.best.logits for answer in answers], 1)
    best_ids = torch.cat([answer.best.class_ids for answer in answers], 1)
    top = best_ids.gather(1, best_logits.topk(3).indices)
    np.testing.assert_array_equal(top, np.argsort(-logits, axis=1)[:, :3])


# Order of work


def test_work_is_done_in_the_order_it_was_started(shards: Shards, rng: np.random.Generator) -> None:
    """Verbs started in sequence, without waiting, see each other's effects, and every fan-out reads one version."""
    batch = batch_of("full", rng)
    part = part_of(batch)
    order, staged = shards.order(part, batch.g, 1), shards.staged(part)
    before = shards.read()
    after = before.step([batch], LEARNING_RATE)
    ids = torch.tensor([2])
    pending = [
        shards.group.score(shards.name, staged, False, False),
        shards.group.apply(shards.name, order, [staged]),
        shards.group.score(shards.name, staged, False, False),
        shards.group.write(shards.name, RowWrite(2, ids, torch.zeros(1, DIM), torch.zeros(1))),
        shards.group.score(shards.name, staged, False, False),
    ]
    scored_0, applied, scored_1, written, scored_2 = (work.result(TIMEOUT_S) for work in pending)
    assert (applied, written) == ([1] * NUM_SHARDS, [2] * NUM_SHARDS)
    emptied = oracle.Replica(after.rows.copy(), after.biases.copy())
    emptied.rows[2], emptied.biases[2] = 0.0, 0.0
    for version, (scores, replica) in enumerate(((scored_0, before), (scored_1, after), (scored_2, emptied))):
        assert {score.version for score in scores} == {version}
        loss = per_example_loss(merge(scores), part.batch.mass)
        np.testing.assert_allclose(loss.numpy(), replica.loss(batch), rtol=EXACT, atol=EXACT)


def test_a_staged_part_serves_many_verbs(shards: Shards, rng: np.random.Generator) -> None:
    """A staged part is not changed by the computations that use it."""
    batch = batch_of("sampled", rng)
    staged, part = shards.group.stage(part_of(batch)), part_of(batch)
    order = shards.order(part, batch.g, 1)
    first = shards.group.score(shards.name, staged, True, True).result(TIMEOUT_S)
    shards.group.gradient(shards.name, staged, order.upstreams[0]).result(TIMEOUT_S)
    again = shards.group.score(shards.name, staged, True, True).result(TIMEOUT_S)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.statistics.lse, other.statistics.lse)
        assert torch.equal(one.statistics.mean_row, other.statistics.mean_row)


# Deadlines


def test_an_answer_that_is_late_is_a_timeout_and_the_work_goes_on(
    group: FanoutGroup, fresh_name: Callable[[], str]
) -> None:
    """result(timeout_s) raises TimeoutError once the time is up, and the table is still created."""
    num_classes = 400_000  # with 32 columns it takes a tenth of a second or more to fill
    cut = Placement("mod", num_classes, 3)
    name = fresh_name()
    spec = TableSpec(name, num_classes, 32, "float32", True, cut, Initializer("normal", 1.0, 0), OptimizerSpec("sgd"))
    group.create(spec, 8)
    making = group.fill(name, 0, 1)
    with pytest.raises(TimeoutError):
        making.result(0.0)
    with pytest.raises(TimeoutError):
        group.applied_versions(name).result(0.001)
    assert group.applied_versions(name).result(TIMEOUT_S) == [0, 0, 0]
    group.drop(name).result(TIMEOUT_S)


# Shards that are missing


VERBS = {
    "score": lambda group, part: group.score("nowhere", group.stage(part), False, False),
    "gradient": lambda group, part: group.gradient(
        "nowhere", group.stage(part), Upstream(torch.zeros(7), torch.zeros(7))
    ),
    "apply": lambda group, part: group.apply(
        "nowhere",
        Order(1, StepKey("s", 1, b""), 0.1, 0, (Upstream(torch.zeros(7), torch.zeros(7)),)),
        [group.stage(part)],
    ),
    "write": lambda group, part: group.write(
        "nowhere", RowWrite(1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, DIM), None)
    ),
    "read": lambda group, part: group.read("nowhere", torch.arange(2)),
    "scan": lambda group, part: group.scan("nowhere", Question(part.batch.hidden, None, None, 1, True), 0, 1),
    "asked_logits": lambda group, part: group.asked_logits("nowhere", part.batch.hidden, part.batch.labels),
    "applied_versions": lambda group, part: group.applied_versions("nowhere"),
    "forget_record": lambda group, part: group.forget_record("nowhere", 1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_table_without_shards_is_reported_as_missing(group: FanoutGroup, rng: np.random.Generator, verb: str) -> None:
    """Every verb except create and drop raises ShardMissing for a table that a worker does not hold."""
    with pytest.raises(ShardMissing, match="nowhere"):
        VERBS[verb](group, part_of(batch_of("full", rng))).result(TIMEOUT_S)


def test_repairing_a_missing_table_is_reported_as_missing(group: FanoutGroup) -> None:
    """repair cannot restore a table that no worker holds."""
    with pytest.raises(ShardMissing):
        group.repair("nowhere", TIMEOUT_S)


# Repair


def test_repair_of_settled_shards_changes_nothing(shards: Shards, rng: np.random.Generator) -> None:
    """If all shards are at one version, repair returns it and changes no bit."""
    assert shards.group.repair(shards.name, TIMEOUT_S) == 0
    step(shards, batch_of("sampled", rng), 1)
    before = shards.read()
    assert shards.group.repair(shards.name, TIMEOUT_S) == 1
    np.testing.assert_array_equal(shards.read().rows, before.rows)


@KINDS
@pytest.mark.parametrize("ahead", ["first", "last"])
def test_a_lagging_worker_is_brought_up_by_its_peers_records(
    shards: Shards, rng: np.random.Generator, kind: str, ahead: str
) -> None:
    """repair applies a step that only one worker had applied on all others, exactly once."""
    group, batch = shards.group, batch_of(kind, rng)
    part = part_of(batch)
    order, staged = shards.order(part, batch.g, 1), group.stage(part)
    expected = shards.read().step([batch], LEARNING_RATE)
    worker = 0 if ahead == "first" else len(group.devices) - 1
    group.start(worker, "apply", shards.name, order, staged).result(TIMEOUT_S)
    assert set(shards.versions()) == ({0, 1} if len(group.devices) > 1 else {1})
    assert group.repair(shards.name, TIMEOUT_S) == 1
    assert shards.versions() == [1] * NUM_SHARDS
    found = shards.read()
    expected.assert_close(found.rows, found.biases, EXACT)
    assert group.repair(shards.name, TIMEOUT_S) == 1
    np.testing.assert_array_equal(shards.read().rows, found.rows)


def test_a_step_that_all_have_applied_may_be_forgotten(shards: Shards, rng: np.random.Generator) -> None:
    """Every shard frees its record, unless it has applied a later one; repair then has nothing to do."""
    group, batch = shards.group, batch_of("full", rng)
    for version in (1, 2):
        step(shards, batch, version)

    def kept() -> set[int]:
        answers = [group.start(worker, "records_since", shards.name, 0) for worker in range(len(group.devices))]
        return {record.version for one in answers for found in one.result(TIMEOUT_S).values() for record in found}

    assert group.forget_record(shards.name, 1).result(TIMEOUT_S) == [2] * NUM_SHARDS
    assert kept() == {2}
    assert group.forget_record(shards.name, 2).result(TIMEOUT_S) == [2] * NUM_SHARDS
    assert kept() == set()
    assert group.repair(shards.name, TIMEOUT_S) == 2


def test_repair_catches_up_steps_and_writes(shards: Shards, rng: np.random.Generator) -> None:
    """A worker that misses a step, then a write, then another step gets each one from its peer."""
    group, batch = shards.group, batch_of("full", rng)
    part = part_of(batch)
    replica, staged = shards.read(), group.stage(part)
    rows = torch.tensor(rng.normal(size=(2, DIM)))
    write = RowWrite(2, torch.tensor([1, 8]), rows, torch.tensor([0.5, -0.5], dtype=torch.float64))
    stepped = replica.step([batch], LEARNING_RATE)
    stepped.rows[[1, 8]], stepped.biases[[1, 8]] = rows.numpy(), [0.5, -0.5]
    expected = stepped.step([batch], LEARNING_RATE)
    first = shards.order(part, batch.g, 1)
    lse = torch.logsumexp(part.batch.hidden @ torch.tensor(stepped.rows).T + torch.tensor(stepped.biases), 1)
    second = Order(3, StepKey("trainer", 2, b""), LEARNING_RATE, 0, (Upstream(lse, torch.tensor(batch.g)),))
    for verb, change in (("apply", first), ("write", write), ("apply", second)):
        group.start(0, verb, shards.name, change, *([staged] if verb == "apply" else [])).result(TIMEOUT_S)
        assert group.repair(shards.name, TIMEOUT_S) == change.version
        assert shards.versions() == [change.version] * NUM_SHARDS
    found = shards.read()
    expected.assert_close(found.rows, found.biases, EXACT)


# The end


def test_closing_a_local_group_ends_its_threads_and_may_be_repeated() -> None:
    """close is idempotent and leaves no thread behind."""
    before = set(threading.enumerate())
    local = LocalGroup(3)
    create(local, spec_of("short-lived"))
    assert set(threading.enumerate()) - before
    local.close()
    local.close()
    assert not set(threading.enumerate()) - before


def test_every_worker_says_how_long_it_computed(group: FanoutGroup, shards: Shards) -> None:
    """Workers behind a relay are reported individually, although the relay sends a single answer."""
    pending = group.read(shards.name, torch.arange(NUM_CLASSES))
    pending.result(TIMEOUT_S)
    assert sorted(pending.computed_s) == list(group._hosts(shards.name))
    assert all(0 < seconds < TIMEOUT_S for seconds in pending.computed_s.values())
