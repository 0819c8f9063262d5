"""The whole way of a request: validate -> plan -> fan out -> merge -> finish. Then commit.

loss     a batch in, per-example losses and the gradient of hidden out, a ticket left open
commit   tickets and upstream gradients in, one optimizer step on every shard
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

import torch
from shardloss.errors import RequestError, SessionExpired, StepTooOld, TicketAborted
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend import validate
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.plan import PADDING, mined_part, plan, unlabelled, with_mass
from shardloss_server.frontend.request import (
    CommitPart,
    CommitReply,
    CommitRequest,
    Cost,
    LossReply,
    LossRequest,
)
from shardloss_server.frontend.session import Ticket, TicketState
from shardloss_server.numerics.loss import Merged, hidden_gradient, per_example_loss, scale_gradient
from shardloss_server.numerics.partial import add_all, combine_all, spread_over
from shardloss_server.numerics.transform import normalized, project
from shardloss_server.shard.record import LabelTarget, Part, RowGradient, Score, TableSpec, Upstream


class Pipeline:
    """Answers losses and commits over the tables of a catalog."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self.catalog, self.limits = catalog, limits

    def loss(self, request: LossRequest, deadline: Deadline) -> LossReply:
        """Score a batch; with a session, exactly one ticket is open for its key afterwards."""
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
        """One optimizer step over all parts, exactly once."""
        owner = self.catalog.owner(request.table)
        validate.commit_request(request, owner.spec, self.limits)
        return owner.commit(request, deadline)

    def abort(self, table: str, session: str, step: int, deadline: Deadline) -> int:
        """Give up the open tickets of a session up to a step; the number given up."""
        validate.session(session)
        validate.at_least(step, 1, "step")
        return self.catalog.owner(table).abort(session, step, deadline)

    def _with_ticket(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        while True:
            committed = owner.ledger.highest(request.session)
            ticket, is_new = owner.sessions.begin(
                request.session,
                request.step,
                request.part,
                request.digest,
                kept_bytes(request, owner.spec),
                committed,
                time.monotonic(),
            )
            if is_new:
                return self._fill(owner, request, ticket, deadline)
            reply = kept_reply(ticket, deadline)
            if reply is not None:
                return reply

    def _fill(self, owner: TableOwner, request: LossRequest, ticket: Ticket, deadline: Deadline) -> LossReply:
        try:
            if request.after_step is not None:
                owner.wait_for_step(request.session, request.after_step, deadline)
            reply = self._score(owner, request, ticket, deadline)
        except BaseException:
            owner.sessions.discard(ticket)
            raise
        if ticket.state in (TicketState.ABORTED, TicketState.EXPIRED):  # a repeat may have committed it already
            raise TicketAborted("the step was given up while it was being scored")
        return reply

    def _score(self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline) -> LossReply:
        """plan -> fan out -> merge -> finish."""
        began = time.monotonic()
        part, targets = self._planned(owner, request, ticket, deadline)
        staged = owner.stage(part)
        planned = time.monotonic()
        scores = owner.score(staged, request.want.hidden_grad, deadline)
        scored = time.monotonic()
        merged, version = merge(scores), scores[0].version
        if targets:
            owner.same_version([version, *(target.version for target in targets)])
            merged = replace(merged, target=add_all([target.target for target in targets]))
        table_grad = None
        if request.want.table_grad:
            upstream = Upstream(merged.statistics.lse, upstream_of(request, part.batch.mass))
            table_grad = join(owner.gradient(staged, upstream, version, deadline))
        cost = Cost(round((planned - began) * 1e6), round((scored - planned) * 1e6), num_candidates(part, owner.spec))
        reply = finish(request, part, merged, table_grad, ticket, version, cost)
        reply = replace(reply, has_bias=owner.spec.bias)
        if ticket is not None:
            ticket.staged, ticket.lse, ticket.num_rows = staged, merged.statistics.lse, len(request.hidden)
            ticket.version, ticket.reply, ticket.mass = version, reply, part.batch.mass
            ticket.labels = part.batch.labels[part.batch.labels != PADDING]
            ticket.ready.set()
        return reply

    def _planned(
        self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline
    ) -> tuple[Part, list[LabelTarget]]:
        """The part to score; what takes a fan-out of its own first: hard negatives, and labels that are a distribution.

        The targets are those of a distribution, whose labels are in no part.
        """
        if request.label_columns is not None:
            return self._collected(owner, request, ticket, deadline)
        part = plan(request, owner.spec, owner.counts)
        if request.sampled is None or not request.sampled.num_hard_negatives:
            return part, []
        k = request.sampled.num_hard_negatives
        return mined_part(part, owner.mine(owner.stage(part), k, deadline), k), []

    def _collected(
        self, owner: TableOwner, request: LossRequest, ticket: Ticket | None, deadline: Deadline
    ) -> tuple[Part, list[LabelTarget]]:
        """Hand each piece of a label distribution to the shards as it comes; nothing of it is held here."""
        part = unlabelled(request, owner.spec, secrets.token_hex(8))
        staged, g, end = owner.stage(part), None, 0
        if request.want.table_grad or request.commit_now is not None:
            owner.begin_labels(part.distribution, ticket, deadline)
            scale = 1.0 if request.commit_now is None else request.commit_now.grad_scale
            g = (upstream_of(request, part.batch.mass.double()) * scale).to(part.batch.mass.dtype)
        targets = owner.add_labels(staged, 0, torch.zeros(len(request.hidden), 0), None, deadline)  # of no piece
        for piece in request.label_columns or ():
            end = validate.label_columns(piece, end, len(request.hidden), owner.spec)
            targets += owner.add_labels(staged, piece.first_class, piece.weights, g, deadline)
            owner.same_version([target.version for target in targets])
            targets = [added(targets)]
        total = added(targets)
        return with_mass(part, total.mass), [total]

    def _with_distribution(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        """One at a time a table: the shards collect the gradient of one distribution."""
        if request.after_step is not None:  # which may be a distribution, too: it needs the order that is taken next
            owner.wait_for_step(request.session, request.after_step, deadline)
        with deadline.holding(owner.distribution_order, "another label distribution of this table"):
            try:
                if request.commit_now is not None:
                    return self._one_call(owner, request, deadline)
                return self._score(owner, request, None, deadline)
            finally:
                owner.forget_labels()

    def _one_call(self, owner: TableOwner, request: LossRequest, deadline: Deadline) -> LossReply:
        """Score and commit under one key. A repeat of an applied step gets the kept reply, or none but the outcome."""
        assert request.commit_now is not None
        session, step, now = request.session, request.step, request.commit_now
        may_be_forgotten = not owner.ledger.knows(session) and now.opened_at_version < owner.ledger.horizon
        is_known = owner.sessions.knows(session) or owner.ledger.knows(session)
        if may_be_forgotten or (not is_known and step != 1):
            raise SessionExpired(f"session {session!r} is unknown or forgotten; start a new one", field="session")
        try:
            reply = self._with_ticket(owner, request, deadline)
        except StepTooOld:
            if owner.ledger.outcome(session, step) is None:
                raise
            kept = owner.last_replies.get((session, step), NO_REPLY)
            return with_commit(kept, owner.commit(commit_of(request, kept.ticket), deadline))
        owner.last_replies.keep(
            (session, step), reply
        )  # before the commit, whose outcome may be settled by another call
        try:
            committed = owner.commit(commit_of(request, reply.ticket), deadline)
        except RequestError:
            owner.last_replies.forget((session, step))
            raise
        return with_commit(reply, committed)


NO_REPLY = LossReply(None, None, None, None, "", 0, True, Cost(0, 0, 0))


def commit_of(request: LossRequest, ticket: str) -> CommitRequest:
    """The commit inside a one-call request."""
    assert request.commit_now is not None
    rate, scale = request.commit_now.learning_rate, request.commit_now.grad_scale
    parts = (CommitPart(ticket, request.upstream),)
    return CommitRequest(request.table, request.session, request.step, parts, rate, scale, None, request.digest, True)


def kept_bytes(request: LossRequest, spec: TableSpec) -> int:
    """What an open ticket keeps at most: the staged batch and candidates at the widest dtypes, and the reply."""
    elements = request.hidden.numel() + 4 * request.labels.numel() + 4 * len(request.hidden)
    if request.class_weights is not None:
        elements += request.class_weights.numel()
    num_drawn = validate.num_drawn(request, spec)
    if request.sampled is not None and request.sampled.num_hard_negatives:
        num_drawn = len(request.hidden) * min(request.sampled.num_hard_negatives, num_drawn)  # each row keeps its own
    return 8 * (elements + 3 * num_drawn) + validate.reply_bytes(request, spec)


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


def upstream_of(request: LossRequest, like: Tensor) -> Tensor:
    """g [N] in compute dtype: the request's, or ones."""
    if request.upstream is None:
        return torch.ones_like(like)
    return request.upstream.to(like.dtype)


def join(gradients: list[RowGradient]) -> RowGradient:
    """One gradient of all shards, class ids ascending."""
    class_ids = torch.cat([gradient.class_ids for gradient in gradients])
    order = torch.argsort(class_ids)
    rows = torch.cat([gradient.rows for gradient in gradients])
    biases = torch.cat([gradient.biases for gradient in gradients])
    return RowGradient(class_ids[order], rows[order], biases[order])


def merge(scores: list[Score]) -> Merged:
    """All shards' scores as one, in shard order."""
    spreads = [score.spread for score in scores if score.spread is not None]
    return Merged(
        combine_all([score.statistics for score in scores]),
        add_all([score.target for score in scores]),
        spread_over(spreads) if spreads else None,
    )


def added(targets: list[LabelTarget]) -> LabelTarget:
    """The sum of at least one target of a label distribution."""
    mass = torch.stack([target.mass for target in targets]).sum(0)
    return LabelTarget(add_all([target.target for target in targets]), mass, targets[0].version)


def num_candidates(part: Part, spec: TableSpec) -> int:
    """Candidates that are scored, over all shards, without the labels."""
    return spec.num_classes if part.candidates is None else part.candidates.class_ids.numel()


def finish(
    request: LossRequest,
    part: Part,
    merged: Merged,
    table_grad: RowGradient | None,
    ticket: Ticket | None,
    version: int,
    cost: Cost,
) -> LossReply:
    """From merged statistics to what was wanted.

    Raises:
        InvalidArgument: a counted row has a loss or a gradient that is not finite.
    """
    want, batch, objective = request.want, part.batch, part.objective
    mass = batch.mass
    loss = per_example_loss(merged, mass, objective.z_loss, batch.spread, batch.hidden).to(mass.dtype)
    gradient = gradient_of_hidden(request, part, merged) if want.hidden_grad else None
    is_finite = torch.isfinite(loss)
    if gradient is not None:
        is_finite &= torch.isfinite(gradient).all(1)
    scale_grad = None
    if objective.learned_scale:
        scale_grad = scale_gradient(
            merged, mass, objective.z_loss, objective.transform.scale, batch.spread, batch.hidden
        ).to(mass.dtype)
        is_finite &= torch.isfinite(scale_grad)
    validate.finite_logits((mass == 0) | is_finite, "hidden")
    if gradient is not None and want.grad_dtype is not None:
        gradient = gradient.to(getattr(torch, want.grad_dtype))
    return LossReply(
        loss=loss if want.loss else None,
        lse=torch.where(mass == 0, -torch.inf, merged.statistics.lse).to(mass.dtype) if want.lse else None,
        hidden_grad=gradient,
        table_grad=table_grad,
        ticket="" if ticket is None else ticket.name,
        version=version,
        replayed=False,
        cost=cost,
        scale_grad=scale_grad,
    )


def gradient_of_hidden(request: LossRequest, part: Part, merged: Merged) -> Tensor:
    """d loss / d hidden [N, D] of hidden as the request has it: back through scale and norms."""
    transform, batch = part.objective.transform, part.batch
    gradient = hidden_gradient(merged, batch.mass, part.objective.z_loss, batch.spread)
    if transform.scale != 1.0:
        gradient = gradient * transform.scale
    if not transform.normalize:
        return gradient
    return project(gradient, *normalized(request.hidden.to(batch.hidden.dtype)))
