"""A Ray cluster of several nodes on one machine, without containers, for as long as a `with` block lasts.

Each node has its own network, mount, process and host name namespaces. The nodes are joined by a bridge in a namespace
that contains nothing else, so no traffic reaches the machine's network. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.procfs import descendants_of
from benchmarks.side import SideFailed

NETWORK = "198.51.100"  # TEST-NET-2: reserved for documentation, so no real host has it
FIRST_HOST, PORT = 10, 6379
TOOLS = ("ip", "unshare", "nsenter", "bash")
STORE_BYTES = 100_000_000
START_S = 90.0
COMMAND_S = 30.0
OWN_DIRECTORIES = (
    'hostname "$1"; mkdir -p /tmp/ray; mount -t tmpfs -o size=1g tmpfs /tmp/ray;'
    'mount -t tmpfs -o size=1g tmpfs /dev/shm; shift; exec "$@"'
)


@dataclass(frozen=True, slots=True)
class Node:
    """A running node of the cluster."""

    namespace: str
    address: str
    init_pid: int

    def inside(self) -> list[str]:
        """Return the prefix with which a command runs on this node."""
        return ["nsenter", "-t", str(self.init_pid), "-m", "-p", "-n", "-u", "--"]

    def carried_bytes(self) -> tuple[int, int]:
        """Return the bytes received and sent over the node's cable."""
        (link,) = json.loads(ip("-n", self.namespace, "-s", "-j", "link", "show", "eth0"))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes, the head first, and the environment variables of every process that joins them."""

    nodes: Sequence[Node]
    variables: dict[str, str]

    @property
    def ray_address(self) -> str:
        """Address at which Ray processes join the cluster."""
        return f"{self.nodes[0].address}:{PORT}"


def ip(*arguments: str) -> str:
    """Run ip and return its output.

    Raises:
        SideFailed: it failed, for example without permission to create namespaces.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise SideFailed(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def check_available() -> None:
    """Check that such a cluster can be created here.

    Raises:
        SideFailed: a tool or root permission is missing; the message names it.
    """
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        raise SideFailed(f"network namespaces need {', '.join(lacking)} (iproute2, util-linux)")
    if os.geteuid() != 0:
        raise SideFailed("network namespaces need root")


@contextmanager
def cluster(cpus_of_nodes: Sequence[int]) -> Iterator[Cluster]:
    """Start a node for each number of CPUs; node 0 is Ray's head. Everything is removed when the block ends.

    Raises:
        SideFailed: the cluster cannot be created here.
    """
    check_available()
    tag = f"sl{os.getpid()}"
    with TemporaryDirectory(prefix="bench-nodes-") as directory, ExitStack() as stack:
        token = Path(directory) / "token"
        token.write_text(secrets.token_hex(32))
        variables = {
            "RAY_AUTH_MODE": "token",  # set on every node: by default only the head would use it
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        switch = make_switch(stack, tag)
        nodes: list[Node] = []
        for index, num_cpus in enumerate(cpus_of_nodes):
            log = Path(directory) / f"{index}.log"
            nodes.append(start_node(stack, tag, switch, index, num_cpus, log, variables))
        yield Cluster(nodes, variables)


def make_namespace(stack: ExitStack, name: str) -> None:
    """Create a network namespace that is deleted with the stack."""
    ip("netns", "add", name)
    stack.callback(ip, "netns", "del", name)
    ip("-n", name, "link", "set", "lo", "up")


def make_switch(stack: ExitStack, tag: str) -> str:
    """Create the bridge in a namespace of its own, and return the namespace's name."""
    name = f"{tag}sw"
    make_namespace(stack, name)
    ip("-n", name, "link", "add", "br0", "type", "bridge")
    ip("-n", name, "link", "set", "br0", "up")
    return name


def start_node(
    stack: ExitStack, tag: str, switch: str, index: int, num_cpus: int, log: Path, variables: dict[str, str]
) -> Node:
    """Connect one node to the switch by a cable and start Ray on it."""
    name, address = f"{tag}n{index}", f"{NETWORK}.{FIRST_HOST + index}"
    make_namespace(stack, name)
    cable = f"c{index}"
    ip("link", "add", cable, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("-n", switch, "link", "set", cable, "master", "br0", "up")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    command = ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts"]
    command += [
        "--mount-proc",
        "bash",
        "-c",
        OWN_DIRECTORIES,
        "_",
        f"node{index}",
        *ray_start(index, address, num_cpus),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    stack.callback(end, process)
    wait_up(process, log, index)
    return Node(name, address, descendants_of(process.pid)[0])


def ray_start(index: int, address: str, num_cpus: int) -> list[str]:
    """Return the command that starts Ray on the head, or on a node that joins it."""
    ray = Path(sys.executable).with_name("ray")
    common = [f"--node-ip-address={address}", f"--num-cpus={num_cpus}", f"--object-store-memory={STORE_BYTES}"]
    role = ["--head", f"--port={PORT}", "--include-dashboard=false", "--disable-usage-stats"]
    if index:
        role = [f"--address={NETWORK}.{FIRST_HOST}:{PORT}"]
    return [str(ray), "start", "--block", *common, *role]


def wait_up(process: subprocess.Popen[bytes], log: Path, index: int) -> None:
    """Wait until Ray reports that it is running.

    Raises:
        SideFailed: Ray exited, or did not start within START_S.
    """
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SideFailed(f"node {index} did not start: {log.read_text(errors='replace')[-400:].strip()}")
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a node by killing unshare: the node's first process dies with it, and with that its process namespace."""
    process.kill()
    process.wait(COMMAND_S)
