"""A client that is connected to the wrong thing says what is there, in words, and within seconds."""

from __future__ import annotations

import inspect
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import shardloss
from prometheus_client import CollectorRegistry, make_wsgi_app
from shardloss import errors, reach
from shardloss.cli import app as cli
from shardloss_server.__main__ import app as server_cli
from shardloss_server.config import Security
from shardloss_server.rpc.scrapes import ScrapePort
from typer.testing import CliRunner

from ..patience import PATIENCE_S
from .credentials import secrets_in, serving
from .http2 import END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame, literal
from .test_tls import Authority, authority_in

SHORT_S = 0.4


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy machine more time for what a peer says."""
    for name in ("CONNECT_S", "ANSWER_S", "LOOK_S"):
        monkeypatch.setattr(reach, name, PATIENCE_S)


def refused(address: str, **options: Any) -> str:
    """Return the message of a connection that fails."""
    with pytest.raises(errors.ServerUnavailable) as caught:
        shardloss.connect(address, **{"wait_s": SHORT_S} | options)
    assert "\n" not in caught.value.message
    assert address in caught.value.message
    return caught.value.message


@contextmanager
def peer(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a peer that talks to each connection, in a thread of its own, and yield its address."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=conversation, args=(sock,), daemon=True).start()

    def conversation(sock: socket.socket) -> None:
        with closing(sock), suppress(OSError):
            talk(sock)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def silent(sock: socket.socket) -> None:
    while sock.recv(4096):
        pass


def banner(sock: socket.socket) -> None:
    sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    silent(sock)


def web_page(sock: socket.socket) -> None:
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def to_tls(sock: socket.socket) -> None:
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nThe plain HTTP request was sent to HTTPS port")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return authority_in(tmp_path)


LOOK_S = reach.LOOK_S


def test_an_unreachable_server_is_reported_within_five_seconds() -> None:
    """The default wait and the look at the address together; a longer wait must be asked for."""
    assert inspect.signature(shardloss.connect).parameters["wait_s"].default + LOOK_S < 5.0


def test_nobody_at_an_address_is_named() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: connections fail, and no other process gets the port
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        for options in ({}, {"tls": True}):
            assert "nothing listens there: is the server running" in refused(address, **options)
    assert "the host name is unknown" in refused("nobody.invalid:7070") or "no answer in time" in refused(
        "nobody.invalid:7070"
    )
    assert "the host name" in refused("x" * 70 + ".invalid:7070") or "check the host" in refused(
        "x" * 70 + ".invalid:7070"
    )


def test_a_wrong_unix_socket_is_named(tmp_path: Path) -> None:
    assert "there is no socket" in refused(f"unix:{tmp_path}/none")
    (tmp_path / "file").touch()
    assert "file is not a socket" in refused(f"unix:{tmp_path}/file")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    assert "its server has ended" in refused(f"unix:{tmp_path}/left")
    with serving(Security(), socket=str(tmp_path / "s")):
        assert "a Unix socket is not encrypted" in refused(f"unix:{tmp_path}/s", tls=True)


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        (silent, "says nothing: is it the server's port"),
        (lambda sock: None, "closes them at once"),
        (banner, "something that is not gRPC answers there, beginning with b'SSH-2.0-OpenSSH_9.6"),
        (web_page, "a web server (HTTP/1) answers there"),
    ],
)
def test_a_peer_that_is_no_server_is_named(
    talk: Callable[[socket.socket], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if talk in (silent, banner):  # they are listened to until this time is over
        monkeypatch.setattr(reach, "ANSWER_S", 1.0)
    with peer(talk) as address:
        assert words in refused(address)


def test_the_metrics_port_is_named() -> None:
    with closing(ScrapePort("127.0.0.1", 0, make_wsgi_app(CollectorRegistry()))) as port:
        assert "this is the server's metrics port" in refused(f"127.0.0.1:{port.port}")


def test_tls_on_one_side_alone_is_named(authority: Authority) -> None:
    """A plaintext client of a server with TLS, a TLS client of one without, a certificate that does not fit."""
    ca = {"ca_file": authority.ca_file}
    with serving(Security()) as server:
        assert "the server does not speak TLS on this port: leave out tls" in refused(server.address, **ca)
    with serving(authority.server()) as server:
        assert "the server requires TLS: pass tls=True, or ca_file" in refused(server.address)
        assert "the server's certificate is not accepted" in refused(server.address, tls=True)
    with serving(authority.server("elsewhere.example.org")) as server:
        assert "certificate is not valid for '127.0.0.1'" in refused(server.address, **ca)
    with serving(authority.server(expired=True)) as server:
        assert "certificate has expired" in refused(server.address, **ca)
    with serving(authority.mutual()) as server:
        assert "pass client_cert_file and client_key_file" in refused(server.address, **ca)
        assert "the server requires TLS" in refused(server.address)


def test_a_web_server_with_tls_is_named(authority: Authority) -> None:
    """It speaks TLS, but no HTTP/2."""
    import ssl

    certificate, key = authority.pair("web", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def talk(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as tls:
            silent(tls)

    with peer(talk) as address:
        assert "with TLS but without HTTP/2" in refused(address, ca_file=authority.ca_file)
        assert "the server requires TLS" in refused(address)


def test_the_other_port_is_named(tmp_path: Path) -> None:
    """Calls at the wrong port of a server name the right one, whatever the caller's role and the method."""
    secrets = secrets_in(tmp_path)
    with serving(Security(tokens_file=secrets.tokens_file)) as server, ExitStack() as stack:
        data, admin = (
            stack.enter_context(shardloss.connect(address, token=secrets.token("admin")))
            for address in (server.address, server.admin_address)
        )
        port = server.address.rpartition(":")[2]
        for call in (admin.list_tables, lambda: admin.create_table("a", num_classes=3, dim=2)):
            with pytest.raises(errors.NotSupported, match=f"this is the server's admin port, .* data port, {port}$"):
                call()
        with pytest.raises(errors.NotSupported, match=rf"its admin port, {server.admin_address.rpartition(':')[2]}$"):
            data.status()
        assert data.list_tables() == []
        assert admin.status().num_workers == 1


def test_another_grpc_server_is_named() -> None:
    """A server of another service has no GetServerInfo."""
    from concurrent.futures import ThreadPoolExecutor

    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(errors.NotSupported, match=f"127.0.0.1:{port} is not a shardloss server"):
            shardloss.connect(f"127.0.0.1:{port}")
    finally:
        other.stop(0).wait(PATIENCE_S)


def test_a_server_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    """wait_s is how long; once there is a connection, only timeout_s counts."""
    found: list[shardloss.LossClient] = []
    path = tmp_path / "s"
    waiting = threading.Thread(target=lambda: found.append(shardloss.connect(f"unix:{path}", wait_s=PATIENCE_S)))
    waiting.start()
    assert "there is no socket" in refused(f"unix:{path}")
    with serving(Security(), socket=str(path)):
        waiting.join(PATIENCE_S)
        assert found[0].list_tables() == []
        found[0].close()


def test_commands_say_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the client ends with exit code 1 and this line; a malformed address is named by its reason."""
    with peer(web_page) as address:
        for words in (["table", "list"], ["table", "show", "x"], ["status", "--admin-address", address]):
            assert cli.run([*words, "--address", address, "--wait-s", str(SHORT_S)]) == 1
            assert "a web server (HTTP/1) answers there" in capsys.readouterr().err
    assert cli.run(["table", "list", "--address", "http://127.0.0.1:7070"]) == 1
    assert "INVALID_ARGUMENT: address = 'http://127.0.0.1:7070' begins with http://" in capsys.readouterr().err


def health(address: str, **variables: str) -> str:
    done = CliRunner(env=variables).invoke(server_cli, ["health", "--address", address, "--timeout-s", "60"])
    assert done.output.count("\n") == 1
    return done.output


def test_a_health_probe_of_this_machine_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a client; for another machine the proxy is used, and named with its variable."""
    for name in ("no_proxy", "no_grpc_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", proxy)
        with serving(Security()) as server:
            assert health(server.admin_address).endswith(": SERVING\n")
            shardloss.connect(server.address, wait_s=PATIENCE_S).close()
        for message in (health("192.0.2.1:7071"), refused("192.0.2.1:7071")):
            assert f"through the proxy {proxy} (http_proxy in the environment), which cannot be reached" in message
            assert "add 192.0.2.1 to no_proxy" in message
        with peer(web_page) as place:
            monkeypatch.setenv("http_proxy", f"http://me:secret@{place}")
            message = refused("192.0.2.1:7071")
            assert f"the proxy http://{place} (" in message
            assert "which answers 'HTTP/1.1 400 Bad Request'" in message
            assert "secret" not in message


def test_a_health_probe_says_what_is_at_its_address() -> None:
    assert "begins with http://" in health("http://127.0.0.1:7071")
    with peer(web_page) as address:
        assert "UNAVAILABLE: a web server (HTTP/1) answers there" in health(address)


# Proxies in front of the server


class Page:
    """An HTTP/2 peer that answers every call with a page and an HTTP status: these in turn, then the last again."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.num_calls = statuses, 0

    def __call__(self, sock: socket.socket) -> None:
        unread, stream = b"", 0
        sock.sendall(frame(SETTINGS, 0, 0))
        while more := sock.recv(65536):
            unread = (unread + more).removeprefix(PREFACE)
            while len(unread) >= 9 and len(unread) >= 9 + int.from_bytes(unread[:3], "big"):
                kind, stream = unread[3], int.from_bytes(unread[5:9], "big")
                unread = unread[9 + int.from_bytes(unread[:3], "big") :]
                if kind == HEADERS:
                    status = self.statuses[min(self.num_calls, len(self.statuses) - 1)]
                    self.num_calls += 1
                    headers = {":status": str(status), "server": "nginx", "content-type": "text/html"}
                    block = b"".join(b"\0" + literal(name) + literal(value) for name, value in headers.items())
                    sock.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (301, errors.BadReply, "another site answers"),
        (400, errors.BadReply, "another site answers"),
        (401, errors.Unauthenticated, "credentials of its own"),
        (403, errors.PermissionDenied, "refuses this client or this path"),
        (404, errors.BadReply, "check host, port and path"),
        (413, errors.LimitExceeded, "client_max_body_size"),
        (500, errors.BadReply, "another site answers"),
    ],
)
def test_a_page_in_place_of_a_reply_is_named_and_not_asked_for_again(
    status: int, kind: type[errors.ShardlossError], words: str
) -> None:
    page = Page(status)
    with peer(page) as address, pytest.raises(errors.ShardlossError, match=words) as caught:
        shardloss.connect(address)
    assert type(caught.value) is kind
    assert f"answered in place of the server at {address}, with HTTP status {status}: " in str(caught.value)
    assert str(caught.value).endswith("the call is not repeated")
    assert page.num_calls == 1


def test_a_grpc_server_that_is_slow_is_waited_for_beyond_wait_s() -> None:
    """The first connection is answered only after the client has looked at the address by a second one."""
    page, looked, turns = Page(413), threading.Event(), iter([True])

    def talk(sock: socket.socket) -> None:
        if next(turns, False):
            looked.wait(PATIENCE_S)
        else:
            looked.set()
        page(sock)

    with peer(talk) as address, pytest.raises(errors.LimitExceeded):
        shardloss.connect(address, wait_s=SHORT_S)
    assert looked.is_set()


def test_a_page_with_status_200_is_no_reply() -> None:
    with peer(Page(200)) as address, pytest.raises(errors.BadReply, match=f"is not the server at {address}"):
        shardloss.connect(address)


@pytest.mark.parametrize(
    ("status", "words"), [(429, "rate"), (502, "is it up"), (503, "no server to pass"), (504, "grpc_read_timeout")]
)
def test_a_server_away_behind_a_proxy_is_called_again_for_as_long_as_one_that_starts(status: int, words: str) -> None:
    """Such a status is transient, and wait_s limits it as well."""
    page = Page(status, status, 413)
    with peer(page) as address, pytest.raises(errors.LimitExceeded):
        shardloss.connect(address, wait_s=PATIENCE_S)
    assert page.num_calls == 3
    with peer(Page(status)) as address, pytest.raises(errors.ServerUnavailable, match=words) as caught:
        shardloss.connect(address, wait_s=2.0)
    assert f"HTTP status {status}" in str(caught.value)
