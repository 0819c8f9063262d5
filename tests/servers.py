"""Server processes for tests, started as an operator starts them, and what they leave behind."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shardloss.v1 import admin_pb2, admin_pb2_grpc

START_S = 300.0  # far more than a busy machine needs
STOP_S = 120.0
LISTENING = "0A"  # the state of a socket in /proc/net/tcp


@dataclass(slots=True)
class Started:
    """A server process: its address, its folder of temporary files and its log."""

    process: subprocess.Popen[bytes]
    address: str
    temp: Path
    log_file: Path

    @property
    def log(self) -> str:
        """Everything that the server has written to stdout and stderr."""
        return self.log_file.read_text()

    @property
    def admin_address(self) -> str:
        """The address of the admin port, from the log."""
        found = re.search(r"admin on (\S+)", self.log)
        assert found is not None, self.log
        return found[1]

    @property
    def num_in_flight(self) -> int:
        """The number of calls that hold a place, without commits and streams."""
        with grpc.insecure_channel(self.admin_address) as channel:
            status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=STOP_S)
        return next(place.num_calls for place in status.places if place.name == "calls")

    @property
    def health(self) -> str:
        """What the health service on the admin port says; UNREACHABLE if nothing answers."""
        with grpc.insecure_channel(self.admin_address) as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=STOP_S)
            except grpc.RpcError:
                return "UNREACHABLE"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def child(self, name: str) -> int:
        """Return the process id of the first descendant whose name or command begins with `name`."""
        found = sorted(pid for pid in children_of(self.process.pid) if command_of(pid).startswith(name))
        assert found, [command_of(pid) for pid in children_of(self.process.pid)]
        return found[0]


@contextmanager
def started(
    temp: Path, *options: str, environment: Mapping[str, str] | None = None, tmpdir: Path | None = None
) -> Iterator[Started]:
    """Start a server process and yield it once it serves; it is terminated in any case.

    Its TMPDIR is tmpdir, by default `temp`/t.
    """
    ready, log_file, tmpdir = temp / "ready", temp / "log", tmpdir or temp / "t"
    tmpdir.mkdir(exist_ok=True)
    ports = ("--port", "0", "--admin-port", "0", "--ready-file", str(ready))
    command = [sys.executable, "-m", "shardloss_server", "serve", *ports, *options]
    env = {**os.environ, "TMPDIR": str(tmpdir), **(environment or {})}
    with log_file.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=env) as process:
        try:
            deadline = time.monotonic() + START_S
            while not ready.exists():
                assert process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline, "the server did not start in time"
                time.sleep(0.05)
            yield Started(process, ready.read_text(), tmpdir, log_file)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(STOP_S)


def command_of(pid: int) -> str:
    """Return a process's title, or the name of its program or Python script; nothing if it has ended."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    scripts = [argument for argument in arguments if argument.endswith(".py")]
    return os.path.basename((scripts or arguments)[0]).removesuffix(".py")


def children_of(pid: int) -> set[int]:
    """Return the pids of all running descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def wait_gone(pids: set[int], timeout_s: float = STOP_S) -> set[int]:
    """Wait until all processes have ended, at most timeout_s; return those that still run."""
    deadline = time.monotonic() + timeout_s
    while alive := {pid for pid in pids if not is_gone(pid)}:
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.05)
    return set()


def is_gone(pid: int) -> bool:
    """Return True if a process has ended."""
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def listening_of(server: Started) -> Counter[tuple[str, str]]:
    """Return on how many TCP sockets each process of a server listens, by its name and the address."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                addresses[f"socket:[{fields[9]}]"] = address_of(fields[1].split(":")[0])
    found: Counter[tuple[str, str]] = Counter()
    for pid in {server.process.pid, *children_of(server.process.pid)}:
        name = "front end" if pid == server.process.pid else command_of(pid)
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it has just been closed
                if (target := os.readlink(descriptor)) in addresses:
                    found[name, addresses[target]] += 1
    return found


def address_of(hexadecimal: str) -> str:
    """Return an address of /proc/net/tcp or tcp6 as text; an IPv4 address in an IPv6 socket is given as IPv4."""
    words = [bytes.fromhex(hexadecimal[start : start + 8])[::-1] for start in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
