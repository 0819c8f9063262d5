"""The metrics of a server over HTTP, for Prometheus."""

from __future__ import annotations

from prometheus_client import make_wsgi_app

from shardloss_server.config import CannotServe, Watching
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.metrics import Metrics
from shardloss_server.rpc.gauges import read_workers
from shardloss_server.rpc.scrapes import ScrapePort
from shardloss_server.rpc.workers import WorkerWatch


class Exposition:
    """The metrics of a server at http://address/metrics, with the latest statistics of its workers.

    Raises:
        CannotServe: the server cannot listen on the port.
    """

    def __init__(self, counted: Metrics, catalog: Catalog, host: str, port: int) -> None:
        self._workers = WorkerWatch(catalog)
        read_workers(counted, catalog.group, self._workers)
        try:
            self._scrapes = ScrapePort(host, port, make_wsgi_app(counted.registry))
        except (OSError, OverflowError) as error:
            raise CannotServe(f"cannot listen for metrics on {host} port {port}: {error}") from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._scrapes.port}"

    @staticmethod
    def of(counted: Metrics, catalog: Catalog, watching: Watching) -> Exposition | None:
        """Create the exposition from the settings; None if metrics_port is not set."""
        if watching.metrics_port is None:
            return None
        return Exposition(counted, catalog, watching.metrics_host, watching.metrics_port)

    def start(self) -> None:
        """Start polling the workers."""
        self._workers.start()

    def stop(self) -> None:
        """Stop polling and close the port. Idempotent."""
        self._workers.stop()
        self._scrapes.close()
