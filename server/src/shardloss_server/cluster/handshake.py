"""Who may be at the other end of a link: each side proves that it knows the group's key, and never sends it.

    listener -> worker   challenge, CHALLENGE_BYTES random bytes
    worker -> listener   index u64, answer = HMAC-SHA256(key, "worker" + index + challenge), challenge of its own
    listener -> worker   answer = HMAC-SHA256(key, "listener" + challenge)

Frames are pickles, so no byte of one is read before. The key travels with the actor's arguments, as Ray's own pickles.
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
    """The other side does not know the key."""


def answer_of(key: bytes, role: bytes, challenge: bytes) -> bytes:
    """What only a holder of the key can say to a challenge."""
    return hmac.digest(key, role + challenge, "sha256")


def admit(sock: socket.socket, key: bytes) -> int:
    """As the listener: the index of the worker that has come.

    Raises:
        NotOurs, LinkClosed, OSError: it does not know the key, or does not answer.
    """
    sock.settimeout(TIMEOUT_S)
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    sock.sendall(challenge)
    index = bytes(receive_bytes(sock, INDEX.size))
    answer = bytes(receive_bytes(sock, CHALLENGE_BYTES))
    if not hmac.compare_digest(answer, answer_of(key, b"worker" + index, challenge)):
        raise NotOurs("a link was refused: its answer does not fit the key")
    sock.sendall(answer_of(key, b"listener", bytes(receive_bytes(sock, CHALLENGE_BYTES))))
    sock.settimeout(None)
    return int(INDEX.unpack(index)[0])


def introduce(sock: socket.socket, key: bytes, index: int) -> None:
    """As worker `index`: be admitted by a listener that knows the key, too.

    Raises:
        NotOurs, LinkClosed, OSError: it does not know the key, or does not answer.
    """
    sock.settimeout(TIMEOUT_S)
    challenge = bytes(receive_bytes(sock, CHALLENGE_BYTES))
    mine, packed = secrets.token_bytes(CHALLENGE_BYTES), INDEX.pack(index)
    sock.sendall(packed + answer_of(key, b"worker" + packed, challenge) + mine)
    if not hmac.compare_digest(bytes(receive_bytes(sock, CHALLENGE_BYTES)), answer_of(key, b"listener", mine)):
        raise NotOurs("the listener does not know the key")
    sock.settimeout(None)
