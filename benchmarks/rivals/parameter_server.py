"""A parameter server over torch.distributed.rpc: pull the candidates' rows, compute in the trainer, push gradients.

Both processes have two threads, since they never compute at the same time. Candidates are distinct, like ours.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import rpc
from torch.nn import functional as F

from benchmarks.rivals.child import Child, main, serve_child
from benchmarks.rivals.torch_batches import tensors

MODULE = "benchmarks.rivals.parameter_server"
SERVER, TRAINER = "server", "trainer"
LEARNING_RATE = 0.1
EPSILON = 1e-10
THREADS = 2
TIMEOUT_S = 120
TABLES: list[Table] = []  # in the server process; remote calls find the table here


class Table:
    """The rows [V, D] and biases [V] with one accumulator per element."""

    def __init__(self, num_classes: int, dim: int) -> None:
        self.rows = torch.empty(num_classes, dim).uniform_(-(dim**-0.5), dim**-0.5)
        self.biases = torch.zeros(num_classes)
        self.of_rows, self.of_biases = torch.zeros(num_classes, dim), torch.zeros(num_classes)

    def step_(self, ids: Tensor, rows: Tensor, biases: Tensor) -> None:
        """Apply Adagrad to the rows of ids [M]; the gradients of a repeated id are summed first."""
        distinct, place = torch.unique(ids, return_inverse=True)
        for values, accumulator, gradient in ((self.rows, self.of_rows, rows), (self.biases, self.of_biases, biases)):
            summed = torch.zeros(len(distinct), *gradient.shape[1:]).index_add_(0, place, gradient)
            state = accumulator.index_select(0, distinct).addcmul_(summed, summed)
            accumulator.index_copy_(0, distinct, state)
            values.index_add_(0, distinct, summed.div_(state.sqrt_().add_(EPSILON)), alpha=-LEARNING_RATE)


def pull(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [M, D] and biases [M]; runs on the server."""
    table = TABLES[0]
    return table.rows.index_select(0, ids), table.biases.index_select(0, ids)


def push(ids: Tensor, rows: Tensor, biases: Tensor) -> None:
    """Apply the gradients of rows; runs on the server."""
    TABLES[0].step_(ids, rows, biases)


def distinct_log_uniform(rng: np.random.Generator, num_sampled: int, num_classes: int) -> tuple[Tensor, int]:
    """Return the first num_sampled distinct ids of a sequence of log-uniform draws, and the number of draws."""
    count = 3 * num_sampled
    while True:
        drawn = np.exp(rng.random(count) * math.log(num_classes + 1.0)).astype(np.int64) - 1
        ids, first = np.unique(np.minimum(drawn, num_classes - 1), return_index=True)
        if len(ids) >= num_sampled:
            kept = np.argpartition(first, num_sampled - 1)[:num_sampled]
            return torch.from_numpy(ids[kept]), int(first[kept].max()) + 1
        count *= 2


def log_expected(ids: Tensor, num_tries: int, num_classes: int) -> Tensor:
    """Return log Q of distinct log-uniform draws."""
    p = torch.log((ids + 2.0) / (ids + 1.0)) / math.log(num_classes + 1.0)
    return torch.log(-torch.expm1(num_tries * torch.log1p(-p)))


class Trainer:
    """The trainer's side, with the server in a child process."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        torch.set_num_threads(THREADS)
        self.num_sampled, self.num_classes = shape["S"], shape["V"]
        self.rng = np.random.default_rng(0)
        self.batches = tensors(dict(shape))
        self.directory = tempfile.TemporaryDirectory()
        meeting = os.path.join(self.directory.name, "meeting")
        self.server = Child(MODULE, {**shape, "meeting": meeting})
        start_rpc(TRAINER, 1, meeting)
        self.pushed: Any = None

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    def step(self) -> Mapping[str, float]:
        hidden, labels = next(self.batches)
        hidden.grad = None
        sampled, num_tries = distinct_log_uniform(self.rng, self.num_sampled, self.num_classes)
        ids = torch.cat([sampled, labels])
        self.finish()
        rows, biases = rpc.rpc_sync(SERVER, pull, (ids,))
        rows.requires_grad_()
        biases.requires_grad_()
        self._loss(hidden, ids, rows, biases, num_tries).backward()  # type: ignore[no-untyped-call]
        self.pushed = rpc.rpc_async(SERVER, push, (ids, rows.grad, biases.grad))
        return {"wire_bytes": 2 * (ids.nbytes + rows.nbytes + biases.nbytes)}

    def finish(self) -> None:
        """Wait for the pending push, because the next pull must see it."""
        if self.pushed is not None:
            self.pushed.wait()
            self.pushed = None

    def _loss(self, hidden: Tensor, ids: Tensor, rows: Tensor, biases: Tensor, num_tries: int) -> Tensor:
        count = self.num_sampled
        corrected = biases - log_expected(ids, num_tries, self.num_classes)
        true = (hidden * rows[count:]).sum(1) + corrected[count:]
        sampled = torch.addmm(corrected[:count], hidden, rows[:count].T)
        sampled = sampled.masked_fill(ids[:count] == ids[count:, None], -math.inf)
        logits = torch.cat([true[:, None], sampled], 1)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    def close(self) -> None:
        """End the server."""
        rpc.shutdown(graceful=False)
        self.server.stop()
        self.directory.cleanup()


def start_rpc(name: str, rank: int, meeting: str) -> None:
    """Join the two processes over TCP.

    Torch's first choice, shared memory, keeps a core busy in each process while it waits. That made it slower, and
    would also slow down the side that is measured in between.
    """
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{meeting}", rpc_timeout=TIMEOUT_S, _transports=["uv"], _channels=["basic"]
    )
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)  # type: ignore[no-untyped-call]


def run_server(shape: Mapping[str, Any]) -> None:
    """Serve the table until stdin closes."""
    torch.set_num_threads(THREADS)
    TABLES.append(Table(shape["V"], shape["D"]))
    # Reported before joining: joining waits for the trainer, which waits for this report.
    serve_child({"ready": True}, lambda: start_rpc(SERVER, 0, shape["meeting"]))
    rpc.shutdown(graceful=False)


if __name__ == "__main__":
    main(Trainer, run_server)
