"""A step that overlaps the trainer's next work: same training, no lost errors, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import shardloss
import torch
from shardloss.errors import RowsLost, TableNotFound, TransientError
from shardloss_server.rpc.serve import Server
from torch import Tensor

V, D, N = 53, 7, 11
RATE = 0.3
PATIENCE_S = 120.0


@pytest.fixture
def make_table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Callable[[], shardloss.Table]:
    def make() -> shardloss.Table:
        optimizer = shardloss.Adagrad()
        return client.create_table(fresh_name(), num_classes=V, dim=D, dtype="float64", optimizer=optimizer)

    return make


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(0, V, (N,))


class Gate:
    """A gate that holds the commits of a table until it is opened, and can make one of them fail."""

    def __init__(self, table: shardloss.Table, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.error: Exception | None = None
        commit = table.client.losses.Commit

        def held(request: Any, timeout: float, **named: Any) -> Any:
            self.entered.set()
            assert self.open.wait(PATIENCE_S)
            error, self.error = self.error, None
            if error is not None:
                raise error
            return commit(request, timeout=timeout, **named)

        monkeypatch.setattr(table.client.losses, "Commit", held)


@pytest.fixture
def table(make_table: Callable[[], shardloss.Table]) -> shardloss.Table:
    return make_table()


@pytest.fixture
def gate(table: shardloss.Table, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(table, monkeypatch)


def test_training_is_the_same_to_the_bit(make_table: Callable[[], shardloss.Table]) -> None:
    """Ten steps with a scheduler, one accumulated and one skipped, give the same bits with and without overlap."""
    ends = []
    for overlap in (False, True):
        torch.manual_seed(3)
        table = make_table()
        head = table.softmax()
        optimizer = head.optimizer(lr=RATE, overlap=overlap)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        losses = []
        for step in range(10):
            for _ in range(2 if step == 4 else 1):
                loss = head(*batch())
                loss.backward()
                losses.append(loss.detach())
            if step != 6:
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        optimizer.synchronize()
        ends.append((torch.stack(losses), torch.from_numpy(table.read_rows(range(V)).rows)))
        assert table.info().num_commits == 9
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_candidates_by_learned_counts_are_those_of_waiting_steps(
    client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """The labels of a step are counted before the next loss draws by them, with and without overlap."""
    ends = []
    for overlap in (False, True):
        torch.manual_seed(3)
        table = client.create_table(fresh_name(), num_classes=V, dim=D, dtype="float64", count_labels=True)
        head = table.sampled_softmax(9, sampler="learned_unigram", seed=1)
        optimizer = head.optimizer(lr=RATE, overlap=overlap)
        losses = []
        for _ in range(12):
            loss = head(*batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        optimizer.synchronize()
        ends.append(torch.stack(losses))
    assert torch.equal(*ends)


def test_zero_grad_does_not_give_up_a_step_that_is_to_be_sent_again(table: shardloss.Table, gate: Gate) -> None:
    """The step is applied once the server answers, even if a later loss was started and failed."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    gate.error = shardloss.errors.DeadlineExceeded("lost")
    optimizer.step()
    loss = head.table.client.send_loss
    failing = Failing(gate)
    head.table.client.send_loss = failing
    with pytest.raises(TransientError):
        head(*batch())
    head.table.client.send_loss = loss
    optimizer.zero_grad()
    optimizer.synchronize()
    assert table.info().version == 1
    head(*batch()).backward()
    optimizer.step()
    optimizer.synchronize()
    assert table.info().version == 2


class Failing:
    """A `send_loss` that opens the gate, so that the held commit fails, and then raises DeadlineExceeded itself."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, request: Any, timeout: float, **named: Any) -> Any:
        self.gate.open.set()
        raise shardloss.errors.DeadlineExceeded("lost")


def test_an_interrupt_while_waiting_loses_nothing(
    table: shardloss.Table, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C inside synchronize() the commit continues, and the next call waits for it."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    hidden, labels = batch()
    first = head(hidden, labels)
    first.backward()
    optimizer.step()

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.synchronize()
    gate.open.set()
    assert head(hidden, labels) < first
    assert table.info().version == 1


def test_closing_the_client_waits_for_the_commit(
    local_server: Server, fresh_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() returns after the last commit, so a program's last step is not lost."""
    client = shardloss.connect(local_server.address)
    table = client.create_table(fresh_name(), num_classes=V, dim=D)
    gate = Gate(table, monkeypatch)
    head = table.softmax()
    head(torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N,))).backward()
    head.optimizer(lr=RATE, overlap=True).step()
    assert gate.entered.wait(PATIENCE_S)
    threading.Timer(0.1, gate.open.set).start()
    client.close()
    with shardloss.connect(local_server.address) as other:
        assert other.table(table.name).spec.version == 1


def test_a_step_returns_while_its_commit_is_under_way(table: shardloss.Table, gate: Gate) -> None:
    """step() returns before its commit is applied, and synchronize() waits for it."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert gate.entered.wait(PATIENCE_S)
    assert table.info().version == 0
    gate.open.set()
    optimizer.synchronize()
    assert table.info().version == 1


def test_the_next_loss_waits_for_the_step_before(table: shardloss.Table, gate: Gate) -> None:
    """The next loss is scored at the version that the previous step produced."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    hidden, labels = batch()
    first = head(hidden, labels)
    first.backward()
    optimizer.step()
    threading.Timer(0.05, gate.open.set).start()
    second = head(hidden, labels)
    assert second < first
    head.eval()
    assert head(hidden, labels) == second


@pytest.mark.parametrize("asking", ["loss", "step", "synchronize"])
def test_an_error_of_the_commit_is_raised_by_what_comes_next(
    table: shardloss.Table, client: shardloss.LossClient, gate: Gate, asking: str
) -> None:
    """The error of a failed commit is raised by the next loss, step() or synchronize()."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    client.delete_table(table.name)
    gate.open.set()
    ask = {"loss": lambda: head(*batch()), "step": optimizer.step, "synchronize": optimizer.synchronize}
    with pytest.raises((TableNotFound, RowsLost)):
        ask[asking]()


@pytest.mark.parametrize("asking", ["loss", "step", "synchronize"])
def test_a_step_that_nobody_answered_is_sent_again(table: shardloss.Table, gate: Gate, asking: str) -> None:
    """After a TransientError the next loss, step() or synchronize() repeats the commit first; it is applied once."""
    again: dict[str, Callable[[Any, Any], object]] = {
        "loss": lambda _, head: head(*batch()),
        "step": lambda optimizer, _: optimizer.step(),
        "synchronize": lambda optimizer, _: optimizer.synchronize(),
    }
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    gate.error = shardloss.errors.DeadlineExceeded("lost")
    gate.open.set()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TransientError):
        optimizer.synchronize()
    again[asking](optimizer, head)
    assert table.info().version == 1
    head(*batch()).backward()
    optimizer.step()
    optimizer.synchronize()
    assert table.info().version == 2


def test_a_refused_step_lets_go_of_the_loss_that_follows_it(table: shardloss.Table, gate: Gate) -> None:
    """If the commit is refused, a loss already in progress fails with the commit's error, long before its deadline."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    gate.error = shardloss.errors.TicketExpired("too late")
    optimizer.step()
    optimizer.zero_grad()
    threading.Timer(0.1, gate.open.set).start()
    began = time.monotonic()
    with pytest.raises(shardloss.errors.TicketExpired):
        head(*batch())
    assert time.monotonic() - began < PATIENCE_S / 2
    head(*batch()).backward()
    optimizer.step()
    optimizer.synchronize()
    assert table.info().version == 1


def test_the_trainer_does_not_wait_for_the_step(table: shardloss.Table, gate: Gate) -> None:
    """step() and zero_grad() return while the commit is still held."""
    head = table.softmax()
    optimizer = head.optimizer(lr=RATE, overlap=True)
    head(*batch()).backward()
    began = time.monotonic()
    optimizer.step()
    optimizer.zero_grad()
    assert time.monotonic() - began < PATIENCE_S / 2
    assert not gate.open.is_set()
    gate.open.set()
    optimizer.synchronize()
