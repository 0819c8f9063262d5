"""A gRPC channel each of whose calls carries a token.

Not gRPC's own call credentials: these hop to another thread with every call, and refuse plaintext, loopback too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from shardloss.credentials import Bearer


class Bearing:
    """What stubs need of a channel; its methods carry the token of the moment."""

    def __init__(self, channel: grpc.Channel, bearer: Bearer) -> None:
        self._channel, self._bearer = channel, bearer
        self.unary_unary = self._bearing(channel.unary_unary)
        self.unary_stream = self._bearing(channel.unary_stream)
        self.stream_unary = self._bearing(channel.stream_unary)
        self.stream_stream = self._bearing(channel.stream_stream)

    def _bearing(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: Method(kind(*arguments, **options), self._bearer)


class Method:
    """A method of a stub."""

    def __init__(self, method: Any, bearer: Bearer) -> None:
        self._method, self._bearer = method, bearer

    def __call__(self, request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
        """As gRPC's own."""
        return self._method(request, metadata=(*metadata, *self._bearer.metadata()), **options)

    def with_call(self, request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
        """As gRPC's own: the reply and its call."""
        return self._method.with_call(request, metadata=(*metadata, *self._bearer.metadata()), **options)
