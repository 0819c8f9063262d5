"""What a scenario gets: the service, sides, and the comparison of two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.interleave import FULL, QUICK, Comparison, Plan, Stepper, interleave
from benchmarks.row import Row, compared, missing
from benchmarks.server import Service, running
from benchmarks.side import Side, SideFailed


@dataclass
class Context:
    """One run. Quick mode has fewer steps, and its scenarios take smaller shapes.

    Leaving the run's `with` block ends the service that scenarios share.
    """

    quick: bool = False
    _shared: Service | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_shared()

    @property
    def plan(self) -> Plan:
        """How long to measure."""
        return QUICK if self.quick else FULL

    @contextmanager
    def service(self, *, workers: int = 2, worker_threads: int = 1, fresh: bool = False) -> Iterator[Service]:
        """The service with so many workers.

        The plain one is shared by all scenarios; another one, or a fresh one, ends it first and lives for the block,
        so that no two are there at once.
        """
        if fresh or (workers, worker_threads) != (2, 1):
            self._stop_shared()
            with running(workers, worker_threads=worker_threads) as service:
                yield service
            return
        if self._shared is None or not self._shared.is_alive():
            self._stop_shared()
            self._shared = self._stack.enter_context(running(workers))
        yield self._shared

    @contextmanager
    def side(
        self,
        name: str,
        shape: Mapping[str, Any],
        *,
        threads: int = 2,
        environment: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Side]:
        """Start `benchmarks.rivals.NAME` with a shape, in `.venv-ENVIRONMENT` if one is named; it ends with the block.

        Two sides may start at once: neither is waited for before the first comparison.

        Raises:
            SideFailed: its environment is missing.
        """
        with Side(name, shape, threads=threads, environment=environment, variables=variables) as side:
            yield side

    def ours(self, service: Service, shape: Mapping[str, Any]) -> AbstractContextManager[Side]:
        """Our trainer of a shape against a service: one thread of its own."""
        return self.side("ours", {**shape, "address": service.address}, threads=1)

    def compare(self, ours: Stepper, rival: Stepper, plan: Plan | None = None) -> Comparison:
        """Alternate two sides, once both are ready.

        Raises:
            SideFailed: one of them broke off.
        """
        for side in (ours, rival):
            if isinstance(side, Side):
                side.ready()
        return interleave(ours, rival, plan or self.plan)

    def row(
        self,
        scenario: str,
        rival: str,
        shape: Mapping[str, Any],
        ours: Side,
        theirs: AbstractContextManager[Side],
        **more: Any,
    ) -> Row:
        """Compare and end the rival; a row with its reason where it fails."""
        try:
            with theirs as side:
                found = self.compare(ours, side)
                return compared(scenario, rival, shape, found, versions=ours.versions | side.versions, **more)
        except SideFailed as error:
            return missing(scenario, rival, shape, str(error))

    def _stop_shared(self) -> None:
        self._stack.close()
        self._shared = None
