"""Tickets and the sessions that hold them. Time is passed in as a number, and nothing here waits.

The states of a ticket are OPEN -> COMMITTED | ABORTED | EXPIRED. Only the table's owner expires a ticket: ticket_ttl_s
after the last call of its session. An open ticket keeps its part, and its reply until the session's next loss, which
shows that the reply has arrived.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from shardloss.errors import (
    InvalidArgument,
    LimitExceeded,
    Overloaded,
    SessionExpired,
    StepReused,
    StepTooOld,
    TicketAborted,
    TicketExpired,
    TicketUnknown,
)
from torch import Tensor

from shardloss_server.cluster.group import Staged
from shardloss_server.frontend.request import LossReply

KEPT_CLOSED = 1 << 14  # closed tickets whose final state is remembered, for a clear error
RETRY_AFTER_S = 0.5


class TicketState(Enum):
    """The state of a ticket."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"
    EXPIRED = "expired"


@dataclass(slots=True)
class Ticket:
    """A scored part that waits for its commit. The fields below `ready` are filled in before that event is set."""

    name: str
    session: str
    step: int
    part: int
    digest: bytes
    num_bytes: int  # of the part and, until it is forgotten, of the reply
    reply_bytes: int = 0
    state: TicketState = TicketState.OPEN
    ready: threading.Event = field(default_factory=threading.Event)
    staged: Staged | None = None
    lse: Tensor | None = None
    steepness: Tensor | float = 1.0
    labels: Tensor | None = None  # [L], without padding
    is_held: bool = False  # a commit is using it, so it does not expire
    num_rows: int = 0
    flops: int = 0  # of one pass over its part
    version: int = 0
    reply: LossReply | None = None
    is_forgotten: bool = False  # the reply was kept and is not any more; a repeat of the loss scores it again


@dataclass(slots=True)
class Session:
    """The open tickets of one trainer by (step, part), and the highest step it gave up."""

    last_seen: float
    given_up: int = 0
    tickets: dict[tuple[int, int], Ticket] = field(default_factory=dict)
    answered: list[Ticket] = field(default_factory=list)  # those whose reply is not forgotten


class TicketBudget:
    """A limit on open tickets and the bytes they keep, over all tables of a server."""

    def __init__(self, max_tickets: int, max_bytes: int) -> None:
        self._max_tickets, self._max_bytes = max_tickets, max_bytes
        self._lock = threading.Lock()
        self.num_tickets = 0
        self.num_bytes = 0

    def take(self, num_bytes: int, own: Sequence[Ticket] = ()) -> None:
        """Account for one more ticket of a session, whose tickets own can be closed only by the session itself.

        Raises:
            LimitExceeded: the limit would be exceeded even without the tickets of other sessions, so waiting is futile.
            Overloaded: the server already keeps as many tickets or bytes as it may.
        """
        own_bytes = sum(ticket.num_bytes for ticket in own)
        if own_bytes + num_bytes > self._max_bytes or len(own) >= self._max_tickets:
            raise LimitExceeded(
                f"{len(own)} open tickets of this session keep {own_bytes} bytes, and this loss would add {num_bytes}; "
                f"the limits are max_ticket_bytes = {self._max_bytes} and max_open_tickets = {self._max_tickets}: "
                "commit or abort the step first (step() or zero_grad() of the optimizer), send fewer rows in a step, "
                "compute losses that do not train under torch.no_grad(), or raise the limit",
                limit="max_open_tickets" if len(own) >= self._max_tickets else "max_ticket_bytes",
            )
        with self._lock:
            if self.num_tickets >= self._max_tickets or self.num_bytes + num_bytes > self._max_bytes:
                raise Overloaded(
                    f"{self.num_tickets} open tickets keep {self.num_bytes} bytes; the limits are "
                    f"{self._max_tickets} and {self._max_bytes}: commit or abort steps",
                    retry_after_s=RETRY_AFTER_S,
                    limit="max_open_tickets" if self.num_tickets >= self._max_tickets else "max_ticket_bytes",
                )
            self.num_tickets += 1
            self.num_bytes += num_bytes

    def give_back(self, num_bytes: int, num_tickets: int = 1) -> None:
        """Account for the end of one ticket, or of a reply if num_tickets is 0."""
        with self._lock:
            self.num_tickets -= num_tickets
            self.num_bytes -= num_bytes


class Sessions:
    """All sessions of one table. Thread-safe."""

    def __init__(
        self, table_id: str, budget: TicketBudget, max_sessions: int, ttl_s: float, session_ttl_s: float = float("inf")
    ) -> None:
        self._table_id, self._budget, self._max_sessions, self._ttl_s = table_id, budget, max_sessions, ttl_s
        self._session_ttl_s = session_ttl_s
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._closed: OrderedDict[str, TicketState] = OrderedDict()
        self._num_made = 0
        self._num_ended = dict.fromkeys((TicketState.COMMITTED, TicketState.ABORTED, TicketState.EXPIRED), 0)

    def num_tickets(self) -> dict[str, int]:
        """Return the number of tickets ever opened, and the number that ended in each way; the rest are open."""
        with self._lock:
            return {"opened": self._num_made} | {state.value: num for state, num in self._num_ended.items()}

    @property
    def num_open(self) -> int:
        """Number of open tickets of this table."""
        with self._lock:
            return sum(len(session.tickets) for session in self._sessions.values())

    @property
    def num_known(self) -> int:
        """Number of sessions that are remembered."""
        with self._lock:
            return len(self._sessions)

    def knows(self, session: str) -> bool:
        """Return True if this session was seen and has not been forgotten."""
        with self._lock:
            return session in self._sessions

    def begin(
        self,
        session: str,
        step: int,
        part: int,
        digest: bytes,
        num_bytes: int,
        committed: int,
        now: float,
        *,
        reply_bytes: int = 0,
        after_step: int = 0,
    ) -> tuple[Ticket, bool]:
        """Return the ticket of a key, and True if it must be scored; the caller then sets `ready`.

        committed is the session's highest applied step. num_bytes includes reply_bytes. Tickets up to after_step are
        about to be closed by a commit. The loss of another key shows that earlier replies of the session have arrived,
        so these are forgotten.

        Raises:
            StepReused: the key has an open ticket with a different payload.
            StepTooOld: the step was already applied or given up.
            LimitExceeded: no more tickets can be kept until the session closes some of its own.
            Overloaded: no more tickets or sessions can be kept.
        """
        with self._lock:
            # A known session is touched even if the call is refused.
            known = self._touch(session, now) if session in self._sessions else Session(now)
            ticket = known.tickets.get((step, part))
            if ticket is not None:
                if ticket.digest != digest:
                    raise StepReused(
                        f"session {session!r}, step {step}, part {part} was already sent with a different payload",
                        field="step",
                    )
                return ticket, False
            if step <= max(committed, known.given_up):
                raise StepTooOld(
                    f"step {step} is not above {max(committed, known.given_up)}, the last step that was committed or "
                    "given up",
                    field="step",
                )
            self._forget_replies(known)
            own = [one for one in known.tickets.values() if one.step > after_step and not one.is_held]
            self._budget.take(num_bytes, own)
            try:
                known = self._touch(session, now)
            except Overloaded:
                self._budget.give_back(num_bytes)
                raise
            self._num_made += 1
            name = f"{self._table_id}-{self._num_made}"
            ticket = known.tickets[step, part] = Ticket(name, session, step, part, digest, num_bytes, reply_bytes)
            known.answered.append(ticket)
            return ticket, True

    def _forget_replies(self, known: Session) -> None:
        """Forget the replies of all losses of a session that have been scored."""
        scored = [ticket for ticket in known.answered if ticket.ready.is_set()]
        known.answered = [ticket for ticket in known.answered if not ticket.ready.is_set()]
        for ticket in scored:
            if ticket.reply is not None:
                ticket.reply, ticket.is_forgotten = None, True
                ticket.num_bytes -= ticket.reply_bytes
                self._budget.give_back(ticket.reply_bytes, num_tickets=0)

    def given_up(self, session: str) -> int:
        """Return the highest step that a session gave up, or 0 if it gave up none."""
        with self._lock:
            known = self._sessions.get(session)
            return known.given_up if known else 0

    def _touch(self, session: str, now: float) -> Session:
        known = self._sessions.get(session)
        if known is None:
            self._make_room()
            known = self._sessions[session] = Session(now)
        known.last_seen = now
        self._sessions.move_to_end(session)
        return known

    def _make_room(self) -> None:
        if len(self._sessions) < self._max_sessions:
            return
        idle = next((name for name, session in self._sessions.items() if not session.tickets), None)
        if idle is None:
            full = f"all {self._max_sessions} sessions hold open tickets: commit or abort steps"
            raise Overloaded(full, retry_after_s=RETRY_AFTER_S, limit="max_sessions")
        del self._sessions[idle]

    def discard(self, ticket: Ticket) -> None:
        """Forget a ticket whose scoring failed, as if it had never been requested."""
        with self._lock:
            self._close(ticket, TicketState.ABORTED, remember=False)

    def find(self, session: str, step: int, names: list[str], now: float) -> list[Ticket]:
        """Return the named tickets of one step, open and ready, and hold them until `commit` or `release`.

        Raises:
            SessionExpired: the session is unknown.
            TicketUnknown, TicketAborted, TicketExpired: a part cannot be committed; the error names the first.
            InvalidArgument: a ticket belongs to a different step.
        """
        with self._lock:
            known = self._sessions.get(session)
            if known is None:
                raise SessionExpired(f"session {session!r} is unknown or forgotten; start a new one", field="session")
            self._touch(session, now)
            by_name = {ticket.name: ticket for ticket in known.tickets.values()}
            tickets = [self._one(by_name, step, name, place) for place, name in enumerate(names)]
            for ticket in tickets:
                ticket.is_held = True
            return tickets

    def _one(self, by_name: dict[str, Ticket], step: int, name: str, place: int) -> Ticket:
        where = {"field": "parts", "index": place}
        ticket = by_name.get(name)
        if ticket is not None and ticket.ready.is_set():
            if ticket.step != step:
                raise InvalidArgument(f"parts[{place}] was scored for step {ticket.step}, not {step}", **where)
            return ticket
        state = self._closed.get(name)
        if state is TicketState.ABORTED:
            raise TicketAborted(f"parts[{place}]: the ticket was given up", **where)
        if state is TicketState.EXPIRED:
            raise TicketExpired(f"parts[{place}]: the ticket was open for more than {self._ttl_s} s", **where)
        raise TicketUnknown(f"parts[{place}]: no such ticket is open in this session", **where)

    def release(self, tickets: list[Ticket]) -> None:
        """Release the tickets of a commit that was not applied; they are open as before."""
        with self._lock:
            for ticket in tickets:
                ticket.is_held = False

    def commit(self, tickets: list[Ticket]) -> None:
        """Close committed tickets, and give up all other tickets of their session up to that step."""
        with self._lock:
            for ticket in tickets:
                self._close(ticket, TicketState.COMMITTED)
            known = self._sessions.get(tickets[0].session)
            if known is not None:
                self._give_up(known, tickets[0].step)

    def abort(self, session: str, step: int, now: float) -> int:
        """Give up the open tickets of this and earlier steps, and return how many.

        Raises:
            SessionExpired: the session is unknown.
        """
        with self._lock:
            if session not in self._sessions:
                raise SessionExpired(f"session {session!r} is unknown or forgotten", field="session")
            return self._give_up(self._touch(session, now), step)

    def _give_up(self, known: Session, step: int) -> int:
        known.given_up = max(known.given_up, step)
        doomed = [ticket for ticket in known.tickets.values() if ticket.step <= step]
        for ticket in doomed:
            self._close(ticket, TicketState.ABORTED)
        return len(doomed)

    def expire(self, now: float) -> int:
        """Close the open tickets of every session that had no call for ttl_s, and return how many.

        A session without tickets is forgotten after session_ttl_s, but its steps stay in the ledger.
        """
        with self._lock:
            stale = [s for s in self._sessions.values() if now - s.last_seen > self._ttl_s]
            doomed = [ticket for session in stale for ticket in session.tickets.values() if is_idle(ticket)]
            for ticket in doomed:
                self._close(ticket, TicketState.EXPIRED)
            self._forget(now)
            return len(doomed)

    def _forget(self, now: float) -> None:
        idle = [name for name, s in self._sessions.items() if now - s.last_seen > self._session_ttl_s and not s.tickets]
        for name in idle:
            del self._sessions[name]

    def clear(self) -> None:
        """Abort every ticket, because the table is deleted or has lost rows."""
        with self._lock:
            for session in self._sessions.values():
                for ticket in list(session.tickets.values()):
                    self._close(ticket, TicketState.ABORTED)

    def _close(self, ticket: Ticket, state: TicketState, remember: bool = True) -> None:
        known = self._sessions.get(ticket.session)
        if ticket.state is not TicketState.OPEN:
            return
        ticket.state = state
        self._num_ended[state] += 1
        if known is not None:
            known.tickets.pop((ticket.step, ticket.part), None)
        self._budget.give_back(ticket.num_bytes)
        ticket.staged = ticket.lse = ticket.reply = None
        ticket.steepness = 1.0
        ticket.ready.set()
        if remember:
            self._closed[ticket.name] = state
            while len(self._closed) > KEPT_CLOSED:
                self._closed.popitem(last=False)


def is_idle(ticket: Ticket) -> bool:
    """Return True if no call is working on a ticket."""
    return ticket.ready.is_set() and not ticket.is_held
