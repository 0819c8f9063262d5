"""Checks of what a Ray needs around it: a folder for its sockets, a token, or the cluster that it should join."""

from __future__ import annotations

import os
import socket
import time

from shardloss.address import MAX_SOCKET_BYTES

from shardloss_server.cluster.folder import temporary
from shardloss_server.config import CannotServe

SOCKET = "shardloss-12345678/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # as Ray names it
ABSENT_S, ABSENT_POLL_S = 10.0, 0.2  # a cluster's head that is started at the same time has this long to listen


def refuse_bad_surroundings(ray_address: str | None) -> None:
    """Check what Ray needs before it is started (ray_address None) or joined.

    Raises:
        CannotServe: TMPDIR cannot be used, RAY_AUTH_MODE turns Ray's token off, or no cluster answers at the address.
    """
    refuse_bad_tmpdir()
    if ray_address is None:
        refuse_without_token()
    else:
        refuse_absent(ray_address)


def refuse_bad_tmpdir() -> None:
    """Refuse a TMPDIR in which no socket can be created; Python would silently replace one that cannot be written."""
    given = os.environ.get("TMPDIR")
    if given and not (os.path.isdir(given) and os.access(given, os.W_OK | os.X_OK)):
        raise CannotServe(f"TMPDIR = {given} is not a folder that this user may write to: create it, or set another")
    folder = temporary()
    num_bytes = len(os.fsencode(os.path.join(folder, SOCKET.format(pid=os.getpid()))))
    if num_bytes > MAX_SOCKET_BYTES:
        raise CannotServe(
            f"TMPDIR = {folder} is too long: the path of a Unix socket in it would have {num_bytes} bytes, and the "
            f"limit is {MAX_SOCKET_BYTES}. Set TMPDIR to a folder with a shorter path"
        )


def refuse_without_token() -> None:
    """Refuse an environment that turns the token of the embedded Ray off."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise CannotServe(
            f"RAY_AUTH_MODE = {mode}: every user of this machine could run code in the workers. Unset it: the embedded "
            "Ray has a token of its own"
        )


def refuse_absent(address: str) -> None:
    """Refuse an address where nothing listens, to which Ray would connect for minutes."""
    if address == "auto":
        return  # Ray itself fails at once if this node has none
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise CannotServe(f"ray_address = {address} is not host:port or auto: the port is that of the GCS (6379)")
    deadline = time.monotonic() + ABSENT_S
    while True:
        left = max(ABSENT_POLL_S, deadline - time.monotonic())
        try:
            socket.create_connection((host.strip("[]"), int(port)), left).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline or isinstance(error, OverflowError):
                raise CannotServe(
                    f"ray_address = {address} does not answer within {ABSENT_S:.0f} s ({error}): is the cluster's head "
                    "running, and is this the port of its GCS (6379 by default)?"
                ) from None
            time.sleep(ABSENT_POLL_S)
