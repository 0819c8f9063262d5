"""Polling of the workers' statistics every few seconds, so that reading the metrics never waits for a worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from shardloss_server.cluster.stats import SeenWorker, WorkerStats
from shardloss_server.frontend.catalog import Catalog

INTERVAL_S = 5.0
TIMEOUT_S = 5.0  # a worker that computes for longer than this counts as down until the next poll
log = logging.getLogger(__name__)


class WorkerWatch:
    """The latest statistics of each worker, polled in the background."""

    def __init__(self, catalog: Catalog, interval_s: float = INTERVAL_S) -> None:
        self.seen: Sequence[SeenWorker] = ()
        self.behind: Mapping[int, int] = {}  # versions, by worker
        self._catalog, self._interval_s = catalog, interval_s
        self._asked = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling. Idempotent."""
        self._stopping.set()

    def age_s(self) -> float:
        """Return the seconds since the last poll, or since this object was created if there was none."""
        return time.monotonic() - self._asked

    def ask(self) -> None:
        """Poll once, and log each worker that stopped answering, answers again or was replaced."""
        versions = {owner.key: owner.steps.version for owner in self._catalog.owners()}
        seen = self._catalog.group.stats(TIMEOUT_S)
        self.behind = {each.index: behind(each.stats, versions) for each in seen if each.stats is not None}
        self._tell(seen)
        self.seen, self._asked = seen, time.monotonic()

    def _watch(self) -> None:
        while True:
            try:
                self.ask()
            except Exception:  # the next poll may succeed; until then, age_s() shows the failure
                log.exception("the workers could not be polled")
            if self._stopping.wait(self._interval_s):
                return

    def _tell(self, seen: Sequence[SeenWorker]) -> None:
        for before, worker in zip(self.seen, seen, strict=False):  # self.seen is empty the first time
            if worker.num_restarts > before.num_restarts:
                log.warning("worker %d was replaced by a new process: its rows are lost", worker.index)
            if (worker.stats is None) != (before.stats is None):
                level, does = (
                    (logging.WARNING, "does not answer") if worker.stats is None else (logging.INFO, "answers")
                )
                log.log(level, "worker %d %s", worker.index, does)


def behind(worker: WorkerStats, versions: Mapping[str, int]) -> int:
    """Return the largest number of versions, over all tables, by which a worker lags the version before the poll."""
    lags = [versions[table] - version for table, version in worker.versions.items() if table in versions]
    return max([0, *lags])
