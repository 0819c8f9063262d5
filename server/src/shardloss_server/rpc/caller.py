"""The caller of a call: the connection to which its share of the server is charged."""

from __future__ import annotations

import grpc


def caller_of(context: grpc.ServicerContext, request: object = None) -> str:
    """Return the connection; on a Unix socket, whose connections look alike, the request's session if it has one.

    Otherwise sessions do not count, so that many sessions on one connection do not get a larger share.
    """
    peer: str = context.peer()
    if not peer.startswith("unix:"):
        return peer
    return f"unix:{getattr(getattr(request, 'message', request), 'session', '')}"
