"""Our trainer against our front end, with the workers behind plain Ray (`benchmarks.rivals.naive_group`).

The shape is that of `benchmarks.rivals.ours` without an address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.rivals.child import Child, main
from benchmarks.rivals.ours import Ours

MODULE = "benchmarks.rivals.ours_naive"
NUM_WORKERS = 2


class OursNaive(Ours):
    """The trainer, with the front end in a child process."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        self.server = Child(MODULE, shape)
        super().__init__({**shape, "address": self.server.ready["address"]})

    def close(self) -> None:
        super().close()
        self.server.stop()


def run_server(_shape: Mapping[str, Any]) -> None:
    """Run a front end over plain Ray until stdin closes."""
    from benchmarks.rivals.front_end import serve_front_end
    from benchmarks.rivals.naive_group import NaiveGroup

    serve_front_end(NaiveGroup(NUM_WORKERS))


if __name__ == "__main__":
    main(OursNaive, run_server)
