"""Tracing of calls: one span per call if the application sets up OpenTelemetry before it connects.

Otherwise no span is created, at no cost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

R = TypeVar("R")
OK = "OK"
KEY = "traceparent"  # a tracestate is not sent: the server does not read it


class Untraced:
    """An untraced call; also the interface of a traced one."""

    headers: tuple[tuple[str, str], ...] = ()  # metadata that makes the server's span a child of this one

    def counting(self, attempt: Callable[..., R]) -> Callable[..., R]:
        """Return attempt, wrapped to count its tries if the call is traced."""
        return attempt

    def __enter__(self) -> None:
        """Enter the call, which includes all tries."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the call with the outcome of its last try."""


UNTRACED = Untraced()


class Traced(Untraced):
    """A call with a span, which records the number of tries and the reason of a failure."""

    def __init__(self, span: Span, headers: tuple[tuple[str, str], ...]) -> None:
        self._span, self.headers = span, headers
        self._num_tries = 0

    def counting(self, attempt: Callable[..., R]) -> Callable[..., R]:
        def counted(*arguments: Any) -> R:
            self._num_tries += 1
            return attempt(*arguments)

        return counted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from opentelemetry.trace import StatusCode

        reason = OK if error is None else getattr(error, "reason", type(error).__name__)
        self._span.set_attributes({"shardloss.tries": self._num_tries, "shardloss.reason": reason})
        if error is not None:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracing:
    """The source of the spans of one channel's calls."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("shardloss")
        self._propagator = TraceContextTextMapPropagator()  # the server's format, whatever the global one is

    @staticmethod
    def found() -> Tracing | None:
        """Return a `Tracing` of the application's tracer provider, or None if the application has set none up."""
        if "opentelemetry.trace" not in sys.modules:  # not set up; importing it here would cost time
            return None
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        is_set = not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))
        return Tracing(provider) if is_set else None

    def call(self, path: str, request_id: str) -> Traced:
        """Start the span of a call to "/package.Service/Method" as a child of the current span."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        service, _, method = path.lstrip("/").partition("/")
        said = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "shardloss.request_id": request_id}
        span = self._tracer.start_span(method, kind=SpanKind.CLIENT, attributes=said)
        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span))
        return Traced(span, tuple((key, headers[key]) for key in (KEY,) if key in headers))


class Naming:
    """The part of a gRPC channel that stubs use; its methods have their path as an attribute."""

    def __init__(self, channel: Any) -> None:
        self.unary_unary = naming(channel.unary_unary)
        self.unary_stream = naming(channel.unary_stream)
        self.stream_unary = naming(channel.stream_unary)
        self.stream_stream = naming(channel.stream_stream)


class Method:
    """A stub method with its path, "/package.Service/Method"."""

    def __init__(self, path: str, method: Callable[..., Any]) -> None:
        self.path, self._method = path, method

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the method as in gRPC."""
        return self._method(*arguments, **options)


def naming(kind: Callable[..., Any]) -> Callable[..., Method]:
    """Return a function that creates methods of a kind, such as unary_unary, with their paths."""
    return lambda path, *arguments, **options: Method(path, kind(path, *arguments, **options))
