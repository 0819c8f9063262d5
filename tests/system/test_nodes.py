"""Workers on several nodes, reached through relays: a step equals the step of a single node."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import shardloss
from test_worker_death import repeat_for

from benchmarks.netns import Cluster, Node, check_available, cluster, make_namespace
from benchmarks.procfs import command_of, descendants_of
from benchmarks.scenarios.nodes import K, serving_on
from benchmarks.side import SideFailed

CPUS_OF_NODES = (0, 2, 2)  # the head node runs the front end only, each other node runs two of the four workers
N, D, NUM_CLASSES = 501, 130, 907
HIDDEN_BYTES = 4 * N * D
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A service that spans the nodes of a cluster, and a client of it."""

    nodes: Cluster
    client: shardloss.LossClient

    def actors(self, name: bytes) -> list[list[int]]:
        """Return the pids of the actors of this name on each node."""
        return [actors_on(node, name) for node in self.nodes.nodes]

    def carried(self) -> tuple[int, int]:
        """Return the bytes sent to the nodes that hold shards, and the bytes received from them."""
        counted = [node.carried_bytes() for node in self.nodes.nodes[1:]]
        return sum(to for to, _ in counted), sum(back for _, back in counted)


def actors_on(node: Node, name: bytes) -> list[int]:
    return [pid for pid in descendants_of(node.init_pid) if command_of(pid).startswith(b"ray::" + name)]


@pytest.fixture(scope="module")
def spread() -> Iterator[Spread]:
    """A service on three nodes; tests are skipped if network namespaces cannot be created."""
    try:
        check_available()
        with ExitStack() as stack:
            make_namespace(stack, f"sl{os.getpid()}try")
    except SideFailed as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="sl-") as directory:  # a socket's path must be short
        path = f"{directory}/data"
        with (
            cluster(CPUS_OF_NODES) as made,
            serving_on(made, "--socket", path),
            shardloss.connect(f"unix:{path}", timeout_s=TIMEOUT_S, attempt_timeout_s=10) as client,
        ):
            yield Spread(made, client)


def batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, NUM_CLASSES, N)


def train(session: shardloss.Session, hidden: np.ndarray, labels: np.ndarray) -> shardloss.types.LossResult:
    return session.train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)


@pytest.mark.slow  # its cluster of namespaces takes half a minute to start
@pytest.mark.ray
def test_a_step_over_nodes_has_the_bits_of_one_node(
    spread: Spread, ray_client: shardloss.LossClient, rng: np.random.Generator
) -> None:
    """Losses, gradients and rows are equal over several steps; each node that holds shards runs one relay."""
    assert [len(pids) for pids in spread.actors(b"RelayActor")] == [0, 1, 1]
    assert [len(pids) for pids in spread.actors(b"WorkerActor")] == [0, 2, 2]
    tables = [
        client.create_table("same", num_classes=NUM_CLASSES, dim=D, num_shards=K)
        for client in (spread.client, ray_client)
    ]
    sessions = [table.session() for table in tables]
    for _ in range(3):
        hidden, labels = batch(rng)
        one, other = (train(session, hidden, labels) for session in sessions)
        for name in ("loss", "lse", "hidden_grad"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    one_rows, other_rows = (table.read_rows(np.arange(NUM_CLASSES)) for table in tables)
    np.testing.assert_array_equal(one_rows.rows, other_rows.rows)


@pytest.mark.slow  # its cluster of namespaces takes half a minute to start
@pytest.mark.ray
def test_a_step_carries_hidden_once_to_each_node(spread: Spread, rng: np.random.Generator) -> None:
    """Each node gets hidden once and returns one merged score, N * D, plus label rows: half of four workers' bytes."""
    session, steps = spread.client.create_table("counted", num_classes=NUM_CLASSES, dim=D).session(), 10
    hidden, labels = batch(rng)
    train(session, hidden, labels)
    to, back = spread.carried()
    for _ in range(steps):
        train(session, hidden, labels)
    to, back = ((late - early) / steps for early, late in zip((to, back), spread.carried(), strict=True))
    assert 2 * HIDDEN_BYTES < to < 3 * HIDDEN_BYTES
    assert 3 * HIDDEN_BYTES < back < 4 * HIDDEN_BYTES


@pytest.mark.slow  # its cluster of namespaces takes half a minute to start
@pytest.mark.ray
def test_a_relay_that_is_killed_costs_no_rows(spread: Spread, rng: np.random.Generator) -> None:
    """Ray restarts the relay, its workers reconnect to it, and the next step continues from the last version."""
    table = spread.client.create_table("relayed", num_classes=NUM_CLASSES, dim=D)
    session = table.session()
    hidden, labels = batch(rng)
    train(session, hidden, labels)
    workers, (victim,) = spread.actors(b"WorkerActor"), spread.actors(b"RelayActor")[1]
    os.kill(victim, signal.SIGKILL)
    result = train(session, hidden, labels)
    assert result.committed is not None
    assert result.committed.version == 2
    assert spread.actors(b"WorkerActor") == workers
    (again,) = spread.actors(b"RelayActor")[1]
    assert again != victim


@pytest.mark.slow  # its cluster of namespaces takes half a minute to start
@pytest.mark.ray
def test_a_worker_that_is_killed_behind_a_relay_loses_its_rows_by_name(
    spread: Spread, rng: np.random.Generator
) -> None:
    """Its tables raise RowsLost; a new table works once Ray has restarted the worker."""
    table = spread.client.create_table("lost", num_classes=NUM_CLASSES, dim=D)
    hidden, labels = batch(rng)
    session = table.session()
    train(session, hidden, labels)
    os.kill(spread.actors(b"WorkerActor")[2][0], signal.SIGKILL)
    with pytest.raises(shardloss.errors.RowsLost):
        repeat_for(TIMEOUT_S, lambda: train(session, hidden, labels))
    spread.client.delete_table("lost")
    again = spread.client.create_table("lost", num_classes=NUM_CLASSES, dim=D)
    assert train(again.session(), hidden, labels).version == 0
    assert [len(pids) for pids in spread.actors(b"WorkerActor")] == [0, 2, 2]
