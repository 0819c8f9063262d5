"""A running server: its data port, its small admin port, and a watch that expires tickets and drops silent streams."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent import futures
from dataclasses import replace

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from shardloss.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    loss_pb2,
    loss_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    table_pb2,
    table_pb2_grpc,
)

from shardloss_server import metrics
from shardloss_server.access.exposure import refuse_exposed
from shardloss_server.cluster.group import ShardGroup
from shardloss_server.config import FRAMING_BYTES, CannotServe, Limits, ServerConfig
from shardloss_server.frontend.admission import LiveStreams
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.metrics import Metrics
from shardloss_server.rpc import gauges, tls
from shardloss_server.rpc.access import Access
from shardloss_server.rpc.admin import AdminServicer
from shardloss_server.rpc.arrival import Gate
from shardloss_server.rpc.call import CallLog
from shardloss_server.rpc.elsewhere import Elsewhere
from shardloss_server.rpc.exposition import Exposition
from shardloss_server.rpc.health import Health
from shardloss_server.rpc.reading import Reading
from shardloss_server.rpc.servicer import (
    EvaluationServicer,
    Handlers,
    LossServicer,
    ServerServicer,
    TableServicer,
)
from shardloss_server.rpc.splicing import Splicing
from shardloss_server.tracing import Tracing

log = logging.getLogger(__name__)
WATCH_INTERVAL_S = 1.0
ADMIN_CALLS = 16  # calls that may arrive at once on the admin port; three times as many may hold a thread
MAX_CALLS_A_CONNECTION = 1024  # further calls wait in the client
STOP_S = 5.0  # seconds for calls that were cut off to end
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (loss_pb2, "LossService"),
        (evaluation_pb2, "EvaluationService"),
        (table_pb2, "TableService"),
        (server_pb2, "ServerService"),
    )
)

DATA_SERVICES = SERVICES[:3]  # ServerService is on both ports
TO_DATA = "this is the server's admin port, which reports its status: losses and tables are on its data port, {}"
TO_ADMIN = "this is the server's data port: its status is on its admin port, {}"


class PortTaken(CannotServe):
    """A port or Unix socket that the server cannot listen on."""


class Server:
    """The front end of a shard group, on two ports; it does not close the group."""

    def __init__(self, group: ShardGroup, config: ServerConfig) -> None:
        self.config = config
        listening = config.listening
        refuse_exposed(listening.host, config.security)
        self.metrics = Metrics()
        self._tracing = Tracing.of(config.watching)
        call_log = CallLog(self.metrics, config.watching, self._tracing)
        self._access = Access(config.security, call_log)
        self._interceptors = self._access, Reading(call_log), Splicing()
        limits = shared_out(listening.num_threads, config.limits)
        self.catalog = Catalog(group, limits)
        streams = LiveStreams(limits.max_streams, limits.stream_idle_s, "max_streams")
        self.handlers = Handlers(self.catalog, limits, streams, call_log)
        self._stopping = threading.Event()
        gauges.read_all(self.metrics, self.handlers, self._stopping.is_set)
        self.health = Health(SERVICES, limits.max_message_s, call_log)
        arriving, arriving_admin = (
            LiveStreams(places, limits.max_message_s, "max_calls_arriving")
            for places in (limits.max_calls_arriving, ADMIN_CALLS)
        )
        self.gate = Gate(places_of(limits), arriving, call_log)
        self.admin_gate = Gate(3 * ADMIN_CALLS, arriving_admin, call_log)
        # With the lowest num_threads, one place of each kind already needs more threads, and refusals need one more.
        to_admin = Elsewhere((ADMIN_SERVICE,), lambda: TO_ADMIN.format(port_of(self.admin_address)), call_log)
        to_data = Elsewhere(DATA_SERVICES, lambda: TO_DATA.format(port_of(self.address)), call_log)
        self._data = self._make_server(max(listening.num_threads, 1 + places_of(limits)), self.gate, to_admin)
        self._admin = self._make_server(4 * ADMIN_CALLS, self.admin_gate, to_data)
        self._register()
        self.address = self._bind(self._data, listening.port)
        if listening.socket:
            self._bind_socket(listening.socket)
        self.admin_address = self._bind(self._admin, listening.admin_port)
        gauges.one(self.metrics, metrics.CALLS_ARRIVING, lambda: self.gate.arriving.num_streams)
        self.metrics.read(metrics.TOKEN_EXPIRY_SECONDS, self._access.expiries)
        self.exposition = Exposition.of(self.metrics, self.catalog, config.watching)
        self._stopped = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def _make_server(self, num_threads: int, gate: Gate, elsewhere: Elsewhere) -> grpc.Server:
        limits = self.config.limits
        limit = limits.max_message_bytes + FRAMING_BYTES
        return grpc.server(
            futures.ThreadPoolExecutor(num_threads, "rpc"),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.max_concurrent_streams", MAX_CALLS_A_CONNECTION),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.http2.max_pings_without_data", 0),  # the default of 2 would stop pings to a silent peer
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", round(1000 * limits.peer_ping_s)),
                ("grpc.keepalive_timeout_ms", round(1000 * limits.peer_answer_s)),
                ("grpc.http2.ping_timeout_ms", round(1000 * limits.peer_answer_s)),  # takes precedence; 60 s by default
                (
                    "grpc.server_handshake_timeout_ms",
                    round(1000 * (limits.peer_ping_s + limits.peer_answer_s)),
                ),  # of TLS
                ("grpc.max_connection_idle_ms", round(1000 * limits.connection_idle_s)),
            ],
            interceptors=[gate, *self._interceptors, elsewhere],
        )

    def _register(self) -> None:
        loss_pb2_grpc.add_LossServiceServicer_to_server(LossServicer(self.handlers), self._data)
        table_pb2_grpc.add_TableServiceServicer_to_server(TableServicer(self.handlers), self._data)
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(EvaluationServicer(self.handlers), self._data)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(self.handlers), self._admin)
        for server in (self._data, self._admin):
            server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(self.handlers), server)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
            own = (ADMIN_SERVICE,) if server is self._admin else ()
            names = (*SERVICES, *own, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)

    def _bind(self, server: grpc.Server, port: int) -> str:
        host, credentials = self.config.listening.host, tls.credentials(self.config.security)
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        try:
            if credentials is None:
                bound = server.add_insecure_port(f"{host}:{port}")
            else:
                bound = server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError:
            raise PortTaken(f"cannot listen on {host} port {port}: is another server using it?") from None
        return f"{host}:{bound}"

    def _bind_socket(self, path: str) -> None:
        """Listen on a Unix socket that only this user may connect to; a socket file without a listener is replaced.

        gRPC itself would replace any socket, and a running server would lose its clients to this one.
        """
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise PortTaken(f"cannot listen on {path}: another server is using it")
        try:
            self._data.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise PortTaken(f"cannot listen on {path}: does its folder exist, and may you write to it?") from None
        os.chmod(path, 0o600)

    def start(self) -> None:
        """Start serving, until `stop` is called."""
        self._data.start()
        self._admin.start()
        self._watcher.start()
        if self.exposition is not None:
            self.exposition.start()
        self.health.serve()
        log.info("serving on %s, admin on %s", self.address, self.admin_address)

    def stop(self, grace_s: float | None = None) -> None:
        """Report NOT_SERVING, let calls in flight finish within grace_s (by default drain_s), and stop. Idempotent."""
        with self._stopped:
            if self._stopping.is_set():
                return
            self._stopping.set()
            self.health.stop()
            self.gate.drain()
            grace = self.config.listening.drain_s if grace_s is None else grace_s
            stopped = self._data.stop(grace)
            stopped.wait(grace)
            self.catalog.close()
            stopped.wait(STOP_S)
            self._admin.stop(0).wait(STOP_S)
            if self.exposition is not None:
                self.exposition.stop()
            if self._tracing is not None:
                self._tracing.close()

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL_S):
            try:
                self._look()
            except Exception:  # a bug in one table must not stop the expiry of tickets and silent calls
                log.exception("the watch failed and will try again")

    def _look(self) -> None:
        now = time.monotonic()
        ours = self.handlers.streams, self.handlers.unsent, self.health.watching
        for streams in (*ours, self.gate.arriving, self.admin_gate.arriving):
            self.metrics.count(metrics.STREAMS_DROPPED, by=streams.drop_silent(now))
        self.catalog.expire_tickets(now)
        self.catalog.settle(Deadline.after(WATCH_INTERVAL_S))


def port_of(address: str) -> str:
    """Return the port of host:port; clients may know the host by another name."""
    return address.rpartition(":")[2]


def shared_out(num_threads: int, limits: Limits) -> Limits:
    """Return the limits, lowered to fit the number of threads: each call holds a thread, and so do refusals."""
    reserved = max(1, num_threads // 12)  # for streams, for commits, and for refusals
    calls = min(limits.max_calls_in_flight, num_threads // 2 - reserved // 2)
    return replace(
        limits,
        max_calls_in_flight=calls,
        max_streams=min(limits.max_streams, reserved),
        max_commits_in_flight=min(limits.max_commits_in_flight, reserved),
        max_calls_arriving=min(limits.max_calls_arriving, max(1, num_threads - calls - 3 * reserved)),
    )


def places_of(limits: Limits) -> int:
    """Return how many calls of all kinds may hold a thread at once."""
    arrived = limits.max_calls_in_flight + limits.max_streams + limits.max_commits_in_flight
    return arrived + limits.max_calls_arriving
