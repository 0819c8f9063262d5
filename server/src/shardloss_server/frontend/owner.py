"""The owner of a table: it numbers the table's commits and gives all its shards one order of work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from shardloss.errors import (
    DeadlineExceeded,
    InvalidArgument,
    LimitExceeded,
    Overloaded,
    RequestError,
    RowsLost,
    ServerUnavailable,
    ShardlossError,
    Stale,
    StepReused,
    StepTooOld,
    TableNotFound,
    TableUnavailable,
)
from torch import Tensor

from shardloss_server.cluster.group import Order, Pending, ShardGroup, ShardMissing, Staged, WorkerLost
from shardloss_server.config import Limits
from shardloss_server.frontend import validate
from shardloss_server.frontend.counts import ClassCounts, CountsRead
from shardloss_server.frontend.deadline import CALLER_CHECK_S, Deadline
from shardloss_server.frontend.finish import merge
from shardloss_server.frontend.meter import meter
from shardloss_server.frontend.replies import LastReplies
from shardloss_server.frontend.request import CommitReply, CommitRequest
from shardloss_server.frontend.session import Sessions, Ticket, TicketBudget
from shardloss_server.frontend.steps import Doubt, Steps
from shardloss_server.frontend.turns import Turns
from shardloss_server.numerics.optimizer import State
from shardloss_server.shard.ledger import Outcome
from shardloss_server.shard.record import (
    LabelTarget,
    Mined,
    OutOfMemory,
    Part,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    StepKey,
    TableSpec,
    Upstream,
)

MAX_BACKLOG = 8  # abandoned reads queued per worker; above that, no more are started
RETRY_AFTER_S = 0.1
KEPT_RECORD_BYTES = 16 * 2**20  # a larger step is forgotten by the shards as soon as all have applied it

T = TypeVar("T")
log = logging.getLogger(__name__)


class TableOwner:
    """One table's versions, ledger and sessions, in front of the group that holds its shards.

    `_order` is held while work is started, so every shard sees scores, commits and writes in one order and a fan-out
    reads one version. `_commits` is held for the whole of a commit or write. After a change whose outcome is unknown
    the table is in doubt: the next call first brings all shards to the highest version that any of them reached
    (`ShardGroup.repair`). If no shard has the record of the change, the change never happened.
    """

    def __init__(
        self,
        spec: TableSpec,
        group: ShardGroup,
        limits: Limits,
        budget: TicketBudget,
        turns: Turns,
        table_id: str,
    ) -> None:
        self.spec, self.limits, self._turns, self.table_id = spec, limits, turns, table_id
        self.key = self.reference  # the table's key on the shards, which a renaming does not change
        self.sessions = Sessions(table_id, budget, limits.max_sessions, limits.ticket_ttl_s, limits.session_ttl_s)
        self.steps = Steps(limits.max_sessions)
        self.last_replies = LastReplies()
        self.counts = ClassCounts(spec.num_classes, spec.count_labels)
        self._group = group
        self.distribution_order = threading.Lock()  # one label distribution is collected at a time
        self._collected_for: Ticket | None = None  # its commit needs what the shards collected for it
        self._order = threading.Lock()
        self._commits = threading.Lock()
        self._line = Turns(1)  # calls queue here for `_commits`
        self._lost: str | None = None
        self._retired = False
        self._closing = False
        self._dropping: Pending[object]  # set when the table is retired
        self._probe: Pending[object] | None = None
        self._filled = threading.Event()
        self.filled = 0.0  # share of the rows that have their initial values

    # Creating (frontend/creation.py)

    @property
    def is_filled(self) -> bool:
        """True once the table has been created."""
        return self._filled.is_set()

    def note_filled(self, share: float) -> None:
        """Record the share of the rows that have their initial values; at 1 the table has been created."""
        self.filled = share
        if share == 1:
            self._filled.set()

    def refuse_unfinished(self) -> None:
        """Refuse to use a table that is still being created.

        Raises:
            TableUnavailable: it is not filled yet; repeat the call.
        """
        if not self.is_filled:
            raise TableUnavailable(
                f"table {self.spec.name!r} is being created: {self.filled:.0%} of its rows are filled; repeat the call",
                retry_after_s=RETRY_AFTER_S,
            )

    def wait_until_filled(self, deadline: Deadline) -> None:
        """Wait until another call has created the table.

        Raises:
            TableUnavailable: that creation failed, or the table was deleted; repeat the call.
            RowsLost: the table has lost rows since.
        """
        deadline.wait(lambda seconds: self._filled.wait(seconds) or self._retired, "the table was filled")
        if not self.is_filled:
            raise TableUnavailable(f"the creation of table {self.spec.name!r} has ended; repeat the call")
        if self._lost is not None:
            self._refuse_lost()

    @property
    def reference(self) -> str:
        """NAME#ID: the table under its present name; the id is new each time a table is created."""
        return f"{self.spec.name}#{self.table_id}"

    @property
    def lost(self) -> str | None:
        """The reason why rows of the table are lost, or None if all rows are present."""
        return self._lost

    def notice_loss(self) -> None:
        """Ask the shards for their version, without waiting, so that a loss of rows is seen before anyone calls."""
        if self._lost is not None or self._retired or not self.is_filled:
            return
        self._probe = self._probe or self._group.applied_versions(self.key)
        try:
            self._probe.result(0.0)
        except TimeoutError:
            return
        except ShardMissing as error:
            if not self._retired:
                self._lose_rows(error)
        except Exception as error:  # unknown until the next probe
            log.debug("table %s cannot be probed: %s", self.spec.name, error)
        self._probe = None

    def retire(self) -> None:
        """Retire a deleted table: refuse later calls, abort the tickets and free the shards. Idempotent."""
        self._retired = True
        self.sessions.clear()
        self.steps.wake()
        self._dropping = self._group.drop(self.key)

    def is_freed(self) -> bool:
        """Return True if every worker has freed the shards of the retired table; after a failure, free them again."""
        try:
            self._dropping.result(0.0)
        except TimeoutError:
            return False
        except Exception as error:
            log.warning("table %s: freeing its shards failed and is repeated: %s", self.spec.name, error)
            self._dropping = self._group.drop(self.key)
            return False
        return True

    def close(self) -> None:
        """End the waits for a step, because the server is stopping."""
        self._closing = True
        self.steps.wake()

    # Reading

    def stage(self, part: Part) -> Staged:
        """Place a part where the shards can read it."""
        return self._guarded(lambda: self._group.stage(part), changing=False)

    def score(self, staged: Staged, with_gradient: bool, keep: bool, deadline: Deadline) -> list[Score]:
        """Score a staged part on every shard, or run of shards, at one version; keep what the part's step can reuse."""
        scores = self.ask(lambda: self._group.score(self.key, staged, with_gradient, keep), deadline)
        self.same_version([score.version for score in scores])
        return scores

    def mine(self, staged: Staged, k: int, deadline: Deadline) -> list[Mined]:
        """Return the k best candidates of each row on every shard."""
        return self.ask(lambda: self._group.mine(self.key, staged, k), deadline)

    def begin_labels(self, name: str, ticket: Ticket | None, deadline: Deadline) -> None:
        """Make the shards collect the gradient of a label distribution for a ticket.

        Drops what the shards collected before. The caller must hold `distribution_order`.
        """
        self._ensure_settled(deadline)  # a step in doubt may need what was collected before
        self._give_up_collected()
        self._collected_for = ticket
        self.ask(lambda: self._group.begin_labels(self.key, name), deadline)

    def add_labels(
        self, staged: Staged, first_class: int, weights: Tensor, g: Tensor | None, deadline: Deadline
    ) -> list[LabelTarget]:
        """Return every shard's target of a piece of a label distribution; with g [N], collect its gradient there."""
        return self.ask(lambda: self._group.add_labels(self.key, staged, first_class, weights, g), deadline)

    def forget_labels(self) -> None:
        """Free what the shards collected and discard the ticket it was for, unless that ticket's step is in doubt."""
        doubt = self.steps.doubt
        if doubt is None or not any(ticket is self._collected_for for ticket in doubt.tickets):
            self._give_up_collected()
            self._group.forget_labels(self.key)

    def _give_up_collected(self) -> None:
        """Discard the ticket of the collected gradient: it cannot be committed now, and a repeat must stream again."""
        if self._collected_for is not None:
            self.sessions.discard(self._collected_for)
            self._collected_for = None

    def gradient(self, staged: Staged, upstream: Upstream, version: int, deadline: Deadline) -> list[RowGradient]:
        """Return the gradient of every shard's touched rows at the version that produced the upstream's lse.

        Raises:
            TableUnavailable: another commit was applied in between; score again.
        """
        with self._changing(deadline, "a commit of this table"):
            if self.steps.version != version:
                raise TableUnavailable("a commit was applied between the loss and its table gradient; repeat the call")
            return self.ask(lambda: self._group.gradient(self.key, staged, upstream), deadline, settled=True)

    def read(self, class_ids: Tensor, deadline: Deadline, with_state: bool = False) -> Rows:
        """Read rows [M, D] and biases [M] of class_ids [M] at one version; with_state adds their optimizer state."""
        pieces = self.ask(lambda: self._group.read(self.key, class_ids, with_state), deadline)
        version = self.same_version([piece.version for piece in pieces])
        owner = self.spec.placement.shard_of(class_ids)
        in_order = torch.argsort(torch.cat([torch.nonzero(owner == k)[:, 0] for k in range(len(pieces))]))

        def whole(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts))[in_order]

        return Rows(
            class_ids,
            whole([piece.rows for piece in pieces]),
            whole([piece.biases for piece in pieces]),
            version,
            pieces[0].num_commits,
            {name: whole([piece.weight_state[name] for piece in pieces]) for name in pieces[0].weight_state},
            {name: whole([piece.bias_state[name] for piece in pieces]) for name in pieces[0].bias_state},
        )

    def read_counts(self, first_class: int, num_classes: int, deadline: Deadline) -> CountsRead:
        """Read the class counts of a range of classes between two commits, with the version at that moment."""
        with deadline.holding(self._commits, "a commit of this table"):
            self._settle(deadline)
            return CountsRead(*self.counts.read(first_class, num_classes), self.steps.version)

    def ask(self, start: Callable[[], Pending[T]], deadline: Deadline, settled: bool = False) -> T:
        """Start work on every shard once its turn comes, and wait for its result.

        `_order` is held only while the work is started. settled is True if the caller holds `_commits`.
        """
        if not settled:
            self._ensure_settled(deadline)
        deadline.check("work on the shards began")
        if self._group.backlog() > MAX_BACKLOG * len(self._group.devices):
            busy = "the workers are still busy with calls whose deadline has passed; repeat later"
            raise Overloaded(busy, retry_after_s=RETRY_AFTER_S, limit="backlog")
        with self._turn(deadline, holds_commits=settled):
            with deadline.holding(self._order, "the dispatch of another call on this table"):
                self._refuse_lost()
                began, pending = time.perf_counter(), start()
            try:
                return self._wait(pending, deadline, began)
            except DeadlineExceeded:
                pending.abandon()
                raise

    def same_version(self, versions: Sequence[int]) -> int:
        """Return the one version of all shards.

        Raises:
            TableUnavailable: the versions differ, as they may while a change is in doubt; repeat the call.
        """
        if len(set(versions)) > 1:
            raise TableUnavailable("the shards are at different versions and are being brought to one; repeat the call")
        return versions[0]

    def wait_for_step(self, session: str, step: int, deadline: Deadline, applied: bool) -> None:
        """Wait as `Steps.wait_for` does, but only while the step may still be applied.

        Raises:
            DeadlineExceeded: the step was not applied in time.
            StepTooOld: the step was given up.
            TableNotFound, RowsLost, ServerUnavailable: the step can no longer be applied.
        """

        def refuse() -> None:
            self._refuse_lost()
            if self._closing:
                raise ServerUnavailable("the server is shutting down")
            if self.sessions.given_up(session) >= step > self.steps.ledger.highest(session):
                raise StepTooOld(f"after_step = {step} was given up", field="after_step")

        self.steps.wait_for(session, step, deadline, applied, refuse)

    # Changing

    def commit(self, request: CommitRequest, deadline: Deadline) -> CommitReply:
        """Apply one optimizer step exactly once; a repeat is answered from the ledger."""
        with self._changing(deadline, "another commit of this table"):
            kept = self._kept_outcome(request)
            if kept is not None:
                return CommitReply(kept.version, kept.staleness, True)
            names = [part.ticket for part in request.parts]
            tickets = self.sessions.find(request.session, request.step, names, time.monotonic())
            try:
                return self._apply(request, tickets, deadline)
            except RequestError:
                if request.is_one_call:  # the caller does not know the ticket
                    for ticket in tickets:
                        self.sessions.discard(ticket)
                raise
            finally:
                if self.steps.doubt is None:  # tickets in doubt stay held until the doubt is settled
                    self.sessions.release(tickets)

    def abort(self, session: str, step: int, deadline: Deadline) -> int:
        """Give up a session's open tickets up to a step, after any commit under way, and return how many."""
        with deadline.holding(self._commits, "a commit of this table"):
            self._settle(deadline)
            num_aborted = self.sessions.abort(session, step, time.monotonic())
            self.steps.wake()
            return num_aborted

    def write(
        self,
        class_ids: Tensor,
        rows: Tensor,
        biases: Tensor | None,
        deadline: Deadline,
        *,
        weight_state: State | None = None,
        bias_state: State | None = None,
        num_commits: int | None = None,
    ) -> int:
        """Overwrite rows, state and num_commits as one new version and return that version.

        If there is nothing to write, return the current version.
        """
        with self._changing(deadline, "another commit of this table"):
            if len(class_ids) == 0 and num_commits is None:
                return self.steps.version
            version = self.steps.version + 1
            write = RowWrite(version, class_ids, rows, biases, weight_state or {}, bias_state or {}, num_commits)
            self._change(Doubt(write, []), lambda: self._group.write(self.key, write), deadline)
            return self.steps.version

    @contextmanager
    def _changing(self, deadline: Deadline, what: str) -> Iterator[None]:
        """Allow one change of the table at a time; callers take turns."""
        with self._line.turn(deadline), deadline.holding(self._commits, what):
            self._settle(deadline)
            yield

    def _turn(self, deadline: Deadline, holds_commits: bool) -> AbstractContextManager[None]:
        """Wait for a turn at the workers; a call that holds `_commits` while others wait for it goes first."""
        return self._turns.turn(deadline, goes_first=holds_commits and self._line.num_waiting > 0)

    def _apply(self, request: CommitRequest, tickets: list[Ticket], deadline: Deadline) -> CommitReply:
        upstreams, staleness = self._upstreams(request, tickets, deadline)
        key = StepKey(request.session, request.step, request.digest)
        order = Order(self.steps.version + 1, key, request.learning_rate, staleness, upstreams)
        staged = [ticket.staged for ticket in tickets if ticket.staged is not None]
        if len(staged) < len(tickets):
            raise TableUnavailable("a ticket was closed during its commit; repeat the call")
        self._change(Doubt(order, tickets), lambda: self._group.apply(self.key, order, staged), deadline)
        meter().flops += sum(ticket.flops for ticket in tickets)
        return CommitReply(self.steps.version, staleness, False)

    def _kept_outcome(self, request: CommitRequest) -> Outcome | None:
        outcome = self.steps.ledger.outcome(request.session, request.step)
        if outcome is not None and outcome.digest != request.digest:
            raise StepReused(f"step {request.step} was already committed with a different payload", field="step")
        highest = self.steps.ledger.highest(request.session)
        if outcome is None and request.step <= highest:
            raise StepTooOld(f"step {request.step} is not above {highest}, the last committed step", field="step")
        return outcome

    def _upstreams(
        self, request: CommitRequest, tickets: list[Ticket], deadline: Deadline
    ) -> tuple[tuple[Upstream, ...], int]:
        """Return (lse, g) of every part at the current version, and the largest staleness."""
        staleness = max(self.steps.version - ticket.version for ticket in tickets)
        if request.max_staleness is not None and staleness > request.max_staleness:
            raise Stale(
                f"a part was scored {staleness} commits ago; max_staleness is {request.max_staleness}",
                field="max_staleness",
            )
        upstreams = []
        for place, (part, ticket) in enumerate(zip(request.parts, tickets, strict=True)):
            lse = self._present_lse(ticket, deadline)
            validate.finite_logits(torch.isfinite(lse) | torch.isneginf(lse), "parts", place)
            g = torch.ones(ticket.num_rows) if part.g is None else part.g
            if len(g) != ticket.num_rows:
                raise InvalidArgument(
                    f"parts[{place}].g has {len(g)} rows; its ticket has {ticket.num_rows}",
                    field=f"parts[{place}].g",
                )
            scaled = g.double() * request.grad_scale
            validate.finite(scaled, f"parts[{place}].g", self.spec)
            largest = scaled * ticket.steepness * len(tickets) * max(1.0, request.learning_rate)
            dtype: torch.dtype = getattr(torch, self.spec.compute_dtype)
            overflows = ~torch.isfinite(largest.to(dtype))
            validate.refuse_where(overflows, g, f"parts[{place}].g", "could make a gradient of the table overflow")
            upstreams.append(Upstream(lse, scaled.to(dtype)))
        return tuple(upstreams), staleness

    def _present_lse(self, ticket: Ticket, deadline: Deadline) -> Tensor:
        """Return the lse of a part at the current version; with a stale lse the softmax would not sum to 1."""
        staged, lse = ticket.staged, ticket.lse
        if staged is None or lse is None:
            raise TableUnavailable("the ticket was closed during its commit; repeat the call")
        if ticket.version == self.steps.version:
            return lse
        scores = self.ask(lambda: self._group.score(self.key, staged, False, True), deadline, settled=True)
        meter().flops += ticket.flops
        self.same_version([score.version for score in scores])
        return merge(scores).statistics.lse

    def _change(self, doubt: Doubt, start: Callable[[], Pending[object]], deadline: Deadline) -> None:
        """Start a change on all shards and wait for it; the table is in doubt until all shards have answered."""
        if deadline.left() == 0:
            raise DeadlineExceeded("the deadline passed before the change began; nothing was changed")
        try:
            with self._turn(deadline, holds_commits=True):
                with deadline.holding(self._order, "the dispatch of another call on this table"):
                    self._refuse_lost()
                    self.steps.begin(doubt)
                    began, pending = time.perf_counter(), start()
                self.steps.wake()
                self._wait(pending, deadline, began, changing=True)
            self._note(doubt)
        finally:
            self.steps.under_way = False

    def _note(self, doubt: Doubt) -> None:
        """Record that all shards have applied the change, and mark its tickets as committed."""
        for ticket in doubt.tickets:
            if ticket.labels is not None:
                self.counts.learn(ticket.labels.numpy())
        self.steps.note()
        if sum(ticket.num_bytes for ticket in doubt.tickets) > KEPT_RECORD_BYTES:
            self._group.forget_record(self.key, doubt.change.version)  # no shard can lag behind it any more
        if doubt.tickets:
            self.sessions.commit(doubt.tickets)

    # Doubt

    def settle_if_idle(self, deadline: Deadline) -> None:
        """Settle a change that is still in doubt, unless another call is changing or settling the table."""
        if self.steps.doubt is not None and self._commits.acquire(blocking=False):
            try:
                self._settle(deadline)
            except ShardlossError as error:
                log.warning("table %s is still in doubt: %s", self.spec.name, error)
            finally:
                self._commits.release()

    def _ensure_settled(self, deadline: Deadline) -> None:
        """Settle what an earlier change left in doubt, or wait for the call that is settling it.

        A change that is still under way is not waited for: it is ahead of new work in the order of work.
        """
        if self.steps.doubt is not None and not self.steps.under_way:
            with deadline.holding(self._commits, "a commit of this table"):
                self._settle(deadline)

    def _settle(self, deadline: Deadline) -> None:
        self._refuse_lost()
        doubt = self.steps.doubt
        if doubt is None:
            return
        version = self._guarded(lambda: self._group.repair(self.key, deadline.left()), changing=True)
        if version >= doubt.change.version:
            self._note(doubt)
        else:
            self.steps.give_up()
            self.sessions.release(doubt.tickets)

    def _wait(self, pending: Pending[T], deadline: Deadline, began: float, changing: bool = False) -> T:
        """Wait for the answers to work that began at `began`, a time.perf_counter reading, and return them."""
        spent = meter()
        computed: Mapping[int, float] = {}

        def result() -> T:
            nonlocal computed
            while True:
                try:
                    answers = pending.result(deadline.left() if changing else min(deadline.left(), CALLER_CHECK_S))
                except TimeoutError:
                    if changing or deadline.left() == 0:
                        raise
                else:
                    computed = pending.computed_s
                    spent.kernel_s += max(computed.values(), default=0.0)
                    return answers

        try:
            return self._guarded(result, changing)
        finally:
            ended = time.perf_counter()
            spent.fanout_s += ended - began
            spent.note("fanout", began, ended, computed)

    def _guarded(self, wait: Callable[[], T], changing: bool) -> T:
        """Return wait(), with the exceptions of a group converted to shardloss errors."""
        try:
            return wait()
        except TimeoutError as error:
            raise DeadlineExceeded("the shards did not answer in time; repeat with the same key") from error
        except WorkerLost as error:
            log.warning("table %s: %s", self.spec.name, error)
            raise TableUnavailable("a worker did not answer; repeat with the same key") from error
        except ShardMissing as error:
            self._refuse_retired()
            self._lose_rows(error)
            self._refuse_lost()
            raise
        except OutOfMemory as error:  # a change stays in doubt: other shards may have applied it
            log.warning("table %s: %s", self.spec.name, error)
            if changing:
                raise TableUnavailable(f"the workers are out of memory: {error}; repeat with the same key") from error
            raise LimitExceeded(f"the workers are out of memory: {error}") from error
        except Exception:
            if changing:
                log.exception("table %s: a change failed", self.spec.name)
                self._lose("a shard failed while changing its rows")
            raise

    def _lose_rows(self, error: ShardMissing) -> None:
        if self.is_filled:  # else its creation fails and says so
            log.error("table %s: %s", self.spec.name, error)
        self._lose("a worker died and its rows are lost")

    def _lose(self, reason: str) -> None:
        """Mark the table as having lost rows: abort its tickets, and free the shards that are left."""
        self._lost = reason
        self.sessions.clear()
        self.steps.wake()
        self._group.drop(self.key)

    def _refuse_retired(self) -> None:
        if self._retired:
            raise TableNotFound(f"table {self.spec.name!r} was deleted", field="table")

    def _refuse_lost(self) -> None:
        self._refuse_retired()
        if self._lost is not None:
            raise RowsLost(
                f"table {self.spec.name!r}: {self._lost}; import it again (shardloss table import --replace), "
                "or delete it and create it again"
            )
