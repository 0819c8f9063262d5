"""The worker's side of a link: one thread reads calls, another answers them in the same order."""

from __future__ import annotations

import logging
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardloss_server.cluster import frames, handshake
from shardloss_server.cluster.frames import Buffer, LinkClosed
from shardloss_server.cluster.link import (
    ANSWER,
    CALL,
    CANCEL,
    FAILURE,
    FREE,
    KEEP,
    WorkerFailed,
)
from shardloss_server.cluster.listener import Invitation, family_of, shut
from shardloss_server.shard.record import Part

log = logging.getLogger(__name__)

Call = Callable[..., Any]  # (method, *args) -> answer
RECONNECT_S = 0.1
PATIENCE_S = 60.0  # longer than Ray takes to restart a relay


class LinkedWorker:
    """The worker's end of one link, which answers calls until the link is closed."""

    def __init__(self, call: Call, sock: socket.socket) -> None:
        self._call, self._sock = call, sock
        self._parts: dict[int, Part] = {}
        self._waiting: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._cancelled: set[int] = set()
        self._came = threading.Condition()
        self._closed = False

    def run(self) -> None:
        """Read and answer calls until the link is closed."""
        reader = threading.Thread(target=self._read, name="link-reader", daemon=True)
        reader.start()
        try:
            while self._serve_one():
                pass
        finally:
            shut(self._sock)
            reader.join()
            self._sock.close()

    def _serve_one(self) -> bool:
        """Answer the next call and keep no reference to it; return False once the link is closed."""
        with self._came:
            self._came.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return False
            number, (method, *args) = self._waiting.popleft()
            if number in self._cancelled:
                self._cancelled.discard(number)
                return True
        try:
            self._answer(number, method, args)
        except OSError:
            return False
        return True

    def _answer(self, number: int, method: str, args: list[Any]) -> None:
        try:
            began = time.perf_counter()
            value = self._call(method, *args)
            kind, body = ANSWER, frames.encode(((time.perf_counter() - began,), value))
        except Exception as error:  # any error is sent to the caller
            kind, body = FAILURE, failure(error)
        frames.send(self._sock, kind, number, body)

    def _read(self) -> None:
        try:
            while True:
                self._take(frames.receive(self._sock))
        except (LinkClosed, OSError):
            pass
        except Exception:
            log.exception("cannot read a frame; the link is closed")
        with self._came:
            self._closed = True
            self._came.notify()
        shut(self._sock)  # `run` closes it once no thread sends on it

    def _take(self, frame: frames.Frame) -> None:
        if frame.kind == KEEP:
            self._parts[frame.number] = frames.decode(frame.body)
        elif frame.kind == FREE:
            self._parts.pop(frame.number, None)
        elif frame.kind == CALL:
            asked = frames.decode(frame.body, self._parts.__getitem__)
            with self._came:
                self._waiting.append((frame.number, asked))
                self._came.notify()
        elif frame.kind == CANCEL:
            with self._came:
                if any(number == frame.number for number, _ in self._waiting):
                    self._cancelled.add(frame.number)


def failure(error: Exception) -> list[Buffer]:
    """Encode an error with its traceback as a note, or the traceback alone if the error cannot be sent."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(trace)
    try:
        return frames.encode(error)
    except Exception:
        return frames.encode(WorkerFailed(trace))


def connect(invitation: Invitation, index: int) -> socket.socket:
    """Connect to a listener and authenticate; return the socket.

    Raises:
        NotOurs, LinkClosed, OSError: no listener is there, or not the one that issued the invitation.
    """
    address = invitation.address
    sock = socket.socket(family_of(address))
    try:
        sock.settimeout(handshake.TIMEOUT_S)
        sock.connect(address)
        frames.configure(sock)
        handshake.introduce(sock, invitation.key, index)
    except BaseException:
        sock.close()
        raise
    return sock


def serve(answer: Callable[[socket.socket], None], invitations: Sequence[Invitation], index: int) -> None:
    """Answer calls over a link, and over a new one whenever it breaks; Ray ends this process with its front end.

    If a link breaks while both ends are alive, only the calls in progress are lost. If the first invitation has not led
    to a link for PATIENCE_S, the others are tried as well.
    """
    last = time.monotonic()
    while True:
        is_patient = time.monotonic() - last < PATIENCE_S
        for invitation in invitations[:1] if is_patient else invitations:
            try:
                sock = connect(invitation, index)
            except (OSError, LinkClosed, handshake.NotOurs):
                continue  # the other end is away, or cut off
            try:
                answer(sock)
            except Exception:
                log.exception("the link broke; connecting again")
            last = time.monotonic()
            break
        time.sleep(RECONNECT_S)


def start(call: Call, invitations: Sequence[Invitation], index: int, num_threads: int) -> None:
    """Run `serve` in a new thread, which is also the one that computes, with num_threads torch threads."""

    def run() -> None:
        torch.set_num_threads(num_threads)  # applies to the thread that sets it
        serve(lambda sock: LinkedWorker(call, sock).run(), invitations, index)

    threading.Thread(target=run, name="link", daemon=True).start()
