"""Creating a table holds up no other, leaves nothing behind if it fails, and takes no memory that there is not."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
from shardloss import errors
from shardloss.cli import app
from shardloss.v1 import table_pb2, table_pb2_grpc
from shardloss_server.cluster.group import Pending, ShardMissing, WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, ServerConfig
from shardloss_server.frontend import creation
from shardloss_server.machine import Pool
from shardloss_server.rpc.serve import Server

from ...patience import PATIENCE_S, eventually

MIB = 2**20
BIG = {"num_classes": 1 << 17, "dim": 64}  # 16 MiB of rows on each of two workers, filled in two slices


class Watched(LocalGroup):
    """Two worker threads that hold back the second slice of the tables named slow..., and can fail or be short of room.

    `errors` are raised by the next calls of a method; `pools` replace the workers' own memory.
    """

    def __init__(self) -> None:
        super().__init__(2)
        self.gate = threading.Event()
        self.errors: dict[str, Exception] = {}
        self.pools: Sequence[Sequence[Pool]] | None = None
        self.calls: list[str] = []
        self._waiting = ThreadPoolExecutor(8)

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        self.calls.append(method)
        if method in self.errors:
            return Done(error=self.errors[method])
        if method == "memory" and self.pools is not None:
            return Done({worker: self.pools[worker]})
        if method == "fill" and args[0].startswith("slow") and args[1] > 0:
            return Done(source=self._waiting.submit(self._late, worker, method, *args))
        return super().start(worker, method, *args)

    def _late(self, worker: int, method: str, *args: Any) -> dict[int, Any]:
        assert self.gate.wait(PATIENCE_S)
        return super().start(worker, method, *args).result(PATIENCE_S)

    def close(self) -> None:
        self.gate.set()
        self._waiting.shutdown()
        super().close()


class Done:
    """An answer that is known, fails, or is that of another future."""

    def __init__(
        self, answer: Any = None, error: Exception | None = None, source: Future[dict[int, Any]] | None = None
    ) -> None:
        self.future: Future[dict[int, Any]] = source or Future()
        if error is not None:
            self.future.set_exception(error)
        elif source is None:
            self.future.set_result(answer)

    def result(self, timeout_s: float) -> Any:
        return self.future.result(timeout_s)

    @property
    def computed_s(self) -> dict[int, float]:
        return {}

    def abandon(self) -> None:
        self.future.cancel()


@pytest.fixture
def group() -> Iterator[Watched]:
    group = Watched()
    yield group
    group.close()


@pytest.fixture
def server(group: Watched) -> Iterator[Server]:
    server = Server(group, ServerConfig(limits=Limits(max_deadline_s=600.0)))
    server.start()
    yield server
    group.gate.set()
    server.stop(grace_s=1.0)


@pytest.fixture
def client(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client:
        yield client


@contextmanager
def creating(client: shardloss.LossClient, name: str, **spec: Any) -> Iterator[Future[shardloss.Table]]:
    """Create a table in a thread, and wait until half of it is filled."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(client.create_table, name, timeout_s=PATIENCE_S, **(spec or BIG))
        eventually(lambda: future.done() or state_of(client, name) == ("creating", 0.5), "the first slice is filled")
        assert not future.done()
        yield future


def state_of(client: shardloss.LossClient, name: str) -> tuple[str, float] | None:
    return next(((info.state, info.filled) for info in client.list_tables() if info.name == name), None)


def held(group: LocalGroup) -> int:
    """Return the number of shards on all workers."""
    return sum(one.stats.num_shards for one in group.stats(PATIENCE_S) if one.stats is not None)


def test_nobody_waits_for_the_creation_of_another_table(client: shardloss.LossClient, group: Watched) -> None:
    """While a table is filled, others are created, trained, renamed, listed and deleted; then it can be used itself."""
    client.create_table("a", num_classes=7, dim=3)
    with creating(client, "slow") as future:
        client.delete_table("a")
        b = client.create_table("b", num_classes=7, dim=3)
        b.session().train_step(np.ones((2, 3)), np.array([1, 2]), shardloss.FullSoftmax(), learning_rate=0.1)
        client.rename_table("b", "c")
        assert [info.name for info in client.list_tables()] == ["c", "slow"]
        assert "CREATING" in repr(client.table("slow"))
        group.gate.set()
        assert future.result(PATIENCE_S).spec.state == "ready"
    assert client.table("slow").read_rows(np.array([0])).rows.any()


def test_a_table_that_is_being_created_is_unavailable_and_its_name_is_taken(
    client: shardloss.LossClient, server: Server, group: Watched
) -> None:
    """Calls on it are told how far it is; another spec is refused at once; it can be neither renamed nor replaced."""
    with shardloss.connect(server.address, timeout_s=1.0) as hasty, creating(client, "slow"):
        with pytest.raises(errors.TableUnavailable, match=r"'slow' is being created: 50% of its rows are filled"):
            hasty.table("slow").read_rows(np.array([0]))
        with pytest.raises(errors.TableExists, match="'slow' is being created with dim = 64, not 3"):
            client.create_table("slow", num_classes=BIG["num_classes"], dim=3)
        with pytest.raises(errors.TableUnavailable, match="being created"):
            hasty.rename_table("slow", "fast")
        client.create_table("a", num_classes=7, dim=3)
        with pytest.raises(errors.TableExists):
            client.rename_table("a", "slow")
        client.delete_table("slow")
        group.gate.set()


def test_a_repeat_of_a_creation_joins_it(client: shardloss.LossClient, group: Watched) -> None:
    """A second creation with an equal spec waits for the first, and the table is filled once."""
    with creating(client, "slow") as first, ThreadPoolExecutor(1) as thread:
        second = thread.submit(client.create_table, "slow", timeout_s=PATIENCE_S, **BIG)
        eventually(lambda: group.calls.count("create") == 2, "both workers have allocated")
        group.gate.set()
        assert first.result(PATIENCE_S).spec.name == second.result(PATIENCE_S).spec.name
    assert group.calls.count("create") == 2
    assert group.calls.count("fill") == 4


def test_a_table_that_is_being_created_is_deleted_at_once(client: shardloss.LossClient, group: Watched) -> None:
    """Deleting frees its name and its memory, and its creation ends with TABLE_NOT_FOUND."""
    with creating(client, "slow") as future:
        client.delete_table("slow")
        assert client.list_tables() == []
        group.gate.set()
        with pytest.raises(errors.TableNotFound, match="'slow' was deleted"):
            future.result(PATIENCE_S)
    eventually(lambda: held(group) == 0, "its shards are freed")


@pytest.mark.parametrize("goes", [True, False], ids=["goes-away", "runs-out-of-time"])
def test_nothing_is_left_of_a_creation_whose_caller_does_not_wait(
    client: shardloss.LossClient, server: Server, group: Watched, goes: bool
) -> None:
    """If the caller goes away or its deadline passes, the table is gone and its memory is freed."""
    with grpc.insecure_channel(server.address) as channel:
        spec = table_pb2.TableSpec(name="slow", num_classes=BIG["num_classes"], dim=BIG["dim"])
        request = table_pb2.CreateTableRequest(spec=spec)
        call = table_pb2_grpc.TableServiceStub(channel).CreateTable.future(request, timeout=PATIENCE_S if goes else 2.0)
        eventually(lambda: state_of(client, "slow") is not None, "the creation has begun")
        if goes:
            call.cancel()
        eventually(lambda: client.list_tables() == [], "the table is gone")
        assert call.code().name == ("CANCELLED" if goes else "DEADLINE_EXCEEDED")
    group.gate.set()
    eventually(lambda: held(group) == 0, "its shards are freed")


def test_with_a_worker_known_dead_a_creation_is_answered_at_once(
    client: shardloss.LossClient, server: Server, group: Watched
) -> None:
    """One try ends with TABLE_UNAVAILABLE long before its deadline; the client repeats it until the worker is back."""
    group.errors["memory"] = ShardMissing("worker 1 has died")
    with grpc.insecure_channel(server.address) as channel:
        request = table_pb2.CreateTableRequest(spec=table_pb2.TableSpec(name="a", num_classes=7, dim=3))
        with pytest.raises(grpc.RpcError, match="a worker has died and is not back yet") as failed:
            table_pb2_grpc.TableServiceStub(channel).CreateTable(request, timeout=PATIENCE_S)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert client.list_tables() == []
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(client.create_table, "a", num_classes=7, dim=3)
        eventually(lambda: group.calls.count("memory") >= 6, "the client has tried again")
        del group.errors["memory"]
        assert future.result(PATIENCE_S).spec.state == "ready"


@pytest.mark.parametrize("error", [WorkerLost("worker 1 is gone"), ShardMissing("worker 1 has died")])
def test_a_fill_that_killed_its_worker_is_not_repeated(
    client: shardloss.LossClient, group: Watched, error: Exception
) -> None:
    """The creation fails by name after one death, and leaves no table."""
    group.errors["fill"] = error
    with pytest.raises(errors.RowsLost, match="a worker died while it filled table 'a', so the table was not created"):
        client.create_table("a", num_classes=7, dim=3)
    assert group.calls.count("fill") == 2  # once per worker
    del group.errors["fill"]
    assert client.list_tables() == []
    assert held(group) == 0


def test_progress_is_reported_while_a_table_is_filled(client: shardloss.LossClient, group: Watched) -> None:
    """create_table calls progress(done, total), which the command shows as a bar."""
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            group.gate.set()

    client.create_table("slow", timeout_s=PATIENCE_S, progress=progress, **BIG)
    assert (BIG["num_classes"] // 2, BIG["num_classes"]) in seen


def test_the_command_shows_how_far_it_is_and_says_what_an_interruption_leaves(
    client: shardloss.LossClient,
    server: Server,
    group: Watched,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`table list` and `table show` say "creating 50%"; Ctrl-C exits with 130; --timeout ends the creation."""

    def run(*args: str) -> tuple[int, str]:
        capsys.readouterr()
        code = app.run((*args, "--address", server.address))
        return code, "".join(capsys.readouterr())

    size = ("--classes", str(BIG["num_classes"]), "--dim", str(BIG["dim"]))
    with creating(client, "slow", placement="mod", **BIG):
        for command in (("table", "list"), ("table", "show", "slow")):
            code, out = run(*command)
            assert (code, "creating 50%" in out) == (0, True), out
        client.delete_table("slow")
        group.gate.set()
    group.gate.clear()
    code, out = run("table", "create", "slow", *size, "--timeout", "1")
    assert (code, "DEADLINE_EXCEEDED" in out) == (1, True), out
    eventually(lambda: client.list_tables() == [], "nothing is left of it")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shardloss.LossClient, "create_table", interrupted)
    code, out = run("table", "create", "slow", *size)
    assert code == 130
    assert "the creation of 'slow' was given up, and the server deletes what it had of the table" in out


# Memory


def pool(key: str, free_mib: int) -> Pool:
    return Pool(key, f"the control group /{key}", 700 * MIB, free_mib * MIB)


@pytest.mark.parametrize(
    ("pools", "process"),
    [
        ([[pool("x", 4096)], [pool("y", 39)]], "worker 1"),
        ([[pool("x", 4096), pool("y", 39)], [pool("x", 4096)]], "worker 0"),
        ([[pool("x", 52)], [pool("x", 52)]], "worker 0"),
    ],
    ids=["its-own", "nested", "shared"],
)
def test_a_table_that_does_not_fit_its_workers_memory_is_refused_before_anything_is_allocated(
    client: shardloss.LossClient, group: Watched, pools: Sequence[Sequence[Pool]], process: str
) -> None:
    """LIMIT_EXCEEDED names the worker, the bytes needed and available, and what to do; shared memory is shared."""
    group.pools = pools
    with pytest.raises(errors.LimitExceeded) as refused:
        client.create_table("a", optimizer=shardloss.Sgd(), **BIG)
    free = min(one.free_bytes for one in pools[int(process[-1])]) - creation_copies()
    needed = BIG["num_classes"] // 2 * (64 + 1) * 4
    assert refused.value.details["process"] == process
    assert refused.value.details["needed_bytes"] == str(needed)
    assert refused.value.details["available_bytes"] == str(free)
    assert re.search(f"{process} needs {needed:,} bytes .* {free:,} are available. Delete a table", str(refused.value))
    assert "create" not in group.calls
    assert client.list_tables() == []


def creation_copies() -> int:
    return 32 * MIB


def test_optimizer_state_and_tables_that_are_being_filled_count(client: shardloss.LossClient, group: Watched) -> None:
    """Adam takes three times the memory of SGD; the unfilled half of another table is not free."""
    group.pools = [[pool("x", 32 + 20)], [pool("y", 32 + 20)]]
    with pytest.raises(errors.LimitExceeded, match="needs 51,118,080 bytes"):
        client.create_table("a", optimizer=shardloss.Adam(), **BIG)
    with creating(client, "slow"):
        group.pools = [[pool("x", 32 + 40)], [pool("y", 32 + 40)]]
        with pytest.raises(errors.LimitExceeded, match="of the 42,598,400 bytes that must come from"):
            client.create_table("a", num_classes=2 * BIG["num_classes"], dim=64)
        group.pools = [[pool("x", 32 + 41)], [pool("y", 32 + 41)]]
        client.create_table("a", num_classes=2 * BIG["num_classes"], dim=64)
        group.gate.set()


def test_label_counts_take_the_front_ends_memory(
    client: shardloss.LossClient, group: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "pools", lambda: [pool("front", 33)])
    group.pools = [[pool("x", 64)], [pool("y", 64)]]
    with pytest.raises(errors.LimitExceeded, match="the front end needs 3,145,728 bytes"):
        client.create_table("a", count_labels=True, **BIG)
    client.create_table("a", **BIG)


def test_the_memory_of_a_deleted_table_can_be_used_again(client: shardloss.LossClient, group: Watched) -> None:
    """A worker gives back what was freed before it says that there is no room."""
    given: list[bool] = []
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("shardloss_server.cluster.worker.return_freed_memory", lambda: given.append(True))
        patch.setattr("shardloss_server.cluster.worker.pools_of", lambda _: [pool("x", 100 if given else 1)])
        client.create_table("a", **BIG)
    assert given


# Shards


@pytest.mark.parametrize("how", ["client", "command", "import"])
def test_a_table_has_one_shard_per_worker_unless_it_is_told_otherwise(
    client: shardloss.LossClient,
    server: Server,
    group: Watched,
    tmp_path: Any,
    how: str,
    fresh_name: Callable[[], str],
) -> None:
    """This is so for worker threads as well, however the table is created: no worker idles."""
    name, weights = fresh_name(), tmp_path / "w.npy"
    np.save(weights, np.ones((7, 3), np.float32))
    if how == "client":
        client.create_table(name, num_classes=7, dim=3)
    else:
        given = ("create", name, "--classes", "7", "--dim", "3") if how == "command" else ("import", str(weights), name)
        assert app.run(("table", *given, "--shards", "0", "--address", server.address)) == 0
    assert client.table(name).spec.num_shards == 2
    assert [one.stats.num_shards for one in group.stats(PATIENCE_S) if one.stats is not None] == [1, 1]
