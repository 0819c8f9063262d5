"""Replies that are kept for a caller who lost his: those of open tickets, and the last ones of the one-call form."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.request import CommitPart, CommitReply, CommitRequest, Cost, LossReply, LossRequest
from shardloss_server.frontend.session import Ticket

KEPT_REPLIES = 16  # one-call replies a table keeps: a repeat comes within seconds of its first try
KEPT_REPLY_BYTES = 64 * 2**20  # and the bytes that they may take together
NO_REPLY = LossReply(None, None, None, None, "", 0, True, Cost(0, 0, 0))


class LastReplies:
    """The last replies of the one-call form, by (session, step), for a caller who lost his. Thread-safe."""

    def __init__(self, max_bytes: int = KEPT_REPLY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._replies: OrderedDict[tuple[str, int], LossReply] = OrderedDict()
        self.num_bytes = 0

    def forget(self, key: tuple[str, int]) -> None:
        """The step was refused."""
        with self._lock:
            forgotten = self._replies.pop(key, None)
            self.num_bytes -= forgotten.num_bytes if forgotten else 0

    def get(self, key: tuple[str, int], default: LossReply) -> LossReply:
        """The kept reply, or the default."""
        with self._lock:
            return self._replies.get(key, default)

    def keep(self, key: tuple[str, int], reply: LossReply) -> None:
        """Keep a reply that has tensors, unless it is larger than all that may be kept, and forget the oldest."""
        with self._lock:
            if key in self._replies or not 0 < reply.num_bytes <= self._max_bytes:
                return
            self._replies[key] = reply
            self.num_bytes += reply.num_bytes
            while len(self._replies) > KEPT_REPLIES or self.num_bytes > self._max_bytes:
                _, forgotten = self._replies.popitem(last=False)
                self.num_bytes -= forgotten.num_bytes


def commit_of(request: LossRequest, ticket: str) -> CommitRequest:
    """The commit inside a one-call request."""
    assert request.commit_now is not None
    rate, scale = request.commit_now.learning_rate, request.commit_now.grad_scale
    parts = (CommitPart(ticket, request.upstream),)
    return CommitRequest(request.table, request.session, request.step, parts, rate, scale, None, request.digest, True)


def kept_reply(ticket: Ticket, deadline: Deadline) -> LossReply | None:
    """The reply of a ticket that another call is making or has made; None where that call failed."""
    deadline.wait(ticket.ready.wait, "the first call with this key was done; repeat with the same key")
    reply = ticket.reply
    return None if reply is None else replayed(reply)


def replayed(reply: LossReply) -> LossReply:
    """The same reply, marked as kept."""
    return replace(reply, replayed=True)


def with_commit(reply: LossReply, committed: CommitReply) -> LossReply:
    """The one-call reply: no ticket stays open."""
    return replace(reply, ticket="", replayed=reply.replayed or committed.replayed, committed=committed)
