"""The HTTP port of the metrics: one thread serves all connections, and each of them ends within seconds."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException, parse_headers
from io import BytesIO
from typing import Any

MOST_CONNECTIONS = 64
LONGEST_S = 10.0  # of a whole connection: a scrape takes milliseconds, and Prometheus itself gives up after 10 s
MOST_REQUEST_BYTES = 1 << 14
END = b"\r\n\r\n"
log = logging.getLogger(__name__)
WsgiApp = Callable[[dict[str, str], Callable[..., Any]], list[bytes]]


class ScrapePort:
    """A listening port whose requests a WSGI app answers, one after another; each connection is for one request.

    A connection is closed after LONGEST_S, however slowly its peer sends or reads. Beyond MOST_CONNECTIONS the oldest
    one is closed, so that peers that never finish a request do not keep out one that does.

    Raises:
        OSError, OverflowError: the port cannot be listened on.
    """

    def __init__(self, host: str, port: int, app: WsgiApp) -> None:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._listener = socket.create_server(address[:2], family=family)
        self.port: int = self._listener.getsockname()[1]
        self._app = app
        self._open: dict[Exchange, None] = {}
        self._loop, self._ended = asyncio.new_event_loop(), asyncio.Event()
        self._rendering = ThreadPoolExecutor(1, "metrics")
        self._thread = threading.Thread(target=self._run, name="scrapes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the port and its connections. Idempotent."""
        with suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._rendering.shutdown(wait=False, cancel_futures=True)
            self._loop.close()

    async def _serve(self) -> None:
        server = await self._loop.create_server(lambda: Exchange(self._open, self._answer), sock=self._listener)
        await self._ended.wait()
        server.close()
        for exchange in list(self._open):
            exchange.abort()
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    def _answer(self, request: bytes) -> asyncio.Future[bytes]:
        """Answer in the rendering thread, so that a collection that waits for a lock stops no other connection."""
        return self._loop.run_in_executor(self._rendering, answer, request, self._app)


class Exchange(asyncio.Protocol):
    """One connection: a request, its reply, and then nothing more until the peer closes or its time is over."""

    def __init__(self, others: dict[Exchange, None], answer: Callable[[bytes], asyncio.Future[bytes]]) -> None:
        self._others, self._answer = others, answer
        self._request = bytearray()
        self._reply: asyncio.Future[bytes] | None = None
        self._is_sent = self._is_half_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection's time, and make room for it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(LONGEST_S, transport.abort)
        if len(self._others) >= MOST_CONNECTIONS:
            next(iter(self._others)).abort()
        self._others[self] = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        """Forget the connection, and the reply that it waited for."""
        self._timer.cancel()
        self._others.pop(self, None)
        if self._reply is not None:
            self._reply.cancel()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes of the request; bytes after its end are ignored, as it has no body."""
        if self._reply is None:
            self._request += data
            if END in self._request or len(self._request) > MOST_REQUEST_BYTES:
                self._reply = self._answer(bytes(self._request))
                self._reply.add_done_callback(self._send)

    def eof_received(self) -> bool:
        """Return True, which keeps the connection, if the peer has only stopped sending and waits for its reply."""
        self._is_half_closed = True
        return self._reply is not None and not self._is_sent

    def abort(self) -> None:
        """Close the connection at once."""
        self._others.pop(self, None)
        self._transport.abort()

    def _send(self, reply: asyncio.Future[bytes]) -> None:
        """Send the reply and its end; the peer closes, because closing first could lose a reply it has not read."""
        if not reply.cancelled() and not self._transport.is_closing():
            self._is_sent = True
            self._transport.write(reply.result())
            (self._transport.close if self._is_half_closed else self._transport.write_eof)()


def answer(request: bytes, app: WsgiApp) -> bytes:
    """Return the whole reply to a request, which is valid if its headers are complete within MOST_REQUEST_BYTES."""
    line, _, headers = request.partition(b"\r\n")
    words = line.decode("latin-1").split(" ")
    if END not in request or len(request) > MOST_REQUEST_BYTES:
        return reply_of("431 Request Header Fields Too Large", [], b"the request is too large: GET /metrics\n")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return reply_of("400 Bad Request", [], b"this is the metrics port, which answers HTTP/1.1: GET /metrics\n")
    path, _, query = words[1].partition("?")
    environ = {"REQUEST_METHOD": words[0], "PATH_INFO": path, "QUERY_STRING": query}
    started: list[tuple[str, list[tuple[str, str]]]] = []
    try:
        for name, value in parse_headers(BytesIO(headers)).items():
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
        body = b"".join(app(environ, lambda status, headers: started.append((status, headers))))
    except HTTPException:
        return reply_of("400 Bad Request", [], b"the request's headers are not valid\n")
    except Exception:
        log.exception("cannot answer a scrape")
        return reply_of("500 Internal Server Error", [], b"the metrics cannot be collected: see the server's log\n")
    return reply_of(*started[0], body)


def reply_of(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """Return the bytes of a reply, after which the connection is closed."""
    every = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in every)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1") + body
