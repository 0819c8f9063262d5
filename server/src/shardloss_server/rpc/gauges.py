"""The gauges of a running server, read from its live objects at each scrape."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from shardloss.errors import Internal
from shardloss.v1 import admin_pb2, evaluation_pb2, loss_pb2, server_pb2, table_pb2

from shardloss_server import __version__, metrics
from shardloss_server.cluster.group import ShardGroup
from shardloss_server.cluster.stats import WorkerStats
from shardloss_server.config import Limits
from shardloss_server.frontend.admission import Admission
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.sizes import table_bytes
from shardloss_server.machine import memory_limit_bytes
from shardloss_server.metrics import Metric, Metrics, Reading
from shardloss_server.rpc.servicer import Handlers
from shardloss_server.rpc.workers import WorkerWatch

METHODS = tuple(
    method.name
    for module in (admin_pb2, evaluation_pb2, loss_pb2, server_pb2, table_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)


def read_all(counted: Metrics, handlers: Handlers, is_stopping: Callable[[], bool]) -> None:
    """Register the readings of all metrics that show the current state of a server, except those of its workers."""
    read_places(counted, handlers)
    read_tables(counted, handlers.catalog)
    read_limits(counted, handlers.limits)
    catalog, made, memory_limit = handlers.catalog, time.time(), memory_limit_bytes()
    for method in METHODS:  # starts at 0: rate() sees no growth in a series that begins with the first error
        counted.count(metrics.CALLS, method, Internal.reason, by=0)
    one(counted, metrics.SERVING, lambda: not is_stopping())
    one(counted, metrics.TICKET_BYTES, lambda: catalog.budget.num_bytes)
    one(counted, metrics.TABLES, lambda: len(catalog.owners()))
    one(counted, metrics.UNREAD_BYTES, lambda: handlers.unsent.num_bytes)
    one(counted, metrics.TURNS_HELD, lambda: catalog.turns.num_held)
    one(counted, metrics.TURNS_WAITING, lambda: catalog.turns.num_waiting)
    one(counted, metrics.BACKLOG, catalog.group.backlog)
    one(counted, metrics.MEMORY_LIMIT_BYTES, lambda: memory_limit)
    one(counted, metrics.START_SECONDS, lambda: made)
    build = __version__, platform.python_version(), str(torch.__version__)
    counted.read(metrics.BUILD_INFO, lambda: [(build, 1.0)])


def one(counted: Metrics, metric: Metric, read: Callable[[], float]) -> None:
    """Register the reading of a metric without labels."""
    counted.read(metric, lambda: [((), float(read()))])


def read_limits(counted: Metrics, limits: Limits) -> None:
    """Register the limits as metrics, so that they can be compared with the values they limit."""
    for metric, value in (
        (metrics.TURNS_HELD_LIMIT, limits.max_calls_at_workers),
        (metrics.TABLES_LIMIT, limits.max_tables),
        (metrics.TABLE_BYTES_LIMIT, limits.max_table_bytes),
        (metrics.SESSIONS_LIMIT, limits.max_sessions),
        (metrics.OPEN_TICKETS_LIMIT, limits.max_open_tickets),
        (metrics.TICKET_BYTES_LIMIT, limits.max_ticket_bytes),
    ):
        counted.read(metric, partial(list, [((), float(value))]))


def read_places(counted: Metrics, handlers: Handlers) -> None:
    """Register the places and bytes that calls hold, and the limits on them."""
    places, streams = handlers.places, handlers.streams

    def reading(of: Callable[[Admission], float]) -> Reading:
        return [((name,), of(place)) for name, place in places.items()]

    counted.read(
        metrics.CALLS_IN_FLIGHT,
        lambda: [
            ((name,), float(streams.num_streams if name == "streams" else place.num_calls))
            for name, place in places.items()
        ],
    )
    counted.read(metrics.CALLS_IN_FLIGHT_LIMIT, lambda: reading(lambda place: place.max_calls))
    counted.read(metrics.CALLS_IN_FLIGHT_BYTES, lambda: reading(lambda place: place.num_bytes))
    counted.read(metrics.CALLS_IN_FLIGHT_BYTES_LIMIT, lambda: reading(lambda place: place.max_bytes))


def read_tables(counted: Metrics, catalog: Catalog) -> None:
    """Register the metrics of each table."""

    def each(of: Callable[[TableOwner], float]) -> Callable[[], Reading]:
        return lambda: [((owner.spec.name,), float(of(owner))) for owner in catalog.owners()]

    for metric, of in (
        (metrics.TABLE_BYTES, lambda owner: table_bytes(owner.spec)),
        (metrics.TABLE_VERSION, lambda owner: owner.steps.version),
        (metrics.TABLE_COMMITS, lambda owner: owner.steps.num_commits),
        (metrics.TABLE_IN_DOUBT, lambda owner: owner.steps.doubt is not None and not owner.steps.under_way),
        (metrics.TABLE_ROWS_LOST, lambda owner: owner.lost is not None),
        (metrics.SESSIONS, lambda owner: owner.sessions.num_known),
        (metrics.OPEN_TICKETS, lambda owner: owner.sessions.num_open),
    ):
        counted.read(metric, each(of))

    def tickets() -> Iterator[tuple[tuple[str, ...], float]]:
        for owner in catalog.owners():
            for outcome, number in owner.sessions.num_tickets().items():
                yield (owner.spec.name, outcome), float(number)

    counted.read(metrics.TICKETS, tickets)


def read_workers(counted: Metrics, group: ShardGroup, watch: WorkerWatch) -> None:
    """Register the metrics of each worker."""
    one(counted, metrics.WORKERS, lambda: len(group.devices))
    one(counted, metrics.WORKER_FACTS_AGE, watch.age_s)
    for metric, of in (
        (metrics.WORKER_RESIDENT_BYTES, lambda stats: stats.resident_bytes),
        (metrics.WORKER_DEVICE_BYTES, lambda stats: stats.device_bytes),
        (metrics.WORKER_KEPT_BYTES, lambda stats: stats.kept_bytes),
    ):
        counted.read(metric, partial(of_living, watch, of))
    counted.read(metrics.WORKER_UP, lambda: [((str(w.index),), float(w.stats is not None)) for w in watch.seen])
    counted.read(metrics.WORKER_RESTARTS, lambda: [((str(w.index),), float(w.num_restarts)) for w in watch.seen])
    counted.read(metrics.WORKER_VERSIONS_BEHIND, lambda: [((str(i),), float(num)) for i, num in watch.behind.items()])


def of_living(watch: WorkerWatch, of: Callable[[WorkerStats], float]) -> Reading:
    """Return one statistic of every worker that answered the last poll."""
    return [((str(each.index),), float(of(each.stats))) for each in watch.seen if each.stats is not None]
