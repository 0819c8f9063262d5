"""The metrics of a server, each defined once with its name, unit, labels and meaning.

Events are counted here as they happen; current values are read from the live objects at each scrape. Each server has
its own registry, so that several servers can run in one process. docs/metrics.md is generated from these definitions.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.utils import floatToGoString

SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
VERSIONS_BUCKETS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Labels = tuple[str, ...]
Reading = Iterable[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric; a counter's name ends in _total, and a histogram's buckets are in its unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        """The name of the metric's family in the exposition format: a counter's name without _total."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


def counter(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    """Define a counter, which starts at 0 with the server or table that it belongs to and only grows."""
    return Metric(f"shardloss_{name}_total", "counter", unit, meaning, labels)


def gauge(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    """Define a gauge, a value at the moment of the scrape."""
    return Metric(f"shardloss_{name}", "gauge", unit, meaning, labels)


def histogram(name: str, unit: str, meaning: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Metric:
    """Define a histogram, which counts values by size."""
    return Metric(f"shardloss_{name}", "histogram", unit, meaning, labels, buckets)


# Calls. method is the RPC's name; reason is one of docs/errors.md, OK, or CANCELLED if the caller went away first.

CALLS = counter("calls", "calls", "Calls that have ended.", "method", "reason")
CALL_SECONDS = histogram(
    "call_duration_seconds", "seconds", "Time of a call, from when it has a thread until its reply is ready.", "method"
)
RECEIVED_BYTES = counter("received_bytes", "bytes", "Bytes of the request messages of calls that have ended.", "method")
SENT_BYTES = counter("sent_bytes", "bytes", "Bytes of the reply messages of calls that have ended.", "method")
REFUSALS = counter(
    "refusals", "calls", "Calls refused as OVERLOADED, by the limit that they hit (docs/configuration.md).", "limit"
)
REPLAYS = counter("replays", "calls", "Repeated calls answered from the ledger or a kept reply.", "method")
CALLS_IN_FLIGHT = gauge(
    "calls_in_flight", "calls", "Calls in flight, by the kind of place they hold: calls, commits or streams.", "place"
)
CALLS_IN_FLIGHT_LIMIT = gauge("calls_in_flight_limit", "calls", "Number of places of each kind.", "place")
CALLS_IN_FLIGHT_BYTES = gauge("calls_in_flight_bytes", "bytes", "Request bytes of the calls in flight.", "place")
CALLS_IN_FLIGHT_BYTES_LIMIT = gauge(
    "calls_in_flight_bytes_limit", "bytes", "Limit on the request bytes of the calls in flight.", "place"
)
CALLS_ARRIVING = gauge("calls_arriving", "calls", "Calls whose message is still arriving; they hold no place yet.")
UNREAD_BYTES = gauge("unread_reply_bytes", "bytes", "Bytes of finished replies that clients have not read yet.")
STREAMS_DROPPED = counter("streams_dropped", "calls", "Calls dropped because their client stopped sending or reading.")
TURNS_HELD = gauge("turns_held", "calls", "Calls that are using the workers: fan-outs under way.")
TURNS_HELD_LIMIT = gauge("turns_held_limit", "calls", "Limit on concurrent fan-outs: max_calls_at_workers.")
TURNS_WAITING = gauge("turns_waiting", "calls", "Calls that are waiting for their turn at the workers.")
SERVING = gauge("serving", "1 or 0", "1 while the server accepts calls, 0 while it drains.")

# The work of a call.

PHASE_SECONDS = histogram(
    "loss_phase_seconds",
    "seconds",
    "Time of a loss by phase: wait (for the step before it and for its turn at the workers), plan, fanout "
    "(until all shards have answered), finish (merge and gradients).",
    "phase",
)
KERNEL_SECONDS = histogram(
    "kernel_seconds", "seconds", "Compute time of the slowest worker in each fan-out, summed over a call.", "method"
)
FLOPS = counter(
    "flops", "operations", "Floating-point operations of the requested matrix products: 2 per multiply-add.", "method"
)
LOSS_ROWS = counter("loss_rows", "rows", "Rows of hidden that losses have scored.")
STALENESS = histogram(
    "commit_staleness_versions",
    "versions",
    "Versions between scoring and applying a step, the largest over its parts.",
    buckets=VERSIONS_BUCKETS,
)

# Tables. table is the table's name, of which there are at most max_tables; the series of a deleted table end.

TABLES = gauge("tables", "tables", "Number of tables.")
TABLES_LIMIT = gauge("tables_limit", "tables", "Limit on the number of tables: max_tables.")
TABLE_BYTES = gauge(
    "table_bytes", "bytes", "Bytes of rows, biases, optimizer state and label counts on all shards.", "table"
)
TABLE_BYTES_LIMIT = gauge("table_bytes_limit", "bytes", "Limit on the bytes of all tables together: max_table_bytes.")
TABLE_VERSION = gauge(
    "table_version", "versions", "Version of the table: the number of commits and row writes applied.", "table"
)
TABLE_COMMITS = counter("table_commits", "commits", "Optimizer steps applied to the table.", "table")
TABLE_IN_DOUBT = gauge(
    "table_in_doubt",
    "1 or 0",
    "1 if the outcome of a change is unknown, such as when a worker does not answer; calls wait until it is settled.",
    "table",
)
TABLE_ROWS_LOST = gauge(
    "table_rows_lost", "1 or 0", "1 if a worker died with rows of the table; its calls fail with ROWS_LOST.", "table"
)
SESSIONS = gauge("sessions", "sessions", "Sessions that the table remembers.", "table")
SESSIONS_LIMIT = gauge("sessions_limit", "sessions", "Limit on the sessions that a table remembers: max_sessions.")

# Tickets.

TICKETS = counter(
    "tickets", "tickets", "Tickets by outcome: opened, committed, aborted or expired.", "table", "outcome"
)
OPEN_TICKETS = gauge("open_tickets", "tickets", "Open tickets.", "table")
OPEN_TICKETS_LIMIT = gauge("open_tickets_limit", "tickets", "Limit on open tickets over all tables: max_open_tickets.")
TICKET_BYTES = gauge("ticket_bytes", "bytes", "Bytes kept for open tickets over all tables.")
TICKET_BYTES_LIMIT = gauge("ticket_bytes_limit", "bytes", "Limit on the bytes kept for open tickets: max_ticket_bytes.")

# Workers, as of their last answer; they are polled every few seconds, never by a scrape. worker is 0 to W - 1.

WORKERS = gauge(
    "workers", "workers", "Workers that the server was started with, up or down; in local mode, its shard threads."
)
WORKER_UP = gauge("worker_up", "1 or 0", "1 if the worker answered when it was last polled.", "worker")
WORKER_RESTARTS = counter("worker_restarts", "restarts", "Times that a new process replaced the worker.", "worker")
WORKER_VERSIONS_BEHIND = gauge(
    "worker_versions_behind",
    "versions",
    "Versions that the worker's shards are behind their table, the largest over all tables.",
    "worker",
)
WORKER_RESIDENT_BYTES = gauge("worker_resident_bytes", "bytes", "Resident memory of the worker's process.", "worker")
WORKER_DEVICE_BYTES = gauge("worker_device_bytes", "bytes", "GPU memory reserved by the worker; 0 on a CPU.", "worker")
WORKER_KEPT_BYTES = gauge(
    "worker_kept_bytes", "bytes", "Bytes that the worker keeps between losses and their steps (keep_mib).", "worker"
)
WORKER_FACTS_AGE = gauge("worker_facts_age_seconds", "seconds", "Time since the workers were last polled.")
BACKLOG = gauge("backlog_calls", "calls", "Unfinished work whose caller has given up; new work waits behind it.")

# The server itself.

BUILD_INFO = gauge(
    "build_info", "1", "Versions of this server, of Python and of torch, as labels.", "version", "python", "torch"
)
TOKEN_EXPIRY_SECONDS = gauge(
    "token_expiry_time_seconds", "seconds since 1970", "Expiry time of a token in the tokens file.", "token"
)
MEMORY_LIMIT_BYTES = gauge(
    "memory_limit_bytes", "bytes", "Memory limit of the front end's container, or else the memory of its machine."
)
START_SECONDS = gauge("start_time_seconds", "seconds since 1970", "Time at which this server was created.")

ALL: Sequence[Metric] = tuple(each for each in globals().copy().values() if isinstance(each, Metric))


class Metrics:
    """The metrics of one server. Thread-safe. Counting a value takes half a microsecond."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {each.name: {} for each in ALL if each.kind == "counter"}
        self._sizes: dict[str, dict[Labels, Sizes]] = {each.name: {} for each in ALL if each.kind == "histogram"}
        self._readings: dict[str, Callable[[], Reading]] = {}
        self.registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add `by` to a counter."""
        counts = self._counts[metric.name]
        with self._lock:
            counts[labels] = counts.get(labels, 0.0) + by

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add a value to a histogram, in its unit."""
        sizes = self._sizes[metric.name]
        with self._lock:
            known = sizes.get(labels)
            if known is None:
                known = sizes[labels] = Sizes([0] * (len(metric.buckets) + 1))
            known.counts[bisect_left(metric.buckets, value)] += 1
            known.total += value

    def read(self, metric: Metric, reading: Callable[[], Reading]) -> None:
        """Register a function that reads a metric at each scrape, as (label values, number). It must not wait."""
        self._readings[metric.name] = reading

    def collect(self) -> Iterator[Family]:
        """Yield every metric family, for the registry."""
        for metric in ALL:
            if metric.kind == "histogram":
                yield self._histogram(metric)
            else:
                yield family_of(metric, self._reading(metric))

    def _reading(self, metric: Metric) -> Reading:
        """Return (label values, number) for each series; a counter without labels is 0 until it is counted."""
        if metric.name in self._readings:
            return self._readings[metric.name]()
        with self._lock:
            counts = dict(self._counts.get(metric.name, {}))
        if metric.kind == "counter" and not metric.labels:
            counts.setdefault((), 0.0)
        return counts.items()

    def _histogram(self, metric: Metric) -> Family:
        family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
        with self._lock:
            sizes = {
                labels: (list(accumulate(one.counts)), one.total) for labels, one in self._sizes[metric.name].items()
            }
        for labels, (counts, total) in sizes.items():
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), total)
        return family


@dataclass(slots=True)
class Sizes:
    """The number of values in each bucket of a histogram (the last is unbounded), and the sum of all values."""

    counts: list[int]
    total: float = 0.0


def family_of(metric: Metric, values: Reading) -> Family:
    """Return the values read from a metric as a metric family."""
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = made(metric.family, metric.meaning, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
