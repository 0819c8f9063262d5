"""Asks the workers for their facts every few seconds, so that whoever wants to know them waits for no worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from shardloss_server.cluster.stats import SeenWorker, WorkerStats
from shardloss_server.frontend.catalog import Catalog

INTERVAL_S = 5.0
TIMEOUT_S = 5.0  # a worker that computes for longer than this counts as down until the next time
log = logging.getLogger(__name__)


class WorkerWatch:
    """What each worker said of itself last."""

    def __init__(self, catalog: Catalog, interval_s: float = INTERVAL_S) -> None:
        self.seen: Sequence[SeenWorker] = ()
        self.behind: Mapping[int, int] = {}  # versions, by worker
        self._catalog, self._interval_s = catalog, interval_s
        self._asked = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)

    def start(self) -> None:
        """Ask from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. Idempotent."""
        self._stopping.set()

    def age_s(self) -> float:
        """Seconds since the workers answered last, or were first to be asked."""
        return time.monotonic() - self._asked

    def ask(self) -> None:
        """Ask once, and log who came or went."""
        versions = {owner.key: owner.steps.version for owner in self._catalog.owners()}
        seen = self._catalog.group.stats(TIMEOUT_S)
        self.behind = {each.index: behind(each.stats, versions) for each in seen if each.stats is not None}
        self._tell(seen)
        self.seen, self._asked = seen, time.monotonic()

    def _watch(self) -> None:
        while True:
            try:
                self.ask()
            except Exception:  # whatever it is, the next time may be better, and the age of the facts shows it
                log.exception("the workers could not be asked")
            if self._stopping.wait(self._interval_s):
                return

    def _tell(self, seen: Sequence[SeenWorker]) -> None:
        for before, worker in zip(self.seen, seen, strict=False):  # the first time there is nothing before
            if worker.num_restarts > before.num_restarts:
                log.warning("worker %d is another process now: its rows are gone", worker.index)
            if (worker.stats is None) != (before.stats is None):
                level, does = (
                    (logging.WARNING, "does not answer") if worker.stats is None else (logging.INFO, "answers")
                )
                log.log(level, "worker %d %s", worker.index, does)


def behind(worker: WorkerStats, versions: Mapping[str, int]) -> int:
    """How far a worker is behind versions that its tables had before it was asked, at most over all of them."""
    lags = [versions[table] - version for table, version in worker.versions.items() if table in versions]
    return max([0, *lags])
