"""A Ray of this server's own: on loopback addresses only, with its own token and folder, watched, and removed."""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services, worker
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # it is compiled

from shardloss_server.cluster.folder import MARK, OwnFolder
from shardloss_server.config import LONGEST_S

OBJECT_STORE_BYTES = 512 * 2**20  # staged parts of open tickets spill to disk above this
STOP_S = 10.0
NODE_POLL_S = 0.2
FOR_CLUSTERS = (  # settings of a Ray that this user runs elsewhere; with them, an embedded one does not start
    "RAY_ADDRESS",
    "RAY_REDIS_ADDRESS",
    "RAY_gcs_storage",
    "RAY_USE_TLS",
    "RAY_OVERRIDE_RESOURCES",
)
VITAL = ("gcs_server", "raylet")  # without them no worker can be started, watched or restarted


class EmbeddedRay:
    """The processes of a Ray that only this process uses."""

    def __init__(self, folder: OwnFolder, num_cpus: int, start_timeout_s: float) -> None:
        self._folder = folder
        token = folder.path / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        with replaced(os.environ, variables(folder, start_timeout_s)), patient(start_timeout_s):
            AuthenticationTokenLoader.instance().reset_cache()
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder.path / "ray"),  # Ray lets everyone write to it, but not enter the folder
                _system_config={
                    "memory_monitor_refresh_ms": 0,  # no worker is killed because a neighbour needs memory
                    "worker_register_timeout_seconds": math.ceil(start_timeout_s),
                    "gcs_rpc_server_reconnect_timeout_s": LONGEST_S,  # else Ray ends this process amid its drain
                },
            )

    def failure(self) -> str | None:
        """Return which vital process has ended, or None."""
        node: Any = worker._global_node
        ended = () if node is None else node.dead_processes()
        return next((f"Ray's {name} has ended" for name, _ in ended if name in VITAL), None)

    def close(self) -> None:
        """End every process of this Ray; if it does not stop in order within STOP_S, by killing them."""
        if self.failure() is None:
            stopping = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
            stopping.start()
            stopping.join(STOP_S)
        self._folder.end_processes()


def variables(folder: OwnFolder, start_timeout_s: float) -> dict[str, str | None]:
    """Return the environment variables with which the processes of a Ray are started; None means unset."""
    return {
        MARK: str(folder.path),
        "SPT_NOENV": "1",  # else setproctitle overwrites the environment, and with it the mark
        "RAY_AUTH_MODE": None,  # Ray turns its token on, in this process, too, unless it is set
        "RAY_AUTH_TOKEN": None,  # it would take precedence over the file
        "RAY_AUTH_TOKEN_PATH": str(folder.path / "token"),
        **dict.fromkeys(FOR_CLUSTERS),
        "AUTOSCALER_METRIC_PORT": "0",  # else every embedded Ray of the machine wants port 44217
        "RAY_gcs_server_port_wait_time_s": str(math.ceil(start_timeout_s)),
    }


@contextmanager
def replaced(mapping: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set some values of a mapping (None: remove the key), and set the previous ones again at the end."""
    before = {key: mapping.get(key) for key in values}
    put(mapping, values)
    try:
        yield
    finally:
        put(mapping, before)


def put(mapping: Any, values: Mapping[str, Any]) -> None:
    """Set some values of a mapping in place; None removes the key."""
    for key, value in values.items():
        mapping.pop(key, None)
        if value is not None:
            mapping[key] = value


@contextmanager
def patient(start_timeout_s: float) -> Iterator[None]:
    """Have Ray bind to 127.0.0.1, and wait start_timeout_s for its own node instead of 30 s.

    Ray has no option for either: it replaces a loopback address that it is given, except on macOS.
    """
    get_node = services.get_node

    def waiting(*args: Any) -> Any:
        deadline = time.monotonic() + start_timeout_s
        while True:
            try:
                return get_node(*args)  # type: ignore[no-untyped-call]
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(NODE_POLL_S)

    with replaced(vars(services), {"get_node": waiting}), replaced(vars(ray_constants), {"ENABLE_RAY_CLUSTER": False}):
        yield
