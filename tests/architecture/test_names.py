"""Every name that the documentation and the deployment use exists: variables, flags, commands, ports, metrics, reasons.

The tests read README, docs, the compose files, the image, the manifests, the rules and the dashboard, and compare the
names in them with those defined in the code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import typer
import yaml
from google.protobuf import descriptor_pool
from shardloss.cli.app import app as client_app
from shardloss.errors import BY_REASON
from shardloss_server import metrics
from shardloss_server.__main__ import app as server_app
from shardloss_server.cluster.folder import MARK
from shardloss_server.config import Listening
from shardloss_server.settings import ALL, FILE_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"shardloss-server": typer.main.get_command(server_app), "shardloss": typer.main.get_command(client_app)}
PAGES = [
    *sorted(path for path in ROOT.glob("docs/**/*.md") if "adr" not in path.parts),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "client/README.md", "server/README.md")),
]
DEPLOYED = sorted(ROOT.glob("docker-compose*.yml")) + sorted(
    path for path in ROOT.glob("deploy/**/*") if path.is_file() and "__pycache__" not in path.parts
)
EVERY = PAGES + DEPLOYED
OTHERS_FLAGS = {  # flags of other programs
    "--profile", "--scale", "--build", "--head", "--block", "--address", "--from-file", "--target", "--detach",
    "--volumes",
    "--env-file",
}  # fmt: skip
OTHERS_PORTS = {
    "gRPC over Ray's head": 6379,
    "Ray's node manager": 6380,
    "Ray's client server": 10001,
    "Prometheus": 9090,
    "Grafana": 3000,
}


OUR_PREFIXES = ("SHARDLOSS_", "OMP_", "RAY_", "MALLOC_", "OTEL_")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return (words, command) of a command and all its subcommands."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


SUFFIXES = {"histogram": ("", "_bucket", "_count", "_sum")}
EXPORTED = {each.name + suffix for each in metrics.ALL for suffix in SUFFIXES.get(each.kind, ("",))}
COMMANDS = {(program, *words): each for program, root in PROGRAMS.items() for words, each in commands(root)}
FLAGS = {
    words: {opt for param in each.params for opt in (*param.opts, *param.secondary_opts)} | {"--help"}
    for words, each in COMMANDS.items()
}


@functools.cache
def variables() -> set[str]:
    """Return the variables that settings, options, deployment files, tests, examples, the client or processes read."""
    of_options = {name for each in COMMANDS.values() for param in each.params for name in names_of(param)}
    deployed = [*ROOT.glob("docker-compose*.yml"), *ROOT.glob("deploy/docker/*.sh")]
    of_deployment = {name for path in deployed for name in re.findall(r"\$\{(\w+)", path.read_text())}
    sources = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("client/src/**/*.py")]
    of_code = {name for path in sources for name in re.findall(r'environ[.\w]*[\[(]"(SHARDLOSS_\w+)', path.read_text())}
    return (
        {setting.variable for setting in ALL.values()} | {FILE_VARIABLE} | of_options | of_deployment | of_code | {MARK}
    )


def names_of(param: Any) -> list[str]:
    """Return the environment variables of an option."""
    names = param.envvar or []
    return [names] if isinstance(names, str) else list(names)


def code_of(path: Path) -> Iterator[str]:
    """Return the code of a page: the lines of its fenced blocks and its inline `spans`."""
    fenced = False
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            yield line.split(" #")[0]
        else:
            yield from re.findall(r"`([^`]+)`", line)


def test_every_variable_is_read_by_something() -> None:
    for path in EVERY:
        found = set(re.findall(r"\bSHARDLOSS_[A-Z0-9_]*[A-Z0-9](?![A-Z0-9_*])", path.read_text()))
        assert found <= variables(), path


def test_every_setting_of_a_deployment_is_one() -> None:
    """Every SHARDLOSS_SERVER_ variable of a deployment is a setting; the server would refuse any other."""
    for path in [path for path in DEPLOYED if path.suffix in (".yml", ".yaml")]:
        found = set(re.findall(r"\bSHARDLOSS_SERVER_\w+", path.read_text()))
        assert found <= {setting.variable for setting in ALL.values()}, path


def test_every_command_and_its_flags_exist() -> None:
    for path in EVERY:
        for code in code_of(path) if path in PAGES else path.read_text().splitlines():
            for program, rest in re.findall(
                r"(?:^|(?<!-n)(?<!from)(?<!import)[\s/])(shardloss-server|shardloss)((?: +[^\s|;&`]+)+)", code
            ):
                words = rest.split()
                command: tuple[str, ...] = (program,)
                while words and (*command, words[0]) in COMMANDS:
                    command = (*command, words.pop(0))
                if (
                    path in PAGES
                    and getattr(COMMANDS[command], "commands", {})
                    and words
                    and re.fullmatch("[a-z]+", words[0])
                ):
                    raise AssertionError(f"{' '.join(command)} has no {words[0]}: {code}")
                flags = {word.split("=")[0] for word in words if word.startswith("--")}
                known = set().union(*(FLAGS[command[:end]] for end in range(1, len(command) + 1)))
                assert flags <= known, code


def test_every_flag_named_alone_exists() -> None:
    for path in PAGES:
        spans = [span for span in code_of(path) if span.startswith("--")]
        found = {re.split(r"[ =/]", span)[0] for span in spans}
        assert found <= set().union(*FLAGS.values()) | OTHERS_FLAGS, path


def test_every_metric_is_exported() -> None:
    for path in EVERY:
        found = set(re.findall(r"\bshardloss_(?!server\b)[a-z0-9_]*[a-z0-9](?![a-z0-9_.*])", path.read_text()))
        assert found <= EXPORTED, path


def test_every_reason_is_one() -> None:
    """Each word in capitals is a reason, a status, an enum value of the contract or a variable."""
    pool = descriptor_pool.Default()
    files = [pool.FindFileByName(f"shardloss/v1/{each.name}") for each in (ROOT / "proto/shardloss/v1").glob("*.proto")]
    values = {value for file in files for value in enum_values(file)}
    known = BY_REASON.keys() | {code.name for code in grpc.StatusCode} | values | {"NOT_SERVING"} | arguments()
    for path in PAGES:
        words = {span for span in code_of(path) if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", span)}
        outside = {word for word in words if not word.startswith(("SHARDLOSS_", "OMP_", "RAY_", "MALLOC_", "OTEL_"))}
        assert outside <= known, path


def arguments() -> set[str]:
    """Return the build arguments of the image."""
    return set(re.findall(r"^ARG (\w+)", (ROOT / "deploy/docker/Dockerfile").read_text(), re.M))


def enum_values(scope: object) -> Iterator[str]:
    """Return the value names of every enum in a file or a message."""
    enums = getattr(scope, "enum_types_by_name", {}) or {each.name: each for each in getattr(scope, "enum_types", ())}
    for enum in enums.values():
        yield from enum.values_by_name
    for message in getattr(scope, "message_types_by_name", {}).values() or getattr(scope, "nested_types", ()):
        yield from enum_values(message)


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in PAGES:
        assert {name for code in code_of(path) for name in re.findall(r"\bmake ([a-z-]+)", code)} <= targets, path


def metrics_port() -> int:
    """Return the metrics port of the compose deployment."""
    environment = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["server"]["environment"]
    return int(environment["SHARDLOSS_SERVER_METRICS_PORT"])


def test_every_port_is_one_that_somebody_listens_on() -> None:
    for path in EVERY:
        known = {Listening().port, Listening().admin_port, metrics_port(), *OTHERS_PORTS.values()}
        patterns = r"(?:(?:[.][01]|(?<!arXi)[a-z]):|[Pp]ort:? |[Pp]ort=|EXPOSE |port\": )(\d{4,5})\b"
        found = {int(port) for port in re.findall(patterns, path.read_text())}
        assert found <= known, path
