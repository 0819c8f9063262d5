"""Every RPC requires the role that it declares, on both ports and from every caller; nothing is open by default."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import shardloss
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from shardloss.channel import error_of
from shardloss.errors import PermissionDenied, Unauthenticated
from shardloss.v1 import options_pb2
from shardloss_server.access import token_files
from shardloss_server.access.grants import ROLES, Role
from shardloss_server.config import Security
from shardloss_server.rpc.roles import needed_role
from shardloss_server.rpc.serve import Server

from .credentials import DENIED, Secrets, all_methods, bearer, code_of, eventually, path_of, secrets_in, serving

METHODS = all_methods()
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
WORDS = list(ROLES)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    return secrets_in(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def server(secrets: Secrets) -> Iterator[Server]:
    with serving(Security(tokens_file=secrets.tokens_file)) as server:
        yield server


@pytest.fixture(scope="module")
def ports(server: Server) -> Iterator[dict[str, grpc.Channel]]:
    with grpc.insecure_channel(server.address) as data, grpc.insecure_channel(server.admin_address) as admin:
        yield {"data": data, "admin": admin}


@pytest.fixture(scope="module")
def served(ports: dict[str, grpc.Channel], secrets: Secrets) -> dict[str, list[grpc.Channel]]:
    """Return the ports that serve each method, by its path."""
    admin = bearer(secrets.token("admin"))
    return {
        path: [port for port in ports.values() if code_of(port, path, admin)[1] != "Method not found!"]
        for path in map(path_of, METHODS)
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_takes_its_role_and_higher_ones_alone(
    method: MethodDescriptor, ports: dict[str, grpc.Channel], served: dict[str, list[grpc.Channel]], secrets: Secrets
) -> None:
    """Missing, wrong or expired tokens are UNAUTHENTICATED, lower roles PERMISSION_DENIED; others are admitted."""
    path, streams = path_of(method), method.client_streaming
    needed = Role(method.GetOptions().Extensions[options_pb2.required_role])
    assert served[path], f"no port serves {path}"
    for port in ports.values():
        for token in (None, "wrong", *(secrets.token(f"expired-{word}") for word in WORDS)):
            assert code_of(port, path, bearer(token), streams)[0] == "UNAUTHENTICATED"
    for port in served[path]:
        for word, role in ROLES.items():
            status, message = code_of(port, path, bearer(secrets.token(word)), streams)
            if role < needed:
                assert status == "PERMISSION_DENIED"
                assert f"needs the role {needed.word}" in message
            else:
                assert status not in DENIED


@pytest.mark.parametrize(
    "metadata, words",
    [
        ((), "no token"),
        ((("authorization", ""),), "Bearer"),
        ((("authorization", "Bearer"),), "Bearer"),
        ((("authorization", "Bearer  "),), "Bearer"),
        ((("authorization", "Basic c2VjcmV0"),), "Bearer"),
        ((("authorization", "secret"),), "Bearer"),
        ((("authorization", "Bearer secret"), ("authorization", "Bearer secret")), "once"),
        ((("authorization", "Bearer secret"),), "unknown"),
        ((("authorization", "Bearer " + "x" * 4000),), "unknown"),
    ],
)
def test_a_refusal_says_which_and_shows_nothing(
    ports: dict[str, grpc.Channel], metadata: tuple[tuple[str, str], ...], words: str
) -> None:
    """The message says whether the token is missing, malformed or unknown, and never repeats the credentials."""
    with pytest.raises(grpc.RpcError) as caught:
        ports["data"].unary_unary("/shardloss.v1.ServerService/GetServerInfo")(b"", timeout=60, metadata=metadata)
    error = error_of(caught.value)
    assert isinstance(error, Unauthenticated)
    assert words in error.message
    for _, value in metadata:
        assert not any(word in error.message + str(error.details) for word in value.split() if word != "Bearer")


def test_the_scheme_is_read_without_case(ports: dict[str, grpc.Channel], secrets: Secrets) -> None:
    """The scheme "Bearer" is case-insensitive, as in HTTP."""
    metadata = (("authorization", f"bEARER   {secrets.token('reader')}"),)
    assert code_of(ports["data"], "/shardloss.v1.ServerService/GetServerInfo", metadata)[0] == "OK"


def test_a_refusal_reads_no_message(ports: dict[str, grpc.Channel]) -> None:
    """A stream is refused even if its client never sends a message."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait(30)
        yield from ()

    call = ports["data"].stream_stream("/shardloss.v1.LossService/StreamLoss")(nothing(), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert not ended.is_set()
    ended.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_asks_for_nothing_and_reflection_for_a_reader(ports: dict[str, grpc.Channel], secrets: Secrets) -> None:
    """Probes need no token for the health service; listing the services requires at least the role reader."""
    ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
    for port in ports.values():
        health = health_pb2_grpc.HealthStub(port)
        assert (
            health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        )
        reflection = reflection_pb2_grpc.ServerReflectionStub(port)
        with pytest.raises(grpc.RpcError) as caught:
            list(reflection.ServerReflectionInfo(iter(ask), timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        replies = list(reflection.ServerReflectionInfo(iter(ask), timeout=60, metadata=bearer(secrets.token("reader"))))
        assert any("shardloss" in service.name for service in replies[0].list_services_response.service)


def test_every_service_that_reflection_names_is_in_the_table(ports: dict[str, grpc.Channel], secrets: Secrets) -> None:
    """Besides health and reflection, the server serves only the services whose methods the first test calls."""
    ours = {method.containing_service.full_name for method in METHODS}
    ask, metadata = [reflection_pb2.ServerReflectionRequest(list_services="")], bearer(secrets.token("reader"))
    named = set()
    for port in ports.values():
        reflection = reflection_pb2_grpc.ServerReflectionStub(port)
        for reply in reflection.ServerReflectionInfo(iter(ask), timeout=60, metadata=metadata):
            named |= {service.name for service in reply.list_services_response.service}
    assert named == ours | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_unknown_methods_are_refused_first(ports: dict[str, grpc.Channel], secrets: Secrets) -> None:
    """A caller without a token cannot find out which methods exist."""
    path = "/shardloss.v1.LossService/NoSuchMethod"
    assert code_of(ports["data"], path)[0] == "UNAUTHENTICATED"
    assert code_of(ports["data"], path, bearer(secrets.token("admin")))[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_method_without_a_role_is_refused_to_everyone(secrets: Secrets, with_tokens: bool) -> None:
    """Even an admin is refused, and so is every caller of a server without tokens."""
    file = FileDescriptorProto(name="bare.proto", package="bare", syntax="proto3")
    file.message_type.add(name="Empty")
    service = file.service.add(name="Bare")
    service.method.add(name="Call", input_type=".bare.Empty", output_type=".bare.Empty")
    Default().AddSerializedFile(file.SerializeToString())
    assert needed_role("/bare.Bare/Call") is None
    with serving(Security(tokens_file=secrets.tokens_file if with_tokens else None)) as server:
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        for path in ("/bare.Bare/Call", "/nowhere.Bare/Call"):  # declared without a role; not declared at all
            *_, name, method = path.split("/")
            server._data.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {method: handler}),))
            with grpc.insecure_channel(server.address) as channel:
                status, message = code_of(channel, path, bearer(secrets.token("admin")))
            assert (status, "declares no role" in message) == ("PERMISSION_DENIED", True)


def test_roles_are_the_contracts() -> None:
    """The roles have the numbers and names of options.proto."""
    declared = {name: number for name, number in options_pb2.Role.items() if number}
    assert declared == {f"ROLE_{role.name}": role.value for role in Role}


def test_tokens_change_without_a_restart(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new token is accepted and a revoked one is refused; a broken file is logged and otherwise ignored."""
    monkeypatch.setattr(token_files, "RELOAD_S", 0.02)
    own = secrets_in(tmp_path_factory.mktemp("changing"))
    with serving(Security(tokens_file=own.tokens_file)) as server, grpc.insecure_channel(server.address) as channel:

        def status(token: str) -> str:
            return code_of(channel, "/shardloss.v1.TableService/ListTables", bearer(token))[0]

        old, late = own.token("reader"), own.folder / "late.token"
        token_files.create(own.tokens_file, late, "late", Role.READER, None)
        assert eventually(lambda: status(late.read_text().strip()) == "OK")
        token_files.revoke(own.tokens_file, "reader")
        assert eventually(lambda: status(old) == "UNAUTHENTICATED")
        good = own.tokens_file.read_text()
        own.tokens_file.write_text("[[token]]\nname = 3")
        assert eventually(lambda: status(late.read_text().strip()) != "OK" or "stays in use" in caplog.text)
        assert status(late.read_text().strip()) == "OK"
        assert str(own.tokens_file) in caplog.text
        own.tokens_file.write_text(good.replace('"admin"\nsha', '"reader"\nsha'))
        admin = bearer(own.token("admin"))
        assert eventually(
            lambda: code_of(channel, "/shardloss.v1.TableService/CreateTable", admin)[0] == "PERMISSION_DENIED"
        )


def test_a_new_token_is_taken_at_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new token is accepted even before the server's next periodic check of its tokens file."""
    monkeypatch.setattr(token_files, "RELOAD_S", 3600.0)
    own = secrets_in(tmp_path_factory.mktemp("at-once"))
    with serving(Security(tokens_file=own.tokens_file)) as server:
        new = own.folder / "new.token"
        token_files.create(own.tokens_file, new, "new", Role.READER, None)
        with shardloss.connect(server.address, token_file=new) as client:
            assert client.list_tables() == []


def test_a_client_follows_its_token_file(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the token is rotated and the old one is refused, a connected client repeats the call with the new one."""
    monkeypatch.setattr(token_files, "RELOAD_S", 0.0)
    monkeypatch.setattr("shardloss.credentials.LOOK_AGAIN_S", 3600.0)
    own = secrets_in(tmp_path_factory.mktemp("rotating"))
    token_file = own.folder / "mine.token"
    token_files.create(own.tokens_file, token_file, "mine-1", Role.ADMIN, None)
    old = token_file.read_text().strip()
    with (
        serving(Security(tokens_file=own.tokens_file)) as server,
        shardloss.connect(server.address, token_file=token_file) as client,
    ):
        table = client.create_table("words", num_classes=5, dim=3)
        token_files.create(own.tokens_file, own.folder / "next.token", "mine-2", Role.ADMIN, None)
        os.replace(own.folder / "next.token", token_file)
        token_files.revoke(own.tokens_file, "mine-1")
        own_renew, bearer_of = client.channel._bearer.renew, client.channel._bearer
        monkeypatch.setattr(bearer_of, "renew", lambda: own_renew() and own_renew())  # another call renewed it first
        for rows in (7, 250_000):  # one message, and a stream
            loss = table.compute_loss(np.zeros((rows, 3), np.float32), np.ones((rows, 1), int), shardloss.FullSoftmax())
            assert loss.loss.shape == (rows,)
        with pytest.raises(Unauthenticated):
            shardloss.connect(server.address, token=old)


@pytest.mark.parametrize(
    "word, call, error",
    [
        ("reader", lambda client: client.create_table("mine", num_classes=3, dim=2), PermissionDenied),
        ("trainer", lambda client: client.delete_table("mine"), PermissionDenied),
        ("expired-admin", lambda client: client.list_tables(), Unauthenticated),
    ],
)
def test_a_client_sees_named_errors(
    server: Server, secrets: Secrets, word: str, call: Callable[[shardloss.LossClient], object], error: type[Exception]
) -> None:
    """A refusal raises the specific error at once; the client does not repeat the call."""
    began = time.monotonic()
    with pytest.raises(error), shardloss.connect(server.address, token=secrets.token(word)) as client:
        call(client)
    assert time.monotonic() - began < 30  # a transient failure would be repeated for 60 s


def test_a_socket_asks_for_tokens_too(secrets: Secrets, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A Unix socket is plaintext, because it never leaves the machine, but it requires a token as well."""
    path = tmp_path_factory.mktemp("s") / "s"
    with serving(Security(tokens_file=secrets.tokens_file), socket=str(path)):
        with pytest.raises(Unauthenticated):
            shardloss.connect(f"unix:{path}")
        with shardloss.connect(f"unix:{path}", token_file=secrets.folder / "reader.token") as client:
            assert client.list_tables() == []
