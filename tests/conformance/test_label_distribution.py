"""A label distribution [N, V] is streamed in columns; loss, gradients and step equal those of the dense formula."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
import torch
from shardloss import messages
from shardloss.channel import error_of
from shardloss.errors import (
    InvalidArgument,
    LimitExceeded,
    RequestError,
    ShardlossError,
    TableUnavailable,
)
from shardloss.splice import LOSS_REQUEST
from shardloss.v1 import loss_pb2
from shardloss_server.cluster.group import Staged, WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, ServerConfig
from shardloss_server.rpc.serve import Server
from torch import Tensor

from .faulty import FaultyGroup

V, D, N = 101, 5, 7  # V is prime, so shards are uneven; a piece of CHUNK bytes holds 17 columns of float64
CHUNK = 17 * N * 8
TOLERANCE = 1e-11
RATE, ALL = 0.3, np.arange(V)
Y = np.random.default_rng(3).random((N, V))
Y[2] = 0  # a row that does not count
Y[:, 40:60] = 0  # columns that are never sent


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)], scope="module")
def faulty(request: pytest.FixtureRequest) -> Iterator[FaultyGroup]:
    if request.param == "ray":
        yield FaultyGroup(request.getfixturevalue("ray_server").catalog.group)
        return
    group = LocalGroup(2)
    yield FaultyGroup(group)
    group.close()


@pytest.fixture(scope="module")
def client(faulty: FaultyGroup) -> Iterator[shardloss.LossClient]:
    server = Server(faulty, ServerConfig(limits=Limits(max_chunk_bytes=CHUNK)))
    server.start()
    with shardloss.connect(server.address) as client:
        yield client
    server.stop(grace_s=1.0)


@pytest.fixture
def make_table(
    client: shardloss.LossClient, fresh_name: Callable[[], str], rng: np.random.Generator
) -> Iterator[Callable[..., shardloss.Table]]:
    made = []

    def make(num_shards: int = 3, placement: str = "div", dtype: str = "float64") -> shardloss.Table:
        table = client.create_table(
            fresh_name(),
            num_classes=V,
            dim=D,
            dtype=dtype,
            num_shards=num_shards,
            placement=placement,
            initializer=shardloss.Normal(0.5),
        )
        made.append(table)
        table.write_rows(ALL, table.read_rows(ALL).rows, rng.normal(size=V))
        return table

    yield make
    for table in made:
        client.delete_table(table.name)


def leaves(table: shardloss.Table) -> tuple[Tensor, Tensor]:
    """Return rows and biases as parameters of the oracle."""
    rows = table.read_rows(ALL)
    return torch.tensor(rows.rows, requires_grad=True), torch.tensor(rows.biases, requires_grad=True)


def oracle(weights: Tensor, biases: Tensor, hidden: Tensor, loss: shardloss.FullSoftmax, y: np.ndarray = Y) -> Tensor:
    """Return the dense loss [N], mass * (lse + z_loss lse^2) - sum_v y_v z_v."""
    if loss.logits.normalize:
        weights, hidden = (torch.nn.functional.normalize(x, dim=1) for x in (weights, hidden))
    logits = loss.logits.scale * (hidden @ weights.T + biases)
    lse, labels = torch.logsumexp(logits, 1), torch.tensor(y)
    return labels.sum(1) * (lse + loss.z_loss * lse**2) - (labels * logits).sum(1)


LOSSES = [
    shardloss.FullSoftmax(),
    shardloss.FullSoftmax(z_loss=0.02, logits=shardloss.LogitTransform(scale=1.7)),
    shardloss.FullSoftmax(logits=shardloss.LogitTransform(scale=3.0, normalize=True)),
]


@pytest.mark.parametrize("num_shards, placement", [(1, "div"), (2, "mod"), (3, "div"), (7, "mod")])
@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "z-loss and scale", "cosine"])
def test_loss_gradients_and_step_equal_the_dense_formula(
    make_table: Callable[..., shardloss.Table],
    rng: np.random.Generator,
    loss: shardloss.FullSoftmax,
    num_shards: int,
    placement: str,
) -> None:
    """Loss, gradients of hidden, scale, rows and biases, and one SGD step are equal for every cut."""
    table = make_table(num_shards, placement)
    hidden, g = rng.normal(size=(N, D)), rng.normal(size=N)
    weights, biases = leaves(table)
    h = torch.tensor(hidden, requires_grad=True)
    expected = oracle(weights, biases, h, loss)
    result = table.compute_loss(
        hidden,
        None,
        loss,
        label_distribution=Y,
        upstream=g,
        want_hidden_grad=True,
        want_table_grad=True,
        want_scale_grad=True,
    )
    of_hidden = torch.autograd.grad(expected.sum(), h, retain_graph=True)[0]
    of_rows, of_biases = torch.autograd.grad((expected * torch.tensor(g)).sum(), [weights, biases])
    np.testing.assert_allclose(result.loss, expected.detach(), atol=TOLERANCE)
    np.testing.assert_allclose(result.hidden_grad, of_hidden, atol=TOLERANCE)
    assert result.table_grad is not None
    np.testing.assert_allclose(result.table_grad.rows, of_rows, atol=TOLERANCE)
    np.testing.assert_allclose(result.table_grad.biases, of_biases, atol=TOLERANCE)
    assert result.loss is not None
    assert result.loss[2] == 0
    eps = 1e-6
    scale = loss.logits.scale

    def at(scale: float) -> Tensor:
        shifted = shardloss.FullSoftmax(
            z_loss=loss.z_loss, logits=shardloss.LogitTransform(scale, None, loss.logits.normalize)
        )
        return oracle(weights, biases, h, shifted).detach()

    slope = (at(scale + eps) - at(scale - eps)) / (2 * eps)
    np.testing.assert_allclose(result.scale_grad, slope, rtol=1e-6, atol=1e-6)
    step = table.session().train_step(hidden, None, loss, learning_rate=RATE, upstream=g, label_distribution=Y)
    assert step.committed is not None
    after = table.read_rows(ALL)
    np.testing.assert_allclose(after.rows, (weights - RATE * of_rows).detach(), atol=TOLERANCE)
    np.testing.assert_allclose(after.biases, (biases - RATE * of_biases).detach(), atol=TOLERANCE)
    assert table.info().num_open_tickets == 0


def test_one_hot_columns_are_hard_labels(make_table: Callable[..., shardloss.Table], rng: np.random.Generator) -> None:
    """Loss and gradient equal those of hard labels in a float32 table, with the columns sent as float16."""
    table = make_table(3, "mod", "float32")
    labels, hidden = rng.integers(V, size=N), rng.normal(size=(N, D)).astype(np.float32)
    hot = np.eye(V, dtype=np.float16)[labels]
    soft = table.compute_loss(hidden, None, shardloss.FullSoftmax(), label_distribution=hot, want_hidden_grad=True)
    hard = table.compute_loss(hidden, labels, shardloss.FullSoftmax(), want_hidden_grad=True)
    np.testing.assert_allclose(soft.loss, hard.loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(soft.hidden_grad, hard.hidden_grad, rtol=1e-5, atol=1e-6)


def test_a_head_trains_on_a_distribution_as_torch_does(
    make_table: Callable[..., shardloss.Table], rng: np.random.Generator
) -> None:
    """20 steps equal torch's cross_entropy and SGD, with probabilities as targets and a loss scale of 64."""
    table = make_table()
    weights, biases = leaves(table)
    head = table.softmax()
    remote, local = head.optimizer(lr=RATE), torch.optim.SGD([weights, biases], lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(20):
        hidden = torch.tensor(rng.normal(size=(N, D)), requires_grad=True)
        y = torch.softmax(torch.tensor(rng.normal(size=(N, V))), 1)
        loss = head(hidden, y)
        expected = torch.nn.functional.cross_entropy(hidden.detach() @ weights.T + biases, y)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        for optimizer in (remote, local):
            optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        expected.backward()  # type: ignore[no-untyped-call]
        scaler.step(remote)
        scaler.update()
        local.step()
    after = table.read_rows(ALL)
    np.testing.assert_allclose(after.rows, weights.detach(), atol=1e-10)
    assert table.info().num_commits == 20


def test_a_step_takes_the_distribution_of_its_loss(
    make_table: Callable[..., shardloss.Table], rng: np.random.Generator
) -> None:
    """The step ignores values that a loader writes into the same tensor after the loss."""
    table = make_table()
    weights, biases = leaves(table)
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE)
    hidden, y = torch.tensor(rng.normal(size=(N, D))), torch.softmax(torch.tensor(rng.normal(size=(N, V))), 1)
    torch.nn.functional.cross_entropy(hidden @ weights.T + biases, y).backward()  # type: ignore[no-untyped-call]
    loss = head(hidden, y)
    y.copy_(torch.eye(V)[0].expand(N, V))
    loss.backward()
    optimizer.step()
    assert weights.grad is not None
    expected = (weights - RATE * weights.grad).detach()
    np.testing.assert_allclose(table.read_rows(ALL).rows, expected, atol=1e-10)


def test_a_distribution_shares_its_step_with_no_other_loss(make_table: Callable[..., shardloss.Table]) -> None:
    """A second loss in the step makes the commit raise InvalidArgument and leaves the table unchanged."""
    table = make_table()
    before = table.read_rows(ALL)
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE)
    hidden = torch.zeros(N, D, dtype=torch.float64, requires_grad=True)
    (head(hidden, torch.tensor(Y)) + head(hidden, torch.zeros(N, dtype=torch.int64))).backward()
    with pytest.raises(InvalidArgument, match="step of its own"):
        optimizer.step()
    np.testing.assert_array_equal(table.read_rows(ALL).rows, before.rows)


@pytest.mark.parametrize("extent", ["all", "first", "last", "none"])
def test_a_lost_reply_leaves_one_step(
    faulty: FaultyGroup, make_table: Callable[..., shardloss.Table], rng: np.random.Generator, extent: str
) -> None:
    """A shard that missed the order still holds its columns, so after the client's repeat the step is applied once."""
    table = make_table()
    weights, biases = leaves(table)
    hidden = rng.normal(size=(N, D))
    oracle(weights, biases, torch.tensor(hidden), LOSSES[0]).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    faulty.lose(extent, WorkerLost("lost"))
    session = table.session()
    session.train_step(hidden, None, LOSSES[0], learning_rate=RATE, label_distribution=Y)
    after = table.read_rows(ALL)
    np.testing.assert_allclose(after.rows, (weights - RATE * weights.grad).detach(), atol=TOLERANCE)
    assert after.version == 2  # the fixture's write and one step
    again = session.train_step(hidden, None, LOSSES[0], learning_rate=RATE, label_distribution=Y)
    assert again.version == 2
    assert again.committed is not None
    assert again.committed.version == 3


def test_a_step_whose_sums_are_forgotten_streams_again(
    client: shardloss.LossClient, faulty: FaultyGroup, make_table: Callable[..., shardloss.Table]
) -> None:
    """If no shard got the order and another distribution precedes the repeat, the repeat is still one correct step."""
    table = make_table()
    weights, biases = leaves(table)
    y = np.zeros((N, V))
    y[:, :3] = 1
    expected = oracle(weights, biases, torch.ones(N, D, dtype=torch.float64), LOSSES[0], y)
    of_rows = torch.autograd.grad(expected.sum(), weights)[0]
    call = [header(table, session="s", step=1), piece(0, y[:, :3])]
    call[0].header.commit_now.learning_rate = RATE
    faulty.lose("none", WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        stream(client, *call)
    table.compute_loss(np.ones((N, D)), None, LOSSES[0], label_distribution=Y, want_table_grad=True)
    assert stream(client, *call)[0].header.committed.version == 2  # the fixture's write and one step
    np.testing.assert_allclose(table.read_rows(ALL).rows, (weights - RATE * of_rows).detach(), atol=TOLERANCE)


def stream(client: shardloss.LossClient, *pieces: loss_pb2.StreamLossRequest) -> Any:
    """Try a raw stream once, marking its last piece as the last."""
    last = loss_pb2.StreamLossRequest()
    last.CopyFrom(pieces[-1])
    if last.WhichOneof("piece") == "columns":
        last.columns.last = True
    return stream_of(client, iter([*pieces[:-1], last]))


def stream_of(client: shardloss.LossClient, pieces: Iterator[loss_pb2.StreamLossRequest]) -> Any:
    """Try a stream once; its pieces are generated while it is sent."""
    try:
        return list(client.losses.StreamLoss(pieces, timeout=30.0))
    except grpc.RpcError as failure:
        raise error_of(failure) from None


def header(table: shardloss.Table, **fields: Any) -> loss_pb2.StreamLossRequest:
    request = loss_pb2.ComputeLossRequest.FromString(
        LOSS_REQUEST.join(messages.loss_request(table.name, np.ones((N, D)), None, shardloss.FullSoftmax()))
    )
    for name, value in fields.items():
        setattr(request, name, value)
    return loss_pb2.StreamLossRequest(header=request)


def piece(first_class: int, weights: np.ndarray) -> loss_pb2.StreamLossRequest:
    tensor = messages.numbers(weights, "weights")
    return loss_pb2.StreamLossRequest(columns=loss_pb2.LabelColumns(first_class=first_class, weights=tensor))


def spoiled(value: float) -> np.ndarray:
    weights = np.ones((N, 3))
    weights[4, 1] = value
    return weights


BAD_PIECES = [
    ("columns that overlap", [piece(5, np.ones((N, 3))), piece(7, np.ones((N, 3)))], "columns.first_class"),
    ("columns beyond V", [piece(V - 2, np.ones((N, 3)))], "columns.first_class"),
    ("a negative class", [piece(-1, np.ones((N, 3)))], "columns.first_class"),
    ("other rows", [piece(0, np.ones((N + 1, 3)))], "columns.weights"),
    ("a vector", [piece(0, np.ones(N))], "columns.weights"),
    ("no column", [piece(0, np.ones((N, 0)))], "columns.weights"),
    ("integers", [piece(0, np.ones((N, 3), dtype=np.int64))], "columns.weights"),
    ("a negative weight", [piece(0, spoiled(-0.5))], "columns.weights"),
    ("a weight that is no number", [piece(0, spoiled(np.nan))], "columns.weights"),
    ("an infinite weight", [piece(0, spoiled(np.inf))], "columns.weights"),
    ("a second header", [loss_pb2.StreamLossRequest(header=loss_pb2.ComputeLossRequest())], "piece"),
    ("nothing", [loss_pb2.StreamLossRequest()], "piece"),
]


@pytest.mark.parametrize("pieces, field", [row[1:] for row in BAD_PIECES], ids=[row[0] for row in BAD_PIECES])
def test_bad_columns_are_refused_by_name(
    client: shardloss.LossClient,
    make_table: Callable[..., shardloss.Table],
    pieces: list[loss_pb2.StreamLossRequest],
    field: str,
) -> None:
    """A refused stream changes nothing, leaves no ticket open, and does not affect the next call."""
    table = make_table()
    before = table.read_rows(ALL)
    commit = header(table, session="s", step=1)
    commit.header.commit_now.learning_rate = RATE
    for first in (header(table), commit):
        with pytest.raises(InvalidArgument) as refused:
            stream(client, first, *pieces)
        assert refused.value.field == field
    after = table.read_rows(ALL)
    assert after.version == before.version
    np.testing.assert_array_equal(after.rows, before.rows)
    assert table.info().num_open_tickets == 0
    assert stream(client, commit, piece(0, np.ones((N, 3))))[0].header.committed.version == before.version + 1


@pytest.mark.parametrize("num_pieces", [0, 1, 2])
def test_a_stream_that_ends_in_the_middle_is_no_step(
    client: shardloss.LossClient, make_table: Callable[..., shardloss.Table], num_pieces: int
) -> None:
    """A client that dies between two pieces may look finished, so nothing changes without a piece marked as last."""
    table = make_table()
    pieces = [header(table, session="s", step=1), *(piece(3 * i, np.ones((N, 3))) for i in range(num_pieces))]
    pieces[0].header.commit_now.learning_rate = RATE
    with pytest.raises(InvalidArgument) as refused:
        stream_of(client, iter(pieces))
    assert refused.value.field == "columns.last"
    assert (table.info().version, table.info().num_open_tickets) == (1, 0)  # the fixture's write


def test_a_distribution_of_zeros_counts_no_row(
    client: shardloss.LossClient, make_table: Callable[..., shardloss.Table]
) -> None:
    """Every loss is 0, also with N = 0; one piece is sent, because a stream needs a last piece."""
    table = make_table()
    for num_rows in (N, 0):
        hidden, y = np.ones((num_rows, D)), np.zeros((num_rows, V))
        found = table.compute_loss(hidden, None, LOSSES[0], label_distribution=y)
        np.testing.assert_array_equal(found.loss, np.zeros(num_rows))


def test_a_piece_above_max_chunk_bytes_is_refused(
    client: shardloss.LossClient, make_table: Callable[..., shardloss.Table]
) -> None:
    table = make_table()
    with pytest.raises(LimitExceeded, match="max_chunk_bytes"):
        stream(client, header(table), piece(0, np.ones((N, 18))))


@pytest.mark.parametrize(
    "options, field",
    [
        ({"loss": shardloss.FullSoftmax(label_smoothing=0.1)}, "full_softmax.label_smoothing"),
        ({"loss": shardloss.FullSoftmax(class_weights=np.ones(V))}, "full_softmax.class_weights"),
        ({"loss": shardloss.FullSoftmax(margin=shardloss.Margin())}, "margin"),
        ({"loss": shardloss.FullSoftmax(logits=shardloss.LogitTransform(soft_cap=30.0))}, "logits.soft_cap"),
        ({"loss": shardloss.FullSigmoid()}, "label_columns"),
        ({"loss": shardloss.SampledSoftmax(num_sampled=3)}, "label_columns"),
        ({"ignore_index": -100}, "ignore_index"),
        ({"label_weights": np.ones((N, 1))}, "label_weights"),
        ({"labels": np.zeros(N, dtype=np.int64)}, "labels"),
        ({"label_distribution": np.ones((N, V - 1))}, "label_distribution"),
        ({"label_distribution": None}, "labels"),
    ],
)
def test_what_does_not_combine_is_refused_by_name(
    make_table: Callable[..., shardloss.Table], options: dict[str, Any], field: str
) -> None:
    table = make_table()
    given: dict[str, Any] = {"labels": None, "loss": shardloss.FullSoftmax(), "label_distribution": Y, **options}
    with pytest.raises(RequestError) as refused:
        table.compute_loss(np.ones((N, D)), given.pop("labels"), given.pop("loss"), **given)
    assert refused.value.field == field


def test_a_session_needs_the_one_call_form(
    client: shardloss.LossClient, make_table: Callable[..., shardloss.Table]
) -> None:
    """A label distribution cannot leave a ticket open, and cannot be sent in a unary call."""
    table = make_table()
    with pytest.raises(InvalidArgument) as refused:
        stream(client, header(table, session="s", step=1), piece(0, np.ones((N, 3))))
    assert refused.value.field == "label_columns"
    with pytest.raises(InvalidArgument) as refused:
        client.channel.unary(client.losses.ComputeLoss, header(table).header, None)
    assert refused.value.field == "label_columns"


def test_a_commit_between_two_pieces_is_told(
    client: shardloss.LossClient,
    faulty: FaultyGroup,
    make_table: Callable[..., shardloss.Table],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Targets of two versions cannot be added, so the call raises TABLE_UNAVAILABLE; a repeat of it is correct."""
    table = make_table()
    has_begun = threading.Event()
    add_labels = faulty.add_labels

    def adding(name: str, staged: Staged, first_class: int, weights: Tensor, g: Tensor | None) -> Any:
        pending = add_labels(name, staged, first_class, weights, g)
        if weights.shape[1]:
            has_begun.set()
        return pending

    monkeypatch.setattr(faulty, "add_labels", adding, raising=False)

    def pieces() -> Iterator[loss_pb2.StreamLossRequest]:
        yield header(table)
        yield piece(0, np.ones((N, 3)))
        assert has_begun.wait(30.0)
        table.write_rows(ALL[:2], np.ones((2, D)))
        yield piece(3, np.ones((N, 3)))

    with pytest.raises(TableUnavailable):
        stream_of(client, pieces())
    y = np.zeros((N, V))
    y[:, :6] = 1
    weights, biases = leaves(table)
    expected = oracle(weights, biases, torch.ones(N, D, dtype=torch.float64), LOSSES[0], y)
    found = table.compute_loss(np.ones((N, D)), None, LOSSES[0], label_distribution=y)
    np.testing.assert_allclose(found.loss, expected.detach(), atol=TOLERANCE)


def test_a_refused_call_lets_the_next_distribution_in(
    client: shardloss.LossClient, make_table: Callable[..., shardloss.Table]
) -> None:
    """A table accepts one distribution at a time, and a failed call releases its place."""
    table = make_table()
    for _ in range(3):
        with pytest.raises(ShardlossError):
            stream(client, header(table), piece(V, np.ones((N, 1))))
    table.compute_loss(np.ones((N, D)), None, LOSSES[0], label_distribution=Y)


def test_a_head_refuses_hidden_without_a_dimension(make_table: Callable[..., shardloss.Table]) -> None:
    """A scalar hidden raises InvalidArgument with a label distribution, as with labels."""
    head = make_table().softmax()
    with pytest.raises(InvalidArgument, match="needed for hidden"):
        head(torch.tensor(1.0), torch.rand(V))
