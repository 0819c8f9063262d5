"""The metrics that a server exports."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import shardloss
from prometheus_client.parser import text_string_to_metric_families
from shardloss_server import metrics
from shardloss_server.cluster.group import WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import CannotServe, Limits, ServerConfig, Watching
from shardloss_server.rpc.serve import Server

N, D, V = 7, 5, 11
OF_THE_LIBRARY = ("python_", "process_")
Values = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def until(holds: Callable[[], bool]) -> None:
    """Wait for work that the server does in addition to its calls."""
    deadline = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Watched:
    """A server with metrics over two worker threads, and a client."""

    def __init__(self, limits: Limits) -> None:
        self.group = LocalGroup(2)
        self.server = Server(self.group, ServerConfig(limits=limits, watching=Watching(metrics_port=0)))
        self.server.start()
        self.client = shardloss.connect(self.server.address, timeout_s=20.0)

    def scrape(self) -> str:
        """Return the text that Prometheus would get."""
        assert self.server.exposition is not None
        with urllib.request.urlopen(f"http://{self.server.exposition.address}/metrics", timeout=60) as reply:
            return str(reply.read().decode())

    def values(self) -> Values:
        """Return every sample by name and labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.scrape())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Return one sample, or 0 if there is none."""
        return self.values().get((f"shardloss_{name}", tuple(sorted(labels.items()))), 0.0)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    made = Watched(Limits(max_sessions=2, max_open_tickets=3))
    yield made
    made.client.close()
    made.server.stop(grace_s=1.0)
    made.group.close()


@pytest.fixture
def table(watched: Watched, fresh_name: Callable[[], str]) -> Iterator[shardloss.Table]:
    made = watched.client.create_table(fresh_name(), num_classes=V, dim=D)
    yield made
    watched.client.delete_table(made.name)


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((N, D), np.float32), np.arange(N)


def test_every_metric_is_exported_once_with_its_meaning(watched: Watched) -> None:
    """The registry has exactly the metrics that metrics.py defines and those of the library about the process."""
    families = {family.name: family for family in watched.server.metrics.registry.collect()}
    own = {name: family for name, family in families.items() if not name.startswith(OF_THE_LIBRARY)}
    assert set(own) == {metric.family for metric in metrics.ALL}
    for metric in metrics.ALL:
        assert own[metric.family].documentation == metric.meaning
        assert own[metric.family].type == metric.kind
    assert {"process_resident_memory_bytes", "python_info", "python_gc_collections"} <= set(families)


def test_every_reading_has_the_labels_of_its_metric(watched: Watched, table: shardloss.Table) -> None:
    table.session().compute_loss(*batch(), shardloss.FullSoftmax())
    until(lambda: watched.value("worker_up", worker="1") == 1)
    by_family = {metric.family: metric for metric in metrics.ALL}
    for family in watched.server.metrics.registry.collect():
        for sample in family.samples:
            if family.name in by_family:
                assert set(sample.labels) - {"le"} == set(by_family[family.name].labels), sample


def test_a_step_is_counted_wherever_it_leaves_a_trace(watched: Watched, table: shardloss.Table) -> None:
    """Calls, bytes, rows, phases, tickets and versions are all counted."""
    before = watched.values()
    session = table.session()
    loss = session.compute_loss(*batch(), shardloss.FullSoftmax())
    session.commit([(loss, None)], learning_rate=0.1)
    after = watched.values()

    def grew(name: str, **labels: str) -> float:
        key = f"shardloss_{name}", tuple(sorted(labels.items()))
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert grew("calls_total", method="ComputeLoss", reason="OK") == 1
    assert grew("calls_total", method="Commit", reason="OK") == 1
    assert grew("call_duration_seconds_count", method="Commit") == 1
    assert grew("received_bytes_total", method="ComputeLoss") > 4 * N * D
    assert grew("sent_bytes_total", method="ComputeLoss") > 4 * N * D
    assert grew("loss_rows_total") == N
    assert grew("flops_total", method="ComputeLoss") == 2 * 2 * N * V * D
    assert grew("flops_total", method="Commit") == 2 * N * V * D
    phases = [grew("loss_phase_seconds_sum", phase=phase) for phase in ("wait", "plan", "fanout", "finish")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) <= grew("call_duration_seconds_sum", method="ComputeLoss")
    assert 0 < grew("kernel_seconds_sum", method="ComputeLoss") <= phases[2]
    assert grew("tickets_total", table=table.name, outcome="opened") == 1
    assert grew("tickets_total", table=table.name, outcome="committed") == 1
    assert grew("commit_staleness_versions_count") == 1
    name = table.name
    assert after["shardloss_table_version", (("table", name),)] == 1
    assert after["shardloss_table_commits_total", (("table", name),)] == 1
    assert after["shardloss_sessions", (("table", name),)] == 1


def test_every_ticket_ends_in_one_way_or_is_open(watched: Watched, table: shardloss.Table) -> None:
    """opened = committed + aborted + expired + open is true at any moment."""
    session = table.session()
    session.compute_loss(*batch(), shardloss.FullSoftmax())
    session.abort()
    session.commit([(session.compute_loss(*batch(), shardloss.FullSoftmax()), None)], learning_rate=0.1)
    session.compute_loss(*batch(), shardloss.FullSoftmax())
    found = watched.values()
    of = {
        outcome: found["shardloss_tickets_total", (("outcome", outcome), ("table", table.name))]
        for outcome in ("opened", "committed", "aborted", "expired")
    }
    num_open = found["shardloss_open_tickets", (("table", table.name),)]
    assert of == {"opened": 3, "committed": 1, "aborted": 1, "expired": 0}
    assert of["opened"] == of["committed"] + of["aborted"] + of["expired"] + num_open


def test_a_refusal_is_counted_by_its_limit_and_a_failure_by_its_reason(
    watched: Watched, table: shardloss.Table
) -> None:
    """With max_sessions = 2, a third session with a ticket is counted as a refusal of that limit."""
    refused = watched.value("refusals_total", limit="max_sessions")
    sessions = [table.session() for _ in range(3)]
    for session in sessions[:2]:
        session.compute_loss(*batch(), shardloss.FullSoftmax())
    with shardloss.connect(watched.server.address, timeout_s=0.3) as impatient:
        session = impatient.table(table.name).session()
        with pytest.raises(shardloss.errors.Overloaded) as caught:
            session.compute_loss(*batch(), shardloss.FullSoftmax())
    assert caught.value.details["limit"] == "max_sessions"
    assert watched.value("refusals_total", limit="max_sessions") > refused
    with pytest.raises(shardloss.errors.InvalidArgument):
        table.compute_loss(np.ones((1, D + 1), np.float32), np.zeros(1, np.int64), shardloss.FullSoftmax())
    assert watched.value("calls_total", method="ComputeLoss", reason="INVALID_ARGUMENT") == 1


def test_a_message_that_grpc_refuses_is_counted_like_one_that_did_not_arrive(watched: Watched) -> None:
    """Each call is counted once, whether gRPC ends it before or after its handler asks for the message."""
    import grpc

    def ended() -> float:
        reasons = ("CANCELLED", "INVALID_ARGUMENT")
        return sum(watched.value("calls_total", method="Commit", reason=reason) for reason in reasons)

    before, too_large = ended(), bytes(Limits().max_message_bytes + 2**20)
    with grpc.insecure_channel(watched.server.address) as channel:
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/shardloss.v1.LossService/Commit")(too_large, timeout=60)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: ended() == before + 20)


def test_a_replay_is_counted(watched: Watched, table: shardloss.Table) -> None:
    session = table.session()
    loss = session.compute_loss(*batch(), shardloss.FullSoftmax())
    send = session._begin_commit([(loss.ticket, np.ones(N, np.float32))], learning_rate=0.1, grad_scale=1.0)
    send()
    before = watched.value("replays_total", method="Commit")
    assert send().replayed
    assert watched.value("replays_total", method="Commit") == before + 1


def test_a_deleted_table_leaves_no_series(watched: Watched, fresh_name: Callable[[], str]) -> None:
    """However many tables are created and deleted, max_tables limits the number of labels."""
    name = fresh_name()
    watched.client.create_table(name, num_classes=V, dim=D)
    assert f'table="{name}"' in watched.scrape()
    watched.client.delete_table(name)
    assert f'table="{name}"' not in watched.scrape()


def test_a_scrape_does_not_wait_for_a_worker_that_does_not_answer(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape returns the values read before."""
    watch = watched.server.exposition._workers
    watch.ask()
    real = watched.group.start

    def start(worker: int, method: str, *args: object) -> object:
        return Lost() if (worker, method) == (1, "stats") else real(worker, method, *args)

    monkeypatch.setattr(watched.group, "start", start)
    watch.ask()
    assert (watched.value("worker_up", worker="0"), watched.value("worker_up", worker="1")) == (1, 0)
    assert watched.value("worker_resident_bytes", worker="0") > 1e6
    assert ("shardloss_worker_resident_bytes", (("worker", "1"),)) not in watched.values()


class Lost:
    """The pending answer of a worker that died."""

    computed_s: Mapping[int, float] = {}

    def result(self, timeout_s: float) -> object:
        raise WorkerLost("gone")

    def abandon(self) -> None:
        """Do nothing, because no call is in progress."""


def test_a_worker_that_is_another_process_was_restarted(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched.server.exposition._workers
    monkeypatch.setattr("shardloss_server.cluster.stats.os.getpid", lambda: -1)
    before = watched.value("worker_restarts_total", worker="0")
    watch.ask()
    assert watched.value("worker_restarts_total", worker="0") == before + 1


def test_a_taken_metrics_port_is_told_at_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotServe, match=f"port {port}"):
            Server(LocalGroup(1), ServerConfig(watching=Watching(metrics_port=port)))


def test_the_port_is_free_after_the_server() -> None:
    made = Watched(Limits())
    address = made.server.exposition.address
    made.client.close()
    made.server.stop(grace_s=1.0)
    made.group.close()
    host, port = address.rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=60)


def test_two_servers_count_apart(watched: Watched) -> None:
    """Each server has its own registry."""
    other = Watched(Limits())
    other.client.list_tables()
    assert other.value("calls_total", method="ListTables", reason="OK") == 1
    assert other.value("calls_total", method="ComputeLoss", reason="OK") == 0
    other.client.close()
    other.server.stop(grace_s=1.0)
    other.group.close()


def test_a_method_that_there_is_not_makes_no_series(watched: Watched) -> None:
    """Callers can invent method names, but labels only have those of the contract."""
    import grpc

    with grpc.insecure_channel(watched.server.address) as channel:
        for number in range(3):
            call = channel.unary_unary(f"/shardloss.v1.LossService/Made{number}Up")
            with pytest.raises(grpc.RpcError):
                call(b"", timeout=60)
    assert "Made" not in watched.scrape()
