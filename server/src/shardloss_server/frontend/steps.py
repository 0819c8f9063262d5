"""What became of a table's changes: its version, its ledger, and the one change whose outcome is not known yet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from shardloss.errors import TableUnavailable

from shardloss_server.cluster.group import Order
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.session import Ticket
from shardloss_server.shard.ledger import Ledger, Outcome
from shardloss_server.shard.record import RowWrite


@dataclass(frozen=True, slots=True)
class Doubt:
    """A change that was started and whose outcome is not known yet, with the tickets it closes."""

    change: Order | RowWrite
    tickets: list[Ticket]


class Steps:
    """The changes of one table. Only its owner changes anything, one change at a time; whoever waits is told."""

    def __init__(self, max_sessions: int) -> None:
        self.version = 0
        self.num_commits = 0
        self.ledger = Ledger(max_sessions)
        self.doubt: Doubt | None = None
        self.under_way = False  # the change in doubt was started, and its answers are still waited for
        self._applied = threading.Condition()

    def begin(self, doubt: Doubt) -> None:
        """A change is being started."""
        with self._applied:
            self.doubt, self.under_way = doubt, True

    def give_up(self) -> None:
        """The change in doubt never happened."""
        with self._applied:
            self.doubt = None
            self._applied.notify_all()

    def note(self) -> None:
        """The change in doubt happened."""
        assert self.doubt is not None
        change = self.doubt.change
        with self._applied:
            self.doubt = None
            self.version = change.version
            if isinstance(change, Order):
                self.num_commits += 1
                self.ledger.note(change.key, Outcome(change.key.digest, change.version, change.staleness))
            elif change.num_commits is not None:
                self.num_commits = change.num_commits
            self._applied.notify_all()

    def wake(self) -> None:
        """Have whoever waits look again."""
        with self._applied:
            self._applied.notify_all()

    def wait_for(self, session: str, step: int, deadline: Deadline, applied: bool, refuse: Callable[[], None]) -> None:
        """Wait until a step of a session, or a later one, is applied; or, unless it must be, on its way to all shards.

        What is asked of the shards from then on comes behind it; `check_follows` says whether it was applied. refuse
        raises what ends the wait otherwise.

        Raises:
            DeadlineExceeded: it was not, in time.
        """

        def is_over() -> bool:
            refuse()
            if self.ledger.highest(session) >= step:
                return True
            return not applied and self.under_way and self._version_in_doubt(session, step) is not None

        with self._applied:
            deadline.wait(
                lambda seconds: self._applied.wait_for(is_over, seconds),
                f"step {step} of session {session!r} was applied",
            )

    def check_follows(self, session: str, step: int, version: int) -> None:
        """See that what was answered at a version came behind a step that `wait_for` waited for.

        Raises:
            TableUnavailable: it did not: the step has failed, or nobody knows yet; repeat.
        """
        with self._applied:  # what is no longer in doubt is in the ledger
            made = self._version_in_doubt(session, step)
            if self.ledger.highest(session) >= step:
                outcome = self.ledger.outcome(session, step)
                made = 0 if outcome is None else outcome.version  # one of long ago, or given up with a later one
        if made is None or version < made:
            raise TableUnavailable("the step before this loss has failed, or is in doubt; repeat the call")

    def _version_in_doubt(self, session: str, step: int) -> int | None:
        """The version that a step makes, or a later one, whose outcome is not known yet."""
        doubt = self.doubt
        if doubt is None or not isinstance(doubt.change, Order):
            return None
        key = doubt.change.key
        return doubt.change.version if key.session == session and key.step >= step else None
