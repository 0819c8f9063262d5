"""A real Prometheus that scrapes a server with the rules of deploy/prometheus, and the traffic that it should see."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCRAPE_S = 1
WINDOW = "30s"  # of a rate in the dashboard; Grafana replaces $__rate_interval by at least four scrapes
READY_S = 60.0
WATCHERS = 140  # more than one connection may have, so that some are refused


class Prometheus:
    """A running Prometheus on a free port of this machine."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of a reply of the HTTP API."""
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=READY_S) as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[float]:
        """Return the values of a query at this moment, without NaN."""
        results = self.get("/api/v1/query", query=expression)["result"]
        values = [float(each["value"][1]) for each in results]
        return [value for value in values if not math.isnan(value)]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {
            each["labels"]["alertname"] for each in self.get("/api/v1/alerts")["alerts"] if each["state"] == "firing"
        }

    def is_scraping(self) -> bool:
        """Return True once the server has been scraped."""
        try:
            return bool(self.query("up == 1"))
        except OSError:
            return False


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of deploy/prometheus on one target, scraped every second.

    The alerts fire without their `for`, so that a test does not wait for minutes; the rules' own tests cover it.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus is here")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = (DEPLOY / "prometheus/alerts.yml").read_text()
    (folder / "alerts.yml").write_text(re.sub(r"(?m)^( +for:) .*$", r"\1 0s", rules))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            found = Prometheus(port)
            deadline = time.monotonic() + READY_S
            while not found.is_scraping():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            yield found
        finally:
            process.terminate()
            process.wait(READY_S)


def dashboard_queries() -> list[tuple[str, str]]:
    """Return (title, query) of every panel of the dashboard, with Grafana's variables replaced."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/shardloss.json").read_text())
    panels = [each for panel in dashboard["panels"] for each in (panel, *panel.get("panels", ()))]
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", WINDOW).replace("$instance", ".*"))
        for panel in panels
        for target in panel.get("targets", ())
    ]


class Traffic:
    """Calls of every kind that the dashboard shows: steps, questions, failures, replays and refusals."""

    def __init__(self, client: shardloss.LossClient, admin_address: str, name: str) -> None:
        self._client, self._admin_address, self._name = client, admin_address, name
        self._table = client.create_table(name, num_classes=907, dim=16)
        self._session = self._table.session()
        self._step = 0

    def once(self) -> None:
        """Make one call of each kind."""
        hidden, labels = np.ones((64, 16), np.float32), np.arange(64)
        self._session.train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
        self._table.evaluate(hidden, labels)
        with pytest.raises(shardloss.errors.TableNotFound):
            self._client.table(f"{self._name}-absent")
        self._step += 1
        request = shardloss.messages.loss_request(self._name, hidden, labels, shardloss.FullSoftmax())
        request.message.session, request.message.step = f"replayed-{self._name}", self._step
        for _ in range(2):  # the second one is answered with the first one's reply
            self._client.send_loss(request)

    def refused(self) -> None:
        """Have some watchers of health refused."""
        with ExitStack() as open_, grpc.insecure_channel(self._admin_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(WATCHERS)]
            for watcher in watchers:
                open_.callback(watcher.cancel)
            refused = [watcher for watcher in watchers if not is_answered(watcher)]
            assert refused


def is_answered(watcher: Any) -> bool:
    """Return True if a watcher gets a first status."""
    try:
        next(watcher)
    except grpc.RpcError:
        return False
    return True
