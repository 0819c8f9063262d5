"""Who calls: the one place that says whose share of the server a call is taken from."""

from __future__ import annotations

import grpc


def caller_of(context: grpc.ServicerContext, request: object = None) -> str:
    """The connection; on a Unix socket, where all connections look alike, the session of the request, if it has one.

    A connection, not a session: whoever opens many sessions over one does not get many shares.
    """
    peer: str = context.peer()
    if not peer.startswith("unix:"):
        return peer
    return f"unix:{getattr(getattr(request, 'message', request), 'session', '')}"
