"""docs/security.md lists the same role for each RPC as the contract."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from shardloss.v1 import options_pb2
from shardloss_server.config import Security

from tests.hostile.credentials import all_methods

PAGE = Path(__file__).resolve().parents[2] / "docs/security.md"


def test_the_page_lists_every_rpc_under_its_role() -> None:
    """The page lists every RPC under the role that the contract requires, and no others."""
    listed = {
        (role, name)
        for role, names in re.findall(r"^\| (reader|trainer|admin) \| (.+) \|$", PAGE.read_text(), re.M)
        for name in re.findall(r"`(\w+)`", names)
    }
    declared = {
        (options_pb2.Role.Name(number).removeprefix("ROLE_").lower(), method.name)
        for method in all_methods()
        for number in [method.GetOptions().Extensions[options_pb2.required_role]]
    }
    assert listed == declared


def test_the_page_names_every_setting_of_security() -> None:
    """docs/security.md mentions every field of the security settings."""
    assert [field.name for field in fields(Security) if f"`{field.name}`" not in PAGE.read_text()] == []
