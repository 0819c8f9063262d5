"""Mutual authentication of a link: each side proves that it knows the group's key, without sending it.

    listener -> worker   challenge, CHALLENGE_BYTES random bytes
    worker -> listener   index u64, answer = HMAC-SHA256(key, "worker" + index + challenge), its own challenge
    listener -> worker   answer = HMAC-SHA256(key, "listener" + challenge)

Frames are pickles, so none is read before this succeeds. The key is one of the actor's arguments: it is sent the same
way as Ray's own pickles.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct

from shardloss_server.cluster.frames import receive_bytes

CHALLENGE_BYTES = 32
INDEX = struct.Struct("<Q")
TIMEOUT_S = 5.0


class NotOurs(Exception):
    """The other end of a link does not know the group's key."""


def answer_of(key: bytes, role: bytes, challenge: bytes) -> bytes:
    """Return the answer to a challenge, which only a holder of the key can compute."""
    return hmac.digest(key, role + challenge, "sha256")


def admit(sock: socket.socket, key: bytes) -> int:
    """Authenticate a worker that has connected to the listener, and return its index.

    Raises:
        NotOurs, LinkClosed, OSError: the worker does not know the key or does not answer.
    """
    sock.settimeout(TIMEOUT_S)
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    sock.sendall(challenge)
    index = bytes(receive_bytes(sock, INDEX.size))
    answer = bytes(receive_bytes(sock, CHALLENGE_BYTES))
    if not hmac.compare_digest(answer, answer_of(key, b"worker" + index, challenge)):
        raise NotOurs("the answer to the challenge is wrong: the other end does not know this group's key")
    sock.sendall(answer_of(key, b"listener", bytes(receive_bytes(sock, CHALLENGE_BYTES))))
    sock.settimeout(None)
    return int(INDEX.unpack(index)[0])


def introduce(sock: socket.socket, key: bytes, index: int) -> None:
    """Authenticate to a listener as worker `index`, and check that the listener knows the key too.

    Raises:
        NotOurs, LinkClosed, OSError: the listener does not know the key or does not answer.
    """
    sock.settimeout(TIMEOUT_S)
    challenge = bytes(receive_bytes(sock, CHALLENGE_BYTES))
    mine, packed = secrets.token_bytes(CHALLENGE_BYTES), INDEX.pack(index)
    sock.sendall(packed + answer_of(key, b"worker" + packed, challenge) + mine)
    if not hmac.compare_digest(bytes(receive_bytes(sock, CHALLENGE_BYTES)), answer_of(key, b"listener", mine)):
        raise NotOurs("the listener does not know this group's key")
    sock.settimeout(None)
