"""Servers and clients for tests: in-process worker threads, and one embedded Ray per session. Tables are per test."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import shardloss
import torch
from hypothesis import settings
from shardloss_server.cluster.group import ShardGroup
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, ServerConfig
from shardloss_server.rpc.serve import Server

from .extent import EVERYTHING

# Like a worker, a test process computes with one thread, because several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# 20 fixed examples keep the suite short; a full run draws 200 new ones.
settings.register_profile("fixed", max_examples=20, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("everything", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("everything" if EVERYTHING else "fixed")
SEED = 20_240_607
MANY_TABLES = Limits(max_tables=4096)  # each test creates its own
_names = itertools.count()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of every test: torch and the NumPy fixture `rng` start from it."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Remove the root logger's stream handlers after each test, because their streams are closed with it."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def fresh_name() -> Callable[[], str]:
    """A function that returns table names no other test uses."""
    return lambda: f"table-{next(_names)}"


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[ShardGroup]:
    """Two Ray worker processes on the session's only Ray instance."""
    ray_group = pytest.importorskip("shardloss_server.cluster.ray_group")
    group = ray_group.RayGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def plain_workers(ray_workers: ShardGroup) -> Iterator[ShardGroup]:
    """Two more workers on the same Ray instance, without links: every verb is an actor call."""
    ray_group = pytest.importorskip("shardloss_server.cluster.ray_group")
    group = ray_group.RayGroup(2, links=False)
    yield group
    group.close()


@pytest.fixture(scope="session", autouse=True)
def ray_before_grpc(request: pytest.FixtureRequest) -> None:
    """Start Ray before any server: Ray forks when it starts, which may hang if threads are inside gRPC."""
    if any(item.get_closest_marker("ray") for item in request.session.items):
        request.getfixturevalue("ray_workers")


@pytest.fixture(scope="session")
def local_server() -> Iterator[Server]:
    """A server over two worker threads, without Ray."""
    group = LocalGroup(2)
    server = Server(group, ServerConfig(limits=MANY_TABLES))
    server.start()
    yield server
    server.stop(grace_s=1.0)
    group.close()


@pytest.fixture(scope="session")
def ray_server(ray_workers: ShardGroup) -> Iterator[Server]:
    """A server over the Ray workers."""
    server = Server(ray_workers, ServerConfig(limits=MANY_TABLES))
    server.start()
    yield server
    server.stop(grace_s=1.0)


@pytest.fixture
def client(local_server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(local_server.address, timeout_s=30.0) as client:
        yield client


@pytest.fixture
def ray_client(ray_server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(ray_server.address, timeout_s=60.0) as client:
        yield client


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def any_client(request: pytest.FixtureRequest) -> shardloss.LossClient:
    """A client of the local group or, in a second run, of the Ray workers."""
    name = "client" if request.param == "local" else "ray_client"
    found: shardloss.LossClient = request.getfixturevalue(name)
    return found


@pytest.fixture
def temp() -> Iterator[Path]:
    """A TMPDIR of its own for a started process; its path is short, because a Unix socket's may have 107 bytes."""
    with TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)
