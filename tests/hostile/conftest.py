"""Worlds that receive bad requests; each test module defines the server and the connection they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import shardloss
from shardloss_server.rpc.serve import Server

from .world import World


@pytest.fixture(scope="module")
def worlds(server: Server, connection: shardloss.LossClient) -> Iterator[list[World]]:
    """The module's reusable world: a list of one world, or empty."""
    worlds: list[World] = []
    yield worlds
    for world in worlds:
        world.close()


@pytest.fixture
def world(worlds: list[World], connection: shardloss.LossClient, server: Server, fresh_name: Any) -> Iterator[World]:
    """An unmodified world: the previous test's if that test verified that it was unchanged, otherwise a new one."""
    world = worlds.pop() if worlds else World(server, connection, fresh_name())
    world.is_proven = False
    yield world
    if world.is_proven:
        worlds.append(world)
    else:
        world.close()
