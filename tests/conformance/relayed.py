"""An in-process model of a group on several nodes: workers are threads, some of them behind relays."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from shardloss_server.cluster import handshake, relay
from shardloss_server.cluster.fanout import FanoutGroup
from shardloss_server.cluster.frames import LinkClosed
from shardloss_server.cluster.group import Pending, Staged
from shardloss_server.cluster.link import Links
from shardloss_server.cluster.linked_worker import LinkedWorker, connect
from shardloss_server.cluster.listener import Invitation, shut
from shardloss_server.cluster.worker import Worker
from shardloss_server.shard.record import Part

from ..patience import PATIENCE_S, eventually

Call = Callable[..., Any]


class Serving:
    """A thread that answers on a link, and reconnects whenever the link breaks, until it is stopped."""

    def __init__(self, answer: Callable[[socket.socket], None], invitation: Invitation, index: int) -> None:
        self._answer, self._invitation, self._index = answer, invitation, index
        self._sock: socket.socket | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._sock = connect(self._invitation, self._index)
                self._answer(self._sock)
            except (OSError, LinkClosed, handshake.NotOurs):
                self._stopped.wait(0.01)

    def cut(self) -> None:
        """Break the current link, if there is one."""
        if self._sock is not None:
            shut(self._sock)

    def stop(self) -> None:
        """Stop as if the process had died; a computation under way may still finish."""
        self._stopped.set()
        eventually(self._is_over, "a serving thread ends")

    def _is_over(self) -> bool:
        self.cut()
        return not self._thread.is_alive()


class RelayedGroup(FanoutGroup):
    """A group whose workers behind[r] are behind relay r; calls[w] answers for worker w, by default a `Worker`."""

    def __init__(self, num_workers: int, behind: Sequence[range], calls: Sequence[Call] | None = None) -> None:
        super().__init__(num_workers)
        self.links = Links(num_workers, "127.0.0.1", behind)
        self.posts = [relay.Post(f"node-{n}", workers, relay.invitation()) for n, workers in enumerate(behind)]
        self._post_of = {worker: post for post in self.posts for worker in post.workers}
        self.linked: dict[int, LinkedWorker] = {}
        self.relays = [relay.take(post) for post in self.posts]
        self.relay_links = [self._linked_relay(r) for r in range(len(behind))]
        calls = calls or [self.made_worker(index) for index in range(num_workers)]
        self.workers = [self.linked_worker(index, call) for index, call in enumerate(calls)]
        assert self.links.wait(PATIENCE_S)
        self.wait_behind()

    def wait_behind(self) -> None:
        """Wait until every worker behind a relay has connected to it."""
        for made in self.relays:
            assert all(link.linked.wait(PATIENCE_S) for link in made.links.values())

    def wait_cancelled(self, worker: int) -> None:
        """Wait until a worker has received a cancellation of work that it has not begun."""
        eventually(lambda: bool(self.linked[worker]._cancelled), "the worker receives the cancellation")

    def made_worker(self, index: int) -> Call:
        """Return a callable for the verbs of a new worker without shards."""
        worker = Worker(index, self._num_workers)
        return lambda method, *args: getattr(worker, method)(*args)

    def linked_worker(self, index: int, call: Call, *, elsewhere: bool = False) -> Serving:
        """Start worker `index` behind its relay; with `elsewhere`, on another node with its own link."""
        invitation = self.links.invitation
        if index in self._post_of and not elsewhere:
            invitation = self._post_of[index].invitation

        def answer(sock: socket.socket) -> None:
            self.linked[index] = LinkedWorker(call, sock)
            self.linked[index].run()

        return Serving(answer, invitation, index)

    def kill_relay(self, index: int) -> None:
        """Stop a relay as if its process had died."""
        self.relay_links[index].stop()
        self.relays[index].close()

    def revive_relay(self, index: int) -> None:
        """Restart a relay on the same post, as Ray does."""
        self.relays[index] = relay.take(self.posts[index])
        self.relay_links[index] = self._linked_relay(index)

    def _linked_relay(self, index: int) -> Serving:
        return Serving(self.relays[index].serve, self.links.invitation, self._num_workers + index)

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def devices(self) -> Sequence[str]:
        return ["cpu"] * self._num_workers

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        return self.links.call([worker], method, *args)[0]

    def start_on(
        self, workers: Sequence[int], method: str, *args: Any, merge_over: int | None = None
    ) -> Sequence[Pending[dict[int, Any]]]:
        return self.links.call(workers, method, *args, merge_over=merge_over)

    def stage(self, part: Part) -> Staged:
        return self.links.keep(part)

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        for index in range(len(self.relays)):
            self.kill_relay(index)
        self.links.close()
