"""The context of a scenario: the service, sides, and the comparison of two sides."""

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
    """One run of the benchmarks. Quick mode has fewer steps, and its scenarios use smaller shapes.

    When its `with` block ends, the service that scenarios share is stopped.
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
        """Length of a measurement, full or quick."""
        return QUICK if self.quick else FULL

    @contextmanager
    def service(self, *, workers: int = 2, worker_threads: int = 1, keep_mib: int | None = None) -> Iterator[Service]:
        """Yield a service with this many workers.

        A service with default options is shared by all scenarios. A service with other options runs for the block only,
        and the shared one is stopped first, so that two never run at once.
        """
        if (workers, worker_threads, keep_mib) != (2, 1, None):
            self._stop_shared()
            with running(workers, worker_threads=worker_threads, keep_mib=keep_mib) as service:
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
        """Start `benchmarks.rivals.NAME` with a shape, in `.venv-ENVIRONMENT` if given; it ends with the block.

        Two sides may start in parallel: nothing waits for them before their first comparison.

        Raises:
            SideFailed: its environment is missing.
        """
        with Side(name, shape, threads=threads, environment=environment, variables=variables) as side:
            yield side

    def ours(self, service: Service, shape: Mapping[str, Any]) -> AbstractContextManager[Side]:
        """Start our trainer of a shape against a service; the trainer has one thread."""
        return self.side("ours", {**shape, "address": service.address}, threads=1)

    def compare(self, ours: Stepper, rival: Stepper, plan: Plan | None = None) -> Comparison:
        """Alternate two sides, once both are ready.

        Raises:
            SideFailed: one of them failed.
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
        """Compare ours with the rival, end the rival and return the row; if the rival fails, the row has the reason."""
        try:
            with theirs as side:
                found = self.compare(ours, side)
                return compared(scenario, rival, shape, found, versions=ours.versions | side.versions, **more)
        except SideFailed as error:
            return missing(scenario, rival, shape, str(error))

    def _stop_shared(self) -> None:
        self._stack.close()
        self._shared = None
