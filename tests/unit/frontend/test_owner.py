"""Replies that an owner keeps, and memory that its workers release."""

from __future__ import annotations

import pytest
import torch
from shardloss_server.cluster import worker as worker_module
from shardloss_server.cluster.worker import Worker
from shardloss_server.frontend.replies import KEPT_REPLIES, NO_REPLY, LastReplies
from shardloss_server.frontend.request import Cost, LossReply
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import OutOfMemory, TableSpec

SPEC = TableSpec("t", 4, 2, "float32", True, Placement("div", 4, 1), Initializer("zeros", 0.0, 0), OptimizerSpec("sgd"))


def reply_of(num_floats: int) -> LossReply:
    """Return a reply that takes 4 bytes per float."""
    return LossReply(torch.zeros(num_floats), None, None, None, "", 1, False, Cost(0, 0, 0))


def test_last_replies_keep_a_bounded_number() -> None:
    """The oldest reply is dropped first."""
    replies = LastReplies()
    sessions = [f"session {n}" for n in range(KEPT_REPLIES + 3)]
    for session in sessions:
        replies.keep((session, 1), reply_of(1))
    assert [s for s in sessions if replies.get((s, 1), NO_REPLY) is not NO_REPLY] == sessions[3:]
    assert replies.num_bytes == 4 * KEPT_REPLIES


def test_last_replies_keep_a_bounded_number_of_bytes() -> None:
    """A large reply displaces older ones; a reply above the whole limit, or without tensors, is not kept."""
    replies = LastReplies(max_bytes=100)
    for session, num_floats in zip("abcd", (10, 10, 20, 26), strict=True):
        replies.keep((session, 1), reply_of(num_floats))
    replies.keep(("e", 1), NO_REPLY)
    assert [s for s in "abcde" if replies.get((s, 1), NO_REPLY) is not NO_REPLY] == ["c"]
    assert replies.num_bytes == 80


def test_the_next_step_of_a_session_replaces_its_reply() -> None:
    """Only the reply of a session's last step is kept, even if the next one is too large to keep."""
    replies = LastReplies(max_bytes=100)
    replies.keep(("a", 1), reply_of(10))
    replies.keep(("a", 2), reply_of(5))
    assert replies.get(("a", 1), NO_REPLY) is NO_REPLY
    assert replies.get(("a", 2), NO_REPLY) is not NO_REPLY
    assert replies.num_bytes == 20
    replies.keep(("a", 1), reply_of(1))
    replies.forget(("a", 1))
    assert replies.num_bytes == 20
    replies.keep(("a", 3), reply_of(26))
    assert replies.num_bytes == 0


def test_a_first_reply_is_not_replaced() -> None:
    """A repeat under the same key keeps the first reply."""
    replies = LastReplies()
    first = reply_of(1)
    replies.keep(("a", 1), first)
    replies.keep(("a", 1), reply_of(2))
    assert replies.get(("a", 1), NO_REPLY) is first


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("another bug"), RuntimeError),
    ],
)
def test_a_table_without_room_is_told_from_a_bug(
    monkeypatch: pytest.MonkeyPatch, error: Exception, named: type[Exception]
) -> None:
    """Only a failed allocation is OutOfMemory, and the worker has no such table afterwards."""

    def fail(*_: object) -> None:
        raise error

    worker = Worker(0, 1)
    monkeypatch.setattr(worker_module, "ShardTable", fail)
    with pytest.raises(named):
        worker.create(SPEC, 4)
    assert worker.drop("t") == {}
    monkeypatch.undo()
    assert worker.create(SPEC, 4) == {0: 0}
