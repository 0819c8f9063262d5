"""Servers for tests: in-process with worker threads, and one embedded Ray a session. Fresh tables every test."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator

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

# A test process, like a worker, computes with one thread: two cores serve several of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# The same 20 examples each time keep the suite within its minutes; a full run draws new ones.
settings.register_profile("fixed", max_examples=20, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("everything", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("everything" if EVERYTHING else "fixed")
SEED = 20_240_607
MANY_TABLES = Limits(max_tables=4096)  # a fresh one a test
_names = itertools.count()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The one seed of every test: torch and NumPy start from it."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """What a test has the log written to is closed after it: nobody writes there any more."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def fresh_name() -> Callable[[], str]:
    """Names that no other test uses."""
    return lambda: f"table-{next(_names)}"


@pytest.fixture(scope="session")
def ray_workers() -> Iterator[ShardGroup]:
    """Two Ray worker processes; the only Ray of the session."""
    ray_group = pytest.importorskip("shardloss_server.cluster.ray_group")
    group = ray_group.RayGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def plain_workers(ray_workers: ShardGroup) -> Iterator[ShardGroup]:
    """Two workers more on that Ray, without links: every verb an actor call."""
    ray_group = pytest.importorskip("shardloss_server.cluster.ray_group")
    group = ray_group.RayGroup(2, links=False)
    yield group
    group.close()


@pytest.fixture(scope="session", autouse=True)
def ray_before_grpc(request: pytest.FixtureRequest) -> None:
    """Ray forks when it starts, which may hang where threads are inside gRPC: so it starts before any server."""
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
    """A client of the local group, then of Ray workers."""
    name = "client" if request.param == "local" else "ray_client"
    found: shardloss.LossClient = request.getfixturevalue(name)
    return found
