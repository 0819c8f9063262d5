"""A relay: before the workers of one node, so that what all of them get crosses the network once.

The front end's frames come over one link; calls and parts go on unread to the node's workers, whose answers are made
one. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from shardloss_server.cluster import frames, linked_worker
from shardloss_server.cluster.frames import Buffer, Frame, LinkClosed
from shardloss_server.cluster.link import (
    ANSWER,
    CALL,
    CANCEL,
    FAILURE,
    FREE,
    KEEP,
    ROUTE,
    KeptPart,
    Link,
    LinkPending,
    Route,
    Timed,
    kept_over,
)
from shardloss_server.cluster.listener import Invitation, Listener, shut
from shardloss_server.shard.record import allocating
from shardloss_server.shard.runs import merge_runs

WORKER_SEND_TIMEOUT_S = (
    3  # far below a front end's own: it is the worker that does not read that is lost, not its relay
)

WARN_TRIES = 300  # half a minute

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Post:
    """Where a relay stands: on a node, before workers that find it by the invitation while they are there."""

    node: str
    workers: range
    invitation: Invitation


def share_of_gpu(num_workers: int, num_gpus: int) -> float:
    """What each worker takes of one GPU, so that all find a place: 1 on a GPU each, 0 where there is none."""
    return 1.0 / -(-num_workers // num_gpus) if num_gpus else 0.0


def room(has: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """How many workers a node's resources allow; several share a GPU, but none has parts of two."""
    by_cpus = [int(has.get("CPU", 0.0) / num_cpus)] if num_cpus else []
    by_gpus = [int(has.get("GPU", 0.0)) * int(1.0 / num_gpus + 1e-6)] if num_gpus else []
    return min(by_cpus + by_gpus, default=0)


def seats(num_workers: int, rooms: Mapping[str, int]) -> list[str | None]:
    """The node of each worker: neighbours together, as many as each node has room for; None: wherever there is room."""
    found: list[str | None] = [node for node, room in rooms.items() for _ in range(room)]
    return (found + [None] * num_workers)[:num_workers]


def posts(seated: Sequence[str | None], front: str) -> list[Post]:
    """A relay for every other node than the front end's that has several workers."""
    found = []
    for node in dict.fromkeys(seated):
        first, num = seated.index(node), seated.count(node)
        if node is not None and node != front and num > 1:
            found.append(Post(node, range(first, first + num), invitation()))
    return found


def invitation() -> Invitation:
    """To an abstract Unix socket: nothing is left on disk, and who listens there next is found by the same name."""
    return Invitation(f"\0shardloss-relay-{secrets.token_hex(16)}", secrets.token_bytes(32))


class Relay:
    """The links to the workers of one node, through all the lives of the front end's."""

    def __init__(self, workers: Sequence[int], invitation: Invitation) -> None:
        self.links = {worker: Link(f"worker {worker}") for worker in workers}
        self._listener = Listener(
            invitation.address,
            invitation.key,
            lambda index, sock: self.links[index].adopt(sock),
            num_expected=len(workers),
            send_timeout_s=WORKER_SEND_TIMEOUT_S,
        )

    def serve(self, sock: socket.socket) -> None:
        """Pass on what comes over one link of the front end, until it breaks; the next one finds nothing of it."""
        Passage(self.links, sock).run()

    def close(self) -> None:
        """Let go of every worker."""
        self._listener.close()
        for link in self.links.values():
            link.close()


class Passage:
    """One link of the front end: who reads it passes on, and whoever brings the last answer of a call sends it."""

    def __init__(self, links: Mapping[int, Link], sock: socket.socket) -> None:
        self._links, self._sock = links, sock
        self._sending = threading.Lock()
        self._parts: dict[int, KeptPart] = {}
        self._routes: dict[int, Route] = {}
        self._under_way: dict[int, Gathering] = {}

    def run(self) -> None:
        """Until the front end has gone; what has not begun by then is taken back, as nobody waits for it."""
        try:
            while True:
                self._take(frames.receive(self._sock))
        except (LinkClosed, OSError):
            pass
        except Exception:
            log.exception("a frame cannot be passed on; the link is closed")
        finally:
            shut(self._sock)  # first: whoever sends on it lets go
            for number in list(self._under_way):
                self._cancel(number)
            with self._sending:
                self._sock.close()

    def _take(self, frame: Frame) -> None:
        number = frame.number
        if frame.kind == KEEP:
            self._parts[number] = kept_over([*self._links.values()], KeptPart(number, None, [frame.body]))
        elif frame.kind == FREE:
            self._parts.pop(number, None)
        elif frame.kind == ROUTE:
            self._routes[number] = frames.decode(frame.body)
        elif frame.kind == CALL:
            self._pass_on(number, self._routes.pop(number), frame.body)
        elif frame.kind == CANCEL:
            self._cancel(number)

    def _pass_on(self, number: int, route: Route, body: Buffer) -> None:
        parts = [self._parts[part] for part in route.parts]
        pending = [self._links[worker].call(number, [body], parts, (worker,)) for worker in route.workers]
        gathering = Gathering(pending, route.merge_over)
        self._under_way[number] = gathering
        gathering.then(
            lambda kind, content: self._answer(number, kind, content), lambda: self._under_way.pop(number, None)
        )

    def _answer(self, number: int, kind: int, content: list[Buffer]) -> None:
        if number not in self._under_way:
            return  # it was given up
        try:
            with self._sending:
                frames.send(self._sock, kind, number, content)
        except OSError:
            shut(self._sock)  # who reads it ends the passage

    def _cancel(self, number: int) -> None:
        gathering = self._under_way.pop(number, None)
        if gathering is not None:
            gathering.abandon()


class Gathering:
    """The answers of several workers to one call: one answer once all are there, or the first failure at once.

    After a failure the others go on, until they have answered or are taken back.
    """

    def __init__(self, pending: Sequence[LinkPending], merge_over: int | None) -> None:
        self._pending, self._merge_over = pending, merge_over
        self._places = [(answer.link, answer.number) for answer in pending]
        self._missing, self._is_told = len(pending), False
        self._counting = threading.Lock()
        self._tell: Callable[[int, list[Buffer]], None]
        self._end: Callable[[], object]

    def then(self, tell: Callable[[int, list[Buffer]], None], end: Callable[[], object]) -> None:
        """Have the outcome told once, as a frame's kind and body, by the thread that brings it; `end` once all came."""
        self._tell, self._end = tell, end
        for answer in self._pending:
            answer.future.add_done_callback(self._came)

    def abandon(self) -> None:
        """Have the workers pass it over that have not begun."""
        self._let_go()
        for link, number in self._places:
            link.cancel(number)

    def _came(self, answer: Future[Timed]) -> None:
        error = answer.exception()
        with self._counting:
            self._missing -= 1
            is_last, is_told = self._missing == 0, self._is_told
            self._is_told = is_told or is_last or error is not None
            tells = self._is_told and not is_told
        if tells:
            self._tell(*self._outcome(error))
        if is_last:
            self._end()

    def _let_go(self) -> Sequence[LinkPending]:
        """The answers, which hold this object by their callbacks: not held here any more, they go at once."""
        pending, self._pending = self._pending, ()
        return pending

    def _outcome(self, error: BaseException | None) -> tuple[int, list[Buffer]]:
        pending = self._let_go()
        try:
            if error is not None:
                return FAILURE, frames.encode(error)
            with allocating("the answers of a node's workers"):
                return ANSWER, frames.encode(self._together(pending))
        except Exception as broken:  # whatever it is, the caller is told
            return FAILURE, linked_worker.failure(broken)

    def _together(self, pending: Sequence[LinkPending]) -> Timed:
        timed = [answer.future.result() for answer in pending]
        by_shard = {shard: answer for _, answers in timed for shard, answer in answers.items()}
        if self._merge_over is not None:
            by_shard = {run.shards.start: run for run in merge_runs(by_shard.values(), self._merge_over)}
        return tuple(one for seconds, _ in timed for one in seconds), by_shard


def take(post: Post) -> Relay:
    """The relay of a post, once whoever died there has left its name; its workers come to the front end meanwhile."""
    for tries in count(1):
        with suppress(OSError):
            return Relay(post.workers, post.invitation)
        if tries % WARN_TRIES == 0:
            log.warning("the name of the relay before workers %s is taken", list(post.workers))
        time.sleep(linked_worker.RECONNECT_S)
    raise AssertionError("there is always another try")


def start(post: Post, front_end: Invitation, index: int) -> None:
    """In a thread of its own: take a post, and pass on what comes over link `index` of the front end."""

    def run() -> None:
        linked_worker.serve(take(post).serve, [front_end], index)

    threading.Thread(target=run, name="relay", daemon=True).start()
