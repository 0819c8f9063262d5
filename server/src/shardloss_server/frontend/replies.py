"""Replies kept so that a retried call can be answered again: of open tickets, and the last one-call replies."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.request import CommitPart, CommitReply, CommitRequest, Cost, LossReply, LossRequest
from shardloss_server.frontend.session import Ticket

KEPT_REPLIES = 16  # one-call replies kept per table: a repeat arrives within seconds of the first try
KEPT_REPLY_BYTES = 64 * 2**20  # limit on the bytes of these replies together
NO_REPLY = LossReply(None, None, None, None, "", 0, True, Cost(0, 0, 0))


class LastReplies:
    """The last replies of the one-call form by (session, step), kept to answer retried calls. Thread-safe."""

    def __init__(self, max_bytes: int = KEPT_REPLY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._replies: OrderedDict[tuple[str, int], LossReply] = OrderedDict()
        self.num_bytes = 0

    def forget(self, key: tuple[str, int]) -> None:
        """Drop the reply of a step that was refused."""
        with self._lock:
            forgotten = self._replies.pop(key, None)
            self.num_bytes -= forgotten.num_bytes if forgotten else 0

    def get(self, key: tuple[str, int], default: LossReply) -> LossReply:
        """Return the kept reply, or the default."""
        with self._lock:
            return self._replies.get(key, default)

    def keep(self, key: tuple[str, int], reply: LossReply) -> None:
        """Keep a reply that has tensors, unless it alone exceeds the byte limit; drop the oldest ones to make room."""
        with self._lock:
            if key in self._replies or not 0 < reply.num_bytes <= self._max_bytes:
                return
            self._replies[key] = reply
            self.num_bytes += reply.num_bytes
            while len(self._replies) > KEPT_REPLIES or self.num_bytes > self._max_bytes:
                _, forgotten = self._replies.popitem(last=False)
                self.num_bytes -= forgotten.num_bytes


def commit_of(request: LossRequest, ticket: str) -> CommitRequest:
    """Return the commit inside a one-call request."""
    assert request.commit_now is not None
    rate, scale = request.commit_now.learning_rate, request.commit_now.grad_scale
    parts = (CommitPart(ticket, request.upstream),)
    return CommitRequest(request.table, request.session, request.step, parts, rate, scale, None, request.digest, True)


def kept_reply(ticket: Ticket, deadline: Deadline) -> LossReply | None:
    """Wait for the reply of a ticket that another call scores, and return it; None if that call failed."""
    deadline.wait(ticket.ready.wait, "the first call with this key finished; repeat with the same key")
    reply = ticket.reply
    return None if reply is None else replayed(reply)


def replayed(reply: LossReply) -> LossReply:
    """Return the same reply, marked as a replay."""
    return replace(reply, replayed=True)


def with_commit(reply: LossReply, committed: CommitReply) -> LossReply:
    """Return the one-call reply: the reply with its commit and without an open ticket."""
    return replace(reply, ticket="", replayed=reply.replayed or committed.replayed, committed=committed)
