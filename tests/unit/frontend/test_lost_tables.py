"""A table that has lost rows is marked wherever it is shown, takes no memory, and is replaced by an import."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import shardloss
from shardloss import errors, files
from shardloss.cli import app
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, ServerConfig
from shardloss_server.rpc.serve import Server

from ...patience import PATIENCE_S, eventually

V, D = 11, 3


@pytest.fixture
def group() -> Iterator[LocalGroup]:
    group = LocalGroup(2)
    yield group
    group.close()


@pytest.fixture
def server(group: LocalGroup) -> Iterator[Server]:
    server = Server(group, ServerConfig(limits=Limits(max_table_bytes=4 * V * (D + 1))))
    server.start()
    yield server
    server.stop(grace_s=1.0)


@pytest.fixture
def client(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client:
        yield client


@pytest.fixture
def run(server: Server, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        code = app.run((*args, "--address", server.address, "--admin-address", server.admin_address))
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    np.save(tmp_path / "w.npy", np.full((V, D), 7, np.float32))
    return tmp_path / "w.npy"


def lose(group: LocalGroup, client: shardloss.LossClient, name: str) -> None:
    """Take all rows of one worker, as its death does, and wait until that is noticed, without calling the table."""
    group._workers[1]._tables.clear()
    eventually(lambda: client.table(name).spec.state == "rows_lost", "the loss is noticed")


def test_a_table_that_has_lost_rows_is_marked_everywhere_before_it_is_called(
    client: shardloss.LossClient, server: Server, group: LocalGroup, run: Callable[..., tuple[int, str]]
) -> None:
    """In list, show, status, repr, the list of tables and the metrics; creating it again is told as well."""
    client.create_table("words", num_classes=V, dim=D)
    for command in (("table", "list"), ("table", "show", "words"), ("status",)):
        assert "ROWS LOST" not in run(*command)[1]
    lose(group, client, "words")
    for command in (("table", "list"), ("table", "show", "words"), ("status",)):
        code, out = run(*command)
        assert (code, "ROWS LOST" in out) == (0, True), out
    (listed,) = json.loads(run("table", "list", "--output", "json")[1])["tables"]
    assert (listed["name"], listed["state"]) == ("words", "rows_lost")
    assert [info.state for info in client.list_tables()] == ["rows_lost"]
    assert "ROWS LOST" in repr(client.table("words"))
    samples = [sample for family in server.metrics.collect() for sample in family.samples]
    assert [one.value for one in samples if one.name == "shardloss_table_rows_lost"] == [1.0]
    for call in (
        lambda: client.table("words").read_rows(np.array([0])),
        lambda: client.create_table("words", num_classes=V, dim=D),
    ):
        with pytest.raises(errors.RowsLost, match=r"'words': a worker died .*shardloss table import --replace"):
            call()


def test_a_lost_table_takes_no_memory(client: shardloss.LossClient, group: LocalGroup) -> None:
    """The shards that are left are freed, and another table may take its share of max_table_bytes."""
    client.create_table("words", num_classes=V, dim=D)
    with pytest.raises(errors.LimitExceeded, match="max_table_bytes"):
        client.create_table("other", num_classes=V, dim=D)
    lose(group, client, "words")
    client.create_table("other", num_classes=V, dim=D)
    assert all(len(worker._tables) == 1 for worker in group._workers)


def test_an_import_replaces_a_lost_table(
    client: shardloss.LossClient, group: LocalGroup, run: Callable[..., tuple[int, str]], weights: Path
) -> None:
    """Without --replace the refusal says that the rows are lost and how to replace them."""
    client.create_table("words", num_classes=V, dim=D)
    lose(group, client, "words")
    code, out = run("table", "import", str(weights), "words")
    assert code == 1
    assert "TABLE_EXISTS: table 'words' already exists and has lost its rows: delete it, replace it (--replace)" in out
    assert run("table", "import", str(weights), "words", "--replace")[0] == 0
    table = client.table("words")
    assert (table.spec.state, [info.name for info in client.list_tables()]) == ("ready", ["words"])
    assert (table.read_rows(np.arange(V)).rows == 7).all()


def test_a_table_is_served_until_it_is_replaced_and_kept_if_the_import_fails(
    local_server: Server, fresh_name: Callable[[], str], weights: Path, tmp_path: Path
) -> None:
    """Readers see the old rows until the last page is written, and then the new ones; there is no moment without."""
    with shardloss.connect(local_server.address, timeout_s=PATIENCE_S) as client:
        name = fresh_name()
        old = client.create_table(name, num_classes=V, dim=D, initializer=shardloss.Zeros())
        seen: list[float] = []

        def progress(_done: int, _of: int) -> None:
            seen.append(float(client.table(name).read_rows(np.arange(V)).rows.sum()))

        def fail(_done: int, _of: int) -> None:
            raise errors.ServerUnavailable("the cable is out")

        np.save(tmp_path / "bad.npy", np.full((V, D), np.nan, np.float32))
        for path, how, error in (
            (tmp_path / "bad.npy", None, errors.InvalidArgument),
            (weights, fail, errors.ServerUnavailable),
        ):
            with pytest.raises(error):
                files.import_table(client, path, name, replace=True, progress=how)
            assert not old.read_rows(np.arange(V)).rows.any()
        new = files.import_table(client, weights, name, replace=True, resume=True, progress=progress)
        assert seen == [0.0]
        assert (new.read_rows(np.arange(V)).rows == 7).all()
        assert not any(info.name.startswith(f"{name}.") for info in client.list_tables())
        files.import_table(client, weights, f"{name}-b", replace=True)  # replaces nothing
        with pytest.raises(errors.TableExists):
            client.rename_table(name, f"{name}-b")
        assert client.rename_table(name, f"{name}-b", replace=True).name == f"{name}-b"
        with pytest.raises(errors.TableNotFound):
            client.table(name)
        assert client.rename_table(f"{name}-b", f"{name}-b", replace=True).name == f"{name}-b"
        assert (client.table(f"{name}-b").read_rows(np.arange(V)).rows == 7).all()
