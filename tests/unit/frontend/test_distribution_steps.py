"""Steps over a label distribution that fail or overlap others leave the table usable, and a repeat is one step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from shardloss.errors import DeadlineExceeded, LimitExceeded
from shardloss_server.config import Limits
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.plan import unlabelled
from shardloss_server.frontend.request import CommitNow, LabelColumns, LossReply, LossRequest, Want
from shardloss_server.frontend.validate import loss_request
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.distribution import Collected
from shardloss_server.shard.gradient import labels_of
from torch import Tensor

from ..cases import D, N, V, randn
from ..front import Front, Table, request_of

RATE = 0.3


def step_of(hidden: Tensor, pieces: Iterator[LabelColumns], step: int = 1, grad_scale: float = 1.0) -> LossRequest:
    """Return the one-call form of a step over a distribution."""
    return replace(
        request_of(hidden, torch.zeros(N, 0, dtype=torch.int64), ignore_index=None, label_columns=pieces),
        session="session",
        step=step,
        commit_now=CommitNow(RATE, grad_scale, 0),
        want=Want(),
    )


def pieces_of(y: Tensor) -> Iterator[LabelColumns]:
    """Return y [N, V] in pieces of two classes."""
    return (LabelColumns(start, y[:, start : start + 2]) for start in range(0, V, 2))


def stepped(table: Table, hidden: Tensor, y: Tensor, g: float = 1.0) -> Tensor:
    """Return the rows after one SGD step on g * sum(cross_entropy), computed densely."""
    rows = table.read()[0].requires_grad_()
    loss = (torch.logsumexp(hidden @ rows.T, 1) * y.sum(1) - (y * (hidden @ rows.T)).sum(1)).sum()
    return (rows - RATE * g * torch.autograd.grad(loss, rows)[0]).detach()


def test_a_step_that_ran_out_of_time_before_its_commit_is_applied_by_its_repeat(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards free what they had collected, and the repeat collects it again."""
    table = front.table(randn(V, D))
    hidden, y = randn(N, D), torch.rand(N, V, dtype=torch.float64)
    wanted = stepped(table, hidden, y)

    def too_late(*_: object) -> None:
        raise DeadlineExceeded("another commit of this table was not over in time")

    with monkeypatch.context() as patched:
        patched.setattr(table.owner, "commit", too_late)
        with pytest.raises(DeadlineExceeded):
            table.loss(step_of(hidden, pieces_of(y)))
    assert table.owner.sessions.num_open == 0
    committed = table.loss(step_of(hidden, pieces_of(y))).committed
    assert committed is not None
    assert not committed.replayed
    torch.testing.assert_close(table.read()[0], wanted, rtol=0, atol=1e-12)


def test_a_step_after_another_lets_it_go_first(front: Front) -> None:
    """If step 3 is sent before step 2, it waits and holds nothing that step 2 needs."""
    table = front.table(randn(V, D))
    hidden, y = randn(N, D), torch.rand(N, V, dtype=torch.float64)
    table.loss(step_of(hidden, pieces_of(y)))
    waits = threading.Event()
    wait_for_step = table.owner.wait_for_step

    def waiting(*args: object, **options: object) -> None:
        waits.set()
        wait_for_step(*args, **options)  # type: ignore[arg-type]

    table.owner.wait_for_step = waiting  # type: ignore[method-assign]
    third = replace(step_of(hidden, pieces_of(y), 3), table=table.spec.name, after_step=2)
    replies: list[LossReply] = []
    thread = threading.Thread(target=lambda: replies.append(front.pipeline.loss(third, Deadline.after(60.0))))
    thread.start()
    assert waits.wait(60.0)
    table.loss(step_of(hidden, pieces_of(y), 2))
    thread.join()
    assert [reply.committed.version for reply in replies if reply.committed] == [4]  # a row write and three steps


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["logits", "scaled hidden"])
def test_whatever_stands_in_a_row_that_does_not_count_is_left_out(front: Front, scale: float) -> None:
    """A row of weight 0 may overflow float32: its loss and gradient are 0, and the step is that of the other rows."""
    table = front.table(torch.ones(V, D), dtype="float32")
    hidden, y = torch.ones(N, D), torch.rand(N, V)
    hidden[2], y[2] = 3e38, 0.0
    objective = Objective(transform=Transform(scale=scale))
    step = replace(step_of(hidden, pieces_of(y)), objective=objective)
    alone = {"session": "", "commit_now": None, "label_columns": pieces_of(y), "want": Want(hidden_grad=True)}
    reply = table.loss(replace(step, **alone))
    assert reply.loss is not None
    assert reply.hidden_grad is not None
    assert float(reply.loss[2]) == 0.0
    assert reply.hidden_grad[2].tolist() == [0.0] * D
    counted = torch.arange(N) != 2
    wanted = stepped(table, scale * hidden[counted], y[counted])
    table.loss(step)
    torch.testing.assert_close(table.read()[0], wanted, rtol=1e-5, atol=1e-5)


def test_only_the_product_of_upstream_and_grad_scale_must_fit_the_table(front: Front) -> None:
    """1e-50 and 1e50 are 0 and infinite in float32, but their product of 1 is accepted."""
    table = front.table(randn(V, D).float(), dtype="float32")
    hidden, y = randn(N, D).float(), torch.rand(N, V)
    wanted = stepped(table, hidden, y)
    upstream = torch.full((N,), 1e-50, dtype=torch.float64)
    table.loss(replace(step_of(hidden, pieces_of(y), grad_scale=1e50), upstream=upstream))
    torch.testing.assert_close(table.read()[0], wanted, rtol=1e-5, atol=1e-5)


def test_what_the_shards_answer_to_a_piece_is_bounded(front: Front) -> None:
    """Every shard returns D values per row of the batch, and these count even if no gradient of hidden is requested."""
    table = front.table(randn(V, D), num_shards=7)
    limits = Limits(max_reply_bytes=7 * N * (32 + 8 * D) // 4)
    request = replace(step_of(randn(N, D), iter(())), max_reply_bytes=1 << 40)
    loss_request(request, table.spec, limits)
    with pytest.raises(LimitExceeded) as refused:
        loss_request(request, table.spec, replace(limits, max_reply_bytes=limits.max_reply_bytes - 1))
    assert refused.value.field == "hidden"


def test_what_was_collected_of_one_distribution_is_no_gradient_of_another(front: Front) -> None:
    """A shard raises LookupError if it collected nothing or another distribution, which is a bug of the caller."""
    table = front.table(randn(V, D))
    part = unlabelled(step_of(randn(N, D), iter(())), table.spec, "second")
    rows, biases = randn(V, D), randn(V)
    for collected in (None, Collected("first", rows, biases)):
        with pytest.raises(LookupError, match="second"):
            labels_of(part, collected, 2, 7)
    taken = labels_of(part, Collected("second", rows, biases), 2, 7)
    assert taken is not None
    assert torch.equal(taken[0], rows[2:7])
    assert torch.equal(taken[1], biases[2:7])
