"""The tables that golden cases are computed on, one set per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shardloss_server.rpc.serve import Server

from .tables import Tables, tables_of


@pytest.fixture(scope="module")
def local_tables(local_server: Server) -> Iterator[Tables]:
    yield from tables_of(local_server)


@pytest.fixture(scope="module")
def ray_tables(ray_server: Server) -> Iterator[Tables]:
    yield from tables_of(ray_server)


@pytest.fixture
def tables(request: pytest.FixtureRequest, where: str) -> Tables:
    """The tables of the group that `where` names."""
    found: Tables = request.getfixturevalue(f"{where}_tables")
    return found
