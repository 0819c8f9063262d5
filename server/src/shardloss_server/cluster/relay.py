"""A relay in front of the workers of one node, so that a broadcast to them crosses the network once.

The front end's frames arrive over one link. Calls and parts are passed on to the node's workers without decoding, and
the workers' answers are combined into one. This module does not depend on Ray.
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

WORKER_SEND_TIMEOUT_S = 3  # far below a front end's own: a worker that does not read is lost, not its relay
WARN_TRIES = 300  # half a minute, at RECONNECT_S each

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Post:
    """The assignment of a relay: its node, its workers, and the invitation by which workers on that node find it."""

    node: str
    workers: range
    invitation: Invitation


def share_of_gpu(num_workers: int, num_gpus: int) -> float:
    """Return the share of one GPU that each worker takes so that all fit: 1 with a GPU each, 0 without GPUs."""
    return 1.0 / -(-num_workers // num_gpus) if num_gpus else 0.0


def room(has: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """Return the number of workers that a node's resources allow; several may share a GPU, but none uses two."""
    by_cpus = [int(has.get("CPU", 0.0) / num_cpus)] if num_cpus else []
    by_gpus = [int(has.get("GPU", 0.0)) * int(1.0 / num_gpus + 1e-6)] if num_gpus else []
    return min(by_cpus + by_gpus, default=0)


def seats(num_workers: int, rooms: Mapping[str, int]) -> list[str | None]:
    """Return the node of each worker, filling each node with neighbouring workers; None means any node with room."""
    found: list[str | None] = [node for node, room in rooms.items() for _ in range(room)]
    return (found + [None] * num_workers)[:num_workers]


def posts(seated: Sequence[str | None], front: str) -> list[Post]:
    """Return the post of a relay for each node with several workers, except the front end's own node."""
    found = []
    for node in dict.fromkeys(seated):
        first, num = seated.index(node), seated.count(node)
        if node is not None and node != front and num > 1:
            found.append(Post(node, range(first, first + num), invitation()))
    return found


def invitation() -> Invitation:
    """Create an invitation to an abstract Unix socket, which leaves no file; a restarted relay keeps the address."""
    return Invitation(f"\0shardloss-relay-{secrets.token_hex(16)}", secrets.token_bytes(32))


class Relay:
    """The links to the workers of one node, which outlive each link of the front end."""

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
        """Pass on the frames of one link of the front end until it breaks; the next link starts from an empty state."""
        Passage(self.links, sock).run()

    def close(self) -> None:
        """Close the links to every worker."""
        self._listener.close()
        for link in self.links.values():
            link.close()


class Passage:
    """One link of the front end: a reader passes frames on, and the thread of a call's last answer sends its result."""

    def __init__(self, links: Mapping[int, Link], sock: socket.socket) -> None:
        self._links, self._sock = links, sock
        self._sending = threading.Lock()
        self._parts: dict[int, KeptPart] = {}
        self._routes: dict[int, Route] = {}
        self._under_way: dict[int, Gathering] = {}

    def run(self) -> None:
        """Pass frames on until the front end is gone, then cancel the calls that no worker has begun."""
        try:
            while True:
                self._take(frames.receive(self._sock))
        except (LinkClosed, OSError):
            pass
        except Exception:
            log.exception("cannot pass on a frame; the link is closed")
        finally:
            shut(self._sock)  # first, so that a thread that sends on it stops
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
            return  # the call was cancelled
        try:
            with self._sending:
                frames.send(self._sock, kind, number, content)
        except OSError:
            shut(self._sock)  # the reader then ends the passage

    def _cancel(self, number: int) -> None:
        gathering = self._under_way.pop(number, None)
        if gathering is not None:
            gathering.abandon()


class Gathering:
    """The answers of several workers to one call, combined once all have arrived; or the first failure, at once.

    After a failure the other workers go on until they have answered or are cancelled.
    """

    def __init__(self, pending: Sequence[LinkPending], merge_over: int | None) -> None:
        self._pending, self._merge_over = pending, merge_over
        self._places = [(answer.link, answer.number) for answer in pending]
        self._missing, self._is_told = len(pending), False
        self._counting = threading.Lock()
        self._tell: Callable[[int, list[Buffer]], None]
        self._end: Callable[[], object]

    def then(self, tell: Callable[[int, list[Buffer]], None], end: Callable[[], object]) -> None:
        """Call `tell` once with the outcome, as a frame's kind and body, and `end` after the last answer.

        Both are called by the thread that brings the answer.
        """
        self._tell, self._end = tell, end
        for answer in self._pending:
            answer.future.add_done_callback(self._came)

    def abandon(self) -> None:
        """Have the workers that have not begun the call skip it."""
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
        """Return the answers and drop them here, to break the cycle: their callbacks refer to this object."""
        pending, self._pending = self._pending, ()
        return pending

    def _outcome(self, error: BaseException | None) -> tuple[int, list[Buffer]]:
        pending = self._let_go()
        try:
            if error is not None:
                return FAILURE, frames.encode(error)
            with allocating("the answers of a node's workers"):
                return ANSWER, frames.encode(self._together(pending))
        except Exception as broken:  # any error is sent to the caller
            return FAILURE, linked_worker.failure(broken)

    def _together(self, pending: Sequence[LinkPending]) -> Timed:
        timed = [answer.future.result() for answer in pending]
        by_shard = {shard: answer for _, answers in timed for shard, answer in answers.items()}
        if self._merge_over is not None:
            by_shard = {run.shards.start: run for run in merge_runs(by_shard.values(), self._merge_over)}
        return tuple(one for seconds, _ in timed for one in seconds), by_shard


def take(post: Post) -> Relay:
    """Create the relay of a post, retrying while a dead predecessor still has its socket name.

    Workers may link directly to the front end in the meantime.
    """
    for tries in count(1):
        with suppress(OSError):
            return Relay(post.workers, post.invitation)
        if tries % WARN_TRIES == 0:
            log.warning("the socket name of the relay of workers %s is still in use; trying again", list(post.workers))
        time.sleep(linked_worker.RECONNECT_S)
    raise AssertionError("the loop above never ends")


def start(post: Post, front_end: Invitation, index: int) -> None:
    """Start a thread that takes a post and passes on the frames of link `index` of the front end."""

    def run() -> None:
        linked_worker.serve(take(post).serve, [front_end], index)

    threading.Thread(target=run, name="relay", daemon=True).start()
