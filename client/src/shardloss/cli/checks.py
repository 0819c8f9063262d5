"""The checks of `shardloss doctor`: each one is a function of the gathered facts alone."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shardloss.address import proxy_of
from shardloss.cli.output import Size
from shardloss.status import ServerStatus

SHM_BYTES = 512 * 2**20  # size of an embedded Ray's object store
DISK_BYTES = 2**30
DISK_SHARE = 0.05  # Ray stops writing to a disk that is 95% full
CLOCK_S = 5.0
PROTOBUF = (6, 31)


class Verdict(StrEnum):
    """The outcome of a check; a check is skipped if there was nothing to look at."""

    OK = "ok"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check: its name, its verdict, what was found, and what to do if that is wrong."""

    check: str
    verdict: Verdict
    found: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one port of the server.

    is_there is False if nothing listens there yet on this machine, and None if `wrong` says what is there instead.
    refusal is the answer to a caller who may not ask for the status.
    """

    what: str
    address: str
    is_there: bool | None
    wrong: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """An address to listen on; is_ours is True if a shardloss server answers there, None if something else may."""

    address: str
    is_free: bool
    is_ours: bool | None = False


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of a folder, with its sizes in bytes."""

    what: str
    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts that the checks look at; answers are those of the data port and the admin port, in this order.

    status is None if the admin port did not report it. token_mode is None without a token file, and -1 if the file does
    not exist. clock_s is the server's clock minus this machine's, known to within clock_error_s.
    """

    answers: Sequence[Answer]
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
    clock_s: float
    clock_error_s: float

    @property
    def no_status(self) -> str:
        """The reason why there is no status."""
        admin = self.answers[-1]
        return admin.wrong or admin.refusal or f"no server listens on {admin.address}"


def connection(facts: Facts) -> Finding:
    """Check that a shardloss server answers on both ports, if anything does; a proxy in between is named."""
    if facts.token_mode == -1:
        return Finding("connection", Verdict.SKIPPED, "the token file cannot be read")
    wrong = [f"{one.what} {one.address}: {one.wrong}" for one in facts.answers if one.wrong]
    if wrong:
        do = "correct --address, --admin-address, their credentials, or the environment, as the message says"
        return Finding("connection", Verdict.WRONG, "; ".join(wrong), do)
    said = ", ".join(answered(one) for one in facts.answers)
    return Finding("connection", Verdict.OK if any(one.is_there for one in facts.answers) else Verdict.SKIPPED, said)


def answered(one: Answer) -> str:
    """Return what a port answers, and through which proxy."""
    proxy = proxy_of(one.address) if one.is_there else None
    through = f" through the proxy {proxy[1]} of {proxy[0]}" if proxy else ""
    return f"{one.what} {one.address} {f'answers{through}' if one.is_there else 'is not listened on'}"


def port(facts: Facts) -> Finding:
    """Check that a server can listen on the ports, or already does."""
    taken = [one.address for one in facts.ports if not one.is_free and one.is_ours is False]
    if taken:
        return Finding(
            "port",
            Verdict.WRONG,
            f"{', '.join(taken)} is in use, but no shardloss server answers there",
            "stop the program that listens there (ss -ltnp shows it), or use other ports (--port, --admin-port)",
        )
    if not facts.ports:
        return Finding("port", Verdict.SKIPPED, "no port of this machine is known")
    words = {True: "answers", False: "is free", None: "is in use"}
    said = (f"{one.address} {words[one.is_ours]}" for one in facts.ports)
    return Finding("port", Verdict.OK, ", ".join(said))


def token(facts: Facts) -> Finding:
    """Check that other users of this machine cannot read the token."""
    if facts.token_mode is None:
        return Finding("token", Verdict.SKIPPED, "no token file was given")
    if facts.token_mode < 0:
        return Finding(
            "token", Verdict.WRONG, f"{facts.token_file} cannot be read", "pass the file that contains the token"
        )
    mode = stat.S_IMODE(facts.token_mode)
    found = f"{facts.token_file} has mode {mode:04o}"
    if mode & 0o077:
        return Finding(
            "token", Verdict.WRONG, f"{found}: others can read it", f"chmod 600 {facts.token_file}, and use a new token"
        )
    return Finding("token", Verdict.OK, found)


def shared_memory(facts: Facts) -> Finding:
    """Check that Ray's object store fits into /dev/shm of the server's machine, or else of this one."""
    free, where = (facts.shm.free_bytes, "this machine") if facts.shm else (0, "")
    if facts.status is not None and facts.status.shm_total_bytes:  # total, not free: the store itself may fill it
        free, where = facts.status.shm_total_bytes, "the server's machine"
    if not where:
        return Finding("shared memory", Verdict.SKIPPED, "there is no /dev/shm")
    found = f"/dev/shm of {where} has {Size(free)}"
    if free < SHM_BYTES:
        do = f"enlarge it to {Size(2 * SHM_BYTES)}: docker run --shm-size=1g, shm_size in compose, or a larger tmpfs"
        return Finding("shared memory", Verdict.WRONG, f"{found}; Ray's object store needs {Size(SHM_BYTES)}", do)
    return Finding("shared memory", Verdict.OK, found)


def disk(facts: Facts) -> Finding:
    """Check that the disks of Ray's folder and of data_dir have enough free space."""
    full = [one for one in facts.disks if one.free_bytes < max(DISK_BYTES, DISK_SHARE * one.total_bytes)]
    if not full and not facts.disks:
        return Finding("disk", Verdict.SKIPPED, "there is no folder to check")
    said = ", ".join(f"{one.what} {one.path}: {Size(one.free_bytes)} free" for one in full or facts.disks)
    if full:
        do = f"free some space: at least {Size(DISK_BYTES)} and a twentieth of the disk, or Ray stops writing"
        return Finding("disk", Verdict.WRONG, said, do)
    return Finding("disk", Verdict.OK, said)


def threads(facts: Facts) -> Finding:
    """Check that workers do not compute with more threads than their machine has cores."""
    for node, num_workers, num_threads, num_cores in per_node(facts.status):
        if num_threads > num_cores:
            return Finding(
                "threads",
                Verdict.WRONG,
                f"{num_workers} workers compute with {num_threads} threads on the {num_cores} cores of {node}",
                "serve with fewer --workers or --worker-threads, and with OMP_NUM_THREADS=1 in the environment",
            )
    if facts.status is not None:
        return Finding("threads", Verdict.OK, "the workers have a core for each of their threads")
    given, cores = facts.omp_num_threads, facts.num_cores
    if given is not None and given.isdigit() and int(given) > cores:
        found = f"OMP_NUM_THREADS={given} on {cores} cores: a process uses more threads than there are cores"
        return Finding("threads", Verdict.WRONG, found, "start servers and trainers with OMP_NUM_THREADS=1")
    return Finding("threads", Verdict.OK, f"OMP_NUM_THREADS={given or 'unset'}, {cores} cores; workers set their own")


def per_node(status: ServerStatus | None) -> list[tuple[str, int, int, int]]:
    """Return (node, number of workers, threads of all of them, cores) of every node with workers that are up."""
    up = [worker for worker in status.workers if worker.up] if status is not None else []
    nodes = sorted({worker.node for worker in up})
    found = []
    for node in nodes:
        here = [worker for worker in up if worker.node == node]
        found.append((node, len(here), sum(worker.num_threads for worker in here), here[0].num_cores))
    return found


def versions(facts: Facts) -> Finding:
    """Check that the client and the server are the same release, and that their protobuf is not too old."""
    said = {"client": facts.client_version, "protobuf (client)": facts.protobuf_version}
    if facts.status is not None:
        said["server"] = facts.status.versions.get("shardloss-server", "unknown")
        said["protobuf (server)"] = facts.status.versions.get("protobuf", "unknown")
    found = ", ".join(f"{name} {version}" for name, version in said.items())
    for name, version in said.items():
        if name.startswith("protobuf") and release(version) < PROTOBUF:
            return Finding("versions", Verdict.WRONG, found, f"update {name}: protobuf 6.31 or later is needed")
    if "server" in said and release(said["server"]) != release(facts.client_version):
        return Finding("versions", Verdict.WRONG, found, "install the same release of shardloss and shardloss-server")
    return Finding("versions", Verdict.OK, found)


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, or (0,) if it has none."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) or (0,)


def workers(facts: Facts) -> Finding:
    """Check that every worker answers, and that no table has lost rows because a worker died."""
    if facts.status is None:
        return Finding("workers", Verdict.SKIPPED, facts.no_status)
    down = [str(worker.index) for worker in facts.status.workers if not worker.up]
    found = f"{facts.status.num_workers - len(down)} of {facts.status.num_workers} workers are up"
    if down:
        do = "a worker that died is restarted without its rows: check its node and log; `ray status` shows what is left"
        return Finding("workers", Verdict.WRONG, f"{found}; no answer from worker {', '.join(down)}", do)
    lost = [table.name for table in facts.status.tables if table.rows_lost]
    if lost:
        do = "delete each, create it again and reload its rows (shardloss table import); find out why the worker died"
        return Finding("workers", Verdict.WRONG, f"{found}, but a worker died with rows of {', '.join(lost)}", do)
    return Finding("workers", Verdict.OK, found)


def clock(facts: Facts) -> Finding:
    """Check that the server's clock agrees with this machine's, because tokens expire by the server's."""
    if facts.status is None:
        return Finding("clock", Verdict.SKIPPED, facts.no_status)
    direction = "ahead of" if facts.clock_s > 0 else "behind"
    found = f"the server's clock is {abs(facts.clock_s):.1f} s {direction} this one (+/- {facts.clock_error_s:.1f} s)"
    if abs(facts.clock_s) > CLOCK_S + facts.clock_error_s:
        return Finding(
            "clock", Verdict.WRONG, found, "synchronise both clocks with NTP: tokens and certificates depend on them"
        )
    return Finding("clock", Verdict.OK, found)


CHECKS: Sequence[Callable[[Facts], Finding]] = (
    connection,
    port,
    token,
    shared_memory,
    disk,
    threads,
    versions,
    workers,
    clock,
)
