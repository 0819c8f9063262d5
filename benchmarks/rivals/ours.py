"""Our trainer, written as in the README: head(hidden, labels), backward, optimizer.step(), zero_grad().

The shape: address; kind "full", "sampled" or "own" (S uniform candidates per row, drawn by the trainer); N, D, V, S, K
(shards, 0: one per worker), dtype; optimizer "sgd", "adagrad" or "row_adagrad". Optional:

- trainers: number of trainers of the one table, each with its own connection and head. A step is one step of each, in
  parallel threads if concurrent is true, else one after another.
- overlap: `optimizer(overlap=True)`, the default here: step() returns before the commit is applied, and the next loss
  follows it. A step's time is then one turn of the loop; the last commit ends within the time of the last step.
- bias: the table has biases.
- settle: after such a step, wait with optimizer.synchronize() until the commit is applied. The next loss then never
  queues behind the last commit, and visible_ms, the time of head, backward and step(), is the waiting time of a trainer
  whose backbone takes at least as long as a commit. ms is the whole step, including the commit.
- sleep_ms: sleep this long at the end of a step, like a trainer whose backbone is on a GPU.
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
    """A head, called with candidates if the trainer draws them."""

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
        """Run one step and return how long each of its three calls took, and their total, in ms."""
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
    """Return the head of a kind, and the function that calls it."""
    if shape["kind"] == "full":
        head: Any = table.softmax()
        return head, head
    if shape["kind"] == "sampled":
        head = table.sampled_softmax(int(shape["S"]), sampler="log_uniform", seed=1)
        return head, head
    head = table.sampled_softmax()
    return head, own_candidates(head, int(shape["N"]), int(shape["S"]), int(shape["V"]))


def own_candidates(head: Any, n: int, s: int, v: int) -> Loss:
    """Return a loss with S uniform candidates for each row, drawn again for each step."""
    expected = torch.full((n, s), s / v), torch.full((n,), s / v)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return cast(Tensor, head(hidden, labels, (torch.randint(v, (n, s)), expected[1], expected[0])))

    return loss


class Ours:
    """Trainers of one table, which this process creates and deletes."""

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
            placement="mod",  # most drawn ids are small; this spreads them evenly over the shards
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
        """Run one step of each trainer and return its times; visible_ms only if settle is set."""
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
        """Wait until all pending commits are applied."""
        for trainer in self.trainers:
            trainer.optimizer.synchronize()

    def close(self) -> None:
        """Delete the table, because the next side may need its memory."""
        with suppress(shardloss.ShardlossError):
            self.client.delete_table(self.name)


def main() -> None:
    """Serve requests, then delete the table."""
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
