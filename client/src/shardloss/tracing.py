"""A span a call, where the application has set up OpenTelemetry before it connects; nothing else, and at no cost."""

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
    """A call of which nobody asks; also what every call offers."""

    headers: tuple[tuple[str, str], ...] = ()  # metadata by which the server's span continues this one

    def counting(self, attempt: Callable[..., R]) -> Callable[..., R]:
        """The attempt, whose tries are counted."""
        return attempt

    def __enter__(self) -> None:
        """All tries are inside."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It ends as its last try."""


UNTRACED = Untraced()


class Traced(Untraced):
    """A call with a span: its tries are counted, and the reason why it failed is kept."""

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
    """Makes the spans of one channel's calls."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("shardloss")
        self._propagator = TraceContextTextMapPropagator()  # what the server reads, whatever others are told

    @staticmethod
    def found() -> Tracing | None:
        """That of the application's tracer provider; None where it has set none up."""
        if "opentelemetry.trace" not in sys.modules:  # whoever has set it up has imported it, which takes its time
            return None
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        is_set = not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))
        return Tracing(provider) if is_set else None

    def call(self, path: str, request_id: str) -> Traced:
        """The span of a call to "/package.Service/Method", under the present one."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        service, _, method = path.lstrip("/").partition("/")
        said = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "shardloss.request_id": request_id}
        span = self._tracer.start_span(method, kind=SpanKind.CLIENT, attributes=said)
        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span))
        return Traced(span, tuple((key, headers[key]) for key in (KEY,) if key in headers))


class Naming:
    """What stubs need of a channel; its methods know their paths."""

    def __init__(self, channel: Any) -> None:
        self.unary_unary = naming(channel.unary_unary)
        self.unary_stream = naming(channel.unary_stream)
        self.stream_unary = naming(channel.stream_unary)
        self.stream_stream = naming(channel.stream_stream)


class Method:
    """A method of a stub, and its path, "/package.Service/Method"."""

    def __init__(self, path: str, method: Callable[..., Any]) -> None:
        self.path, self._method = path, method

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As gRPC's own."""
        return self._method(*arguments, **options)


def naming(kind: Callable[..., Any]) -> Callable[..., Method]:
    """Makes the methods of a kind."""
    return lambda path, *arguments, **options: Method(path, kind(path, *arguments, **options))
