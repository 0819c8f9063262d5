"""A ticket is OPEN -> COMMITTED | ABORTED | EXPIRED, its session's steps only grow, and every byte is released."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
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
from shardloss_server.frontend import session as session_module
from shardloss_server.frontend.replies import NO_REPLY
from shardloss_server.frontend.session import Sessions, Ticket, TicketBudget, TicketState

TTL_S = 600.0
BYTES = 100
NOW = 1000.0


class World:
    """Sessions of one table with a budget and a clock that only the test advances."""

    def __init__(self, max_sessions: int = 8, max_tickets: int = 64, max_bytes: int = 1 << 20) -> None:
        self.budget = TicketBudget(max_tickets, max_bytes)
        self.sessions = Sessions("table", self.budget, max_sessions, TTL_S)
        self.now = NOW

    def open(
        self, session: str = "a", step: int = 1, part: int = 0, digest: bytes = b"x", committed: int = 0
    ) -> Ticket:
        """Return a scored ticket."""
        ticket, is_new = self.sessions.begin(session, step, part, digest, BYTES, committed, self.now)
        assert is_new
        ticket.ready.set()
        return ticket

    def find(self, *tickets: Ticket, session: str = "a", step: int = 1) -> list[Ticket]:
        return self.sessions.find(session, step, [ticket.name for ticket in tickets], self.now)


@pytest.fixture
def world() -> World:
    return World()


def test_the_tickets_that_ended_last_are_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of one of them says how it ended; older ones are unknown."""
    monkeypatch.setattr(session_module, "KEPT_CLOSED", 2)
    tickets = [world.open(step=step) for step in (1, 2, 3)]
    for step in (1, 2, 3):
        world.sessions.abort("a", step, world.now)
    for ticket, error in zip(tickets, (TicketUnknown, TicketAborted, TicketAborted), strict=True):
        with pytest.raises(error):
            world.find(ticket, step=ticket.step)


# One key, one ticket


def test_a_repeat_gets_the_same_ticket(world: World) -> None:
    """The same key with the same payload opens nothing new, however often it is sent."""
    ticket = world.open()
    again, is_new = world.sessions.begin("a", 1, 0, b"x", BYTES, 0, world.now)
    assert again is ticket
    assert not is_new
    assert world.sessions.num_open == world.budget.num_tickets == 1


def test_another_payload_under_the_same_key_is_refused(world: World) -> None:
    """StepReused is raised, and the open ticket stays."""
    ticket = world.open()
    with pytest.raises(StepReused, match="step 1, part 0"):
        world.open(digest=b"y")
    assert world.find(ticket) == [ticket]
    assert world.budget.num_tickets == 1


def test_parts_steps_and_sessions_are_different_keys(world: World) -> None:
    """Micro-batches, later steps and other trainers each have their own ticket with a different name."""
    tickets = [world.open(), world.open(part=1), world.open(step=2), world.open(session="b")]
    assert len({ticket.name for ticket in tickets}) == world.sessions.num_open == 4


def test_callers_at_the_same_time_share_one_ticket(world: World) -> None:
    """If 16 threads begin one key at once, exactly one of them is told to score."""
    num_threads, rounds = 16, 50
    barrier = threading.Barrier(num_threads)
    interval = sys.getswitchinterval()

    def begin(step: int) -> tuple[Ticket, bool]:
        barrier.wait(timeout=30)
        return world.sessions.begin("a", step, 0, b"x", BYTES, 0, world.now)

    sys.setswitchinterval(1e-6)  # threads take turns between almost any two operations
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            for step in range(1, rounds + 1):
                answers = list(pool.map(begin, [step] * num_threads))
                assert sum(is_new for _, is_new in answers) == 1
                assert len({id(ticket) for ticket, _ in answers}) == 1
    finally:
        sys.setswitchinterval(interval)
    assert world.budget.num_tickets == rounds


# Commit


def test_committed_tickets_are_closed_and_their_step_is_done(world: World) -> None:
    """After the commit the step cannot begin again, and the next one can."""
    tickets = [world.open(part=0), world.open(part=1)]
    assert world.find(*tickets) == tickets
    world.sessions.commit(tickets)
    assert {ticket.state for ticket in tickets} == {TicketState.COMMITTED}
    assert world.sessions.num_open == world.budget.num_tickets == world.budget.num_bytes == 0
    with pytest.raises(StepTooOld, match="not above 1"):
        world.open(part=2)
    with pytest.raises(TicketUnknown):
        world.find(tickets[0])
    world.open(step=2)


def test_a_commit_gives_up_what_it_left_out(world: World) -> None:
    """Parts of this and earlier steps that the commit does not name are aborted; parts of later steps stay open."""
    early, named, left_out, later = world.open(), world.open(step=2), world.open(step=2, part=1), world.open(step=3)
    other = world.open(session="b")
    world.sessions.commit([named])
    assert [t.state.name for t in (early, named, left_out, later, other)] == [
        "ABORTED",
        "COMMITTED",
        "ABORTED",
        "OPEN",
        "OPEN",
    ]


def test_a_step_below_what_the_ledger_holds_is_too_old(world: World) -> None:
    """The highest applied step is taken from the ledger, even if this process has never seen that step."""
    for step in (1, 4, 5):
        with pytest.raises(StepTooOld, match="not above 5"):
            world.open(step=step, committed=5)
    world.open(step=6, committed=5)


def test_a_commit_names_the_first_part_at_fault(world: World) -> None:
    """TicketUnknown, and InvalidArgument for a ticket of another step, say which part is at fault."""
    ticket, of_step_2 = world.open(), world.open(step=2)
    with pytest.raises(TicketUnknown) as unknown:
        world.sessions.find("a", 1, [ticket.name, "no such ticket"], world.now)
    assert (unknown.value.field, unknown.value.index) == ("parts", "1")
    with pytest.raises(InvalidArgument, match=r"parts\[1\] was scored for step 2, not 1") as wrong:
        world.find(ticket, of_step_2)
    assert (wrong.value.field, wrong.value.index) == ("parts", "1")
    assert world.sessions.num_open == 2


def test_a_ticket_belongs_to_its_session(world: World) -> None:
    """A session cannot commit a ticket of another session."""
    ticket = world.open()
    world.open(session="b")
    with pytest.raises(TicketUnknown):
        world.find(ticket, session="b")


def test_a_ticket_that_is_still_being_scored_cannot_be_committed(world: World) -> None:
    """The ticket's name is not published before its scoring has ended."""
    ticket, _ = world.sessions.begin("a", 1, 0, b"x", BYTES, 0, world.now)
    with pytest.raises(TicketUnknown):
        world.find(ticket)
    ticket.ready.set()
    assert world.find(ticket) == [ticket]


def test_an_unknown_session_is_expired(world: World) -> None:
    """Committing or aborting a session never seen raises SessionExpired and leaves the session unknown."""
    with pytest.raises(SessionExpired, match="'a' is unknown"):
        world.sessions.find("a", 1, ["ticket"], world.now)
    with pytest.raises(SessionExpired):
        world.sessions.abort("a", 1, world.now)
    assert not world.sessions.knows("a")


# Abort


def test_aborted_steps_are_done_with(world: World) -> None:
    """An abort closes its session's tickets up to its step and returns their number; all others stay open."""
    doomed = [world.open(), world.open(part=1), world.open(step=2)]
    later, other = world.open(step=3), world.open(session="b")
    assert world.sessions.abort("a", 2, world.now) == 3
    assert {ticket.state for ticket in doomed} == {TicketState.ABORTED}
    assert (later.state, other.state) == (TicketState.OPEN, TicketState.OPEN)
    with pytest.raises(TicketAborted) as refused:
        world.find(later, doomed[0], step=3)
    assert refused.value.index == "1"
    with pytest.raises(StepTooOld, match="not above 2"):
        world.open(step=2, part=7)
    assert world.sessions.abort("a", 2, world.now) == 0


def test_an_abort_wakes_who_waits_for_the_reply(world: World) -> None:
    """A ticket that is aborted during scoring is ready, closed and without a reply."""
    ticket, _ = world.sessions.begin("a", 1, 0, b"x", BYTES, 0, world.now)
    world.sessions.abort("a", 1, world.now)
    assert ticket.ready.is_set()
    assert ticket.state is TicketState.ABORTED
    assert ticket.reply is None


def test_a_failed_scoring_leaves_no_trace(world: World) -> None:
    """The key of a discarded ticket can begin again; its old name is unknown, not aborted."""
    failed = world.open()
    world.sessions.discard(failed)
    assert world.budget.num_tickets == world.budget.num_bytes == 0
    again = world.open()
    assert again.name != failed.name
    with pytest.raises(TicketUnknown):
        world.find(failed)


def test_closing_twice_gives_back_once(world: World) -> None:
    """After discard on abort, or abort on commit, the budget has counted a ticket once and its first outcome stays."""
    aborted, committed = world.open(), world.open(session="b")
    world.sessions.abort("a", 1, world.now)
    world.sessions.discard(aborted)
    world.sessions.commit([committed])
    world.sessions.abort("b", 1, world.now)
    assert world.budget.num_tickets == world.budget.num_bytes == 0
    assert (aborted.state, committed.state) == (TicketState.ABORTED, TicketState.COMMITTED)


# Expiry


def test_only_a_silent_session_expires(world: World) -> None:
    """Tickets expire if their session makes no call for longer than the time to live."""
    ticket = world.open()
    world.open(session="b")
    assert world.sessions.expire(NOW + TTL_S) == 0
    world.sessions.abort("b", 0, NOW + TTL_S)
    assert world.sessions.expire(NOW + TTL_S + 1) == 1
    assert ticket.state is TicketState.EXPIRED
    with pytest.raises(TicketExpired, match="600") as refused:
        world.find(ticket)
    assert refused.value.index == "0"
    assert world.budget.num_tickets == 1


@pytest.mark.parametrize("call", ["begin", "repeat", "find", "abort"])
def test_any_call_of_a_session_renews_its_tickets(world: World, call: str) -> None:
    """begin, find and abort each restart the time to live."""
    ticket = world.open(step=2)
    world.now += TTL_S
    if call == "begin":
        world.open(step=3)
    elif call == "repeat":
        world.sessions.begin("a", 2, 0, b"x", BYTES, 0, world.now)
    elif call == "find":
        world.sessions.release(world.find(ticket, step=2))
    else:
        world.sessions.abort("a", 1, world.now)
    assert world.sessions.expire(world.now + TTL_S) == 0
    assert world.sessions.expire(world.now + TTL_S + 1) > 0
    assert ticket.state is TicketState.EXPIRED


def test_a_ticket_does_not_expire_while_it_is_scored(world: World) -> None:
    """The ticket stays open, however long its scoring takes."""
    ticket, _ = world.sessions.begin("a", 1, 0, b"x", BYTES, 0, world.now)
    assert world.sessions.expire(NOW + 10 * TTL_S) == 0
    ticket.ready.set()
    assert world.sessions.expire(NOW + 10 * TTL_S) == 1


def test_an_expired_step_may_be_scored_again(world: World) -> None:
    """Expiry does not finish a step: the same key opens a new ticket."""
    world.open()
    world.sessions.expire(NOW + TTL_S + 1)
    ticket = world.open()
    assert world.find(ticket) == [ticket]


# Limits


def test_the_budget_refuses_one_ticket_too_many() -> None:
    """Overloaded carries a retry delay, and a closed ticket makes room."""
    world = World(max_tickets=2)
    first = world.open()
    world.open("b")
    with pytest.raises(Overloaded) as refused:
        world.open("b", part=1)
    assert refused.value.retry_after_s > 0
    assert world.sessions.num_open == 2
    world.sessions.discard(first)
    world.open("b", part=1)


def test_the_budget_refuses_one_byte_too_many() -> None:
    """Kept bytes have their own limit."""
    world = World(max_bytes=2 * BYTES + BYTES // 2)
    world.open()
    world.open("b")
    with pytest.raises(Overloaded, match=f"keep {2 * BYTES} bytes"):
        world.open("b", part=1)
    assert world.budget.num_bytes == 2 * BYTES


@pytest.mark.parametrize("limit", ["max_open_tickets", "max_ticket_bytes"])
def test_a_session_that_fills_a_limit_itself_is_not_told_to_wait(limit: str) -> None:
    """LimitExceeded names the limits with their values, because only the session's own commit or abort helps."""
    limits = {"max_tickets": 2} if limit == "max_open_tickets" else {"max_bytes": 2 * BYTES + BYTES // 2}
    world = World(**limits)
    world.open()
    world.open(step=2)
    with pytest.raises(LimitExceeded, match=r"max_ticket_bytes = \d+ and max_open_tickets = \d+") as refused:
        world.open(step=2, part=1)
    assert refused.value.details["limit"] == limit
    world.sessions.abort("a", 1, world.now)
    world.open(step=2, part=1)


def test_a_step_that_is_about_to_be_committed_is_worth_waiting_for() -> None:
    """The loss after a step gets Overloaded: it fits once that step's commit, which is on its way, is applied."""
    world = World(max_tickets=2)
    tickets = [world.open(), world.open(part=1)]
    with pytest.raises(Overloaded):
        world.sessions.begin("a", 2, 0, b"x", BYTES, 0, world.now, after_step=1)
    world.find(*tickets)
    with pytest.raises(Overloaded):
        world.open(step=2)


def test_the_next_loss_forgets_the_replies_before_it(world: World) -> None:
    """A scored ticket's reply is released when another key of its session begins; that of another session stays."""
    first, _ = world.sessions.begin("a", 1, 0, b"x", 2 * BYTES, 0, world.now, reply_bytes=BYTES)
    other, _ = world.sessions.begin("b", 1, 0, b"x", 2 * BYTES, 0, world.now, reply_bytes=BYTES)
    unscored, _ = world.sessions.begin("a", 1, 1, b"x", 2 * BYTES, 0, world.now, reply_bytes=BYTES)
    assert world.budget.num_bytes == 6 * BYTES
    for ticket in (first, other, unscored):
        ticket.reply = NO_REPLY
    for ticket in (first, other):
        ticket.ready.set()
    world.sessions.begin("a", 1, 2, b"x", 2 * BYTES, 0, world.now, reply_bytes=BYTES)
    assert [ticket.reply for ticket in (first, other, unscored)] == [None, NO_REPLY, NO_REPLY]
    assert (world.budget.num_tickets, world.budget.num_bytes) == (4, 7 * BYTES)
    world.sessions.clear()
    assert (world.budget.num_tickets, world.budget.num_bytes) == (0, 0)


def test_an_idle_session_makes_room_and_a_busy_one_does_not() -> None:
    """At max_sessions the least recent session without tickets is forgotten; if none is, the call is refused."""
    world = World(max_sessions=2)
    world.open("a")
    idle = world.open("b")
    with pytest.raises(Overloaded, match="all 2 sessions"):
        world.open("c")
    world.sessions.discard(idle)
    world.open("c")
    assert [session for session in "abc" if world.sessions.knows(session)] == ["a", "c"]


def test_a_refused_ticket_changes_nothing() -> None:
    """If the budget refuses a ticket, its session stays unknown and no idle session is forgotten for it."""
    world = World(max_sessions=2, max_tickets=1)
    world.open("idle", step=3)
    world.sessions.abort("idle", 3, world.now)
    world.open("busy")
    with pytest.raises(Overloaded, match="open tickets"):
        world.open("new")
    assert [name for name in ("idle", "busy", "new") if world.sessions.knows(name)] == ["idle", "busy"]
    with pytest.raises(StepTooOld):
        world.open("idle", step=3)


def test_one_budget_serves_all_tables() -> None:
    """Tickets of two tables count towards the same budget, and their names differ."""
    budget = TicketBudget(1, 1 << 20)
    one, other = (Sessions(name, budget, 8, TTL_S) for name in ("one", "other"))
    ticket, _ = one.begin("a", 1, 0, b"x", BYTES, 0, NOW)
    with pytest.raises(Overloaded):
        other.begin("a", 1, 0, b"x", BYTES, 0, NOW)
    one.clear()
    assert budget.num_tickets == 0
    assert other.begin("a", 1, 0, b"x", BYTES, 0, NOW)[0].name != ticket.name


def test_clearing_gives_everything_back(world: World) -> None:
    """Deleting a table closes all of its tickets and frees their budget."""
    tickets = [world.open(session, step) for session in "abc" for step in (1, 2)]
    world.sessions.clear()
    assert world.budget.num_tickets == world.budget.num_bytes == world.sessions.num_open == 0
    assert {ticket.state for ticket in tickets} == {TicketState.ABORTED}


class TicketMachine(RuleBasedStateMachine):
    """Random calls of three trainers, compared with a model of open keys and finished steps."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(max_sessions=3, max_tickets=7)
        self.open: dict[tuple[str, int, int], Ticket] = {}
        self.done = dict.fromkeys("abc", 0)
        self.seen: dict[str, float] = {}

    def close(self, keys: list[tuple[str, int, int]], state: TicketState) -> None:
        for key in keys:
            assert self.open.pop(key).state is state

    @rule(
        session=st.sampled_from("abc"),
        step=st.integers(1, 4),
        part=st.integers(0, 2),
        digest=st.sampled_from([b"x", b"y"]),
    )
    def begin(self, session: str, step: int, part: int, digest: bytes) -> None:
        known = self.open.get((session, step, part))
        try:
            ticket, is_new = self.world.sessions.begin(session, step, part, digest, BYTES, 0, self.world.now)
        except StepReused:
            assert known is not None
            assert known.digest != digest
        except StepTooOld:
            assert known is None
            assert step <= self.done[session]
        except Overloaded:
            assert known is None
            assert len(self.open) == 7
            assert {key[0] for key in self.open} != {session}
        except LimitExceeded:
            assert known is None
            assert len(self.open) == 7
            assert {key[0] for key in self.open} == {session}
        else:
            assert is_new == (known is None)
            assert known in (None, ticket)
            assert step > self.done[session] or known is not None
            ticket.ready.set()
            self.open[session, step, part] = ticket
        self.seen[session] = self.world.now

    @rule(session=st.sampled_from("abc"), step=st.integers(1, 4))
    def commit(self, session: str, step: int) -> None:
        named = [ticket for (s, t, _), ticket in self.open.items() if (s, t) == (session, step)]
        if not named:
            return
        assert self.world.find(*named, session=session, step=step) == named
        self.world.sessions.commit(named)
        self.close([k for k in self.open if k[0] == session and k[1] == step], TicketState.COMMITTED)
        self.close([k for k in self.open if k[0] == session and k[1] < step], TicketState.ABORTED)
        self.done[session] = max(self.done[session], step)
        self.seen[session] = self.world.now

    @rule(session=st.sampled_from("abc"), step=st.integers(1, 4))
    def abort(self, session: str, step: int) -> None:
        doomed = [key for key in self.open if key[0] == session and key[1] <= step]
        try:
            assert self.world.sessions.abort(session, step, self.world.now) == len(doomed)
        except SessionExpired:
            assert session not in self.seen
            return
        self.close(doomed, TicketState.ABORTED)
        self.done[session] = max(self.done[session], step)
        self.seen[session] = self.world.now

    @rule(elapsed=st.sampled_from([1.0, TTL_S / 2, TTL_S + 1]))
    def wait(self, elapsed: float) -> None:
        self.world.now += elapsed
        doomed = [key for key in self.open if self.world.now - self.seen[key[0]] > TTL_S]
        assert self.world.sessions.expire(self.world.now) == len(doomed)
        self.close(doomed, TicketState.EXPIRED)

    @invariant()
    def the_books_balance(self) -> None:
        assert self.world.sessions.num_open == self.world.budget.num_tickets == len(self.open)
        assert self.world.budget.num_bytes == BYTES * len(self.open)
        assert all(ticket.state is TicketState.OPEN for ticket in self.open.values())


TestTicketMachine = TicketMachine.TestCase
TestTicketMachine.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
