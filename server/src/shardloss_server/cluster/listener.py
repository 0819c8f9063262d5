"""The socket that the other ends of links connect to; it admits every peer that knows the key."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from shardloss_server.cluster import frames, handshake
from shardloss_server.cluster.frames import LinkClosed

MOST_STRANGERS, BACKLOG, ACCEPT_AGAIN_S = 8, 1024, 0.1

log = logging.getLogger(__name__)
Address = str | tuple[str, int]  # a Unix socket's path, or its abstract name after a 0 byte; or a host and a port


@dataclass(frozen=True, slots=True)
class Invitation:
    """The address of a listener, and the key that a peer needs to be admitted."""

    address: Address
    key: bytes


class Listener:
    """A listening socket that admits peers until it is closed, and passes each one's index and socket to adopt.

    An index that adopt does not know (LookupError) is refused. A send on an admitted socket fails if the peer does not
    read for send_timeout_s. A peer has handshake.TIMEOUT_S to prove that it knows the key; beyond MOST_STRANGERS of
    them the oldest is closed, so that silent peers keep no worker out.
    """

    def __init__(
        self,
        address: Address,
        key: bytes,
        adopt: Callable[[int, socket.socket], None],
        *,
        num_expected: int,
        send_timeout_s: int,
    ) -> None:
        self._key, self._adopt, self._send_timeout_s = key, adopt, send_timeout_s
        self._closed = threading.Event()
        self._admitting = threading.Semaphore(num_expected + MOST_STRANGERS)
        self._strangers: dict[socket.socket, None] = {}  # the peers in their handshake, the oldest first
        self._knowing = threading.Lock()
        self._listener = socket.socket(family_of(address))
        try:
            self._listener.bind(address)
            self._listener.listen(BACKLOG)
        except OSError:
            self._listener.close()
            raise
        self._address = address if isinstance(address, str) else self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="links", daemon=True).start()

    @property
    def invitation(self) -> Invitation:
        """The invitation that a peer needs to link here."""
        return Invitation(self._address, self._key)

    def close(self) -> None:
        """Stop admitting peers. Idempotent."""
        self._closed.set()
        shut(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.wait(ACCEPT_AGAIN_S):
                    log.warning("cannot accept a link: %s", error)
                continue
            self._make_room()
            with self._knowing:
                self._strangers[sock] = None
            try:
                threading.Thread(target=self._admit, args=(sock,), name="admit", daemon=True).start()
            except RuntimeError as error:  # no more threads: the worker will connect again
                log.warning("cannot accept a link: %s", error)
                self._forget(sock)
                sock.close()
                self._admitting.release()

    def _make_room(self) -> None:
        """Take a place for one more handshake; if there is none, end the oldest one, whose thread frees its own."""
        if self._admitting.acquire(blocking=False):
            return
        with self._knowing:
            for sock in [*self._strangers][:1]:
                shut(sock)
        self._admitting.acquire()

    def _forget(self, sock: socket.socket) -> None:
        with self._knowing:
            self._strangers.pop(sock, None)

    def _admit(self, sock: socket.socket) -> None:
        too_long = threading.Timer(handshake.TIMEOUT_S, shut, (sock,))
        try:
            too_long.start()
            index = handshake.admit(sock, self._key)
            too_long.cancel()
            self._forget(sock)  # no longer a stranger: it must not be closed for another
            frames.configure(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, frames.timeval(self._send_timeout_s))
            self._adopt(index, sock)
        except (handshake.NotOurs, LinkClosed, OSError, LookupError, RuntimeError) as error:
            log.warning("refused a link: %s", error)
            sock.close()
        finally:
            too_long.cancel()
            self._forget(sock)
            self._admitting.release()


def family_of(address: Address) -> socket.AddressFamily:
    """Return the socket family of an address."""
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def shut(sock: socket.socket) -> None:
    """Shut down both directions of a socket, so that threads waiting on it see it closed."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
