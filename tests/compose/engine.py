"""A project of the compose file on this machine's container engine: started, queried and removed completely."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD_S, COMMAND_S, HEALTHY_S = 1800.0, 300.0, 900.0
LABEL = "com.docker.compose.project"


class NoEngine(Exception):
    """No container engine or no compose command is available; the message says which, and why."""


def output(command: list[str], timeout_s: float = COMMAND_S, **options: Any) -> str:
    """Run a command and return its standard output.

    Raises:
        AssertionError: the command failed; the message holds the end of its output.
    """
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace", **options
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
    )
    return done.stdout


def compose_command(version: str) -> list[str]:
    """Return the command of this machine for Compose version "1" or "2".

    Candidates are the one that `make test-compose` installs, docker's plugin, and docker-compose.

    Raises:
        NoEngine: there is no such command, or no engine is running.
    """
    if shutil.which("docker") is None:
        raise NoEngine("no docker command is here")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if engine.returncode:
        raise NoEngine(f"no engine answers: {engine.stderr.strip().splitlines()[-1:]}")
    for command in ([str(ROOT / ".venv-compose/bin/docker-compose")], ["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if asked.stdout.strip().lstrip("v").startswith(f"{version}."):
                return command
    raise NoEngine(f"no command of Compose version {version} is here")


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core of this machine busy, twice over."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


LISTENING = """
import glob, os, socket
inodes, named = {}, {"0.0.0.0": "all", "127.0.0.1": "127.0.0.1"}
for name in ("tcp", "tcp6"):
    for line in open("/proc/net/" + name).read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            raw = fields[1].split(":")[0][-8:]
            ip = socket.inet_ntoa(bytes.fromhex(raw)[::-1])
            if ip != "127.0.0.11":  # the engine's name server
                inodes["socket:[" + fields[9] + "]"] = named.get(ip, "container")
for path in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        target = os.readlink(path)
        command = open("/proc/" + path.split("/")[2] + "/cmdline").read().split(chr(0))
    except OSError:
        continue
    if target in inodes:
        script = [each for each in command if each.endswith((".py", "shardloss-server"))]
        module = command[command.index("-m") + 1 :] if "-m" in command else []
        print(os.path.basename((script or module or command)[0]).removesuffix(".py"), inodes[target])
"""


def free_ports(number: int) -> list[int]:
    """Return free ports of this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def eventually(holds: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Poll until a condition is true; return the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - began


@dataclass(frozen=True)
class Project:
    """A compose project with its own name, published on free ports of this machine."""

    compose: list[str]
    name: str
    ports: list[int] = field(default_factory=lambda: free_ports(2))

    @property
    def address(self) -> str:
        """The published address of the front end."""
        return f"127.0.0.1:{self.ports[0]}"

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """Run a compose command on the project and return its output."""
        variables = {
            "COMPOSE_PROJECT_NAME": self.name,
            "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "1"),
            "SHARDLOSS_PUBLISH_PORT": str(self.ports[0]),
            "SHARDLOSS_PUBLISH_ADMIN_PORT": str(self.ports[1]),
        }
        return output([*self.compose, *arguments], timeout_s, env={**os.environ, **variables})

    def containers(self, service: str = "") -> list[str]:
        """Return the ids of the project's containers, including exited ones."""
        label = f"label=com.docker.compose.service={service}" if service else f"label={LABEL}"
        return output(["docker", "ps", "-aq", "--filter", f"label={LABEL}={self.name}", "--filter", label]).split()

    def state(self, container: str) -> dict[str, Any]:
        """Return the engine's description of a container."""
        (found,) = json.loads(output(["docker", "inspect", container]))
        return dict(found)

    def is_healthy(self, service: str) -> bool:
        """Return True if the service has containers and all of them report healthy."""
        states = [self.state(each)["State"] for each in self.containers(service)]
        return bool(states) and all(each.get("Health", {}).get("Status") == "healthy" for each in states)

    def address_of(self, service: str, network: str) -> str:
        """Return the address of the service's first container on one of the project's networks."""
        networks = self.state(self.containers(service)[0])["NetworkSettings"]["Networks"]
        return str(networks[f"{self.name}_{network}"]["IPAddress"])

    def inside(self, service: str, *command: str) -> str:
        """Run a command in the service's first container and return its output."""
        return self.run("exec", "-T", service, *command)

    def listening(self, service: str) -> Counter[tuple[str, str]]:
        """Return on how many TCP sockets each process of the service's first container listens, by name and address.

        The address is 127.0.0.1, "container" for the container's own ones, or "all".
        """
        lines = self.inside(service, "python", "-c", LISTENING).splitlines()
        return Counter((process, address) for process, address in (line.rsplit(" ", 1) for line in lines))

    def left(self) -> list[str]:
        """Return the project's containers, networks and volumes that still exist."""
        kinds = (["ps", "-aq"], ["network", "ls", "-q"], ["volume", "ls", "-q"])
        return [
            each
            for kind in kinds
            for each in output(["docker", *kind, "--filter", f"label={LABEL}={self.name}"]).split()
        ]
