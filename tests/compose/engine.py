"""A project of the compose file on the engine of this machine: brought up, asked, and taken away whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD_S, COMMAND_S, HEALTHY_S = 1800.0, 300.0, 240.0
LABEL = "com.docker.compose.project"


class NoEngine(Exception):
    """No engine or no compose answers: says which, and why."""


def output(command: list[str], timeout_s: float = COMMAND_S, **options: Any) -> str:
    """What a command prints.

    Raises:
        AssertionError: it failed, with the end of what it said.
    """
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace", **options
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
    )
    return done.stdout


def compose_command() -> list[str]:
    """How compose is called here: as a plugin of docker, or by its older name.

    Raises:
        NoEngine: neither answers, or there is no engine behind them.
    """
    if shutil.which("docker") is None:
        raise NoEngine("no docker command is here")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if engine.returncode:
        raise NoEngine(f"no engine answers: {engine.stderr.strip().splitlines()[-1:]}")
    for command in (["docker", "compose"], ["docker-compose"]):
        asked = [*command, "version"]
        if shutil.which(command[0]) and not subprocess.run(asked, capture_output=True, check=False).returncode:
            return command
    raise NoEngine("neither docker compose nor docker-compose is here")


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def eventually(holds: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Poll until it holds; the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - began


@dataclass(frozen=True)
class Project:
    """One project, by a name of its own, its ports free ones of this machine."""

    compose: list[str]
    name: str
    ports: list[int] = field(default_factory=lambda: free_ports(2))

    @property
    def address(self) -> str:
        """Where its front end is published."""
        return f"127.0.0.1:{self.ports[0]}"

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """A compose command on it."""
        variables = {
            "COMPOSE_PROJECT_NAME": self.name,
            "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "1"),
            "SHARDLOSS_PUBLISH_PORT": str(self.ports[0]),
            "SHARDLOSS_PUBLISH_ADMIN_PORT": str(self.ports[1]),
        }
        return output([*self.compose, *arguments], timeout_s, env={**os.environ, **variables})

    def containers(self, service: str = "") -> list[str]:
        """Ids of its containers, ended ones too."""
        label = f"label=com.docker.compose.service={service}" if service else f"label={LABEL}"
        return output(["docker", "ps", "-aq", "--filter", f"label={LABEL}={self.name}", "--filter", label]).split()

    def state(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        (found,) = json.loads(output(["docker", "inspect", container]))
        return dict(found)

    def is_healthy(self, service: str) -> bool:
        """Whether every container of a service says so."""
        states = [self.state(each)["State"] for each in self.containers(service)]
        return bool(states) and all(each.get("Health", {}).get("Status") == "healthy" for each in states)

    def inside(self, service: str, *command: str) -> str:
        """What a command prints in the service's first container."""
        return self.run("exec", "-T", service, *command)

    def left(self) -> list[str]:
        """Containers, networks and volumes that are still there."""
        kinds = (["ps", "-aq"], ["network", "ls", "-q"], ["volume", "ls", "-q"])
        return [
            each
            for kind in kinds
            for each in output(["docker", *kind, "--filter", f"label={LABEL}={self.name}"]).split()
        ]
