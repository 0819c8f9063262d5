"""The refusal of calls that arrive at the wrong port of the server."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import grpc
from shardloss.errors import NotSupported

from shardloss_server.rpc.call import CallLog


class Elsewhere(grpc.ServerInterceptor):
    """An interceptor that refuses the services of the other port; gRPC would say only "Method not found!"."""

    def __init__(self, services: Collection[str], message: Callable[[], str], call_log: CallLog) -> None:
        self._services, self._message, self._call_log = services, message, call_log

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Return the method's handler, or one that refuses the call."""
        path = handler_call_details.method
        if path.strip("/").partition("/")[0] not in self._services:
            return continuation(handler_call_details)
        return self._call_log.refusing(path, NotSupported(self._message()))
