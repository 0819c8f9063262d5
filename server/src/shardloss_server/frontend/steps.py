"""The state of a table's changes: its version, its ledger, and the one change whose outcome is not known yet."""

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
    """A change that was started but whose outcome is not known yet, with the tickets it closes."""

    change: Order | RowWrite
    tickets: list[Ticket]


class Steps:
    """The changes of one table, updated only by its owner, one change at a time; waiting calls are notified."""

    def __init__(self, max_sessions: int) -> None:
        self.version = 0
        self.num_commits = 0
        self.ledger = Ledger(max_sessions)
        self.doubt: Doubt | None = None
        self.under_way = False  # the change in doubt was started, and the owner still waits for its answers
        self._applied = threading.Condition()

    def begin(self, doubt: Doubt) -> None:
        """Record that a change is being started: the table is in doubt."""
        with self._applied:
            self.doubt, self.under_way = doubt, True

    def give_up(self) -> None:
        """Record that the change in doubt never happened."""
        with self._applied:
            self.doubt = None
            self._applied.notify_all()

    def note(self) -> None:
        """Record that the change in doubt was applied."""
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
        """Wake all waiting calls, which check their condition again."""
        with self._applied:
            self._applied.notify_all()

    def wait_for(self, session: str, step: int, deadline: Deadline, applied: bool, refuse: Callable[[], None]) -> None:
        """Wait until a step of a session, or a later one, is applied.

        With applied False it is enough that the step is on its way to all shards: work that is started on the shards
        afterwards runs behind it, and `check_follows` checks that the step was applied. refuse() raises any other
        error that ends the wait.

        Raises:
            DeadlineExceeded: the step was not applied, or not on its way, in time.
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
        """Check that an answer at a version was computed after a step that `wait_for` waited for.

        Raises:
            TableUnavailable: it was not, because the step failed or its outcome is not known yet; repeat the call.
        """
        with self._applied:  # an applied step is either in doubt or in the ledger
            made = self._version_in_doubt(session, step)
            if self.ledger.highest(session) >= step:
                outcome = self.ledger.outcome(session, step)
                made = 0 if outcome is None else outcome.version  # applied long ago, or given up with a later step
        if made is None or version < made:
            raise TableUnavailable("the step before this loss failed, or its outcome is not known yet; repeat the call")

    def _version_in_doubt(self, session: str, step: int) -> int | None:
        """Return the version that a step, or a later one, creates if its outcome is not known yet; None otherwise."""
        doubt = self.doubt
        if doubt is None or not isinstance(doubt.change, Order):
            return None
        key = doubt.change.key
        return doubt.change.version if key.session == session and key.step >= step else None
