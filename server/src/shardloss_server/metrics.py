"""Every metric of a server, defined once: its name, unit, labels and meaning; docs/metrics.md is made of them.

What happens is counted here, as it happens; what stands is read from the live objects when somebody asks. Each server
has a registry of its own, so that several live in one process.
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
    """One metric, as it is exported: a counter's name ends in _total, a histogram has buckets in its unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        """The name of its family in the exposition's own terms."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


def counter(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    """What only grows, from 0 at the start of what it counts."""
    return Metric(f"shardloss_{name}_total", "counter", unit, meaning, labels)


def gauge(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    """What stands at the moment of the scrape."""
    return Metric(f"shardloss_{name}", "gauge", unit, meaning, labels)


def histogram(name: str, unit: str, meaning: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Metric:
    """How often values of each size came."""
    return Metric(f"shardloss_{name}", "histogram", unit, meaning, labels, buckets)


# Calls. method is the RPC's name; reason one of docs/errors.md, OK, or CANCELLED where the caller went away first.

CALLS = counter("calls", "calls", "Calls that have ended.", "method", "reason")
CALL_SECONDS = histogram(
    "call_duration_seconds", "seconds", "From the moment that a call has a thread until its reply is made.", "method"
)
RECEIVED_BYTES = counter("received_bytes", "bytes", "Request messages of calls that have ended.", "method")
SENT_BYTES = counter("sent_bytes", "bytes", "Reply messages of calls that have ended.", "method")
REFUSALS = counter(
    "refusals", "calls", "Calls refused as OVERLOADED, by the limit that they met (docs/configuration.md).", "limit"
)
REPLAYS = counter("replays", "calls", "Repeats answered from the ledger or a kept reply, not done again.", "method")
CALLS_IN_FLIGHT = gauge(
    "calls_in_flight", "calls", "Calls inside now, by the places they take: calls, commits or streams.", "place"
)
CALLS_IN_FLIGHT_LIMIT = gauge("calls_in_flight_limit", "calls", "Places of each kind.", "place")
CALLS_IN_FLIGHT_BYTES = gauge("calls_in_flight_bytes", "bytes", "Bytes that the calls inside have brought.", "place")
CALLS_IN_FLIGHT_BYTES_LIMIT = gauge("calls_in_flight_bytes_limit", "bytes", "Bytes that they may bring.", "place")
CALLS_ARRIVING = gauge("calls_arriving", "calls", "Calls whose message is on its way, before they have a place.")
UNREAD_BYTES = gauge("unread_reply_bytes", "bytes", "Replies that are made and that their clients have not read yet.")
STREAMS_DROPPED = counter(
    "streams_dropped", "calls", "Calls dropped because their client stood still, sending or reading."
)
TURNS_HELD = gauge("turns_held", "calls", "Calls at the workers: fan-outs under way.")
TURNS_HELD_LIMIT = gauge("turns_held_limit", "calls", "Fan-outs at once: max_calls_at_workers.")
TURNS_WAITING = gauge("turns_waiting", "calls", "Calls that wait for their turn at the workers: the queue.")
SERVING = gauge("serving", "1 or 0", "Whether the server takes calls: 0 while it drains.")

# The work of a call.

PHASE_SECONDS = histogram(
    "loss_phase_seconds",
    "seconds",
    "Time of a loss by phase: wait (for the step before it and its place in the order of work), plan, fanout "
    "(until all shards have answered), finish (merge and gradients).",
    "phase",
)
KERNEL_SECONDS = histogram(
    "kernel_seconds", "seconds", "Time that the slowest worker computed for a call, over its fan-outs.", "method"
)
FLOPS = counter(
    "flops", "operations", "Floating point operations of the matrix products asked for: 2 a product.", "method"
)
LOSS_ROWS = counter("loss_rows", "rows", "Rows of hidden that were scored by losses.")
STALENESS = histogram(
    "commit_staleness_versions",
    "versions",
    "Versions between scoring and applying of each step, the largest over its parts.",
    buckets=VERSIONS_BUCKETS,
)

# Tables. table is its name, at most max_tables at once; a deleted table's series end.

TABLES = gauge("tables", "tables", "Tables that there are.")
TABLES_LIMIT = gauge("tables_limit", "tables", "Tables that there may be: max_tables.")
TABLE_BYTES = gauge("table_bytes", "bytes", "Rows, biases, optimizer state and label counts on all shards.", "table")
TABLE_BYTES_LIMIT = gauge("table_bytes_limit", "bytes", "What all tables may take together: max_table_bytes.")
TABLE_VERSION = gauge("table_version", "versions", "The table's version: commits and row writes applied.", "table")
TABLE_COMMITS = counter("table_commits", "commits", "Optimizer steps of the table.", "table")
TABLE_IN_DOUBT = gauge(
    "table_in_doubt",
    "1 or 0",
    "Whether the outcome of a change is unknown, as after a worker's silence: calls wait until it is settled.",
    "table",
)
TABLE_ROWS_LOST = gauge("table_rows_lost", "1 or 0", "Whether a worker died with rows: calls end ROWS_LOST.", "table")
SESSIONS = gauge("sessions", "sessions", "Sessions that the table remembers.", "table")
SESSIONS_LIMIT = gauge("sessions_limit", "sessions", "Sessions that a table may remember: max_sessions.")

# Tickets.

TICKETS = counter(
    "tickets", "tickets", "Tickets by what became of them: opened, committed, aborted or expired.", "table", "outcome"
)
OPEN_TICKETS = gauge("open_tickets", "tickets", "Open tickets.", "table")
OPEN_TICKETS_LIMIT = gauge("open_tickets_limit", "tickets", "Open tickets over all tables: max_open_tickets.")
TICKET_BYTES = gauge("ticket_bytes", "bytes", "Kept for open tickets over all tables.")
TICKET_BYTES_LIMIT = gauge("ticket_bytes_limit", "bytes", "What may be kept for them: max_ticket_bytes.")

# Workers, as they answered last: asked every few seconds, never by a scrape. worker is the index, 0 to W - 1.

WORKERS = gauge("workers", "workers", "Workers that were asked for; threads of the server in local mode.")
WORKER_UP = gauge("worker_up", "1 or 0", "Whether the worker answered when it was asked last.", "worker")
WORKER_RESTARTS = counter("worker_restarts", "restarts", "How often it was another process than before.", "worker")
WORKER_VERSIONS_BEHIND = gauge(
    "worker_versions_behind",
    "versions",
    "How far its shards are behind their table's version, the most over all tables.",
    "worker",
)
WORKER_RESIDENT_BYTES = gauge("worker_resident_bytes", "bytes", "Resident memory of the worker's process.", "worker")
WORKER_DEVICE_BYTES = gauge("worker_device_bytes", "bytes", "Memory that it takes on a GPU; 0 on a CPU.", "worker")
WORKER_KEPT_BYTES = gauge("worker_kept_bytes", "bytes", "Kept between losses and their steps (keep_mib).", "worker")
WORKER_FACTS_AGE = gauge("worker_facts_age_seconds", "seconds", "Since the workers were asked last.")
BACKLOG = gauge("backlog_calls", "calls", "Abandoned work before the workers: its caller waits no more.")

# The server itself.

BUILD_INFO = gauge("build_info", "1", "Versions that this server runs.", "version", "python", "torch")
TOKEN_EXPIRY_SECONDS = gauge(
    "token_expiry_time_seconds", "seconds since 1970", "When a token of the tokens file ends.", "token"
)
MEMORY_LIMIT_BYTES = gauge(
    "memory_limit_bytes", "bytes", "What the front end's container may take, or else the memory of its machine."
)
START_SECONDS = gauge("start_time_seconds", "seconds since 1970", "When this server was made.")

ALL: Sequence[Metric] = tuple(each for each in globals().copy().values() if isinstance(each, Metric))


class Metrics:
    """The metrics of one server. Thread-safe. A value costs half a microsecond to count."""

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
        """Count what happened."""
        counts = self._counts[metric.name]
        with self._lock:
            counts[labels] = counts.get(labels, 0.0) + by

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Count a value of a histogram, in its unit."""
        sizes = self._sizes[metric.name]
        with self._lock:
            known = sizes.get(labels)
            if known is None:
                known = sizes[labels] = Sizes([0] * (len(metric.buckets) + 1))
            known.counts[bisect_left(metric.buckets, value)] += 1
            known.total += value

    def read(self, metric: Metric, reading: Callable[[], Reading]) -> None:
        """Have a metric read when somebody asks: each label's value and the number. It must not wait for anything."""
        self._readings[metric.name] = reading

    def collect(self) -> Iterator[Family]:
        """Every family, for the registry."""
        for metric in ALL:
            if metric.kind == "histogram":
                yield self._histogram(metric)
            else:
                yield family_of(metric, self._reading(metric))

    def _reading(self, metric: Metric) -> Reading:
        """A number for each set of labels; without labels a counter is there from the start."""
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
    """How many values fell into each bucket, the last being all above, and their sum."""

    counts: list[int]
    total: float = 0.0


def family_of(metric: Metric, values: Reading) -> Family:
    """What was read, as a family."""
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = made(metric.family, metric.meaning, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
