"""The behaviour of an overloaded server, measured on this machine and printed as a table: `make test-load`.

The figures are from one run on a shared machine; only the mechanism is asserted, as in tests/hostile/test_overload.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import grpc
import numpy as np
import pytest
import shardloss
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shardloss.errors import Overloaded
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, Listening, ServerConfig
from shardloss_server.rpc.serve import Server

from benchmarks.procfs import memory_of
from benchmarks.server import running
from tests.hostile.http2 import Connection

from .trainers import DIM, NUM_CLASSES

pytestmark = [pytest.mark.load, pytest.mark.timeout(900)]
ROUNDS, PHASE_S, LIGHT_PAUSE_S = 3, 8.0, 0.05
PEAK_TRAINERS, MANY_TRAINERS = (1, 2, 4), 40  # ten times as many as reach the peak
PATIENCE_S = 60.0
MIB = 2**20


def trainers(address: str, seconds: float, pause_s: float, tables: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.load.trainers", address, str(seconds), str(pause_s), *tables]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def steps_of(process: subprocess.Popen[str]) -> list[float]:
    """Return the duration of each step in seconds."""
    out, _ = process.communicate(timeout=PATIENCE_S + PHASE_S)
    return [seconds for _, seconds in json.loads(out)]


def p99_ms(steps: list[float]) -> float:
    return float(np.percentile(np.array(steps) * 1e3, 99))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a service with two workers and a table for every trainer."""
    with running(workers=2) as service, shardloss.connect(service.address, timeout_s=PATIENCE_S) as client:
        for name in ["light", *(f"t{number}" for number in range(MANY_TRAINERS))]:
            client.create_table(name, num_classes=NUM_CLASSES, dim=DIM, optimizer=shardloss.Sgd())
        steps_of(trainers(service.address, 2.0, 0.0, ["light", "t0"]))
        yield service.address


def test_goodput_and_a_light_trainer_under_overload(address: str) -> None:
    """With ten times the trainers of the peak, one table each, steps still complete and no ticket stays open.

    The p99 of a light trainer is measured alone and next to them.
    """
    many = [f"t{number}" for number in range(MANY_TRAINERS)]
    peak: dict[int, list[float]] = {count: [] for count in PEAK_TRAINERS}
    overload, alone, beside = [], [], []
    for _ in range(ROUNDS):
        alone.append(p99_ms(steps_of(trainers(address, PHASE_S, LIGHT_PAUSE_S, ["light"]))))
        for count in PEAK_TRAINERS:
            peak[count].append(len(steps_of(trainers(address, PHASE_S, 0.0, many[:count]))) / PHASE_S)
        heavy = trainers(address, PHASE_S + 4.0, 0.0, many)
        time.sleep(3.0)
        beside.append(p99_ms(steps_of(trainers(address, PHASE_S, LIGHT_PAUSE_S, ["light"]))))
        overload.append(len(steps_of(heavy)) / (PHASE_S + 4.0))
    best = max(median(rates) for rates in peak.values())
    print(f"\n| peak goodput, steps/s | {best:.1f} |")
    print(f"| goodput of {MANY_TRAINERS} trainers, steps/s | {median(overload):.1f} ({median(overload) / best:.2f}) |")
    print(f"| light trainer's p99 alone, ms | {median(alone):.1f} |")
    print(f"| light trainer's p99 beside them, ms | {median(beside):.1f} ({median(beside) / median(alone):.2f}) |")
    assert min(overload) > 0
    with shardloss.connect(address) as client:
        assert all(table.num_open_tickets == 0 for table in client.list_tables())


@pytest.fixture
def server() -> Iterator[Server]:
    """An in-process server whose gauges can be read; tickets and sessions expire after seconds."""
    limits = Limits(max_message_s=2.0, ticket_ttl_s=2.0, session_ttl_s=3.0, max_open_tickets=20_000)
    group = LocalGroup(1)
    server = Server(group, ServerConfig(Listening(port=0, admin_port=0), limits))
    server.start()
    yield server
    server.stop(grace_s=1.0)
    group.close()


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        pause.wait(0.05)


def assert_idle(server: Server) -> None:
    handlers = server.handlers
    gauges: dict[str, Callable[[], float]] = {
        "calls": lambda: server.gate.num_inside + handlers.admission.num_calls + handlers.commits.num_calls,
        "bytes": lambda: handlers.admission.num_bytes + handlers.stream_bytes.num_bytes + handlers.unsent.num_bytes,
        "streams": lambda: handlers.streams.num_streams + server.gate.arriving.num_streams,
        "tickets": lambda: server.catalog.budget.num_tickets + server.catalog.budget.num_bytes,
        "sessions": lambda: server.catalog.num_sessions,
    }
    for name, gauge in gauges.items():
        eventually(lambda gauge=gauge: gauge() == 0, f"{name} = 0")  # type: ignore[misc]


def health_ms(server: Server) -> float:
    with grpc.insecure_channel(server.admin_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        began = time.monotonic()
        reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        return 1e3 * (time.monotonic() - began)


def test_slow_loris(server: Server) -> None:
    """Other calls are answered while 50 connections hold 20 calls each that never send their message."""
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client, ExitStack() as stack:
        client.create_table("t", num_classes=11, dim=5)
        for _ in range(50):
            silent = stack.enter_context(Connection(server.address))
            for _ in range(20):
                silent.call("/shardloss.v1.LossService/ComputeLoss", b"\0\0\0\1\0abc")
        began = time.monotonic()
        assert client.table("t").read_rows(np.arange(3)).version == 0
        answer_ms, refused = 1e3 * (time.monotonic() - began), server.gate.arriving.num_refused
        print(f"\n| slow-loris: 1,000 calls; another's answer, ms | {answer_ms:.0f}; health {health_ms(server):.1f} |")
        eventually(lambda: server.gate.num_inside == 0, "the end of the silent calls")
        print(f"| slow-loris: refused, dropped | {refused}, {server.gate.arriving.num_dropped} |")
    assert_idle(server)


def test_idle_connections(server: Server) -> None:
    """The server stays healthy over three rounds of 1,000 idle connections; the printed memory shows any leak."""
    sizes = [memory_of(os.getpid())]
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(Connection(server.address))
            eventually(lambda: health_ms(server) < 1e3 * PATIENCE_S, "health")
        sizes.append(memory_of(os.getpid()))
    print(f"\n| resident MiB: before, after 1,000, 2,000, 3,000 connections | {[size // MIB for size in sizes]} |")
    assert_idle(server)


def test_abandoned_sessions_and_tickets(server: Server) -> None:
    """10,000 abandoned sessions and tickets expire, twice; the printed memory shows if the second round needs more."""
    hidden, labels = np.ones((2, 5), np.float32), np.zeros(2, int)
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client:
        table = client.create_table("t", num_classes=11, dim=5)
        sizes = [memory_of(os.getpid())]
        for _ in range(2):
            for _ in range(10_000):
                table.session().compute_loss(hidden, labels, shardloss.FullSoftmax())
            assert_idle(server)
            sizes.append(memory_of(os.getpid()))
    print(f"\n| resident MiB: before, after 10,000, 20,000 sessions | {[size // MIB for size in sizes]} |")


def test_refusals(server: Server) -> None:
    """In a burst of calls beyond the available places, every refusal carries a retry hint."""
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client:
        table = client.create_table("t", num_classes=200_000, dim=64)
        request = shardloss.messages.loss_request(
            table.name, np.ones((64, 64), np.float32), np.zeros(64, int), shardloss.FullSoftmax()
        )
        calls = [client.send_loss.future(request, timeout=PATIENCE_S) for _ in range(500)]
        refused = [shardloss.channel.error_of(call) for call in calls if call.exception() is not None]
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in refused)
    hints = sorted(error.retry_after_s for error in refused)
    print(f"\n| 500 calls at once: refused; hints from, to, s | {len(refused)}; {hints[0]:.2f}, {hints[-1]:.2f} |")
    assert_idle(server)
