"""Wire fuzzing with mutated requests: a fixed number here; `make fuzz` runs for SHARDLOSS_FUZZ_S seconds.

Each request is answered, or refused with a reason of the contract other than a server bug. The server keeps running,
and a table that no request names stays bitwise unchanged. A failure prints the bytes that reproduce it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import shardloss
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from shardloss_server.rpc.serve import Server

from .mutants import mutant, mutated
from .test_raw_bytes import METHODS, RAW_LIMITS, assert_in_contract, call_raw, valid_messages
from .world import D, V, World, serving

FUZZ_S = float(os.environ.get("SHARDLOSS_FUZZ_S", "0"))
SEED = int(os.environ.get("SHARDLOSS_FUZZ_SEED", "1"))
SOCKET_SHARE = 0.2
LEAST_CALLS, LEAST_CONNECTIONS = 4000, 600
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
KEEP = 200  # calls between two checks of the world, when the prey is also created again


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(RAW_LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address) as client:
        yield client


class Prey:
    """A table outside the world that every request may change, and the valid requests that are mutated."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.requests: dict[str, list[Message]] = {}

    def renew(self) -> None:
        """Create the table again, because earlier requests may have filled it with inf or deleted it."""
        client, name = self.world.client, f"{self.world.name}-prey"
        client.create_table(name, num_classes=V, dim=D, num_shards=3, optimizer=shardloss.Adam(), count_labels=True)
        client.create_table("no-bias", num_classes=V, dim=D, bias=False)
        self.requests = valid_messages(self.world)
        for requests in self.requests.values():
            for request in requests:
                self._redirect(request, name)

    def forget(self) -> None:
        """Delete the table, and every table that a mutated request created."""
        for info in self.world.client.list_tables():
            if info.name != self.world.name:
                self.world.client.delete_table(info.name)

    def _redirect(self, message: Message, name: str) -> None:
        for field, content in message.ListFields():
            if field.name == "table" and content != "no-bias":
                message.table = name  # type: ignore[attr-defined]
            elif field.name in ("header", "spec"):
                self._redirect(content, name)
            elif field.name == "name":
                message.name = name  # type: ignore[attr-defined]

    def payloads(self, method: MethodDescriptor, rng: np.random.Generator) -> list[bytes]:
        """Return a mutated request of a method; two messages if it streams its request."""
        of_method = self.requests[method.name]
        every = [request for requests in self.requests.values() for request in requests]
        made = []
        for _ in range(1 + method.client_streaming):
            request, donor = (group[rng.integers(len(group))] for group in (of_method, every))
            if rng.random() < 0.6:
                request = mutant(request, donor, rng)
            content = request.SerializeToString()
            made.append(mutated(content, rng) if rng.random() < 0.5 else content)
        return made


def test_spoilt_requests_are_answered_or_refused_by_name(world: World, server: Server) -> None:
    """Extreme, foreign, missing or repeated fields and flipped, truncated or padded bytes never cause INTERNAL."""
    rng, prey = np.random.default_rng(SEED), Prey(world)
    began, num_calls, num_refused = time.monotonic(), 0, 0
    with grpc.insecure_channel(server.address) as raw:
        while num_calls < LEAST_CALLS or time.monotonic() < began + FUZZ_S * (1 - SOCKET_SHARE):
            if num_calls % KEEP == 0:
                prey.forget()
                world.assert_untouched()
                prey.renew()
            method = METHODS[num_calls % len(METHODS)]
            payloads = prey.payloads(method, rng)
            num_calls += 1
            num_refused += not is_answered(raw, method, payloads)
    prey.forget()
    world.assert_untouched()
    assert server.handlers.admission.num_calls == 0
    assert 0.2 < num_refused / num_calls < 0.95, "too many or too few requests are refused to test much"
    print(f"{num_calls} calls in {time.monotonic() - began:.0f} s, {num_refused} refused, seed {SEED}")


def is_answered(raw: grpc.Channel, method: MethodDescriptor, payloads: list[bytes]) -> bool:
    """Return True if a call is answered and False if it is refused; assert that a refusal follows the contract."""
    try:
        call_raw(raw, method, payloads)
    except grpc.RpcError as failure:
        try:
            assert_in_contract(failure)
        except AssertionError as error:
            sent = [payload.hex() for payload in payloads]
            raise AssertionError(f"{method.name} of {sent}, seed {SEED}: {error}") from failure
        return False
    return True


def test_noise_on_the_socket_disturbs_nobody(world: World, server: Server) -> None:
    """Random bytes sent alone, after the HTTP/2 preface, or as frames with random content do not affect other calls."""
    rng, host_port = np.random.default_rng(SEED), server.address.rsplit(":", 1)
    began, num_connections = time.monotonic(), 0
    while num_connections < LEAST_CONNECTIONS or time.monotonic() < began + FUZZ_S * SOCKET_SHARE:
        noise = rng.bytes(int(rng.integers(1, 2000)))
        for content in (noise, PREFACE + noise, PREFACE + frames(noise, rng)):
            try:
                with socket.create_connection((host_port[0], int(host_port[1])), timeout=60) as connection:
                    connection.sendall(content)
            except ConnectionError:
                pass  # the server may close the connection early
            num_connections += 1
        if num_connections % (3 * KEEP) == 0:
            world.assert_untouched()
    world.assert_untouched()


def frames(noise: bytes, rng: np.random.Generator) -> bytes:
    """Split noise into HTTP/2 frames with random types, flags and streams."""
    made = []
    while noise:
        length = int(rng.integers(1, 60))
        content, noise = noise[:length], noise[length:]
        stream = int(rng.choice([0, 1, 1, 3, 2**31 - 1]))
        head = len(content).to_bytes(3, "big") + bytes([int(rng.integers(12)), int(rng.integers(256))])
        made.append(head + stream.to_bytes(4, "big") + content)
    return b"".join(made)
