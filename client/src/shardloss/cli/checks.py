"""What may be wrong with a set-up: each check looks at gathered facts alone."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shardloss.cli.output import Size
from shardloss.status import ServerStatus

SHM_BYTES = 512 * 2**20  # what an embedded Ray takes for its object store
DISK_BYTES = 2**30
DISK_SHARE = 0.05  # Ray writes nothing more to a disk that is 95% full
CLOCK_S = 5.0
PROTOBUF = (6, 31)


class Verdict(StrEnum):
    """How a check ended; skipped: there was nothing to look at."""

    OK = "ok"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do where that is wrong."""

    check: str
    verdict: Verdict
    found: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """An address to listen on: whether it is free; whether a server of ours answers there, None where nobody knows."""

    address: str
    is_free: bool
    is_ours: bool | None = False


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder's file system, bytes."""

    what: str
    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What was gathered; status is None where no server answered, and no_status says why.

    token_mode is None without a token file, -1 where that is not there. clock_s is the server's clock minus ours, give
    or take clock_error_s.
    """

    ports: Sequence[Port]
    token_file: str
    token_mode: int | None
    shm: Disk | None
    disks: Sequence[Disk]
    num_cores: int
    omp_num_threads: str | None
    client_version: str
    protobuf_version: str
    status: ServerStatus | None
    no_status: str
    clock_s: float
    clock_error_s: float


def port(facts: Facts) -> Finding:
    """Whether a server could listen, or does."""
    taken = [one.address for one in facts.ports if not one.is_free and one.is_ours is False]
    if taken:
        return Finding(
            "port",
            Verdict.WRONG,
            f"{', '.join(taken)} is taken, and no shardloss server answers there",
            "stop what listens there (ss -ltnp shows it), or serve on other ports (--port, --admin-port)",
        )
    if not facts.ports:
        return Finding("port", Verdict.SKIPPED, "the server is on another machine")
    words = {True: "answers", False: "is free", None: "is taken, by what cannot be told with these credentials"}
    said = (f"{one.address} {words[one.is_ours]}" for one in facts.ports)
    return Finding("port", Verdict.OK, ", ".join(said))


def token(facts: Facts) -> Finding:
    """Whether others on this machine can read the token."""
    if facts.token_mode is None:
        return Finding("token", Verdict.SKIPPED, "no token file is given")
    if facts.token_mode < 0:
        return Finding(
            "token", Verdict.WRONG, f"{facts.token_file} cannot be read", "give the file that holds the token"
        )
    mode = stat.S_IMODE(facts.token_mode)
    found = f"{facts.token_file} has mode {mode:04o}"
    if mode & 0o077:
        return Finding(
            "token", Verdict.WRONG, f"{found}: others can read it", f"chmod 600 {facts.token_file}, new token"
        )
    return Finding("token", Verdict.OK, found)


def shared_memory(facts: Facts) -> Finding:
    """Whether Ray's object store fits into /dev/shm: of the server's machine, or of this one."""
    free, where = (facts.shm.free_bytes, "this machine") if facts.shm else (0, "")
    if facts.status is not None and facts.status.shm_total_bytes:  # what is taken may be that very store
        free, where = facts.status.shm_total_bytes, "the server's machine"
    if not where:
        return Finding("shared memory", Verdict.SKIPPED, "there is no /dev/shm")
    found = f"/dev/shm of {where} has {Size(free)}"
    if free < SHM_BYTES:
        do = f"give it {Size(2 * SHM_BYTES)}: docker run --shm-size=1g, shm_size in compose, a larger tmpfs elsewhere"
        return Finding("shared memory", Verdict.WRONG, f"{found}; Ray's object store needs {Size(SHM_BYTES)}", do)
    return Finding("shared memory", Verdict.OK, found)


def disk(facts: Facts) -> Finding:
    """Whether there is room where Ray and the server write."""
    full = [one for one in facts.disks if one.free_bytes < max(DISK_BYTES, DISK_SHARE * one.total_bytes)]
    if not full and not facts.disks:
        return Finding("disk", Verdict.SKIPPED, "no folder to look at")
    said = ", ".join(f"{one.what} {one.path}: {Size(one.free_bytes)} free" for one in full or facts.disks)
    if full:
        do = f"free some: {Size(DISK_BYTES)} and a twentieth of the disk are needed, or Ray writes nothing more"
        return Finding("disk", Verdict.WRONG, said, do)
    return Finding("disk", Verdict.OK, said)


def threads(facts: Facts) -> Finding:
    """Whether workers share the cores, rather than fight for them."""
    for node, num_workers, num_threads, num_cores in per_node(facts.status):
        if num_threads > num_cores:
            return Finding(
                "threads",
                Verdict.WRONG,
                f"{num_workers} workers compute with {num_threads} threads on the {num_cores} cores of {node}",
                "serve with fewer --workers or --worker-threads, and OMP_NUM_THREADS=1 in its environment",
            )
    if facts.status is not None:
        return Finding("threads", Verdict.OK, "workers have a core for each of their threads")
    given, cores = facts.omp_num_threads, facts.num_cores
    if given is not None and given.isdigit() and int(given) > cores:
        found = f"OMP_NUM_THREADS={given} on {cores} cores: a process computes with more threads than there are cores"
        return Finding("threads", Verdict.WRONG, found, "set OMP_NUM_THREADS=1 where servers and trainers are started")
    return Finding("threads", Verdict.OK, f"OMP_NUM_THREADS={given or 'unset'}, {cores} cores; workers have their own")


def per_node(status: ServerStatus | None) -> list[tuple[str, int, int, int]]:
    """(node, workers, threads of all of them, cores) of every node whose workers are up."""
    up = [worker for worker in status.workers if worker.up] if status is not None else []
    nodes = sorted({worker.node for worker in up})
    found = []
    for node in nodes:
        here = [worker for worker in up if worker.node == node]
        found.append((node, len(here), sum(worker.num_threads for worker in here), here[0].num_cores))
    return found


def versions(facts: Facts) -> Finding:
    """Whether client and server, and their protobuf, fit each other."""
    said = {"client": facts.client_version, "protobuf here": facts.protobuf_version}
    if facts.status is not None:
        said["server"] = facts.status.versions.get("shardloss-server", "unknown")
        said["protobuf there"] = facts.status.versions.get("protobuf", "unknown")
    found = ", ".join(f"{name} {version}" for name, version in said.items())
    for name, version in said.items():
        if name.startswith("protobuf") and release(version) < PROTOBUF:
            return Finding("versions", Verdict.WRONG, found, f"update {name}: protobuf 6.31 or later is needed")
    if "server" in said and release(said["server"]) != release(facts.client_version):
        return Finding("versions", Verdict.WRONG, found, "install the same release of shardloss and shardloss-server")
    return Finding("versions", Verdict.OK, found)


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, (0,) where there are none."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) or (0,)


def workers(facts: Facts) -> Finding:
    """Whether as many workers answer as were asked for, with the rows that they had."""
    if facts.status is None:
        return Finding("workers", Verdict.SKIPPED, facts.no_status)
    down = [str(worker.index) for worker in facts.status.workers if not worker.up]
    found = f"{facts.status.num_workers - len(down)} of {facts.status.num_workers} workers are up"
    if down:
        do = "a worker that died is started anew, empty: look for its node and its log, `ray status` shows what is left"
        return Finding("workers", Verdict.WRONG, f"{found}; {', '.join(down)} did not answer", do)
    lost = [table.name for table in facts.status.tables if table.rows_lost]
    if lost:
        do = "delete each, make it anew and fill it (shardloss table import), and look why its worker died"
        return Finding("workers", Verdict.WRONG, f"{found}, but rows of {', '.join(lost)} died with one", do)
    return Finding("workers", Verdict.OK, found)


def clock(facts: Facts) -> Finding:
    """Whether both clocks agree: tokens expire by the server's."""
    if facts.status is None:
        return Finding("clock", Verdict.SKIPPED, facts.no_status)
    direction = "ahead of" if facts.clock_s > 0 else "behind"
    found = (
        f"the server's clock is {abs(facts.clock_s):.1f} s {direction} this one, give or take {facts.clock_error_s:.1f}"
    )
    if abs(facts.clock_s) > CLOCK_S + facts.clock_error_s:
        return Finding("clock", Verdict.WRONG, found, "set both by NTP: tokens and certificates expire by it")
    return Finding("clock", Verdict.OK, found)


CHECKS: Sequence[Callable[[Facts], Finding]] = (
    port,
    token,
    shared_memory,
    disk,
    threads,
    versions,
    workers,
    clock,
)
