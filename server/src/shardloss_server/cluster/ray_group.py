"""A group of Ray actors: one worker process a GPU, or a core. The only file that imports ray."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from shardloss.allocator import keep_freed_memory

from shardloss_server.cluster import linked_worker, relay
from shardloss_server.cluster.fanout import FanoutGroup, remaining_until, timed
from shardloss_server.cluster.group import Pending, ShardMissing, Staged, WorkerLost
from shardloss_server.cluster.link import Links
from shardloss_server.cluster.listener import Invitation
from shardloss_server.cluster.relay import Post
from shardloss_server.cluster.worker import Worker
from shardloss_server.shard.kept import KEPT_BYTES
from shardloss_server.shard.record import OutOfMemory, Part

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # workers are no background work: a trainer waits for them

import ray  # reads the variables above
from ray._private import state as ray_state  # its public sister asks the dashboard, which need not be there
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OBJECT_STORE_BYTES = 512 * 2**20  # staged parts of open tickets spill to disk above this
START_TIMEOUT_S = 120.0
LINK_TIMEOUT_S = 10.0
JOINED_POLL_S = 0.2
JOINED_S = 5.0  # after its head, a cluster's nodes come back within seconds of each other
DEATH_POLL_S = 0.5
log = logging.getLogger(__name__)


def _tensor_to_numpy(tensor: torch.Tensor) -> tuple[Any, str]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    return tensor.numpy(), ""


def _tensor_from_numpy(packed: tuple[Any, str]) -> torch.Tensor:
    array, view = packed
    tensor = torch.from_numpy(np.array(array))  # a copy: the object store's memory must not outlive the call
    return tensor.view(torch.bfloat16) if view else tensor


def register_tensors() -> None:
    """Send tensors as NumPy buffers, which Ray carries without pickling their content."""
    ray.util.register_serializer(torch.Tensor, serializer=_tensor_to_numpy, deserializer=_tensor_from_numpy)


class WorkersNotStarted(Exception):
    """Ray has not started as many workers as were asked for."""


class WorkerActor:
    """`Worker` behind an actor: it answers over its link, or where there is none as plain actor calls; never both."""

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
        """Answer one verb of `Worker`."""
        return getattr(self._worker, method)(*args)

    def timed_call(self, method: str, *args: Any) -> tuple[float, Any]:
        """The same, with the seconds that it took."""
        return timed(self.call, method, *args)

    def whoami(self) -> tuple[int, str]:
        """Process id and device."""
        return os.getpid(), self._device


class RelayActor:
    """`Relay` behind an actor."""

    def __init__(self, post: Post, front_end: Invitation, index: int) -> None:
        keep_freed_memory(one_arena=True)
        torch.set_num_threads(1)
        relay.start(post, front_end, index)

    def is_ready(self) -> bool:
        """It is, once it can say so."""
        return True


def is_spread() -> bool:
    """Whether workers may run on other nodes than this one."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1  # type: ignore[no-untyped-call]


def own_address() -> str:
    """The address of this node, as other nodes know it."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def own_node() -> str:
    """Ray's name of this node."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


def rooms(num_cpus: float, num_gpus: float) -> dict[str, int]:
    """How many workers each living node has room for, this one first."""
    here, alive = own_node(), [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]))
    return {node["NodeID"]: relay.room(node["Resources"], num_cpus, num_gpus) for node in alive}


def on_node(actor: Any, node: str | None, invitation: Invitation | None) -> Any:
    """The actor, to be started there: anew, too, where it can link itself from there alone; else rather there."""
    if node is None or invitation is None:
        return actor
    is_spread = not isinstance(invitation.address, str)
    there = NodeAffinitySchedulingStrategy(node, soft=is_spread, _spill_on_unavailable=is_spread)
    return actor.options(scheduling_strategy=there)


def resources() -> dict[str, float]:
    """What the cluster has."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def all_there_is(timeout_s: float, settled_s: float) -> int:
    """As many workers as the cluster has GPUs, or else CPUs, once no node has come or gone for settled_s.

    Raises:
        WorkersNotStarted: there are none in time.
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
    raise WorkersNotStarted(f"no node with a CPU or a GPU is in the cluster after {timeout_s:.0f} s: add nodes")


def has_died(actor: Any) -> bool:
    """Whether Ray knows that the actor's process has ended, and has not started it anew yet."""
    found = ray_state.actors(actor._actor_id.hex())
    return found.get("State") in ("RESTARTING", "DEAD")


@dataclass(slots=True)
class RayPending:
    """The answer of one actor call; abandoned takes its reference when nobody waits for it any more."""

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
        self.abandoned.append(self.ref)  # Ray does not take back what stands in an actor's queue


class RayGroup(FanoutGroup):
    """W actors on an embedded Ray (address None) or on the cluster at `address`, each with a link to this process.

    num_workers = 0: as many as Ray has GPUs, or else CPUs.

    A worker that dies is started anew, empty: its tables answer ShardMissing and others go on. links = False is the
    plain path: every verb an actor call. So it is, too, where a worker cannot reach this process. Where the cluster has
    several nodes, neighbouring workers share a node, and a relay stands before those of every other node than this.
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        *,
        links: bool = True,
        num_threads: int = 1,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        super().__init__(num_workers)
        self._temp_dir = None if address else tempfile.mkdtemp(prefix="shardloss-")
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
                self._start_ray(address)
            self._num_workers = num_workers or all_there_is(START_TIMEOUT_S, JOINED_S if address else 0.0)
            register_tensors()
            self._start_actors(num_threads, kept_bytes, with_links=links)
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    def _start_ray(self, address: str | None) -> None:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        ray.init(
            address="local",
            num_cpus=max(self._num_workers, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=self._temp_dir,
        )

    def _start_actors(self, num_threads: int, kept_bytes: int, with_links: bool) -> None:
        num_gpus = relay.share_of_gpu(self._num_workers, int(resources().get("GPU", 0.0)))
        num_cpus = 0 if self._temp_dir else 1  # an embedded Ray is this process's own: nothing competes for its cores
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
            log.warning("not every worker can reach this process: every call goes through Ray, at some 8 ms each")
            self._links.close()
            self._links = None
            self._stop_relays()

    def _started(self, refs: Sequence[Any], num_cpus: float, num_gpus: float) -> list[tuple[int, str]]:
        """What every worker says of itself, once it has started.

        Raises:
            WorkersNotStarted: some have not, in time: say what there is room for.
        """
        has_room = sum(rooms(num_cpus, num_gpus).values()) if num_cpus or num_gpus else self._num_workers
        if has_room < self._num_workers:
            log.warning("%d workers are asked for; the cluster has room for %d", self._num_workers, has_room)
        try:
            answers: list[tuple[int, str]] = ray.get(refs, timeout=START_TIMEOUT_S)
        except GetTimeoutError:
            raise WorkersNotStarted(
                f"{self._num_workers} workers did not start within {START_TIMEOUT_S:.0f} s; the cluster has room for "
                f"{has_room}, at {num_cpus} CPU and {num_gpus:.2f} GPU each: add nodes, or ask for fewer workers"
            ) from None
        return answers

    def _made_links(self, num_cpus: float, num_gpus: float) -> list[str | None]:
        """Make links that workers can come to, and the relays before them; the node where each worker is to be."""
        nodes: list[str | None] = [own_node()] * self._num_workers
        host = None
        if self._temp_dir is None:  # others' Ray: workers may have to be on other nodes, now or later
            has_room = rooms(num_cpus, num_gpus)
            if is_spread() or has_room.get(own_node(), 0) < self._num_workers:
                host, nodes = own_address(), relay.seats(self._num_workers, has_room)
        self._posts = relay.posts(nodes, own_node())
        try:
            self._links = Links(self._num_workers, host, [post.workers for post in self._posts])
        except OSError as error:
            log.warning("workers cannot link themselves, every call goes through Ray, at some 8 ms each: %s", error)
            self._posts = []
            return [None] * self._num_workers
        self._start_relays(self._links.invitation)
        return nodes

    def _start_relays(self, invitation: Invitation) -> None:
        """They come before their workers, which look for them as soon as they are there."""
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(RelayActor)
        for index, post in enumerate(self._posts, start=self._num_workers):
            there = NodeAffinitySchedulingStrategy(post.node, soft=False)
            self._relays.append(actor.options(scheduling_strategy=there).remote(post, invitation, index))
        ray.get([a.is_ready.remote() for a in self._relays], timeout=START_TIMEOUT_S)

    def _all_answer(self, links: Links) -> bool:
        """Whether every worker can be reached over links: behind a relay only an answer tells."""
        if not links.wait(LINK_TIMEOUT_S):
            return False
        left = remaining_until(time.monotonic() + LINK_TIMEOUT_S)
        while left():
            with suppress(WorkerLost, TimeoutError):  # lost: it has only now come by itself, from another node
                self.echo(torch.zeros(1)).result(left())
                return True
        return False

    def _stop_relays(self) -> None:
        for actor in self._relays:
            ray.kill(actor)
        self._relays = []

    def _watch_for_deaths(self) -> None:
        """A broken link alone loses nothing: ask Ray whether the worker died, which may be long before it is back."""
        while self._links is not None and not self._closed.wait(DEATH_POLL_S):
            for worker, link in self._links.away().items():
                lives = link.lives
                try:
                    if has_died(self._actors[worker]):
                        link.bury(lives)
                except Exception as error:  # the cluster's head is away: nothing is known
                    log.warning("whether worker %d lives is unknown: %s", worker, error)

    @property
    def has_links(self) -> bool:
        """Whether calls go over links."""
        return self._links is not None

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
                refs = self._abandoned.copy()  # others append to it meanwhile
                done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                for ref in done:
                    self._abandoned.remove(ref)
            return len(self._abandoned)

    def stage(self, part: Part) -> Staged:
        """The part, which workers get with the first call and keep; without links, in the object store.

        Raises:
            OutOfMemory: the store is full, and so is the disk it spills to.
        """
        if self._links:
            return self._links.keep(part)
        try:
            return ray.put(part)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise OutOfMemory("the object store is full") from error

    def close(self) -> None:
        self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join(LINK_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._stop_relays()
        if self._links:
            self._links.close()
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        if self._temp_dir:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
