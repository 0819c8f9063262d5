"""Four workers on two nodes with the front end on a third, against all on one node: time, and bytes on the cables."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.context import Context
from benchmarks.netns import Cluster, cluster
from benchmarks.procfs import descendants_of
from benchmarks.row import Row, missing
from benchmarks.server import Service, command
from benchmarks.side import ROOT, Side, SideFailed
from examples.cities.service import STOP_S, ServiceFailed, stop, wait_ready

N, D, K = 1024, 256, 4
CPUS_OF_NODES = (0, 2, 2)  # the head runs the front end and the trainer, and holds no shard
NUM_NODES = 2
COUNTED_STEPS = 10
RIVAL = "all on one node"


def nodes(context: Context) -> list[Row]:
    """Compare three nodes with one for a full softmax with SGD."""
    shape = {"N": N, "D": D, "V": 20_000 if context.quick else 100_000, "S": None, "K": K, "dtype": "float32"}
    trained = {**shape, "kind": "full", "optimizer": "sgd"}
    try:
        with (
            cluster(CPUS_OF_NODES) as made,
            serving_on(made) as service,
            context.side("inside", trained | inside(made, service), threads=1) as spread,
            context.service(workers=K) as single,
            context.ours(single, trained) as together,
        ):
            found = context.row("nodes", RIVAL, shape, spread.ready(), together)
            return [found.but(**carried(made, spread), wire_bytes_rival=None)]
    except SideFailed as error:
        return [missing("nodes", RIVAL, shape, str(error))]


def inside(made: Cluster, service: Service) -> dict[str, Any]:
    """Return the options with which our trainer runs on the front end's node."""
    return {"module": "ours", "inside": made.nodes[0].inside(), "address": service.address}


@contextmanager
def serving_on(made: Cluster, *options: str) -> Iterator[Service]:
    """Start the service, with its front end on the head, and yield it."""
    with TemporaryDirectory(prefix="bench-") as directory:
        ready, log = Path(directory) / "ready", Path(directory) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*made.nodes[0].inside(), *command(K, 1, None, ready), "--ray-address", made.ray_address, *options],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **made.variables},
            )
        try:
            yield Service(wait_ready(process, ready, log), process)
        except ServiceFailed as error:
            raise SideFailed(str(error)) from error
        finally:
            end_inside(process)
            stop(process)


def end_inside(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the process that nsenter runs and wait for it, because nsenter forwards no signals."""
    for child in descendants_of(process.pid)[:1]:
        os.kill(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def carried(made: Cluster, side: Side) -> dict[str, Any]:
    """Measure the bytes per step on the cables of the nodes with shards, and note what to compare them with."""
    before = [node.carried_bytes() for node in made.nodes[1:]]
    side.step(COUNTED_STEPS)
    after = [node.carried_bytes() for node in made.nodes[1:]]
    to_nodes, from_nodes = (
        sum(late[way] - early[way] for early, late in zip(before, after, strict=True)) / COUNTED_STEPS for way in (0, 1)
    )
    hidden_mb = 4e-6 * N * D
    note = (
        f"a step sends {1e-6 * to_nodes:.2f} MB to the nodes and {1e-6 * from_nodes:.2f} MB back; "
        f"nodes * N * D is {NUM_NODES * hidden_mb:.2f} MB, K * N * D {K * hidden_mb:.2f} MB"
    )
    return {"wire_bytes": to_nodes + from_nodes, "note": note}
