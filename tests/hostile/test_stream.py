"""Losses and replies larger than one message are sent in chunks, with unchanged results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import shardloss
from shardloss import chunks, wire
from shardloss.errors import LimitExceeded, StepReused
from shardloss.splice import Spliced
from shardloss.v1 import evaluation_pb2, loss_pb2, tensor_pb2
from shardloss_server.config import Limits
from shardloss_server.rpc.serve import Server

from .world import once, serving

MIB = 2**20
NUM_ROWS, WIDE = 16_384, 1024  # 64 MiB of float32 hidden
NUM_CLASSES = 37
SLICE = 200  # rows whose hidden and hidden gradient each fit into a unary message
EXACT = 5e-6  # float32, relative to max(1, magnitude): bits depend on the number of rows in a product
ANSWER_S = 120.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = Limits()
    assert limits.max_message_bytes == 4 * MIB
    with serving(limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address, timeout_s=120.0) as client:
        yield client


@pytest.fixture
def make_table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Iterator[Callable[..., shardloss.Table]]:
    """Return a function that creates tables; they are deleted after the test."""
    made: list[str] = []

    def make(**spec: object) -> shardloss.Table:
        made.append(fresh_name())
        return client.create_table(made[-1], num_shards=3, **spec)

    yield make
    for name in made:
        client.delete_table(name)


class Calls:
    """The names of the methods that a client has used for its losses, in order."""

    def __init__(self, client: shardloss.LossClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[str] = []
        for attribute, name in (("send_loss", "ComputeLoss"), ("stream_loss", "StreamLoss")):
            monkeypatch.setattr(client, attribute, self._noting(name, getattr(client, attribute)))

    def _noting(self, name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.used.append(name)
            return method(*args, **kwargs)

        return call


@pytest.fixture
def calls(client: shardloss.LossClient, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(client, monkeypatch)


def assert_close(actual: np.ndarray | None, expected: np.ndarray) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=EXACT * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize(
    "num_rows, num_sampled", [(NUM_ROWS, 0), (2 * MIB // WIDE, 11)], ids=["64 MB, full", "8 MB, sampled"]
)
def test_many_mb_of_hidden_give_the_results_of_small_batches(
    make_table: Callable[..., shardloss.Table], calls: Calls, rng: np.random.Generator, num_rows: int, num_sampled: int
) -> None:
    """The client chooses StreamLoss automatically; losses and gradients equal those of many small unary calls."""
    table = make_table(num_classes=NUM_CLASSES, dim=WIDE, initializer=shardloss.Normal(0.05))
    hidden = rng.standard_normal((num_rows, WIDE), dtype=np.float32)
    assert hidden.nbytes in (64 * MIB, 8 * MIB)
    labels = rng.integers(0, NUM_CLASSES, num_rows)
    loss = shardloss.SampledSoftmax(num_sampled, seed=5) if num_sampled else shardloss.FullSoftmax()
    large = table.compute_loss(hidden, labels, loss, step=3, want_lse=True, want_hidden_grad=True)
    assert calls.used == ["StreamLoss"]
    slices = [slice(start, start + SLICE) for start in range(0, num_rows, 8 * SLICE)]
    for chosen in slices:
        small = table.compute_loss(hidden[chosen], labels[chosen], loss, step=3, want_lse=True, want_hidden_grad=True)
        assert_close(large.loss[chosen], small.loss)
        assert_close(large.lse[chosen], small.lse)
        assert_close(large.hidden_grad[chosen], small.hidden_grad)
    assert calls.used[1:] == ["ComputeLoss"] * len(slices)


def test_a_streamed_step_trains_once(
    make_table: Callable[..., shardloss.Table], calls: Calls, rng: np.random.Generator
) -> None:
    """A streamed loss opens a ticket; streaming it again is a replay, and its commit applies one step."""
    table = make_table(num_classes=NUM_CLASSES, dim=WIDE, initializer=shardloss.Normal(0.05))
    hidden = rng.standard_normal((2048, WIDE), dtype=np.float32)
    labels = rng.integers(0, NUM_CLASSES, len(hidden))
    before = table.read_rows(np.arange(NUM_CLASSES))
    expected = gradient_of_sum(before, hidden, labels)
    session = table.session()
    first = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    session.num_parts = 0  # so the next loss has the same key
    again = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    assert calls.used == ["StreamLoss"] * 2
    assert (first.replayed, again.replayed) == (False, True)
    assert again.ticket == first.ticket
    np.testing.assert_array_equal(again.hidden_grad, first.hidden_grad)
    session.num_parts = 0
    with pytest.raises(StepReused):
        session.compute_loss(-hidden, labels, shardloss.FullSoftmax())
    session.commit([(first, None)], learning_rate=1e-3)
    after = table.read_rows(np.arange(NUM_CLASSES))
    assert after.version == 1
    assert_close((before.rows - after.rows) / 1e-3, expected)


def gradient_of_sum(table: shardloss.Rows, hidden: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return d sum(loss) / d rows [V, D], computed in float64."""
    rows, hidden = table.rows.astype(np.float64), hidden.astype(np.float64)
    assert table.biases is not None
    logits = hidden @ rows.T + table.biases
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1.0
    return p.T @ hidden


def test_a_one_call_step_may_be_streamed(
    make_table: Callable[..., shardloss.Table], calls: Calls, rng: np.random.Generator
) -> None:
    """A step of one large batch sent as a single stream gives bitwise the same losses and rows as the two-call form."""
    tables = [make_table(num_classes=NUM_CLASSES, dim=WIDE, initializer=shardloss.Normal(0.05)) for _ in range(2)]
    hidden = rng.standard_normal((2048, WIDE), dtype=np.float32)
    labels, g = rng.integers(0, NUM_CLASSES, len(hidden)), rng.standard_normal(len(hidden))
    done = tables[0].session().train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=1e-3, upstream=g)
    assert calls.used == ["StreamLoss"]
    session = tables[1].session()
    scored = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    session.commit([(scored, g)], learning_rate=1e-3)
    np.testing.assert_array_equal(done.loss, scored.loss)
    rows = [table.read_rows(np.arange(NUM_CLASSES)).rows for table in tables]
    np.testing.assert_array_equal(rows[0], rows[1])


# Small requests with large replies


def test_a_wide_gradient_is_counted_before_it_is_asked_for(
    make_table: Callable[..., shardloss.Table], calls: Calls, rng: np.random.Generator
) -> None:
    """The client streams if the gradient in grad_dtype is too large: in float64, but not in float32 or float16."""
    table = make_table(num_classes=NUM_CLASSES, dim=512)
    hidden = rng.standard_normal((1500, 512), dtype=np.float32)
    labels = rng.integers(0, NUM_CLASSES, len(hidden))
    for grad_dtype in (None, "float64"):
        found = table.compute_loss(
            hidden, labels, shardloss.FullSoftmax(), want_hidden_grad=True, grad_dtype=grad_dtype
        )
        assert found.hidden_grad is not None
        assert found.hidden_grad.dtype == (grad_dtype or "float32")
    twice = np.concatenate([hidden, hidden]).astype(np.float16)
    table.compute_loss(twice, np.tile(labels, 2), shardloss.FullSoftmax(), want_hidden_grad=True, grad_dtype="float16")
    assert calls.used == ["ComputeLoss", "StreamLoss", "ComputeLoss"]


def test_a_reply_above_one_message_comes_in_chunks(
    make_table: Callable[..., shardloss.Table], calls: Calls, rng: np.random.Generator
) -> None:
    """A small batch's table gradient over 60,000 classes is streamed, and equals the sum over two parts of it."""
    num_classes, dim = 60_000, 24  # 5.8 MB of rows
    table = make_table(num_classes=num_classes, dim=dim)
    hidden = rng.standard_normal((6, dim), dtype=np.float32)
    labels = rng.integers(0, num_classes, 6)

    def gradient(chosen: slice) -> shardloss.TableGradient:
        result = table.compute_loss(hidden[chosen], labels[chosen], shardloss.FullSoftmax(), want_table_grad=True)
        assert result.table_grad is not None
        return result.table_grad

    whole, halves = gradient(slice(0, 6)), [gradient(slice(0, 2)), gradient(slice(2, 6))]
    assert calls.used == ["StreamLoss"] * 3
    assert whole.rows.nbytes > 4 * MIB
    np.testing.assert_array_equal(whole.class_ids, np.arange(num_classes))
    assert_close(whole.rows, halves[0].rows + halves[1].rows)
    assert_close(whole.biases, halves[0].biases + halves[1].biases)
    assert np.abs(whole.rows[labels[0]]).max() > 1e-2


def large_reply(table: str, form: str) -> loss_pb2.ComputeLossRequest:
    """Return a request with 2.4 MB of float16 hidden, whose float32 gradient takes 4.9 MB."""
    request = loss_pb2.ComputeLossRequest(
        table=table,
        hidden=wire.encode(np.ones((2400, 512), np.float16)),
        labels=wire.encode(np.zeros(2400, np.int64)),
        full_softmax=loss_pb2.FullSoftmax(),
        want_hidden_grad=True,
    )
    if form != "no session":
        request.session, request.step = "trainer", 1
    if form == "one call":
        request.commit_now.learning_rate = 0.5
    return request


@pytest.mark.parametrize("form", ["no session", "ticket", "one call"])
def test_a_unary_loss_whose_reply_is_too_large_is_refused(
    make_table: Callable[..., shardloss.Table], client: shardloss.LossClient, form: str
) -> None:
    """LimitExceeded suggests StreamLoss and leaves no ticket or step; the stream then answers the same key."""
    table = make_table(num_classes=NUM_CLASSES, dim=512)
    before = table.read_rows(np.arange(NUM_CLASSES))
    request = large_reply(table.name, form)
    with pytest.raises(LimitExceeded, match="StreamLoss"):
        once(client.losses.ComputeLoss, request, ANSWER_S)
    after, info = table.read_rows(np.arange(NUM_CLASSES)), table.info()
    assert (after.version, info.version, info.num_open_tickets) == (0, 0, 0)
    np.testing.assert_array_equal(after.rows, before.rows)
    replies = stream(client, request)
    assert not replies[0].header.replayed
    assert all(len(reply.chunk.content) <= Limits().max_chunk_bytes for reply in replies[1:])
    sent = sum(len(reply.chunk.content) for reply in replies[1:])
    assert sent == replies[0].header.hidden_grad.chunk.num_bytes == 2400 * 512 * 4
    info = table.info()
    assert (info.version, info.num_open_tickets) == {"no session": (0, 0), "ticket": (0, 1), "one call": (1, 0)}[form]


def stream(client: shardloss.LossClient, request: loss_pb2.ComputeLossRequest) -> list[loss_pb2.StreamLossResponse]:
    """Send a request over StreamLoss with hidden in chunks, and return the replies."""
    header, parts = chunks.detach(Spliced(request), "hidden", Limits().max_chunk_bytes)
    messages = (tensor_pb2.Chunk(id=part.id, content=bytes(part.content)) for part in parts)
    pieces = [loss_pb2.StreamLossRequest(header=header), *(loss_pb2.StreamLossRequest(chunk=one) for one in messages)]
    return list(client.losses.StreamLoss(iter(pieces), timeout=ANSWER_S))


def many_samples(table: str) -> tuple[str, object]:
    sampler = loss_pb2.Sampler(kind=loss_pb2.Sampler.KIND_UNIFORM, num_sampled=400_000, unique=False)
    return "SampleCandidates", loss_pb2.SampleCandidatesRequest(table=table, sampler=sampler)


def many_best(table: str) -> tuple[str, object]:
    hidden = wire.encode(np.ones((40, 3), np.float32))
    return "TopK", evaluation_pb2.TopKRequest(table=table, hidden=hidden, k=10_000, want_log_probs=True)


def many_logits(table: str) -> tuple[str, object]:
    hidden, class_ids = wire.encode(np.ones((60, 3), np.float32)), wire.encode(np.arange(10_000))
    return "Score", evaluation_pb2.ScoreRequest(table=table, hidden=hidden, class_ids=class_ids, want_log_probs=True)


@pytest.mark.parametrize("ask", [many_samples, many_best, many_logits], ids=lambda ask: ask.__name__)
def test_any_reply_above_one_message_is_refused_by_name(
    make_table: Callable[..., shardloss.Table], client: shardloss.LossClient, ask: Callable[[str], tuple[str, object]]
) -> None:
    """A reply that is too large raises LimitExceeded, not Overloaded, because a retry would fail again."""
    method, request = ask(make_table(num_classes=10_000, dim=3).name)
    stub = client.losses if hasattr(client.losses, method) else client.questions
    with pytest.raises(LimitExceeded):
        once(getattr(stub, method), request, ANSWER_S)


def test_a_question_above_one_message_is_refused_at_once(
    server: Server, make_table: Callable[..., shardloss.Table]
) -> None:
    """Score of 600,000 class ids does not fit into a message: the client raises LimitExceeded without retrying."""
    table = make_table(num_classes=50, dim=3)
    with shardloss.connect(server.address, timeout_s=2.0) as impatient, pytest.raises(LimitExceeded):
        impatient.table(table.name).score(np.ones((1, 3), np.float32), np.zeros(600_000, np.int64))


def test_large_questions_go_in_pages(make_table: Callable[..., shardloss.Table], rng: np.random.Generator) -> None:
    """Evaluate, TopK and Score of 8 MB of hidden return the same results as for single rows."""
    table = make_table(num_classes=NUM_CLASSES, dim=WIDE, initializer=shardloss.Normal(0.05))
    hidden = rng.standard_normal((2048, WIDE), dtype=np.float32)
    labels = rng.integers(0, NUM_CLASSES, len(hidden))
    evaluation, best = table.evaluate(hidden, labels), table.top_k(hidden, 3)
    scores = table.score(hidden, np.arange(NUM_CLASSES))
    for row in (0, 127, 128, 2047):
        alone = slice(row, row + 1)
        assert_close(evaluation.loss[alone], table.evaluate(hidden[alone], labels[alone]).loss)
        assert evaluation.rank[row] == table.evaluate(hidden[alone], labels[alone]).rank[0]
        np.testing.assert_array_equal(best.class_ids[alone], table.top_k(hidden[alone], 3).class_ids)
        assert_close(scores.logits[alone], table.score(hidden[alone], np.arange(NUM_CLASSES)).logits)
