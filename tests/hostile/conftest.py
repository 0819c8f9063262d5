"""Worlds to send bad requests to; a module says which server and connection they are of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import shardloss
from shardloss_server.rpc.serve import Server

from .world import World


@pytest.fixture(scope="module")
def worlds(server: Server, connection: shardloss.LossClient) -> Iterator[list[World]]:
    """The present world, if there is one."""
    worlds: list[World] = []
    yield worlds
    for world in worlds:
        world.close()


@pytest.fixture
def world(worlds: list[World], connection: shardloss.LossClient, server: Server, fresh_name: Any) -> Iterator[World]:
    """A world that no test has touched: the last test's, if that test proved it to be as it was, else a new one."""
    world = worlds.pop() if worlds else World(server, connection, fresh_name())
    world.is_proven = False
    yield world
    if world.is_proven:
        worlds.append(world)
    else:
        world.close()
