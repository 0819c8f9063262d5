"""A group of Ray actors: one worker process per GPU or per core."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from ray._private import state as ray_state  # the public API queries the dashboard, which may not be running
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shardloss.allocator import keep_freed_memory

from shardloss_server.cluster import linked_worker, relay
from shardloss_server.cluster.embedded_ray import EmbeddedRay
from shardloss_server.cluster.fanout import FanoutGroup, remaining_until, timed
from shardloss_server.cluster.folder import OwnFolder
from shardloss_server.cluster.group import Pending, ShardMissing, Staged, WorkerLost
from shardloss_server.cluster.link import Links
from shardloss_server.cluster.listener import Invitation
from shardloss_server.cluster.relay import Post
from shardloss_server.cluster.surroundings import refuse_bad_surroundings
from shardloss_server.cluster.worker import Worker
from shardloss_server.config import CannotServe
from shardloss_server.machine import num_cores
from shardloss_server.shard.kept import KEPT_BYTES
from shardloss_server.shard.record import OutOfMemory, Part

# Ray and the processes that it starts read these when they start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # a trainer waits for the workers: they are not background work

START_TIMEOUT_S = 300.0
LINK_TIMEOUT_S = 10.0
JOINED_POLL_S = 0.2
JOINED_S = 5.0  # after a restart of the head, a cluster's nodes rejoin within seconds of each other
DEATH_POLL_S = 0.5
log = logging.getLogger(__name__)


def _tensor_to_numpy(tensor: torch.Tensor) -> tuple[Any, str]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    return tensor.numpy(), ""


def _tensor_from_numpy(packed: tuple[Any, str]) -> torch.Tensor:
    array, view = packed
    tensor = torch.from_numpy(np.array(array))  # a copy, as a view of the object store must not outlive the call
    return tensor.view(torch.bfloat16) if view else tensor


def register_tensors() -> None:
    """Have Ray send tensors as NumPy buffers, whose content it does not pickle."""
    ray.util.register_serializer(torch.Tensor, serializer=_tensor_to_numpy, deserializer=_tensor_from_numpy)


class WorkersNotStarted(CannotServe):
    """Ray did not start, or did not start the requested number of workers."""


class WorkerActor:
    """A Ray actor around a `Worker`, which answers either over its link or, without one, as plain actor calls."""

    def __init__(
        self,
        index: int,
        num_workers: int,
        num_threads: int,
        kept_bytes: int,
        invitation: Invitation | None,
        post: Post | None,
    ) -> None:
        keep_freed_memory(one_arena=True)
        register_tensors()
        torch.set_num_threads(num_threads)
        self._device = "cuda:0" if ray.get_gpu_ids() else "cpu"
        self._worker = Worker(index, num_workers, self._device, kept_bytes)
        invitations = [] if invitation is None else [invitation]
        if post is not None and post.node == own_node():
            invitations.insert(0, post.invitation)
        if invitations:
            linked_worker.start(self.call, invitations, index, num_threads)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of `Worker` and return its answer."""
        return getattr(self._worker, method)(*args)

    def timed_call(self, method: str, *args: Any) -> tuple[float, Any]:
        """Call a method of `Worker`; return the seconds it took and its answer."""
        return timed(self.call, method, *args)

    def whoami(self) -> tuple[int, str]:
        """Return the process id and the device."""
        return os.getpid(), self._device


class RelayActor:
    """A Ray actor around a `Relay`."""

    def __init__(self, post: Post, front_end: Invitation, index: int) -> None:
        keep_freed_memory(one_arena=True)
        torch.set_num_threads(1)
        relay.start(post, front_end, index)

    def is_ready(self) -> bool:
        """Return True; an answer at all shows that the actor is ready."""
        return True


def is_spread() -> bool:
    """Return True if workers may run on nodes other than this one."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1  # type: ignore[no-untyped-call]


def own_address() -> str:
    """Return the address of this node, as other nodes reach it."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def own_node() -> str:
    """Return Ray's id of this node."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


def rooms(num_cpus: float, num_gpus: float) -> dict[str, int]:
    """Return how many workers each living node has room for, by node id, with this node first."""
    here, alive = own_node(), [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]))
    return {node["NodeID"]: relay.room(node["Resources"], num_cpus, num_gpus) for node in alive}


def on_node(actor: Any, node: str | None, invitation: Invitation | None) -> Any:
    """Return the actor pinned to a node, including its restarts.

    The node is only a preference if the actor can link from other nodes.
    """
    if node is None or invitation is None:
        return actor
    is_spread = not isinstance(invitation.address, str)
    there = NodeAffinitySchedulingStrategy(node, soft=is_spread, _spill_on_unavailable=is_spread)
    return actor.options(scheduling_strategy=there)


def resources() -> dict[str, float]:
    """Return the total resources of the cluster, by name."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def all_there_is(timeout_s: float, settled_s: float) -> int:
    """Return the cluster's number of GPUs, or of CPUs if it has no GPU, once that number has been stable for settled_s.

    Raises:
        WorkersNotStarted: there are none within timeout_s, or their number keeps changing.
    """
    found, since = 0, time.monotonic()
    left = remaining_until(since + timeout_s)
    while left():
        has = resources()
        seen = int(has.get("GPU", 0.0)) or int(has.get("CPU", 0.0))
        if seen != found:
            found, since = seen, time.monotonic()
        elif found and time.monotonic() - since >= settled_s:
            return found
        time.sleep(JOINED_POLL_S)
    raise WorkersNotStarted(f"the cluster has no node with a CPU or a GPU after {timeout_s:.0f} s: add nodes")


def brief(error: Exception) -> str:
    """Return the type of an error and the first line of its text, of which Ray writes many."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def has_died(actor: Any) -> bool:
    """Return True if Ray knows that the actor's process has ended and has not restarted it yet."""
    found = ray_state.actors(actor._actor_id.hex())
    return found.get("State") in ("RESTARTING", "DEAD")


@dataclass(slots=True)
class RayPending:
    """The pending answer of one actor call; if it is given up, its reference is added to abandoned."""

    worker: int
    ref: Any
    abandoned: list[Any]
    computed_s: dict[int, float] = field(default_factory=dict)

    def result(self, timeout_s: float) -> Any:
        try:
            seconds, answer = ray.get(self.ref, timeout=timeout_s)
            self.computed_s = {self.worker: seconds}
            return answer
        except GetTimeoutError as error:
            raise TimeoutError(f"a worker did not answer within {timeout_s:.1f} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, (ShardMissing, OutOfMemory)):
                raise type(error.cause)(str(error.cause)) from None
            raise
        except RayError as error:
            raise WorkerLost(str(error)) from error

    def abandon(self) -> None:
        self.abandoned.append(self.ref)  # Ray does not cancel a call that waits in an actor's queue


class RayGroup(FanoutGroup):
    """W actors on an embedded Ray (address None) or on the cluster at `address`, each with a link to this process.

    num_workers = 0 starts one worker per GPU in the cluster, or per CPU if it has no GPU.

    A worker that dies is restarted empty: calls on its tables raise ShardMissing, and other tables are not affected.
    With links = False, or if a worker cannot reach this process, every verb is a plain actor call. In a cluster of
    several nodes, neighbouring workers share a node, and each remote node with several workers runs a relay.

    Files and sockets are in `folder`, by default one of this group's own; close() removes it.

    Raises:
        CannotServe: Ray or the workers did not start within start_timeout_s; the message says why.
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        *,
        links: bool = True,
        num_threads: int = 1,
        kept_bytes: int = KEPT_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
        folder: OwnFolder | None = None,
    ) -> None:
        super().__init__(num_workers)
        refuse_bad_surroundings(address)
        self._folder = folder or OwnFolder()
        self._is_shared = address is not None  # others use the cluster, too
        self._embedded: EmbeddedRay | None = None
        self._left = remaining_until(time.monotonic() + start_timeout_s)
        self._actors: list[Any] = []
        self._relays: list[Any] = []
        self._posts: list[Post] = []
        self._abandoned: list[Any] = []
        self._links: Links | None = None
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch_for_deaths, name="deaths", daemon=True)
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                self._start_ray(address, start_timeout_s)
            self._num_workers = num_workers or all_there_is(self._left(), JOINED_S if address else 0.0)
            register_tensors()
            self._start_actors(num_threads, kept_bytes, with_links=links)
            self._watcher.start()
        except BaseException as error:
            failed = self.failure()
            self.close()
            if isinstance(error, CannotServe) or not isinstance(error, Exception):
                raise
            raise WorkersNotStarted(f"the workers cannot start: {failed or brief(error)}") from error

    def _start_ray(self, address: str | None, start_timeout_s: float) -> None:
        try:
            if address is None:
                num_cpus = max(self._num_workers, num_cores())
                self._embedded = EmbeddedRay(self._folder, num_cpus, start_timeout_s)
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises many types, and some texts have many lines
            log.debug("Ray did not start", exc_info=True)
            what = "the embedded Ray did not start" if address is None else f"ray_address = {address} cannot be joined"
            late = (
                ""
                if self._left()
                else f" within start_timeout_s = {start_timeout_s:g} s (is the machine slow or busy?)"
            )
            raise WorkersNotStarted(f"{what}{late}: {brief(error)}") from None

    def _start_actors(self, num_threads: int, kept_bytes: int, with_links: bool) -> None:
        num_gpus = relay.share_of_gpu(self._num_workers, int(resources().get("GPU", 0.0)))
        num_cpus = 1 if self._is_shared else 0  # an embedded Ray is this process's own: no others use its cores
        actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1, max_task_retries=0)(WorkerActor)
        nodes = self._made_links(num_cpus, num_gpus) if with_links else [None] * self._num_workers
        invitation = self._links.invitation if self._links else None
        shared = self._num_workers, num_threads, kept_bytes, invitation
        post_of = {worker: post for post in self._posts for worker in post.workers}
        self._actors = [
            on_node(actor, node, invitation).remote(index, *shared, post_of.get(index))
            for index, node in enumerate(nodes)
        ]
        answers = self._started([a.whoami.remote() for a in self._actors], num_cpus, num_gpus)
        self._pids = [pid for pid, _ in answers]
        self._pid_of = dict(enumerate(self._pids))
        self._devices = [device for _, device in answers]
        if self._links and not self._all_answer(self._links):
            log.warning("not every worker can reach this process: every call goes through Ray, at about 8 ms each")
            self._links.close()
            self._links = None
            self._stop_relays()

    def _started(self, refs: list[Any], num_cpus: float, num_gpus: float) -> list[tuple[int, str]]:
        """Wait until every worker has started; return the process id and device of each.

        Raises:
            WorkersNotStarted: some did not start in time; the message says how many there is room for.
        """
        has_room = sum(rooms(num_cpus, num_gpus).values()) if num_cpus or num_gpus else self._num_workers
        if has_room < self._num_workers:
            log.warning("%d workers were requested, but the cluster has room for %d", self._num_workers, has_room)
        try:
            while ray.wait(refs, num_returns=len(refs), timeout=min(self._left(), DEATH_POLL_S))[1]:
                if failed := self.failure():
                    raise WorkersNotStarted(f"the workers cannot start: {failed}")
                if not self._left():
                    break
            answers: list[tuple[int, str]] = ray.get(refs, timeout=0)
        except GetTimeoutError:
            raise WorkersNotStarted(
                f"{self._num_workers} workers did not start within start_timeout_s; the cluster has room for "
                f"{has_room}, at {num_cpus} CPU and {num_gpus:.2f} GPU each: add nodes, request fewer workers, or "
                f"raise start_timeout_s if the machine is slow"
            ) from None
        except RayError as error:
            raise WorkersNotStarted(f"a worker cannot start: {str(error).strip().splitlines()[-1]}") from None
        return answers

    def _made_links(self, num_cpus: float, num_gpus: float) -> list[str | None]:
        """Create the links and start the relays; return the node of each worker, or None for any node."""
        nodes: list[str | None] = [own_node()] * self._num_workers
        host = None
        if self._is_shared:  # workers may have to run on other nodes, now or later
            has_room = rooms(num_cpus, num_gpus)
            if is_spread() or has_room.get(own_node(), 0) < self._num_workers:
                host, nodes = own_address(), relay.seats(self._num_workers, has_room)
        self._posts = relay.posts(nodes, own_node())
        try:
            behind = [post.workers for post in self._posts]
            self._links = Links(self._num_workers, host, behind, self._folder.path)
        except OSError as error:
            log.warning("cannot listen for links, so every call goes through Ray, at about 8 ms each: %s", error)
            self._posts = []
            return [None] * self._num_workers
        self._start_relays(self._links.invitation)
        return nodes

    def _start_relays(self, invitation: Invitation) -> None:
        """Start the relays and wait for them: workers look for their relay as soon as they start."""
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(RelayActor)
        for index, post in enumerate(self._posts, start=self._num_workers):
            there = NodeAffinitySchedulingStrategy(post.node, soft=False)
            self._relays.append(actor.options(scheduling_strategy=there).remote(post, invitation, index))
        ray.get([a.is_ready.remote() for a in self._relays], timeout=self._left())

    def _all_answer(self, links: Links) -> bool:
        """Return True if every worker answers over links.

        A link to a relay does not show that the workers behind it can be reached.
        """
        if not links.wait(LINK_TIMEOUT_S):
            return False
        left = remaining_until(time.monotonic() + LINK_TIMEOUT_S)
        while left():
            with suppress(WorkerLost, TimeoutError):  # lost: a worker has just linked directly, from another node
                self.echo(torch.zeros(1)).result(left())
                return True
        return False

    def _stop_relays(self) -> None:
        for actor in self._relays:
            ray.kill(actor)
        self._relays = []

    def _watch_for_deaths(self) -> None:
        """Poll Ray for the deaths of unlinked workers, because a broken link alone loses no rows.

        Ray often reports a death long before the worker is back.
        """
        while self._links is not None and not self._closed.wait(DEATH_POLL_S):
            for worker, link in self._links.away().items():
                lives = link.lives
                try:
                    if has_died(self._actors[worker]):
                        link.bury(lives)
                except Exception as error:  # the cluster's head is away: the state is unknown
                    log.warning("cannot determine whether worker %d is alive: %s", worker, error)

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def devices(self) -> Sequence[str]:
        return self._devices

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the workers as first started."""
        return self._pids

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        if self._links:
            return self._links.call([worker], method, *args)[0]
        return RayPending(worker, self._actors[worker].timed_call.remote(method, *args), self._abandoned)

    def start_on(
        self, workers: Sequence[int], method: str, *args: Any, merge_over: int | None = None
    ) -> Sequence[Pending[dict[int, Any]]]:
        if self._links:
            return self._links.call(workers, method, *args, merge_over=merge_over)
        return super().start_on(workers, method, *args)

    def backlog(self) -> int:
        with self._counting:
            if self._abandoned:
                refs = self._abandoned.copy()  # other threads may append to it
                done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                for ref in done:
                    self._abandoned.remove(ref)
            return len(self._abandoned)

    def stage(self, part: Part) -> Staged:
        """Place a part: workers keep it from its first call on; without links, they read it from the object store.

        Raises:
            OutOfMemory: the object store is full, and so is the disk that it spills to.
        """
        if self._links:
            return self._links.keep(part)
        try:
            return ray.put(part)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise OutOfMemory("Ray's object store, which holds staged parts, is full") from error

    def failure(self) -> str | None:
        return self._embedded.failure() if self._embedded else None

    def close(self) -> None:
        self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join(LINK_TIMEOUT_S)
        if self.failure() is None:  # else Ray's calls would wait for the process that has ended
            for actor in self._actors:
                ray.kill(actor)
            self._stop_relays()
        self._actors = []
        if self._links:
            self._links.close()
        if self._owns_ray and self._embedded:
            self._embedded.close()
        elif self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False  # a second close must not stop the Ray of the next group
        self._folder.remove()
