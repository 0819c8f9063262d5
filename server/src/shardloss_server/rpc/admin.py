"""AdminService: the status of a running server, for its operator."""

from __future__ import annotations

import os
import platform
import threading
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from shardloss.errors import Overloaded
from shardloss.v1 import admin_pb2, admin_pb2_grpc

from shardloss_server import __version__
from shardloss_server.cluster.stats import SeenWorker
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.sizes import table_bytes
from shardloss_server.rpc.servicer import Handlers, answers

STATS_S = 2.0  # a worker that has not answered by then is reported as down
RETRY_AFTER_S = 0.5
SHARED_MEMORY = "/dev/shm"


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """The servicer of AdminService."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self._looking = threading.Lock()  # only one call waits for workers: health shares the few threads here

    @answers
    def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.Status:
        if not self._looking.acquire(blocking=False):
            raise Overloaded("another GetStatus is under way", retry_after_s=RETRY_AFTER_S)
        try:
            workers = self.handlers.catalog.group.stats(STATS_S)
        finally:
            self._looking.release()
        calls = self.handlers.call_log.recent
        status = admin_pb2.Status(
            versions=versions(),
            uptime_s=calls.age_s,
            time_s=time.time(),
            num_workers=len(workers),
            workers=[worker_message(worker) for worker in workers],
            tables=[table_message(owner) for owner in self.handlers.catalog.owners()],
            places=self._places(),
            num_refused=calls.num_refused,
            methods=[admin_pb2.MethodStatus(**asdict(method)) for method in calls.seen()],
        )
        if os.path.isdir(SHARED_MEMORY):
            room = os.statvfs(SHARED_MEMORY)
            status.shm_free_bytes, status.shm_total_bytes = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        return status

    def _places(self) -> list[admin_pb2.Places]:
        return [
            admin_pb2.Places(
                name=name,
                num_calls=held.num_calls,
                num_bytes=held.num_bytes,
                max_calls=held.max_calls,
                max_bytes=held.max_bytes,
            )
            for name, held in self.handlers.places.items()
        ]


def versions() -> dict[str, str]:
    """Return the versions of the server and its packages; packages that are not installed are left out."""
    found = {"shardloss-server": __version__, "python": platform.python_version()}
    for package in ("torch", "grpcio", "protobuf", "ray"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def worker_message(worker: SeenWorker) -> admin_pb2.Worker:
    """Encode the status of a worker as its group saw it."""
    facts = {} if worker.stats is None else asdict(worker.stats) | {"up": True}
    facts.pop("versions", None)
    message = admin_pb2.Worker(**facts)
    message.index, message.device, message.num_restarts = worker.index, worker.device, worker.num_restarts
    return message


def table_message(owner: TableOwner) -> admin_pb2.TableStatus:
    """Encode the current status of a table."""
    spec = owner.spec
    return admin_pb2.TableStatus(
        name=spec.name,
        num_classes=spec.num_classes,
        dim=spec.dim,
        dtype=spec.dtype,
        num_shards=spec.placement.num_shards,
        version=owner.steps.version,
        num_commits=owner.steps.num_commits,
        num_sessions=owner.sessions.num_known,
        num_open_tickets=owner.sessions.num_open,
        num_bytes=table_bytes(spec),
        rows_lost=owner.lost is not None,
        filled=owner.filled,
    )
