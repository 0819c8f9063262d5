"""Names from the wire never become paths, and an invalid table name is refused with a specific error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import shardloss
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from shardloss.channel import error_of
from shardloss.errors import InvalidArgument, LimitExceeded, NotSupported, RequestError, TableNotFound
from shardloss_server.frontend.catalog import NAME
from shardloss_server.rpc.serve import Server

from .test_raw_bytes import METHODS, RAW_LIMITS, call_raw, valid_messages
from .world import World, serving

NAMES = {
    "up": "../x",
    "far-up": "../../../../../../tmp/x",
    "inside": "a/b",
    "absolute": "/tmp/x",
    "here": ".",
    "parent": "..",
    "hidden": ".x",
    "backslash": "..\\x",
    "nul": "a\0b",
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "long": "a" * 129,
    "very-long": "../" * 10_000,
    "home": "~root/x",
    "variable": "$HOME/x",
    "lookalike-slash": "a\u2215b",
    "lookalike-dots": "\u2024\u2024/x",
    "lookalike-letter": "w\u043ards",
    "fullwidth": "\uff0e\uff0e\uff0fx",
    "right-to-left": "a\u202egnp.b",
    "percent": "%2e%2e%2fx",
    "url": "file:///etc/passwd",
    "space": " words ",
    "capital": "Words",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(RAW_LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def world(server: Server, connection: shardloss.LossClient) -> World:
    return World(server, connection, "words")


def named_fields(message: Message) -> Iterator[tuple[Any, FieldDescriptor]]:
    """Return every text field of a request, with its message; fields of absent submessages are left out."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            yield message, field
        elif field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated and message.HasField(field.name):
            yield from named_fields(getattr(message, field.name))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_hostile_name_is_refused_wherever_a_table_is_named(
    world: World, server: Server, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text field of any RPC creates a table or a file; fields that name a table raise a specific error."""
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    before = [info.name for info in world.client.list_tables()]
    num_refused = 0
    with grpc.insecure_channel(server.address) as raw:
        for method in METHODS:
            for good in valid_messages(world)[method.name][:1]:
                for number, (_, field) in enumerate(named_fields(good)):
                    request = type(good)()
                    request.CopyFrom(good)
                    holder, _ = list(named_fields(request))[number]
                    setattr(holder, field.name, name)
                    refused = refusal(raw, method, request)
                    if field.name in ("table", "name", "new_name"):
                        assert isinstance(refused, (InvalidArgument, TableNotFound, NotSupported)), (
                            method.name,
                            refused,
                        )
                        num_refused += 1
                    assert refused is None or isinstance(refused, RequestError), (method.name, field.name, refused)
    assert num_refused >= len(METHODS) - 2  # ListTables and GetServerInfo name no table
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "side"]
    assert [info.name for info in world.client.list_tables()] == before


def refusal(raw: grpc.Channel, method: MethodDescriptor, request: Message) -> Exception | None:
    """Send a request and return its error, or None if it succeeds."""
    try:
        call_raw(raw, method, [request.SerializeToString()])
    except grpc.RpcError as failure:
        return error_of(failure)
    return None


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_no_table_is_made_of_a_hostile_name(world: World, name: str) -> None:
    """The client's create_table refuses the name with a message of less than 1,000 bytes."""
    with pytest.raises((InvalidArgument, LimitExceeded)) as caught:
        world.client.create_table(name, num_classes=3, dim=2)
    assert len(caught.value.message.encode()) < 1000


def test_a_tables_name_can_be_no_path() -> None:
    """A table name is ASCII, contains no separator and does not begin with a dot, so it is safe in file names."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789._-"
    assert not any(NAME.fullmatch("a" + chr(code)) for code in range(0x3000) if chr(code) not in letters)
    assert not any(NAME.fullmatch(first + "a") for first in "._-")
    assert NAME.fullmatch("a" * 128)
    assert not NAME.fullmatch("a" * 129)
