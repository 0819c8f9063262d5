"""What belongs to a table and not to its name: handles, sessions, heads and optimizers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shardloss
import torch
from shardloss import files
from shardloss.compat import paddle, tensorflow, tfrs
from shardloss.errors import TableNotFound
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import ANY_PORT, ServerConfig
from shardloss_server.rpc.serve import Server
from torch import Tensor

N, D, V = 5, 3, 23  # the table created again has fewer classes: a class of the old one need not exist in it
FEWER = 11
Remade = Callable[[shardloss.Table], shardloss.Table]


def batch(num_classes: int = V) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, requires_grad=True), torch.randint(num_classes, (N,))


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    return client.create_table(fresh_name(), num_classes=V, dim=D)


def created_again(table: shardloss.Table) -> shardloss.Table:
    table.client.delete_table(table.name)
    return table.client.create_table(table.name, num_classes=FEWER, dim=D)


def created_alike(table: shardloss.Table) -> shardloss.Table:
    table.client.delete_table(table.name)
    return table.client.create_table(table.name, num_classes=V, dim=D)


def assert_untouched(table: shardloss.Table) -> None:
    info = table.info()
    assert (info.version, info.num_commits, info.num_open_tickets) == (0, 0, 0)


@pytest.mark.parametrize("again", [created_again, created_alike])
def test_a_head_of_a_deleted_table_does_not_train_a_new_one_of_its_name(table: shardloss.Table, again: Remade) -> None:
    """A loss, a step with recorded gradients and a new session are refused; a head made from the new table works."""
    weights = np.ones(V, np.float32)
    head, weighted = table.softmax(), table.softmax(class_weights=weights)
    optimizer = head.optimizer(0.1)
    hidden, labels = batch(FEWER)
    head(hidden, labels).backward()
    new = again(table)
    for refused in (optimizer.step, lambda: head(hidden, labels), lambda: weighted(hidden, labels), table.session):
        with pytest.raises(TableNotFound, match=f"opened as '{table.name}' was deleted.*create new sessions, heads"):
            refused()
    head.eval()
    with pytest.raises(TableNotFound):
        head(hidden, labels)
    assert_untouched(new)
    fresh = new.softmax(learning_rate=0.1)
    fresh(hidden, labels).backward()
    assert new.info().num_commits == 1


def test_every_call_of_a_deleted_table_is_refused(table: shardloss.Table, tmp_path: Path) -> None:
    """Reads, writes, questions, draws and exports of the old handle do not reach the new table of its name."""
    new = created_alike(table)
    hidden, ids = np.zeros((2, D), np.float32), np.arange(2)
    exported = tmp_path / "exported.safetensors"
    calls: list[Callable[[], object]] = [
        table.info,
        lambda: table.compute_loss(hidden, ids, shardloss.FullSoftmax()),
        lambda: table.evaluate(hidden, ids),
        lambda: table.top_k(hidden, 2),
        lambda: table.score(hidden, ids),
        lambda: table.sample_classes(hidden, 2),
        lambda: table.sample_candidates(3),
        lambda: table.read_rows(ids),
        lambda: table.write_rows(ids, hidden),
        lambda: table.read_state(0, 2),
        lambda: table.write_state(0, new.read_state(0, 2)),
        lambda: table.read_class_counts(0, V),
        lambda: table.write_class_counts(np.ones(V)),
        lambda: files.export_table(table, exported),
        lambda: table.client.delete_table(table.reference),
        lambda: table.client.rename_table(table.reference, f"{table.name}-2"),
    ]
    for call in calls:
        with pytest.raises(TableNotFound):
            call()
    assert_untouched(new)
    assert new.read_class_counts(0, V).written is None
    assert not exported.exists()


def test_a_head_stays_with_its_table_when_that_is_renamed(table: shardloss.Table) -> None:
    """It trains its table under the new name, not a new table of the old name, and continues after a renaming back."""
    client, head = table.client, table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch()
    head(hidden, labels).backward()
    moved = client.rename_table(table.name, f"{table.name}.moved")
    assert (moved.id, moved.name, table.info().name) == (table.id, f"{table.name}.moved", moved.name)
    new = client.create_table(table.name, num_classes=V, dim=D)
    optimizer.step()
    assert moved.info().num_commits == 1
    assert_untouched(new)
    client.delete_table(new.name)
    client.rename_table(moved.name, table.name)
    head(hidden, labels).backward()
    optimizer.step()
    assert client.table(table.name).info().num_commits == 2


def test_creating_an_existing_table_keeps_its_heads(table: shardloss.Table) -> None:
    """A create_table that returns the existing table changes nothing for them."""
    head = table.softmax(learning_rate=0.1)
    assert table.client.create_table(table.name, num_classes=V, dim=D).id == table.id
    head(*batch()).backward()
    assert table.info().num_commits == 1


def test_an_import_is_a_new_table(table: shardloss.Table, tmp_path: Path) -> None:
    """A head of the table that was exported and deleted does not train the imported one."""
    path, head = tmp_path / "table.safetensors", table.softmax(learning_rate=0.1)
    files.export_table(table, path)
    table.client.delete_table(table.name)
    new = files.import_table(table.client, path, table.name)
    with pytest.raises(TableNotFound):
        head(*batch())
    assert (new.info().num_commits, new.info().num_open_tickets) == (0, 0)


def test_the_tickets_of_a_deleted_table_are_unknown_to_a_new_one(table: shardloss.Table) -> None:
    """Neither the old session nor a new one can commit a ticket of the old table to the new table."""
    session = table.session()
    loss = session.compute_loss(np.zeros((1, D), np.float32), np.zeros(1, np.int64), shardloss.FullSoftmax())
    new = created_alike(table)
    with pytest.raises(TableNotFound):
        session.commit([(loss, None)], learning_rate=0.1)
    other = new.session()
    other.compute_loss(np.zeros((1, D), np.float32), np.zeros(1, np.int64), shardloss.FullSoftmax())
    with pytest.raises(shardloss.errors.TicketUnknown):
        other.commit([(loss, None)], learning_rate=0.1)
    assert new.info().num_commits == 0


@contextmanager
def serving(socket: Path) -> Iterator[None]:
    group = LocalGroup(1)
    server = Server(group, ServerConfig(replace(ANY_PORT, socket=str(socket))))
    server.start()
    yield
    server.stop(grace_s=0.0)
    group.close()


def test_a_head_does_not_train_a_table_of_a_restarted_server() -> None:
    """A server that starts again at the same address has lost its tables; one created since is another one."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as after:
        socket = Path(folder) / "s"  # short, because the path of a socket is limited
        with serving(socket):
            client = after.enter_context(shardloss.connect(f"unix:{socket}", timeout_s=60.0))
            head = client.create_table("table", num_classes=V, dim=D).softmax(learning_rate=0.1)
        with serving(socket):
            new = client.create_table("table", num_classes=V, dim=D)
            with pytest.raises(TableNotFound, match="the server was restarted"):
                head(*batch())
            assert_untouched(new)


def test_compat_functions_train_the_table_they_are_given(table: shardloss.Table) -> None:
    """An optimizer of the old table is refused and never steps for the new one, whatever their shapes."""
    optimizer = tensorflow.optimizer(table, 0.1)
    hidden, labels = batch()
    losses: list[Callable[[shardloss.Table], Tensor]] = [
        lambda one: tensorflow.sampled_softmax_loss(one, one, labels[:, None], hidden, 5, V).sum(),
        lambda one: paddle.cross_entropy(one.logits(hidden), labels),
    ]
    losses[0](table).backward()
    new = created_alike(table)
    for loss in losses:
        with pytest.raises(TableNotFound):
            loss(table)
    with pytest.raises(TableNotFound):
        optimizer.step()
    fresh = paddle.optimizer(new, 0.1)
    for loss in losses:
        loss(new).backward()
        with pytest.raises(TableNotFound, match="create a new optimizer"):
            optimizer.step()
        fresh.step()
    assert new.info().num_commits == 2


def test_compat_functions_share_one_head_across_a_renaming(table: shardloss.Table) -> None:
    """The optimizer made under the old name commits losses of the handle with the new name."""
    optimizer = tfrs.optimizer(table, 0.1)
    moved = table.client.rename_table(table.name, f"{table.name}.moved")
    hidden, labels = batch()
    tensorflow.sampled_softmax_loss(moved, table, labels[:, None], hidden, 5, V).sum().backward()
    optimizer.step()
    assert moved.info().num_commits == 1
