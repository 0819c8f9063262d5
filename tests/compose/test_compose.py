"""The compose file on a real engine: build, health, training, a killed worker, and complete removal."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import shardloss
from engine import BUILD_S, HEALTHY_S, NoEngine, Project, busy_cores, compose_command, eventually, output
from observed import Prometheus, Traffic, dashboard_queries, scraping

pytestmark = [pytest.mark.compose, pytest.mark.timeout(BUILD_S + 2 * HEALTHY_S)]
MB = 1e6
TRAIN_S = 20
V, D, N = 907, 64, 256
SECURITY = Path(__file__).resolve().parents[2] / "docs/security.md"
LOST_S = 60.0
DATA_S = 120.0
Figures = dict[str, str]


@pytest.fixture(scope="module")
def figures() -> Iterator[Figures]:
    """The measured figures, printed at the end."""
    found: Figures = {}
    yield found
    print("\n\n" + "\n".join(f"{name:<52} {value:>24}" for name, value in found.items()))


@pytest.fixture(scope="module", params=["1", "2"], ids=["compose-1", "compose-2"])
def project(request: pytest.FixtureRequest, figures: Figures) -> Iterator[Project]:
    """The service with two workers, by each version of Compose; only its images are left afterwards."""
    with running(request.param, figures) as found:
        yield found


@contextmanager
def running(version: str, figures: Figures, when: str = "") -> Iterator[Project]:
    """Build and start the service with two workers; everything but its images is removed at the end."""
    try:
        found = Project(compose_command(version), f"shardloss-test-{os.getpid()}-{secrets.token_hex(2)}")
    except NoEngine as error:
        pytest.skip(str(error))
    label = f"compose {version}{when}"
    try:
        began = time.monotonic()
        found.run("--profile", "demo", "build", timeout_s=BUILD_S)
        figures[f"{label}: build, s (cached layers included)"] = f"{time.monotonic() - began:.0f}"
        began = time.monotonic()
        found.run("up", "--detach", "--scale", "worker=2", timeout_s=HEALTHY_S)
        figures[f"{label}: `up` returned after, s"] = f"{time.monotonic() - began:.1f}"
        eventually(lambda: found.is_healthy("server"), "the front end is healthy", HEALTHY_S)
        figures[f"{label}: from `up` to a healthy front end, s"] = f"{time.monotonic() - began:.1f}"
        yield found
    except AssertionError:
        print(found.run("logs", "--tail", "40"))
        raise
    finally:
        found.run("--profile", "demo", "down", "--volumes", "--remove-orphans")
        assert found.left() == []


@pytest.mark.parametrize("version", ["1", "2"])
def test_up_succeeds_while_every_core_is_busy(version: str, figures: Figures) -> None:
    """`up` waits for slow nodes, repeats their joins, and ends with a healthy front end on both workers."""
    with busy_cores(), running(version, figures, ", busy cores") as project:
        status = json.loads(project.inside("server", "shardloss", "status", "--output", "json"))
        assert [worker["up"] for worker in status["workers"]] == [True, True]


@pytest.fixture(scope="module")
def client(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[shardloss.LossClient]:
    """A client on this machine with the admin token from the volume."""
    token: Path = tmp_path_factory.mktemp("tokens") / "admin.token"
    token.touch(0o600)
    token.write_text(project.inside("server", "cat", "/tokens/admin.token"))
    with shardloss.connect(project.address, token_file=token, timeout_s=60, attempt_timeout_s=10) as found:
        yield found


def test_two_workers_serve(project: Project, client: shardloss.LossClient, figures: Figures) -> None:
    """The server has as many workers as --scale requested; the image sizes are measured."""
    assert client.server_info().num_workers == 2
    status = json.loads(project.inside("server", "shardloss", "status", "--output", "json"))
    assert [worker["up"] for worker in status["workers"]] == [True, True]
    for target in ("cpu", "demo"):
        size = output(["docker", "image", "inspect", "--format", "{{.Size}}", f"shardloss:{target}"])
        figures[f"image {target}, MB"] = f"{int(size) / MB:.0f}"
    base = output(["docker", "image", "inspect", "--format", "{{.Size}}", "python:3.11-slim-bookworm"])
    figures["  of which the base image of this engine, MB"] = f"{int(base) / MB:.0f}"


@pytest.mark.parametrize("service", ["head", "worker", "server"])
def test_a_container_is_nobody_and_writes_nothing(project: Project, service: str) -> None:
    """The user is not root, the root file system is read-only, and there are no capabilities and no build tools."""
    state = project.state(project.containers(service)[0])
    assert state["HostConfig"]["ReadonlyRootfs"]
    assert state["HostConfig"]["CapDrop"] == ["ALL"]
    assert project.inside(service, "id", "-u").strip() == "10001"
    for path in ("/x", "/opt/shardloss/x", "/usr/local/bin/x"):
        assert project.inside(service, "sh", "-c", f"touch {path} 2>/dev/null || echo refused").strip() == "refused"
    assert project.inside(service, "sh", "-c", "command -v pip gcc || echo none").strip() == "none"


def test_the_containers_listen_where_the_page_says(project: Project) -> None:
    """The sockets of head, worker and server are those of docs/security.md, and only two ports are published."""
    table = SECURITY.read_text().split("### Compose\n", 1)[1].split("\n#", 1)[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")][
        2:
    ]
    for service in ("head", "worker", "server"):
        listed = {(row[1], row[2]): int(row[3]) for row in rows if row[0] == service}
        assert project.listening(service) == Counter(listed)
        published = project.state(project.containers(service)[0])["NetworkSettings"]["Ports"] or {}
        hosts = [binding["HostIp"] for bindings in published.values() for binding in bindings or ()]
        assert hosts == (["127.0.0.1"] * 2 if service == "server" else [])


def test_tokens_are_kept_and_not_made_anew(project: Project) -> None:
    """`init` runs again at every `up` but keeps the tokens, so clients can continue with theirs."""
    before = project.inside("server", "sha256sum", "/tokens/tokens.toml", "/ray-token/token")
    project.run("run", "--rm", "init")
    assert project.inside("server", "sha256sum", "/tokens/tokens.toml", "/ray-token/token") == before
    assert "600" in project.inside("server", "stat", "-c", "%a", "/tokens/admin.token")


def test_a_caller_without_a_token_is_refused(project: Project) -> None:
    """The port is published, but only clients with a token can connect."""
    with pytest.raises(shardloss.errors.Unauthenticated):
        shardloss.connect(project.address, timeout_s=20)


def test_the_example_trains_through_it(project: Project, figures: Figures) -> None:
    """The city finder learns: its loss over all classes falls by more than 0.5 nats."""
    arguments = ["train", "--out", "/demo", "--train-seconds", str(TRAIN_S), "--eval-names", "500"]
    project.run("run", "--rm", "demo", *arguments)
    result = json.loads(project.run("run", "--rm", "--entrypoint", "cat", "demo", "/demo/result.json"))
    figures["rows a second of the example, 2 workers"] = f"{result['rows_per_s']:,.0f}"
    assert result["after"]["nll"] < result["before"]["nll"] - 0.5


@pytest.fixture(scope="module")
def prometheus(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus of this machine that scrapes the front end on its container's address."""
    with scraping(f"{project.address_of('server', 'front')}:9464", tmp_path_factory.mktemp("prometheus")) as found:
        yield found


def test_every_query_of_the_dashboard_has_data(
    project: Project, client: shardloss.LossClient, prometheus: Prometheus
) -> None:
    """After steps, questions, failures, replays and refusals, no panel of the dashboard is empty."""
    traffic = Traffic(client, f"127.0.0.1:{project.ports[1]}", "watched")
    empty = dict.fromkeys(dashboard_queries(), True)
    traffic.refused()

    def all_have_data() -> bool:
        traffic.once()
        for each in [each for each, is_empty in empty.items() if is_empty]:
            empty[each] = not prometheus.query(each[1])
        if any(title == "Refusals by limit" for (title, _), is_empty in empty.items() if is_empty):
            traffic.refused()
        return not any(empty.values())

    try:
        eventually(all_have_data, "every panel has data", DATA_S)
    except AssertionError:
        pytest.fail(f"no data: {[each for each, is_empty in empty.items() if is_empty]}")
    assert prometheus.query("sum(shardloss_worker_up)") == [2.0]
    assert prometheus.firing() == set()
    client.delete_table("watched")


@pytest.mark.parametrize("by_engine", [False, True], ids=["crash", "docker-kill"])
def test_a_killed_worker_is_a_named_error_until_its_tables_are_made_again(
    project: Project, client: shardloss.LossClient, prometheus: Prometheus, figures: Figures, by_engine: bool
) -> None:
    """Calls raise ROWS_LOST and never return wrong numbers, and the alerts fire until all is well again.

    Only a crashed worker restarts automatically.
    """
    hidden, labels = np.ones((N, D), np.float32), np.arange(N) % V
    how, name = ("killed by hand", "by-hand") if by_engine else ("crashed", "crashed")

    def train(session: shardloss.Session) -> int:
        result = session.train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
        assert result.committed is not None
        return result.committed.version

    session = client.create_table(name, num_classes=V, dim=D, num_shards=2).session()
    steps = [train(session) for _ in range(3)]
    assert steps == [1, 2, 3]
    victim = project.containers("worker")[0]
    restarts, began = project.state(victim)["RestartCount"], time.monotonic()
    kill(victim, by_engine)
    with pytest.raises(shardloss.errors.RowsLost) as raised:
        repeat(lambda: train(session), LOST_S)
    figures[f"a worker {how}: ROWS_LOST after, s"] = f"{time.monotonic() - began:.1f}"
    figures[f"a worker {how}: what it says"] = str(raised.value)
    fired = {"ShardlossRowsLost"} | ({"ShardlossWorkerDown"} if by_engine else {"ShardlossWorkerRestarted"})
    took = eventually(lambda: fired <= prometheus.firing(), f"{fired} fire", LOST_S)
    figures[f"a worker {how}: alerts after, s"] = f"{took:.1f}"
    client.delete_table(name)
    if by_engine:
        output(["docker", "start", victim])
    else:
        eventually(lambda: project.state(victim)["RestartCount"] > restarts, "it is restarted", HEALTHY_S)
    again = client.create_table(name, num_classes=V, dim=D, num_shards=2).session()
    assert train(again) == 1
    figures[f"a worker {how}: trained again after, s"] = f"{time.monotonic() - began:.1f}"
    eventually(lambda: project.is_healthy("worker"), "all workers are healthy", HEALTHY_S)
    ended = {"ShardlossRowsLost", "ShardlossWorkerDown"}
    eventually(lambda: not ended & prometheus.firing(), f"{ended} end", LOST_S)
    client.delete_table(name)


def kill(container: str, by_engine: bool) -> None:
    """Kill a container through the engine, so that it stays down, or kill its processes, as if memory had run out."""
    if by_engine:
        output(["docker", "kill", container])
    else:
        subprocess.run(["docker", "exec", container, "sh", "-c", "kill -9 -1"], timeout=LOST_S, check=False)


def repeat(step: Callable[[], object], timeout_s: float) -> None:
    """Call `step` until it raises or timeout_s has passed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        step()
