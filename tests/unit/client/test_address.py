"""Addresses are checked before anything is sent; the proxy that is named is the one that gRPC uses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
import shardloss
from shardloss.address import checked, proxy_of
from shardloss.errors import InvalidArgument

from ...patience import PATIENCE_S

WRONG: list[tuple[Any, str]] = [
    ("http://127.0.0.1:7070", "begins with http://, .* write '127.0.0.1:7070'$"),
    ("HTTPS://me@host:443/path?x", "write 'host:443', with tls=True or ca_file"),
    ("grpc://host:7070", "write 'host:7070'$"),
    ("tcp://host:7070", "write 'host:7070'"),
    ("localhost", "has no port: write 'localhost:PORT'"),
    ("localhost:", "has no port: write 'localhost:PORT'"),
    ("[::1]", r"has no port: write '\[::1\]:PORT'"),
    ("dns:///localhost", "has no port"),
    ("ipv4:127.0.0.1:7070,10.0.0.1", "has no port"),
    ("localhost:http", "the port 'http', which is not a number from 1 to 65535"),
    ("localhost:0", "the port '0'"),
    ("localhost:65536", "the port '65536'"),
    ("localhost:-1", "the port '-1'"),
    ("localhost:\u0667\u0660", "the port"),
    ("127.0.0.1:7070/", "the port '7070/'"),
    (":7070", "no valid host"),
    ("", "no valid host"),
    ("me@host:7070", "no valid host"),
    ("7070", "has no host: write 'host:7070'"),
    ("::1", "IPv6 address without brackets"),
    ("::1:7070", "IPv6 address without brackets"),
    ("host:7070:7071", "IPv6 address without brackets"),
    (" host:7070", "blank"),
    ("host:7070\n", "blank"),
    ("unix:", "has no path"),
    ("unix://run/socket", "two slashes: write unix:/run/socket"),
    ("unix:/" + "x" * 107, "more than 107 bytes"),
    ("/run/socket", "write unix:/run/socket"),
    ("./socket", "write unix:./socket"),
    (7070, "is not text"),
    (None, "is not text"),
    (("127.0.0.1", 7070), "is not text"),
    (b"127.0.0.1:7070", "is not text"),
]


@pytest.mark.parametrize(("address", "complaint"), WRONG)
def test_a_malformed_address_is_refused_at_once(address: Any, complaint: str) -> None:
    """The error is one line that says what to write; gRPC would look for a host of that name, or take port 443."""
    with pytest.raises(InvalidArgument, match=complaint) as refused:
        shardloss.connect(address)
    assert refused.value.field == "address"
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "address",
    [
        *("localhost:7070", "[::1]:1", "10.0.0.7:65535", "a-b.example.org:7070", "dns:///host:7070", "dns:host:7070"),
        *("dns://8.8.8.8/host:7070", "ipv4:10.0.0.7:1,10.0.0.8:2", "ipv6:[::1]:1", "ipv6:%5B::1%5D:1", "xds:///name"),
        *("unix:socket", "unix:/run/socket", "unix:///run/socket", "unix-abstract:socket", "unix:/" + "x" * 106),
    ],
)
def test_every_form_that_grpc_knows_is_passed_on(address: str) -> None:
    assert checked(address) == address


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, threading.Event]]:
    """A listening port, and an event that is set once something connects to it; the environment names no proxy."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    called = threading.Event()

    def accept() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                called.set()
                sock.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", called
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


HOST = "proxied.invalid"
ENVIRONMENTS: list[tuple[dict[str, str], str, str | None]] = [
    ({"http_proxy": "http://P"}, f"{HOST}:1", "http_proxy"),
    ({"https_proxy": "http://P"}, f"{HOST}:1", "https_proxy"),
    ({"grpc_proxy": "http://P"}, f"{HOST}:1", "grpc_proxy"),
    ({"http_proxy": "http://user:secret@P"}, f"dns:///{HOST}:1", "http_proxy"),
    ({"http_proxy": "http://P", "grpc_proxy": ""}, f"{HOST}:1", None),
    ({"HTTP_PROXY": "http://P"}, f"{HOST}:1", None),
    ({"all_proxy": "http://P"}, f"{HOST}:1", None),
    ({"http_proxy": "socks5://P"}, f"{HOST}:1", None),
    ({"http_proxy": "http://P", "no_proxy": f"x, {HOST}"}, f"{HOST}:1", None),
    ({"http_proxy": "http://P", "no_proxy": "invalid"}, f"{HOST}:1", None),
    ({"http_proxy": "http://P", "no_proxy": "*"}, f"{HOST}:1", "http_proxy"),
    ({"http_proxy": "http://P", "no_grpc_proxy": HOST, "no_proxy": "x"}, f"{HOST}:1", None),
    ({"http_proxy": "http://P", "no_proxy": "192.0.2.0/24"}, "192.0.2.1:1", None),
    ({"http_proxy": "http://P", "no_proxy": "192.0.3.0/24"}, "192.0.2.1:1", "http_proxy"),
    ({"http_proxy": "http://P"}, "127.0.0.1:1", None),
    ({"http_proxy": "http://P"}, "localhost:1", None),
    ({"http_proxy": "http://P"}, "[::1]:1", None),
    ({"http_proxy": "http://P"}, "0.0.0.0:1", None),
]


@pytest.mark.parametrize(("environment", "address", "named"), ENVIRONMENTS)
def test_the_proxy_that_is_named_is_the_one_that_grpc_calls(
    environment: dict[str, str],
    address: str,
    named: str | None,
    proxy: tuple[str, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only variables in lower case count, the first that is set; addresses of this machine are never proxied."""
    place, called = proxy
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("P", place))
    assert proxy_of(address) == (None if named is None else (named, f"http://{place}"))
    with shardloss.channel.opened(address, shardloss.credentials.Credentials()) as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/a/b")(b"", timeout=PATIENCE_S if named else 0.5)
        assert called.is_set() == (named is not None)
