"""OpenTelemetry spans of the server's calls: one per call, below its client's span, and one per phase below that.

The phases are those that the call's meter noted. The workers export nothing: their spans are created here from the
compute seconds that they report with their answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shardloss_server import __version__
from shardloss_server.config import CannotServe, Watching

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from shardloss_server.frontend.meter import Phase, Phases

KEY, MAX_TEXT = "traceparent", 128  # characters: the library logs longer ones, and also a malformed tracestate
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
SERVICE = "shardloss-server"
LAST_S = 2.0  # for the collector to accept the last spans; the library itself would wait for 10 s
Attributes = Mapping[str, str | int]


def refuse_missing(watching: Watching) -> None:
    """Check that the packages that tracing needs are installed, if tracing is on.

    Raises:
        CannotServe: a package is missing.
    """
    if watching.tracing and not all(is_installed(module) for module in NEEDED):
        raise CannotServe(
            "tracing is on, but its packages are not installed: run `pip install shardloss-server[tracing]`, or turn "
            "tracing off"
        )


def is_installed(module: str) -> bool:
    """Return True if a module can be imported."""
    try:
        return find_spec(module) is not None
    except ImportError:  # its parent package is missing, too
        return False


def resource() -> Resource:
    """Return the exporting resource, named by OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES, or else SERVICE."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource

    found = Resource.create({SERVICE_VERSION: __version__})
    is_named = not str(found.attributes[SERVICE_NAME]).startswith("unknown_service")
    return found if is_named else found.merge(Resource({SERVICE_NAME: SERVICE}))


class Tracing:
    """The tracer of one server's calls. Thread-safe."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("shardloss_server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @staticmethod
    def of(watching: Watching) -> Tracing | None:
        """Create a tracer from the settings and the OTEL_* variables, or return None if tracing is off.

        Raises:
            CannotServe: tracing is on, but a package that it needs is not installed.
        """
        if not watching.tracing:
            return None
        refuse_missing(watching)
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return Tracing(provider)

    def begin(self, method: str, metadata: Iterable[tuple[str, Any]], began: float) -> CallSpan | None:
        """Start the span of a call that began at a moment of time.perf_counter; None if it is not sampled."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if key == KEY and len(value) <= MAX_TEXT}
        parent = self._propagator.extract(carrier, Context()) if carrier else Context()
        zero_ns = time.time_ns() - round(1e9 * time.perf_counter())
        said = {"rpc.system": "grpc", "rpc.method": method}
        span = self._tracer.start_span(
            method, parent, SpanKind.SERVER, said, start_time=zero_ns + round(1e9 * began), record_exception=False
        )
        return CallSpan(self, span, zero_ns) if span.is_recording() else None

    def child(self, name: str, parent: Context, start_ns: int, end_ns: int, said: Attributes) -> Span:
        """Record a span that has ended; times are in nanoseconds since 1970."""
        span = self._tracer.start_span(name, parent, attributes=said, start_time=start_ns)
        span.end(end_ns)
        return span

    def close(self) -> None:
        """Export the remaining spans, for at most LAST_S seconds. Idempotent."""
        closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        closing.join(LAST_S)


class CallSpan:
    """The span of a recorded call; zero_ns is the wall-clock time, in ns since 1970, when time.perf_counter was 0."""

    def __init__(self, tracing: Tracing, span: Span, zero_ns: int) -> None:
        self._tracing, self._span, self._zero_ns = tracing, span, zero_ns

    @property
    def trace_id(self) -> str:
        """The trace id, 32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, said: Attributes, phases: Phases, is_fault: bool) -> None:
        """End the span of a finished call; is_fault marks it as failed by the server's fault."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(dict(said))
        if phases.num_left_out:
            self._span.set_attribute("shardloss.phases_left_out", phases.num_left_out)
        if is_fault:
            self._span.set_status(StatusCode.ERROR)
        self._show(phases.seen, self._span)
        self._span.end()

    def _show(self, phases: Iterable[Phase], parent: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(parent)
        for phase in phases:
            start_ns, end_ns = self._at(phase.began), self._at(phase.ended)
            span = self._tracing.child(phase.name, inside, start_ns, end_ns, {})
            self._show(phase.inner, span)
            self._show_workers(phase.computed_s, start_ns, span)

    def _show_workers(self, computed_s: Mapping[int, float], start_ns: int, fanout: Span) -> None:
        """Add a span per worker. Only the duration of its computation is known, so it starts with its fan-out."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(fanout)
        for worker, seconds in computed_s.items():
            self._tracing.child(
                "kernel", inside, start_ns, start_ns + round(1e9 * seconds), {"shardloss.worker": worker}
            )

    def _at(self, moment: float) -> int:
        return self._zero_ns + round(1e9 * moment)
