"""The whole path of a request: validate -> plan -> fan out -> merge -> finish. Then commit.

loss     a batch in, per-example losses and the gradient of hidden out, a ticket left open
commit   tickets and upstream gradients in, one optimizer step on every shard
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

import torch
from shardloss.errors import RequestError, SessionExpired, StepTooOld, TicketAborted

from shardloss_server.cluster.group import Staged
from shardloss_server.config import Limits
from shardloss_server.frontend import validate
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.finish import added, finish, join, merge, num_candidates, upstream_of
from shardloss_server.frontend.meter import flops_of, meter, of_columns
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.plan import PADDING, mined_part, plan, unlabelled, with_mass
from shardloss_server.frontend.replies import NO_REPLY, commit_of, kept_reply, with_commit
from shardloss_server.frontend.request import (
    CommitReply,
    CommitRequest,
    Cost,
    InBatch,
    LossReply,
    LossRequest,
    SamplerSpec,
)
from shardloss_server.frontend.session import Ticket, TicketState
from shardloss_server.frontend.steepness import steepness
from shardloss_server.numerics.partial import add_all
from shardloss_server.shard.record import LabelTarget, Part, Score, TableSpec, Upstream

LEARNED_KINDS = ("learned_unigram", "mixture")  # a mixture may use learned counts


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """A part with all shards' answers; targets belong to a label distribution, flops to one pass over the part."""

    part: Part
    staged: Staged
    targets: list[LabelTarget]
    scores: list[Score]
    flops: int
    cost: Cost


class Pipeline:
    """The entry point for losses and commits on the tables of a catalog."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self.catalog, self.limits = catalog, limits

    def loss(self, request: LossRequest, deadline: Deadline) -> LossReply:
        """Score a batch; with a session, leave one ticket open for its key unless the request commits at once."""
        owner = self.catalog.owner(request.table)
        validate.loss_request(request, owner.spec, self.limits)
        if request.label_columns is not None:
            return self._with_distribution(owner, request, deadline)
        if request.commit_now is not None:
            return self._one_call(owner, request, deadline)
        if not request.session:
            return self._score(owner, request, None, deadline)
        return self._with_ticket(owner, request, deadline)

    def commit(self, request: CommitRequest, deadline: Deadline) -> CommitReply:
        """Apply one optimizer step over all parts, exactly once."""
        owner = self.catalog.owner(request.table)
        validate.commit_request(request, owner.spec, self.limits)
        return owner.commit(request, deadline)

    def abort(self, table: str, session: str, step: int, deadline: Deadline) -> int:
        """Give up the open tickets of a session up to a step, and return how many."""
        validate.session(session)
        validate.at_least(step, 1, "step")
        return self.catalog.owner(table).abort(session, step, deadline)

    def _with_ticket(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        reply_bytes = validate.reply_bytes(request, owner.spec)
        while True:
            committed = owner.steps.ledger.highest(request.session)
            ticket, is_new = owner.sessions.begin(
                request.session,
                request.step,
                request.part,
                request.digest,
                kept_bytes(request, owner.spec) + reply_bytes,
                committed,
                time.monotonic(),
                reply_bytes=reply_bytes,
                after_step=request.after_step or 0,
            )
            if is_new:
                return self._fill(owner, request, ticket, deadline)
            if ticket.is_forgotten:  # a late repeat; the ticket's part stays as it is
                return replace(self._score(owner, request, None, deadline), ticket=ticket.name)
            reply = kept_reply(ticket, deadline)
            if reply is not None:
                return reply

    def _fill(self, owner: TableOwner, request: LossRequest, ticket: Ticket, deadline: Deadline) -> LossReply:
        try:
            reply = self._score(owner, request, ticket, deadline)
        except BaseException:
            owner.sessions.discard(ticket)
            raise
        # COMMITTED is no error: a repeat of the call may have committed the ticket already.
        if ticket.state in (TicketState.ABORTED, TicketState.EXPIRED):
            raise TicketAborted("the step was given up while it was being scored")
        return reply

    def _score(self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline) -> LossReply:
        """Plan, fan out, merge and finish; if the loss follows a step, that step is sent to the shards before it."""
        spent, began = meter(), time.monotonic()
        with spent.planning():
            ready = None if depends_on_steps(request) else plan(request, owner.spec, owner.counts)
            waiting = time.monotonic()
            if request.after_step is not None:  # the plan may depend on that step's labels
                owner.wait_for_step(request.session, request.after_step, deadline, applied=ready is None)
            began += time.monotonic() - waiting
            part, targets = (ready, []) if ready is not None else self._planned(owner, request, ticket, deadline)
            staged = owner.stage(part)
        planned = time.monotonic()
        scores = owner.score(staged, request.want.hidden_grad, ticket is not None, deadline)
        scored, flops = time.monotonic(), flops_of(part, owner.spec)
        spent.flops += flops * (1 + request.want.hidden_grad + request.want.table_grad)
        cost = Cost(round((planned - began) * 1e6), round((scored - planned) * 1e6), num_candidates(part, owner.spec))
        with spent.finishing():
            scored_part = ScoredPart(part, staged, targets, scores, flops, cost)
            return self._finished(owner, request, ticket, scored_part, deadline)

    def _finished(
        self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, scored: ScoredPart, deadline: Deadline
    ) -> LossReply:
        """Merge and finish; the ticket then holds what its commit needs."""
        part, staged, targets = scored.part, scored.staged, scored.targets
        merged, version = merge(scored.scores), scored.scores[0].version
        if request.after_step is not None:
            owner.steps.check_follows(request.session, request.after_step, version)
        if targets:
            owner.same_version([version, *(target.version for target in targets)])
            merged = replace(merged, target=add_all([target.target for target in targets]))
        table_grad = None
        if request.want.table_grad:
            upstream = Upstream(merged.statistics.lse, upstream_of(request, part.batch.mass))
            table_grad = join(owner.gradient(staged, upstream, version, deadline))
        name = "" if ticket is None else ticket.name
        reply = finish(request, part, merged, table_grad, name, version, scored.cost, owner.spec.bias)
        if ticket is not None:
            ticket.staged, ticket.lse, ticket.num_rows = staged, merged.statistics.lse, len(request.hidden)
            ticket.version, ticket.reply, ticket.flops = version, reply, scored.flops
            ticket.steepness = steepness(part, merged.statistics.lse)
            if owner.spec.count_labels:
                ticket.labels = part.batch.labels[part.batch.labels != PADDING]
            ticket.ready.set()
        return reply

    def _planned(
        self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline
    ) -> tuple[Part, list[LabelTarget]]:
        """Return the part to score, after the extra fan-outs of hard negatives or of a label distribution.

        The targets are those of a label distribution, whose labels are not in the part; there are none otherwise.
        """
        if request.label_columns is not None:
            return self._collected(owner, request, ticket, deadline)
        part = plan(request, owner.spec, owner.counts)
        if request.sampled is None or not request.sampled.num_hard_negatives:
            return part, []
        k = request.sampled.num_hard_negatives
        meter().flops += flops_of(part, owner.spec)
        return mined_part(part, owner.mine(owner.stage(part), k, deadline), k), []

    def _collected(
        self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline
    ) -> tuple[Part, list[LabelTarget]]:
        """Send each piece of a label distribution to the shards as it arrives; no piece is kept here."""
        part = unlabelled(request, owner.spec, secrets.token_hex(8))
        staged, g, end = owner.stage(part), None, 0
        if request.want.table_grad or request.commit_now is not None:
            owner.begin_labels(part.distribution, ticket, deadline)
            scale = 1.0 if request.commit_now is None else request.commit_now.grad_scale
            g = (upstream_of(request, part.batch.mass.double()) * scale).to(part.batch.mass.dtype)
        targets = owner.add_labels(staged, 0, torch.zeros(len(request.hidden), 0), None, deadline)  # empty
        for piece in request.label_columns or ():
            end = validate.label_columns(piece, end, len(request.hidden), owner.spec)
            targets += owner.add_labels(staged, piece.first_class, piece.weights, g, deadline)
            meter().flops += of_columns(piece.weights, owner.spec) * (1 + (g is not None))
            owner.same_version([target.version for target in targets])
            targets = [added(targets)]
        total = added(targets)
        return with_mass(part, total.mass), [total]

    def _with_distribution(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        """Score a label distribution, one at a time per table: the shards collect the gradient of only one."""
        if request.after_step is not None:  # that step may need `distribution_order`, which is acquired next
            owner.wait_for_step(request.session, request.after_step, deadline, applied=True)
        with deadline.holding(owner.distribution_order, "another label distribution of this table"):
            try:
                if request.commit_now is not None:
                    return self._one_call(owner, request, deadline)
                return self._score(owner, request, None, deadline)
            finally:
                owner.forget_labels()

    def _one_call(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        """Score and commit under one key; a repeat of an applied step gets the kept reply, or else only its outcome."""
        assert request.commit_now is not None
        session, step, now = request.session, request.step, request.commit_now
        may_be_forgotten = not owner.steps.ledger.knows(session) and now.opened_at_version < owner.steps.ledger.horizon
        is_known = owner.sessions.knows(session) or owner.steps.ledger.knows(session)
        if may_be_forgotten or (not is_known and step != 1):
            raise SessionExpired(f"session {session!r} is unknown or forgotten; start a new one", field="session")
        try:
            reply = self._with_ticket(owner, request, deadline)
        except StepTooOld:
            if owner.steps.ledger.outcome(session, step) is None:
                raise
            kept = owner.last_replies.get((session, step), NO_REPLY)
            return with_commit(kept, owner.commit(commit_of(request, kept.ticket), deadline))
        # Before the commit, because another call may settle the commit's outcome.
        owner.last_replies.keep((session, step), reply)
        try:
            committed = owner.commit(commit_of(request, reply.ticket), deadline)
        except RequestError:
            owner.last_replies.forget((session, step))
            raise
        return with_commit(reply, committed)


def depends_on_steps(request: LossRequest) -> bool:
    """Return True if the plan of a loss depends on earlier steps: it uses learned counts or a fan-out of its own."""
    if request.label_columns is not None:
        return True
    if request.sampled is None:
        return False
    drawn = request.sampled.candidates
    by_counts = isinstance(drawn, InBatch) or (isinstance(drawn, SamplerSpec) and drawn.kind in LEARNED_KINDS)
    return by_counts or request.sampled.num_hard_negatives > 0


def kept_bytes(request: LossRequest, spec: TableSpec) -> int:
    """Return the most bytes that a ticket keeps: hidden in compute dtype, and labels and candidates at the widest."""
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    elements = 5 * request.labels.numel() + 4 * len(request.hidden)
    if request.class_weights is not None:
        elements += request.class_weights.numel()
    num_drawn = validate.num_drawn(request, spec)
    if request.sampled is not None and request.sampled.num_hard_negatives:
        num_drawn = len(request.hidden) * min(request.sampled.num_hard_negatives, num_drawn)  # each row keeps its own
    return dtype.itemsize * request.hidden.numel() + 8 * (elements + 4 * num_drawn)
