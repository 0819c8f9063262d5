"""The worker's end of a link: one thread reads what comes, another answers it in that order."""

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
PATIENCE_S = 60.0  # in which Ray has started a relay anew


class LinkedWorker:
    """Answers the calls of one front end until it goes."""

    def __init__(self, call: Call, sock: socket.socket) -> None:
        self._call, self._sock = call, sock
        self._parts: dict[int, Part] = {}
        self._waiting: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._cancelled: set[int] = set()
        self._came = threading.Condition()
        self._closed = False

    def run(self) -> None:
        """Read and answer; returns when the front end has gone."""
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
        """Answer the next call, and hold nothing of it afterwards; False once the link is closed."""
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
        except Exception as error:  # whatever it is, the caller is told
            kind, body = FAILURE, failure(error)
        frames.send(self._sock, kind, number, body)

    def _read(self) -> None:
        try:
            while True:
                self._take(frames.receive(self._sock))
        except (LinkClosed, OSError):
            pass
        except Exception:
            log.exception("a frame cannot be read; the link is closed")
        with self._came:
            self._closed = True
            self._came.notify()
        shut(self._sock)  # closed by `run`, once nobody sends on it

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
    """An error to send: itself, with its trace as a note, or where it cannot be sent the trace alone."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(trace)
    try:
        return frames.encode(error)
    except Exception:
        return frames.encode(WorkerFailed(trace))


def connect(invitation: Invitation, index: int) -> socket.socket:
    """An admitted socket to the front end.

    Raises:
        NotOurs, LinkClosed, OSError: nobody is there, or not the one that made the invitation.
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
    """Answer on a link until it breaks, and then on a new one; Ray ends this process with its front end.

    A link that breaks while both live costs the calls under way alone. Where nobody has been at the first invitation
    for PATIENCE_S, the others are taken as well.
    """
    last = time.monotonic()
    while True:
        is_patient = time.monotonic() - last < PATIENCE_S
        for invitation in invitations[:1] if is_patient else invitations:
            try:
                sock = connect(invitation, index)
            except (OSError, LinkClosed, handshake.NotOurs):
                continue  # the other side is away, or cut off
            try:
                answer(sock)
            except Exception:
                log.exception("the link broke; it is made anew")
            last = time.monotonic()
            break
        time.sleep(RECONNECT_S)


def start(call: Call, invitations: Sequence[Invitation], index: int, num_threads: int) -> None:
    """`serve` in a thread of its own, which is the one that computes, with so many threads beside it."""

    def run() -> None:
        torch.set_num_threads(num_threads)  # counts for the thread that sets it
        serve(lambda sock: LinkedWorker(call, sock).run(), invitations, index)

    threading.Thread(target=run, name="link", daemon=True).start()
