"""Selection of the groups that the exactly-once tests run on."""

from __future__ import annotations

import pytest

from ..extent import EVERYTHING, turn_of

IN_TURN = ("ray_workers", "nothing kept", "plain_workers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each test that uses `faulty` on threads and on one of the groups IN_TURN, chosen by its name."""
    if EVERYTHING or any("[" in argument for argument in config.args):  # a test that is selected by its id
        return
    dropped = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("faulty") not in IN_TURN:
            continue
        test = getattr(item, "originalname", item.name)
        if params["faulty"] != IN_TURN[turn_of(test) % len(IN_TURN)]:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]
