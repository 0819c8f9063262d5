"""A wrapper of a gRPC channel that sends a bearer token with every call.

gRPC's own call credentials are not used because they switch threads on every call and refuse plaintext, even on
loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from shardloss.credentials import Bearer


class Bearing:
    """The part of a gRPC channel that stubs use; its methods send the current token."""

    def __init__(self, channel: grpc.Channel, bearer: Bearer) -> None:
        self._channel, self._bearer = channel, bearer
        self.unary_unary = self._bearing(channel.unary_unary)
        self.unary_stream = self._bearing(channel.unary_stream)
        self.stream_unary = self._bearing(channel.stream_unary)
        self.stream_stream = self._bearing(channel.stream_stream)

    def _bearing(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: Method(kind(*arguments, **options), self._bearer)


class Method:
    """A stub method that sends the current token with each call."""

    def __init__(self, method: Any, bearer: Bearer) -> None:
        self._method, self._bearer = method, bearer

    def __call__(self, request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
        """Call the method as in gRPC, with the token added to the metadata."""
        return self._method(request, metadata=(*metadata, *self._bearer.metadata()), **options)

    def with_call(self, request: Any, *, metadata: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
        """Call the method with the token added to the metadata; return the reply and its call, as in gRPC."""
        return self._method.with_call(request, metadata=(*metadata, *self._bearer.metadata()), **options)
