"""Replies kept so that a retried call can be answered again: of open tickets, and the last one-call reply of a session.

A session's next step shows that the reply of the one before has arrived.
"""

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
    """The last reply of the one-call form of each session, with its step, kept to answer retried calls. Thread-safe."""

    def __init__(self, max_bytes: int = KEPT_REPLY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._replies: OrderedDict[str, tuple[int, LossReply]] = OrderedDict()
        self.num_bytes = 0

    def forget(self, key: tuple[str, int]) -> None:
        """Drop the reply of a step that was refused."""
        with self._lock:
            if self._replies.get(key[0], (0, NO_REPLY))[0] == key[1]:
                self._pop(key[0])

    def get(self, key: tuple[str, int], default: LossReply) -> LossReply:
        """Return the kept reply, or the default."""
        with self._lock:
            step, reply = self._replies.get(key[0], (0, default))
            return reply if step == key[1] else default

    def keep(self, key: tuple[str, int], reply: LossReply) -> None:
        """Keep a reply that has tensors, unless it alone exceeds the byte limit.

        It replaces the reply of the session's earlier step; the oldest replies are dropped to make room.
        """
        session, step = key
        with self._lock:
            if self._replies.get(session, (0, reply))[0] >= step:
                return
            self._pop(session)
            if not 0 < reply.num_bytes <= self._max_bytes:
                return
            self._replies[session] = step, reply
            self.num_bytes += reply.num_bytes
            while len(self._replies) > KEPT_REPLIES or self.num_bytes > self._max_bytes:
                self._pop(next(iter(self._replies)))

    def _pop(self, session: str) -> None:
        _, forgotten = self._replies.pop(session, (0, NO_REPLY))
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
