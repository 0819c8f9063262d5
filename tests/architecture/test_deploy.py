"""The images run without privileges, and the compose file uses only settings, stages and volumes that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from shardloss_server.settings import ALL

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"].startswith("${SHARDLOSS"))
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX = str(1 << 30), str(2**31 - 1), "1"  # docs/performance.md


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage of the Dockerfile, by its name."""
    found: dict[str, list[str]] = {}
    for line in INSTRUCTIONS:
        if line.startswith("FROM "):
            name = line.split(" AS ")[1]
            found[name] = []
        elif line and found:
            found[name].append(line)
    return found


def base_of(stage: str) -> str:
    """Return the stage or image that a stage is built from."""
    return re.search(rf"(?m)^FROM (\S+) AS {stage}$", DOCKERFILE)[1]  # type: ignore[index]


def lineage(stage: str) -> list[str]:
    """Return a stage and all stages that it is built from."""
    return [stage, *lineage(base_of(stage))] if stage in stages() else []


@pytest.mark.parametrize("target", ["cpu", "cuda", "demo"])
def test_a_target_runs_as_nobody_on_the_slim_base(target: str) -> None:
    """The image runs as an unprivileged user on the pinned base, and its stages install nothing."""
    made_of = lineage(target)
    lines = [line for stage in reversed(made_of) for line in stages()[stage]]
    assert base_of(made_of[-1]) == "${PYTHON_IMAGE}"
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001:10001"
    assert not [line for line in lines if re.search(r"apt|pip3? install|\$INSTALL|curl|wget|git ", line)]
    assert "pip uninstall" in " ".join(lines)


def test_the_base_is_pinned_and_the_file_is_plain() -> None:
    """The base image's tag names a version and a release, and the file works with Docker's classic builder."""
    assert INSTRUCTIONS[0] == "ARG PYTHON_IMAGE=python:3.11-slim-bookworm"
    assert "syntax=" not in DOCKERFILE
    assert "--mount" not in DOCKERFILE


def test_every_requirement_is_pinned_by_the_one_file() -> None:
    """Each pip install uses constraints.txt, and the runtime stage sets the allocator and thread variables."""
    lines = "\n".join(line for lines in stages().values() for line in lines)
    installs = re.findall(r"pip [^&\n]*\binstall\b[^&\n]*", lines)
    assert len(installs) >= 2
    assert all("--constraint constraints.txt" in each for each in installs)
    runtime = " ".join(stages()["runtime"])
    for name, value in (
        ("MALLOC_MMAP_THRESHOLD_", M_MMAP_THRESHOLD),
        ("MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD),
        ("MALLOC_ARENA_MAX", M_ARENA_MAX),
        ("OMP_NUM_THREADS", "1"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
    ):
        assert re.search(rf"\b{name}={value}(\s|$)", runtime), name


def test_no_secret_and_no_junk_reaches_the_engine() -> None:
    """The build context excludes everything by default; each copied path exists and is explicitly included."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {"**/*.token", "**/*.key", "**/*.pem"} <= set(lines)
    kept = [line[1:] for line in lines if line.startswith("!")]
    for line in INSTRUCTIONS:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == path or source.startswith(path + "/") for path in kept), source
    assert not re.search(r"(?i)(password|secret|token)\s*=\s*\S", DOCKERFILE)


def test_health_and_start_are_commands_that_exist() -> None:
    """The server has the commands `serve` and `health`, which the image uses."""
    from shardloss_server.__main__ import app

    commands = {each.name or each.callback.__name__ for each in app.registered_commands if each.callback}
    assert {"serve", "health"} <= commands
    assert 'CMD ["shardloss-server", "health", "--address", "127.0.0.1:7071", "--timeout-s", "30"]' in DOCKERFILE


def test_a_health_check_waits_for_a_busy_machine() -> None:
    """Each check has a minute for its answer and minutes for the start, in the compose file and in the image."""
    checks = [s["healthcheck"] for s in SERVICES.values() if "test" in s["healthcheck"]]
    assert len(checks) == 5
    for check in checks:
        assert check["timeout"] == "60s"
        assert int(check["interval"].removesuffix("s")) * check["retries"] >= 600
    assert "HEALTHCHECK --interval=10s --timeout=60s --start-period=600s" in DOCKERFILE


def environment_of(service: dict[str, Any]) -> dict[str, Any]:
    """Return the environment variables of a service."""
    return dict(service.get("environment") or {})


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_has_no_privilege(name: str) -> None:
    """A service has a read-only root, no capabilities or new privileges, limited logs and a health check."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges=true"]
    assert "max-size" in service["logging"]["options"]
    assert "healthcheck" in service
    assert not service.keys() & {"privileged", "user", "ulimits", "cap_add", "pid", "ipc"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_ports_are_published_on_this_machine_alone(name: str) -> None:
    """Ports are published on 127.0.0.1 only, and a variable selects the published port."""
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{SHARDLOSS_PUBLISH_[A-Z_]+:-\d+\}:\d+", port), port


@pytest.mark.parametrize("name", OURS)
def test_every_setting_in_the_compose_file_exists(name: str) -> None:
    """Every variable that begins with SHARDLOSS_SERVER_ is a setting of the server."""
    known = {setting.variable for setting in ALL.values()}
    ours = {key for key in environment_of(SERVICES[name]) if key.startswith("SHARDLOSS_SERVER_")}
    assert ours <= known, ours - known


@pytest.mark.parametrize("name", ["head", "worker", "server"])
def test_ray_asks_for_its_token_on_every_node(name: str) -> None:
    """Each Ray node requires the token, and only these nodes and init mount its volume."""
    environment = environment_of(SERVICES[name])
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/ray-token/token"
    holders = {each for each, s in SERVICES.items() if any("ray-token" in str(v) for v in s.get("volumes", []))}
    assert holders == {"init", "head", "worker", "server"}


def test_tokens_are_made_in_the_one_service_that_may_write_them() -> None:
    """The volume of the tokens is writable in init alone, which is where docs/deploy.md runs `tokens create`."""
    holders = {name: str(v) for name, s in SERVICES.items() for v in s.get("volumes", []) if "tokens:" in str(v)}
    assert {name for name, volume in holders.items() if not volume.endswith(":ro")} == {"init"}
    page = (ROOT / "docs/deploy.md").read_text()
    for action in ("create", "revoke"):
        assert f"docker compose run --rm --no-deps --entrypoint shardloss-server init tokens {action}" in page


def test_a_node_that_is_silent_is_dead_in_seconds() -> None:
    """Ray is configured to declare a silent node dead within seconds; its defaults took 65 s (docs/deploy.md)."""
    head = environment_of(SERVICES["head"])
    found = [int(head[f"RAY_health_check_{each}"]) for each in ("period_ms", "timeout_ms", "failure_threshold")]
    assert found == [1000, 2000, 3]


def test_a_stop_leaves_time_to_drain() -> None:
    """The engine's grace period before it kills the server is longer than the server's own drain time."""
    server = SERVICES["server"]
    grace = int(server["stop_grace_period"].removesuffix("s"))
    assert grace > float(environment_of(server)["SHARDLOSS_SERVER_DRAIN_S"])


def test_the_compose_file_suits_both_composes() -> None:
    """There is no version key (v2 warns about it, 1.29 does not need it), workers restart and volumes are named."""
    assert "version" not in COMPOSE
    assert SERVICES["worker"]["restart"] == "on-failure"
    named = {
        str(v).split(":")[0] for s in SERVICES.values() for v in s.get("volumes", []) if not str(v).startswith(".")
    }
    assert named == set(COMPOSE["volumes"])
    targets = {s["build"]["target"] for file in (COMPOSE, GPU) for s in file["services"].values() if "build" in s}
    assert targets == {"cpu", "demo", "cuda"} <= set(stages())


def test_the_gpu_variant_reserves_devices() -> None:
    """The GPU variant reserves GPUs for the worker only."""
    (device,) = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert list(GPU["services"]) == ["worker"]


def test_the_page_on_proxies_explains_every_setting_of_nginx() -> None:
    """Each directive that tunes nginx has a place on the page, with the value of the file."""
    page = (ROOT / "docs/proxies.md").read_text()
    found = {}
    for file in sorted((ROOT / "deploy/nginx").iterdir()):
        assert f"`{file.name}`" in page
        found |= dict(re.findall(r"(?m)^\s+(\w+) ([^;{]+);", file.read_text()))
    own = {"listen", "server", "server_name", "proxy_pass", "proxy_connect_timeout", "proxy_socket_keepalive"}
    for name in found.keys() - own - {"ssl_certificate", "ssl_certificate_key"}:
        assert f"`{name}`" in page, name
        row = re.search(rf"(?m)^\|[^|]*`{name}`[^|]*\|([^|]+)\|", page)
        assert row is None or found[name] in row[1], name
