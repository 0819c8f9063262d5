"""Our trainer, written as the README tells a user to: head(hidden, labels), backward, optimizer.step(), zero_grad().

The shape: address; kind "full", "sampled" or "own" (S uniform candidates a row, drawn by the trainer); N, D, V, S, K
(shards, 0: one a worker), dtype; optimizer "sgd", "adagrad" or "row_adagrad". Optional:

- trainers: so many, each with a connection and a head of its own, all of one table; a step is one step of each, in
  threads at once where concurrent is true, else one after another.
- overlap: `optimizer(overlap=True)`, the default here: step() returns before the commit is applied, and the next loss
  follows it. A step's time is then that of one turn of the loop; the last commit ends within the last step's.
- bias: the table has biases.
- settle: after such a step wait, by optimizer.synchronize(), until the commit is applied. So the next loss never queues
  behind the last commit, and visible_ms, the time of head, backward and step(), is what a trainer waits for whose
  backbone takes at least as long as a commit. ms is the whole step, with the commit.
- sleep_ms: sleep so long at the end of a step, as a trainer does whose backbone is on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, cast
from uuid import uuid4

import grpc
import shardloss
import torch
from torch import Tensor

from benchmarks.rivals.protocol import Rival, serve
from benchmarks.rivals.torch_batches import tensors
from benchmarks.rivals.wire_bytes import bytes_to

OPTIMIZERS: dict[str, shardloss.types.Optimizer] = {
    "sgd": shardloss.Sgd(),
    "adagrad": shardloss.Adagrad(),
    "row_adagrad": shardloss.RowAdagrad(),
}
LEARNING_RATE = 0.1
TIMEOUT_S = 300.0


class Loss(Protocol):
    """A head with its candidates, if it draws its own."""

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor: ...


class Trainer:
    """One connection, one head, its optimizer and its batches."""

    def __init__(self, shape: dict[str, Any], table: str, seed: int) -> None:
        self.client = shardloss.connect(shape["address"], timeout_s=TIMEOUT_S, attempt_timeout_s=TIMEOUT_S)
        self.table = self.client.table(table)
        self.batches: Iterator[tuple[Tensor, Tensor]] = tensors(shape, seed)
        head, self.loss = make_loss(shape, self.table)
        self.optimizer = head.optimizer(lr=LEARNING_RATE, overlap=shape.get("overlap", True))

    def step(self) -> dict[str, float]:
        """One step, and how long each of its three calls took."""
        hidden, labels = next(self.batches)
        hidden.grad = None
        start = time.perf_counter()
        loss = self.loss(hidden, labels)
        scored = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        differentiated = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        return {
            "loss_ms": 1e3 * (scored - start),
            "backward_ms": 1e3 * (differentiated - scored),
            "commit_ms": 1e3 * (end - differentiated),
            "visible_ms": 1e3 * (end - start),
        }


def make_loss(shape: dict[str, Any], table: shardloss.Table) -> tuple[Any, Loss]:
    """The head of a kind, and how it is called."""
    if shape["kind"] == "full":
        head: Any = table.softmax()
        return head, head
    if shape["kind"] == "sampled":
        head = table.sampled_softmax(int(shape["S"]), sampler="log_uniform", seed=1)
        return head, head
    head = table.sampled_softmax()
    return head, own_candidates(head, int(shape["N"]), int(shape["S"]), int(shape["V"]))


def own_candidates(head: Any, n: int, s: int, v: int) -> Loss:
    """Each row with S uniform candidates of its own, drawn anew for each step."""
    expected = torch.full((n, s), s / v), torch.full((n,), s / v)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return cast(Tensor, head(hidden, labels, (torch.randint(v, (n, s)), expected[1], expected[0])))

    return loss


class Ours:
    """Trainers of one table that this process makes and deletes."""

    def __init__(self, shape: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.shape, self.name = shape, f"bench-{uuid4().hex[:12]}"
        self.client = shardloss.connect(shape["address"], timeout_s=TIMEOUT_S)
        self.client.create_table(
            self.name,
            num_classes=int(shape["V"]),
            dim=int(shape["D"]),
            dtype=shape.get("dtype", "float32"),
            bias=bool(shape.get("bias")),
            placement="mod",  # drawn ids are small ones mostly: so each shard owns as many of them
            num_shards=int(shape.get("K", 0)),
            optimizer=OPTIMIZERS[shape.get("optimizer", "sgd")],
        )
        num_trainers = int(shape.get("trainers", 1))
        self.trainers = [Trainer(shape, self.name, seed) for seed in range(num_trainers)]
        self.threads = ThreadPoolExecutor(num_trainers) if shape.get("concurrent") else None
        self.port = int(shape["address"].rpartition(":")[2]) if not shape["address"].startswith("unix") else 0

    def versions(self) -> Mapping[str, str]:
        return {"shardloss": shardloss.__version__, "torch": torch.__version__, "grpcio": grpc.__version__}

    def step(self) -> Mapping[str, float]:
        """One step of each trainer; visible_ms only where the commit may run beside the trainer."""
        carried = bytes_to(self.port)
        start = time.perf_counter()
        if self.threads is None:
            told = [trainer.step() for trainer in self.trainers]
        else:
            told = [future.result() for future in [self.threads.submit(trainer.step) for trainer in self.trainers]]
        if self.shape.get("settle"):
            for trainer in self.trainers:
                trainer.optimizer.synchronize()
        time.sleep(self.shape.get("sleep_ms", 0.0) / 1e3)
        found = {"ms": 1e3 * (time.perf_counter() - start)}
        found |= {name: sum(one[name] for one in told) / len(told) for name in told[0]}
        if not self.shape.get("settle"):
            del found["visible_ms"]
        if carried is not None:
            found["wire_bytes"] = float((bytes_to(self.port) or 0) - carried)
        return found

    def finish(self) -> None:
        """End the commits that are under way."""
        for trainer in self.trainers:
            trainer.optimizer.synchronize()

    def close(self) -> None:
        """Free the table: the next side may need its memory."""
        with suppress(shardloss.ShardlossError):
            self.client.delete_table(self.name)


def main() -> None:
    """Serve, then free the table."""
    made: list[Ours] = []

    def make(shape: dict[str, Any]) -> Rival:
        made.append(Ours(shape))
        return made[0]

    try:
        serve(make)
    finally:
        for ours in made:
            ours.close()


if __name__ == "__main__":
    main()
