"""Selection of the groups that the exactly-once tests run on."""

from __future__ import annotations

import pytest

from ..extent import EVERYTHING

IN_TURN = ("ray_workers", "nothing kept", "plain_workers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each test that uses `faulty` on threads and on one of the groups IN_TURN, which rotate from test to test."""
    if EVERYTHING:
        return
    turns: dict[str, int] = {}
    dropped = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("faulty") not in IN_TURN:
            continue
        test = getattr(item, "originalname", item.name)
        turn = turns.setdefault(test, len(turns))
        if params["faulty"] != IN_TURN[turn % len(IN_TURN)]:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]
