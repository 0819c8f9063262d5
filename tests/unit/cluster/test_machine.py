"""The memory and cores that a process may use, as control groups of both versions limit them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shardloss_server import machine
from shardloss_server.config import Limits, Workers

GIB = 2**30
V2_MOUNT = "31 23 0:28 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"
OTHER_MOUNT = "30 23 0:27 / /proc rw,nosuid - proc proc rw\n"


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files of /proc and /sys below a folder, which it returns."""

    def write(files: dict[str, str]) -> Path:
        meminfo = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"
        for name, text in {"proc/meminfo": meminfo, "proc/sys/kernel/random/boot_id": "b\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def v2(own: str, groups: dict[str, dict[str, object]], top: str = "/") -> dict[str, str]:
    """Return the files of a process in group `own` of version 2."""
    files = {f"sys/fs/cgroup{group}/{name}": f"{text}\n" for group, one in groups.items() for name, text in one.items()}
    return {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": OTHER_MOUNT + V2_MOUNT.format(top=top)} | files


def v1(own: str, groups: dict[str, dict[str, object]], top: str = "/", name: str = "memory") -> dict[str, str]:
    """Return the files of a process in group `own` of one controller of version 1."""
    files = {
        f"sys/fs/cgroup/{name}{group}/{file}": f"{text}\n"
        for group, one in groups.items()
        for file, text in one.items()
    }
    mounts = OTHER_MOUNT + V1_MOUNT.format(top="/", name="devices") + V1_MOUNT.format(top=top, name=name)
    return {"proc/self/cgroup": f"7:devices:/x\n4:{name}:{own}\n0::/\n", "proc/self/mountinfo": mounts} | files


def limits(root: Path) -> list[tuple[float, float]]:
    """Return (limit, free) of every pool but the machine's, in GiB."""
    return [(pool.limit_bytes / GIB, pool.free_bytes / GIB) for pool in machine.pools(root)[1:]]


def test_without_control_groups_there_is_the_machines_memory(tree: Callable[..., Path]) -> None:
    (pool,) = machine.pools(tree({}))
    assert (pool.key, pool.limit_bytes, pool.free_bytes) == ("b", 16 * GIB, 8 * GIB)
    assert machine.memory_limit_bytes(tree({})) == 16 * GIB


def test_limits_of_version_2_hold_on_every_level(tree: Callable[..., Path]) -> None:
    """max and high limit a group and all below it; "max" is no limit, and the kernel can reclaim its cache of files."""
    root = tree(
        v2(
            "/a/b/c",
            {
                "/a": {"memory.max": 4 * GIB, "memory.high": "max", "memory.current": 3 * GIB},
                "/a/b": {"memory.max": "max", "memory.high": 2 * GIB, "memory.current": 1 * GIB},
                "/a/b/c": {"memory.max": "max", "memory.high": "max", "memory.current": 1 * GIB},
                "/other": {"memory.max": 1, "memory.current": 1},
            },
        )
        | {"sys/fs/cgroup/a/memory.stat": f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\nslab_reclaimable {GIB // 2}\n"}
    )
    assert limits(root) == [(4.0, 4 - 3 + 1 + 0.5), (2.0, 1.0)]
    assert machine.memory_limit_bytes(root) == 2 * GIB


def test_limits_of_version_1_hold_on_every_level(tree: Callable[..., Path]) -> None:
    """The number that version 1 writes for "unlimited" is no limit."""
    unlimited = {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 3 * GIB}
    root = tree(
        v1(
            "/a/b",
            {
                "": unlimited,
                "/a": {"memory.limit_in_bytes": 3 * GIB, "memory.usage_in_bytes": 2 * GIB},
                "/a/b": unlimited,
            },
        )
        | {"sys/fs/cgroup/memory/a/memory.stat": f"cache 5\ntotal_cache {GIB}\ntotal_shmem {GIB // 2}\n"}
    )
    assert limits(root) == [(3.0, 1.5)]


@pytest.mark.parametrize(
    ("own", "top", "group"),
    [("/docker/x", "/docker/x", ""), ("/docker/x/y", "/docker/x", "/y"), ("/docker/x", "/", ""), ("/", "/", "")],
    ids=["bound", "bound-below", "another-namespace", "own-namespace"],
)
@pytest.mark.parametrize("version", [v1, v2])
def test_a_containers_limit_is_found_where_the_container_sees_it(
    tree: Callable[..., Path], version: Callable[..., dict[str, str]], own: str, top: str, group: str
) -> None:
    """The mount may show only the container's group, and the path may be one that only the host can see."""
    file = "memory.limit_in_bytes" if version is v1 else "memory.max"
    assert limits(tree(version(own, {group: {file: GIB}}, top))) == [(1.0, 1.0)]


def test_processes_share_a_pool_if_they_share_its_group(tree: Callable[..., Path]) -> None:
    """The key is the group's own, whatever it is called; another group's differs."""
    groups = {"/a": {"memory.max": GIB}, "/b": {"memory.max": GIB}}
    keys = [[pool.key for pool in machine.pools(tree(v2(own, groups)))] for own in ("/a", "/a", "/b")]
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[2][0] == "b"
    assert keys[0][1] != keys[2][1]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (v2("/a/b", {"/a": {"cpu.max": "250000 100000"}, "/a/b": {"cpu.max": "max 100000"}}), 3),
        (v2("/a", {"/a": {"cpu.max": "10000 100000"}}), 1),
        (v1("/a", {"/a": {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000}}, name="cpu"), 4),
        (v1("/a", {"/a": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, name="cpu"), 8),
    ],
    ids=["none", "v2-parent", "v2-less-than-one", "v1", "v1-unlimited"],
)
def test_cores_are_counted_by_affinity_and_quota(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.num_cores(tree(files)) == cores


def test_defaults_fit_the_memory_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables get half, tickets at most a sixth and kept results at most a sixteenth of it."""
    monkeypatch.setattr("shardloss_server.config.memory_limit_bytes", lambda: GIB)
    assert (Limits().max_table_bytes, Limits().max_ticket_bytes, Workers().keep_mib) == (GIB // 2, GIB // 6, 64)
    monkeypatch.setattr("shardloss_server.config.memory_limit_bytes", lambda: 64 * GIB)
    assert (Limits().max_table_bytes, Limits().max_ticket_bytes, Workers().keep_mib) == (32 * GIB, 5 * GIB // 2, 512)


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group of this machine with a limit of 1 GiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may create a control group")
    for mount, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(mount) / f"shardloss-test-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / file).write_text(str(GIB))
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no memory controller of control groups is mounted and writable")


CHILD = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
from shardloss.errors import LimitExceeded
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import TableSpec
limits = Limits()
print(limits.max_table_bytes)
catalog = Catalog(LocalGroup(2), Limits(max_table_bytes=1 << 40))
cut, start = Placement("mod", 4_000_000, 2), Initializer("zeros", 0.0, 0)
try:
    spec = TableSpec("t", 4_000_000, 128, "float32", True, cut, start, OptimizerSpec("sgd"))
    catalog.create(spec, Deadline.after(60))
except LimitExceeded as error:
    print(error)
catalog.group.close()
"""


def test_a_real_control_group_limits_the_tables_of_the_processes_in_it(limited_group: Path) -> None:
    """Two workers in one group share its memory; the process is not killed."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(limited_group)], capture_output=True, text=True, timeout=120, check=True
    )
    default, refused = done.stdout.splitlines()
    assert int(default) == GIB // 2
    assert f"worker 0 needs {2_000_000 * (128 + 1) * 4:,} bytes" in refused
    assert f"come from the control group {limited_group}, of {GIB:,} bytes" in refused
