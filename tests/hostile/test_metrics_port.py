"""The metrics port answers a scrape whatever other peers do to it, with a bounded number of threads and connections."""

from __future__ import annotations

import asyncio
import http.client
import select
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Gauge, Metric, make_wsgi_app
from prometheus_client.registry import Collector
from shardloss_server.rpc import scrapes
from shardloss_server.rpc.scrapes import ScrapePort

from ..patience import PATIENCE_S, eventually

MANY = 150
VALUE = b"things 17.0"
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Gauge("things", "Things.", registry=made).set(17)
    return made


@pytest.fixture
def port(registry: CollectorRegistry) -> Iterator[ScrapePort]:
    made = ScrapePort("127.0.0.1", 0, make_wsgi_app(registry))
    yield made
    made.close()


def connected(port: ScrapePort, sent: bytes = b"") -> socket.socket:
    """Connect, and send these bytes."""
    made = socket.create_connection(("127.0.0.1", port.port), timeout=PATIENCE_S)
    made.sendall(sent)
    return made


def everything_from(sock: socket.socket) -> bytes:
    """Return what arrives until the port closes the connection, in either way."""
    found = b""
    try:
        while more := sock.recv(65536):
            found += more
    except ConnectionError:
        pass
    return found


def num_closed(socks: list[socket.socket]) -> int:
    """Return how many of these connections, which are sent nothing, the port has closed."""
    return len(select.select(socks, [], [], 0)[0])


def scraped(port: ScrapePort) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port.port}/metrics", timeout=PATIENCE_S) as reply:
        found: bytes = reply.read()
    return found


def test_a_scrape_is_answered_while_many_half_sent_requests_hold_on(port: ScrapePort) -> None:
    """They are given no thread, and all but a bounded number of them are closed."""
    threads = threading.active_count()
    with ExitStack() as stack:
        held = [stack.enter_context(connected(port, b"GET /metrics HTTP/1.1\r\n")) for _ in range(MANY)]
        assert VALUE in scraped(port)
        assert threading.active_count() <= threads + 1  # the rendering thread
        eventually(lambda: len(port._open) <= scrapes.MOST_CONNECTIONS, "the surplus to be closed")
        assert everything_from(held[0]) == b""
        assert VALUE in scraped(port)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", REQUEST],
    ids=["silent", "half a request", "does not close after its reply"],
)
def test_a_connection_ends_in_time_whatever_its_peer_does(
    port: ScrapePort, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(scrapes, "LONGEST_S", 0.2)
    with connected(port, sent) as sock:
        everything_from(sock)
        eventually(lambda: not port._open, "the connection to be closed")


def test_a_peer_that_sends_a_byte_now_and_then_gains_no_time(port: ScrapePort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "LONGEST_S", 0.2)
    with connected(port, b"GET /metrics HTTP/1.1\r\n") as sock:

        def is_refused() -> bool:
            try:
                sock.sendall(b"x")
            except ConnectionError:
                return True
            return False

        eventually(is_refused, "the connection to be closed")


def test_a_peer_that_does_not_read_its_reply_is_closed(
    registry: CollectorRegistry, port: ScrapePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply larger than the sockets' buffers is not kept for longer than the connection may last."""
    monkeypatch.setattr(scrapes, "LONGEST_S", 0.5)
    Gauge("large", "x" * 16_000_000, registry=registry)
    with connected(port, REQUEST):
        eventually(lambda: bool(port._open), "the connection to be open")
        eventually(lambda: not port._open, "the connection to be closed")


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
    ],
)
def test_a_request_that_is_none_gets_a_status_and_the_port_goes_on(port: ScrapePort, sent: bytes, status: int) -> None:
    with connected(port, sent) as sock:
        reply = http.client.HTTPResponse(sock)
        reply.begin()
        assert reply.status == status
    assert VALUE in scraped(port)


def test_a_reply_says_that_its_connection_ends(port: ScrapePort) -> None:
    """A client that asks to keep the connection can reconnect; the formats that it accepts are those of the library."""
    connection = http.client.HTTPConnection("127.0.0.1", port.port, timeout=PATIENCE_S)
    for _ in range(3):
        accept = {"Connection": "keep-alive", "Accept": "application/openmetrics-text; version=1.0.0"}
        connection.request("GET", "/metrics", headers=accept)
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        assert "openmetrics" in reply.headers["Content-Type"]
        assert VALUE in reply.read()
    connection.close()


def test_a_peer_that_stops_sending_after_its_request_gets_its_reply(port: ScrapePort) -> None:
    with connected(port, REQUEST) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert VALUE in everything_from(sock)
        eventually(lambda: not port._open, "the connection to be closed")


def test_nothing_is_collected_for_connections_that_are_gone(registry: CollectorRegistry, port: ScrapePort) -> None:
    """A flood of whole requests does not leave a queue behind it, in which the next scrape would wait."""
    released, num_collected = threading.Event(), 0

    class Counting(Collector):
        def describe(self) -> list[Metric]:
            return []

        def collect(self) -> list[Metric]:
            nonlocal num_collected
            num_collected += 1
            released.wait(PATIENCE_S)
            return []

    registry.register(Counting())
    with ExitStack() as stack:
        held = [stack.enter_context(connected(port, REQUEST)) for _ in range(MANY)]
        eventually(lambda: num_closed(held) == MANY - scrapes.MOST_CONNECTIONS, "the surplus to be closed")
        for _ in range(3):  # turns of the port's loop, in which it gives up their replies
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), port._loop).result(PATIENCE_S)
        released.set()
        assert VALUE in scraped(port)
    assert num_collected <= 2 + scrapes.MOST_CONNECTIONS


def test_a_collection_that_hangs_or_fails_stops_no_other_connection(
    registry: CollectorRegistry, port: ScrapePort, caplog: pytest.LogCaptureFixture
) -> None:
    """While one scrape waits for a lock, others come and go; a bug in a collector is status 500, and in the log."""
    released, collecting = threading.Event(), threading.Event()

    class Waiting(Collector):
        def describe(self) -> list[Metric]:
            return []

        def collect(self) -> list[Metric]:
            collecting.set()
            released.wait(PATIENCE_S)
            raise ValueError("a bug")

    registry.register(Waiting())
    with connected(port, REQUEST) as stuck:
        assert collecting.wait(PATIENCE_S)
        with connected(port, b"GET /"):
            eventually(lambda: len(port._open) == 2, "the other connection to be accepted")
        eventually(lambda: len(port._open) == 1, "the other connection to be closed")
        released.set()
        reply = http.client.HTTPResponse(stuck)
        reply.begin()
        assert reply.status == 500
    assert "cannot answer a scrape" in caplog.text


def test_a_closed_port_leaves_neither_connections_nor_threads(registry: CollectorRegistry) -> None:
    threads = threading.active_count()
    made = ScrapePort("127.0.0.1", 0, make_wsgi_app(registry))
    with connected(made, b"GET /") as held:
        eventually(lambda: bool(made._open), "the connection to be open")
        made.close()
        made.close()
        assert everything_from(held) == b""
    eventually(lambda: threading.active_count() <= threads, "its threads to end")
    with pytest.raises(ConnectionRefusedError):
        connected(made)
