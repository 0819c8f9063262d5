"""Relays: a broadcast crosses the network once per node; in all other respects relays behave like direct links."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from shardloss_server.cluster import linked_worker, relay
from shardloss_server.cluster.frames import Frame
from shardloss_server.cluster.group import Order, ShardMissing, WorkerLost
from shardloss_server.cluster.link import CALL, KEEP, ROUTE, Links, WorkerFailed
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.finish import merge
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.loss import Merged
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.numerics.partial import Partial
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Batch, OutOfMemory, Part, Score, StepKey, TableSpec, Upstream

from ...conformance.relayed import RelayedGroup
from ...patience import PATIENCE_S, eventually

NUM_CLASSES, N, D = 37, 7, 65
NODES = [range(1, 3), range(3, 5)]  # of five workers; worker 0 is linked to the front end directly


class Noting:
    """A worker that answers with the arguments of each call and records them."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.gate, self.entered = threading.Event(), threading.Event()

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append((method, args))
        if method == "wait":
            self.entered.set()
            assert self.gate.wait(PATIENCE_S)
        if method == "missing":
            raise ShardMissing(f"nothing here, says {self.index}")
        if method == "memory":
            return {self.index: []}
        if method == "full":
            raise OutOfMemory("none left")
        if method == "strange":
            raise Unsendable(threading.Lock())
        return {self.index: args}

    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]


class Unsendable(Exception):
    """An error that cannot be pickled."""


@pytest.fixture
def make_group() -> Iterator[Callable[..., RelayedGroup]]:
    """Create groups that are closed after the test, and wait until their threads have ended."""
    before, made = set(threading.enumerate()), []

    def make(*args: Any) -> RelayedGroup:
        made.append(RelayedGroup(*args))
        return made[-1]

    yield make
    for group in made:
        group.close()
    eventually(lambda: not set(threading.enumerate()) - before, "every thread ends")


@pytest.fixture
def noting() -> Iterator[list[Noting]]:
    found = [Noting(index) for index in range(5)]
    yield found
    for worker in found:
        worker.gate.set()


@pytest.fixture
def group(make_group: Callable[..., RelayedGroup], noting: list[Noting]) -> RelayedGroup:
    return make_group(5, NODES, [worker.call for worker in noting])


@pytest.fixture
def frames_to_relays(monkeypatch: pytest.MonkeyPatch) -> list[Frame]:
    """Every frame that a relay receives from the front end; request this fixture before the group."""
    came: list[Frame] = []
    take = relay.Passage._take

    def counted(self: relay.Passage, frame: Frame) -> None:
        came.append(frame)
        take(self, frame)

    monkeypatch.setattr(relay.Passage, "_take", counted)
    return came


def answers(group: RelayedGroup, workers: range, method: str, *args: Any) -> dict[int, Any]:
    """Return the answer of each worker."""
    found: dict[int, Any] = {}
    for pending in group.start_on(workers, method, *args):
        found.update(pending.result(PATIENCE_S))
    return found


def part_of(num_rows: int = N) -> Part:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, D, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_rows, 1), generator=generator)
    return Part(Batch(hidden, labels, torch.ones(num_rows, 1), torch.ones(num_rows)), None)


def spec_of(num_shards: int, name: str = "t") -> TableSpec:
    cut = Placement("mod", NUM_CLASSES, num_shards)
    return TableSpec(name, NUM_CLASSES, D, "float32", True, cut, Initializer("normal", 0.7, 3), OptimizerSpec("sgd"))


# Scores


def merged_by(group: Any, num_shards: int, part: Part) -> tuple[Merged, list[Score]]:
    group.create(spec_of(num_shards), 8).result(PATIENCE_S)
    group.fill("t", 0, 1).result(PATIENCE_S)
    scores = group.score("t", group.stage(part), True, False).result(PATIENCE_S)
    return merge(scores), scores


def bits(merged: Merged) -> list[torch.Tensor]:
    assert isinstance(merged.statistics, Partial)
    found = [merged.statistics.lse, merged.statistics.mean_row, merged.target.target_logit, merged.target.target_row]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize(
    ("num_workers", "behind", "num_shards", "runs"),
    [
        (2, [range(2)], 2, [range(2)]),
        (4, [range(2), range(2, 4)], 4, [range(2), range(2, 4)]),
        (4, [range(2), range(2, 4)], 9, [range(4), range(4, 8), range(8, 9)]),
        (3, [range(1, 3)], 3, [range(1), range(1, 2), range(2, 3)]),  # unaligned scores return unmerged
        (3, [range(1, 3)], 7, [range(1), range(1, 2), range(2, 4), range(4, 7)]),
        (5, NODES, 5, [range(1), range(1, 2), range(2, 3), range(3, 4), range(4, 5)]),
        (5, NODES, 3, [range(1), range(1, 2), range(2, 3)]),  # fewer shards than workers
    ],
)
def test_scores_through_relays_are_the_bits_of_direct_ones(
    make_group: Callable[..., RelayedGroup], num_workers: int, behind: list[range], num_shards: int, runs: list[range]
) -> None:
    """Each relay merges only its aligned runs of shards, and the total equals that of all workers on one node."""
    local, part = LocalGroup(num_workers), part_of()
    try:
        expected, _ = merged_by(local, num_shards, part)
    finally:
        local.close()
    found, scores = merged_by(make_group(num_workers, behind), num_shards, part)
    assert [score.shards for score in scores] == runs
    assert all(torch.equal(one, other) for one, other in zip(bits(found), bits(expected), strict=True))


def test_scores_of_two_versions_go_back_apart(make_group: Callable[..., RelayedGroup]) -> None:
    """The front end sees that the versions differ, as over direct links."""
    group, part = make_group(2, [range(2)]), part_of()
    found, scores = merged_by(group, 2, part)
    order = Order(1, StepKey("s", 1, b""), 0.1, 0, (Upstream(found.statistics.lse, torch.ones(N)),))
    group.start(1, "apply", "t", order, group.stage(part)).result(PATIENCE_S)
    scores = group.score("t", group.stage(part), True, False).result(PATIENCE_S)
    assert [score.version for score in scores] == [0, 1]


# What crosses the network


def test_parts_and_calls_cross_the_network_once_a_relay(
    frames_to_relays: list[Frame], group: RelayedGroup, noting: list[Noting]
) -> None:
    """A part is sent with the first call that needs it, and a call in one frame for all workers of a relay."""
    part = part_of(100)
    kept = group.stage(part)
    answers(group, range(5), "score", kept)
    answers(group, range(5), "apply", kept)
    kinds = [frame.kind for frame in frames_to_relays]
    assert (kinds.count(KEEP), kinds.count(CALL), kinds.count(ROUTE)) == (2, 4, 4)
    hidden_bytes = part.batch.hidden.nbytes
    assert sum(frame.body.nbytes for frame in frames_to_relays) < 2 * hidden_bytes * 1.2
    for worker in noting:
        first, second = (args[0] for _, args in worker.calls)
        assert first is second
        assert torch.equal(first.batch.hidden, part.batch.hidden)


def test_an_echo_crosses_once_a_relay_and_comes_from_every_worker(
    frames_to_relays: list[Frame], group: RelayedGroup
) -> None:
    """An echo takes the same route as every other call, so that it measures that route."""
    tensor = torch.arange(5000.0)
    echoed = group.echo(tensor).result(PATIENCE_S)
    assert len(echoed) == 5
    assert all(torch.equal(came, tensor) for (came,) in echoed)
    assert [frame.kind for frame in frames_to_relays].count(CALL) == 2


def test_a_part_goes_when_nobody_needs_it(group: RelayedGroup, noting: list[Noting]) -> None:
    """The relay and its workers free an unused part without another call."""
    kept: Any = group.stage(part_of())
    answers(group, range(5), "score", kept)
    theirs = [weakref.ref(worker.calls.pop()[1][0]) for worker in noting]
    assert all(part() is not None for part in theirs)
    kept = None
    eventually(lambda: all(part() is None for part in theirs), "the workers' parts go")


def test_what_a_call_brought_goes_without_the_garbage_collector(
    group: RelayedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of an answered, failed or abandoned call, often megabytes, is freed at once.

    The list of freed parts that a link has yet to report does not grow either.
    """
    held: list[weakref.ref[Any]] = []
    make = relay.Gathering

    def noted(*args: Any) -> relay.Gathering:
        made = make(*args)
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(relay, "Gathering", noted)
    gc.disable()
    try:
        answers(group, range(5), "score", group.stage(part_of()))
        for pending in group.start_on(range(1, 5), "missing"):
            with pytest.raises(ShardMissing):
                pending.result(PATIENCE_S)
        group.workers[1].stop()
        (early,) = group.start_on(range(1, 3), "early")
        eventually(lambda: len(held) == 5, "the relay has passed it on")
        early.abandon()
        eventually(lambda: all(gathering() is None for gathering in held), "all of it goes")
    finally:
        gc.enable()
    assert not any(link._freed for link in group.links.links[1:])


def test_each_worker_gets_its_calls_in_the_order_they_were_started(group: RelayedGroup, noting: list[Noting]) -> None:
    """Calls of one worker, of some and of all, large and small, are started without waiting in between."""
    asked = [range(5), range(1, 2), range(2, 4), range(5), range(3, 5), range(1)] * 10
    pending = [p for n, workers in enumerate(asked) for p in group.start_on(workers, "note", n, torch.ones(n * 50))]
    for answer in pending:
        answer.result(PATIENCE_S)
    for worker in noting:
        expected = [n for n, workers in enumerate(asked) if worker.index in workers]
        assert [args[0] for _, args in worker.calls] == expected


# Failures


@pytest.mark.parametrize(
    ("method", "error"), [("missing", ShardMissing), ("full", OutOfMemory), ("strange", WorkerFailed)]
)
def test_errors_of_a_worker_keep_their_kind(group: RelayedGroup, method: str, error: type[Exception]) -> None:
    """The caller gets the worker's error, and the next call is answered."""
    with pytest.raises(error):
        group.start(2, method).result(PATIENCE_S)
    assert answers(group, range(1, 3), "echo", 1) == {1: (1,), 2: (1,)}


def test_a_failure_is_told_before_the_other_workers_are_done(group: RelayedGroup, noting: list[Noting]) -> None:
    """The caller gets the error while another worker is still busy, as over direct links."""
    group.start(1, "wait")
    assert noting[1].entered.wait(PATIENCE_S)
    (pending,) = group.start_on(range(1, 3), "missing")
    with pytest.raises(ShardMissing, match="says 2"):
        pending.result(PATIENCE_S)
    assert noting[1].methods() == ["wait"]


def test_a_worker_that_dies_behind_a_relay_is_lost_and_the_next_one_is_asked(
    group: RelayedGroup, noting: list[Noting]
) -> None:
    """The other worker continues; new calls wait for the lost one, and a part that it lacks is sent again."""
    part = part_of()
    kept = group.stage(part)
    answers(group, range(5), "score", kept)
    (running,) = group.start_on(range(1, 3), "wait")
    assert noting[1].entered.wait(PATIENCE_S)
    noting[2].gate.set()
    group.workers[1].cut()
    with pytest.raises(WorkerLost):
        running.result(PATIENCE_S)
    noting[1].gate.set()
    group.workers[1].stop()
    assert answers(group, range(2, 3), "echo", 1) == {2: (1,)}
    (early,) = group.start_on(range(1, 3), "score", kept)
    with pytest.raises(TimeoutError):
        early.result(0.05)
    back = Noting(1)
    group.workers[1] = group.linked_worker(1, back.call)
    assert sorted(early.result(PATIENCE_S)) == [1, 2]
    assert torch.equal(back.calls[0][1][0].batch.hidden, part.batch.hidden)


def test_a_relay_that_dies_costs_the_calls_under_way_alone(make_group: Callable[..., RelayedGroup]) -> None:
    """The relay's workers keep their rows and connect to the next relay by themselves."""
    group, part = make_group(4, [range(2), range(2, 4)]), part_of()
    kept = group.stage(part)
    before, _ = merged_by(group, 4, part)
    group.kill_relay(1)
    eventually(lambda: not group.links.relays[1].linked.is_set(), "the front end sees that the relay has gone")
    early = group.score("t", kept, True, False)
    with pytest.raises(TimeoutError):
        early.result(0.05)
    group.revive_relay(1)
    after = merge(early.result(PATIENCE_S))
    assert all(torch.equal(one, other) for one, other in zip(bits(before), bits(after), strict=True))
    assert group.applied_versions("t").result(PATIENCE_S) == [0] * 4


def test_a_relay_that_dies_fails_what_is_under_way(group: RelayedGroup, noting: list[Noting]) -> None:
    """Calls in progress raise WorkerLost at once; workers of other nodes are not affected."""
    (running,), (other,) = group.start_on(range(1, 3), "wait"), group.start_on(range(3, 5), "wait")
    assert all(noting[w].entered.wait(PATIENCE_S) for w in range(1, 5))
    group.kill_relay(0)
    with pytest.raises(WorkerLost):
        running.result(PATIENCE_S)
    for worker in noting:
        worker.gate.set()
    assert sorted(other.result(PATIENCE_S)) == [3, 4]
    group.revive_relay(0)
    assert answers(group, range(5), "echo", 1) == dict.fromkeys(range(5), (1,))


def test_a_broken_link_between_relay_and_front_end_is_made_anew(group: RelayedGroup, noting: list[Noting]) -> None:
    """Calls that had not begun are withdrawn, parts are sent again, and the workers notice nothing."""
    kept = group.stage(part_of())
    answers(group, range(1, 3), "score", kept)
    (running,) = group.start_on(range(1, 3), "wait")
    assert all(noting[w].entered.wait(PATIENCE_S) for w in (1, 2))
    (waiting,) = group.start_on(range(1, 3), "never")
    eventually(lambda: len(group.relays[0].links[2]._under_way) == 2, "the relay has passed it on")
    group.relay_links[0].cut()
    for pending in (running, waiting):
        with pytest.raises(WorkerLost):
            pending.result(PATIENCE_S)
    (again,) = group.start_on(range(1, 3), "score", kept)
    for worker in (1, 2):
        group.wait_cancelled(worker)
    for worker in noting:
        worker.gate.set()
    assert sorted(again.result(PATIENCE_S)) == [1, 2]
    assert [noting[w].methods() for w in (1, 2)] == [["score", "wait", "score"]] * 2


def test_an_abandoned_call_that_has_not_begun_is_passed_over(group: RelayedGroup, noting: list[Noting]) -> None:
    """The relay forwards the cancellation; a running call continues and is answered."""
    (running,) = group.start_on(range(1, 3), "wait")
    assert all(noting[w].entered.wait(PATIENCE_S) for w in (1, 2))
    (given_up,), (wanted,) = group.start_on(range(1, 3), "given up"), group.start_on(range(1, 3), "wanted")
    given_up.abandon()
    behind = group.start_on(range(1, 3), "behind")
    for worker in (1, 2):
        group.wait_cancelled(worker)
    noting[1].gate.set()
    noting[2].gate.set()
    for pending in (running, wanted, *behind):
        assert sorted(pending.result(PATIENCE_S)) == [1, 2]
    assert [noting[w].methods() for w in (1, 2)] == [["wait", "wanted", "behind"]] * 2


def test_a_relay_waits_until_the_one_before_has_left_its_name() -> None:
    """A dying process may still hold the name when Ray starts the next relay."""
    post = relay.Post("node", range(2), relay.invitation())
    before, taken = relay.take(post), []
    taking = threading.Thread(target=lambda: taken.append(relay.take(post)))
    taking.start()
    taking.join(0.05)
    assert not taken
    before.close()
    taking.join(PATIENCE_S)
    taken[0].close()


# Workers that Ray starts on another node than their relay


def test_a_worker_that_comes_by_itself_is_asked_directly(group: RelayedGroup, noting: list[Noting]) -> None:
    """A call that waited for it behind the relay is lost at once; its neighbour is still called through the relay."""
    group.workers[1].stop()
    (early,) = group.start_on(range(1, 3), "early")
    with pytest.raises(TimeoutError):
        early.result(0.05)
    elsewhere = Noting(1)
    group.workers[1] = group.linked_worker(1, elsewhere.call, elsewhere=True)
    with pytest.raises(WorkerLost):
        early.result(PATIENCE_S)
    assert answers(group, range(5), "echo", 1) == dict.fromkeys(range(5), (1,))
    assert elsewhere.methods() == ["echo"]
    group.workers[1].stop()
    eventually(lambda: not group.links.links[1].linked.is_set(), "the front end sees that it has gone")
    back = Noting(1)
    group.workers[1] = group.linked_worker(1, back.call)
    assert answers(group, range(5), "echo", 2) == dict.fromkeys(range(5), (2,))
    assert back.methods() == ["echo"]


# Placement of workers and relays


@pytest.mark.parametrize(
    ("resources", "num_cpus", "num_gpus", "expected"),
    [
        ({"CPU": 3.0}, 1, 0, 3),
        ({}, 1, 0, 0),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1.0, 2),
        ({"CPU": 3.0, "GPU": 2.0}, 1, 1 / 3, 3),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 2 / 3, 2),  # a third worker would need parts of both GPUs
        ({"CPU": 8.0}, 1, 1.0, 0),
    ],
)
def test_a_node_has_room_for_as_many_workers_as_its_cpus_and_gpus(
    resources: dict[str, float], num_cpus: float, num_gpus: float, expected: int
) -> None:
    """If a worker needs both, the scarcer resource decides."""
    assert relay.room(resources, num_cpus, num_gpus) == expected


@pytest.mark.parametrize(
    ("num_workers", "rooms", "seated", "behind"),
    [
        (4, {"front": 0, "b": 2, "c": 2}, "bbcc", [range(2), range(2, 4)]),
        (4, {"front": 1, "b": 2, "c": 2}, ["front", "b", "b", "c"], [range(1, 3)]),  # a single worker needs no relay
        (3, {"front": 8, "b": 8}, ["front"] * 3, []),
        (5, {"front": 1, "b": 2}, ["front", "b", "b", None, None], [range(1, 3)]),  # more than fit
        (2, {}, [None, None], []),
    ],
)
def test_neighbours_share_a_node_and_those_of_another_node_a_relay(
    num_workers: int, rooms: dict[str, int], seated: Any, behind: list[range]
) -> None:
    """The front end's own node is filled first, then the others in the given order."""
    found = relay.seats(num_workers, rooms)
    assert found == list(seated)
    posts = relay.posts(found, "front")
    assert [post.workers for post in posts] == behind
    assert len({post.invitation.address for post in posts} | {post.invitation.key for post in posts}) == 2 * len(posts)


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "share"),
    [(2, 0, 0.0), (2, 4, 1.0), (4, 4, 1.0), (3, 2, 0.5), (4, 3, 0.5), (6, 1, 1 / 6)],
)
def test_shares_of_a_gpu_find_a_place(num_workers: int, num_gpus: int, share: float) -> None:
    """All requested workers fit, and none of them needs parts of two GPUs."""
    assert relay.share_of_gpu(num_workers, num_gpus) == share
    if num_gpus:
        assert relay.room({"CPU": 64.0, "GPU": float(num_gpus)}, 1, share) >= num_workers


# Calls and drops that no caller waits for


def test_a_call_that_failed_is_taken_back_from_a_worker_that_is_away(group: RelayedGroup, noting: list[Noting]) -> None:
    """Nothing of the call is kept, and the worker does not run it after it reconnects."""
    group.workers[1].stop()
    eventually(lambda: not group.relays[0].links[1].linked.is_set(), "the relay sees it")
    for _ in range(3):
        (pending,) = group.start_on(range(1, 3), "missing")
        with pytest.raises(ShardMissing):
            pending.result(PATIENCE_S)
        pending.abandon()
    eventually(lambda: not group.relays[0].links[1]._early, "the relay lets go of it")
    back = Noting(1)
    group.workers[1] = group.linked_worker(1, back.call)
    assert answers(group, range(1, 3), "echo", 2) == {1: (2,), 2: (2,)}
    assert back.methods() == ["echo"]


def test_a_table_is_freed_wherever_its_drop_was_lost(group: RelayedGroup, noting: list[Noting]) -> None:
    """If a worker outlives the link over which the drop was sent, the drop is sent again."""
    catalog = Catalog(group, Limits())
    catalog.create(spec_of(5), Deadline.after(PATIENCE_S))
    group.start_on([2], "wait")
    assert noting[2].entered.wait(PATIENCE_S)
    catalog.delete("t")
    group.kill_relay(0)
    noting[2].gate.set()
    group.revive_relay(0)

    def is_freed() -> bool:
        catalog.settle(Deadline.after(PATIENCE_S))
        return "drop" in noting[2].methods() and not catalog._retired

    eventually(is_freed, "every worker has freed it")


def test_a_worker_that_finds_no_relay_comes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no relay answers within PATIENCE_S, the worker connects to the front end as soon as that listens."""
    monkeypatch.setattr(linked_worker, "PATIENCE_S", 0.05)
    links, worker = Links(1), Noting(0)
    nobody = relay.invitation()
    linked_worker.start(worker.call, [nobody, links.invitation], 0, 1)
    try:
        assert links.wait(PATIENCE_S)
        assert links.call([0], "echo", 3)[0].result(PATIENCE_S) == {0: (3,)}
    finally:
        links.close()


def test_links_reach_a_node_by_ipv6() -> None:
    """Links work if Ray knows its nodes by IPv6 addresses."""
    try:
        links = Links(1, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    worker = Noting(0)
    linked_worker.start(worker.call, [links.invitation], 0, 1)
    try:
        assert links.wait(PATIENCE_S)
    finally:
        links.close()
