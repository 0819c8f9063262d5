"""One shard's full-softmax step against the three bare GEMMs that it needs, alternating, on one thread, no service.

The shape: N, D, V (of the shard: half of the table's), dtype. A step's "ms" is the time of `ShardTable.score` and of
`apply_` with SGD. gemm_ms is the time of the same products by torch.mm into preallocated outputs, in chunks of the
vocabulary of the size that is fastest here:

    logits [N, C] = h @ W_c.T;  hidden gradient [N, D] += E @ W_c;  row gradient [C, D] = E.T @ h

The GEMM times are extra numbers rather than those of a second process, so that both see the same state of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from shardloss.allocator import keep_freed_memory
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Batch, Part, Record, StepKey, TableSpec, Upstream
from shardloss_server.shard.table import ShardTable
from torch import Tensor

from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_batches import LOSS_DTYPES, tensors

NUM_SHARDS = 2
LEARNING_RATE = 0.1
CHUNKS = (1024, 2048, 4096, 8192, 16384, 65536)  # a shard's own chunk is among them
TRIES = 2


class Gemms:
    """The three products over rows [V, D], with every output preallocated."""

    def __init__(self, rows: Tensor, n: int) -> None:
        self.rows, self.row_grad = rows, torch.empty_like(rows)
        self.hidden_grad = torch.zeros(n, rows.shape[1], dtype=rows.dtype)
        self.n, self.chunk = n, CHUNKS[0]
        self.logits = rows.new_empty(0)

    def take_fastest(self, hidden: Tensor) -> None:
        """Time every chunk size and choose the fastest."""
        times = {}
        for chunk in CHUNKS:
            self.set_chunk(chunk)
            times[chunk] = min(timed(lambda: self.step(hidden)) for _ in range(TRIES))
        self.set_chunk(min(times, key=lambda chunk: times[chunk]))

    def set_chunk(self, chunk: int) -> None:
        """Allocate the logits [N, C] of a chunk as zeros: they are multiplied, so they must be finite."""
        self.chunk = min(chunk, len(self.rows))
        self.logits = self.rows.new_zeros(self.n * self.chunk)

    def step(self, hidden: Tensor) -> None:
        """Run three GEMMs per chunk."""
        for rows, row_grad in zip(
            torch.split(self.rows, self.chunk), torch.split(self.row_grad, self.chunk), strict=True
        ):
            logits = self.logits[: self.n * len(rows)].view(self.n, len(rows))
            torch.mm(hidden, rows.T, out=logits)
            self.hidden_grad.addmm_(logits, rows)
            torch.mm(logits.T, hidden, out=row_grad)


def timed(work: Callable[[], None]) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


class ShardFloor:
    """Shard 0 of a table of twice the classes, and its GEMMs over rows of the same size."""

    def __init__(self, shape: dict[str, Any]) -> None:
        keep_freed_memory()
        torch.set_num_threads(1)
        num_classes, dim = NUM_SHARDS * int(shape["V"]), int(shape["D"])
        dtype = str(shape["dtype"])
        placement = Placement("div", num_classes, NUM_SHARDS)
        initializer = Initializer("uniform", dim**-0.5, 0)
        spec = TableSpec("floor", num_classes, dim, dtype, False, placement, initializer, OptimizerSpec("sgd"))
        with torch.inference_mode():
            self.table = ShardTable(spec, 0, 1)
            self.table.fill_()
            # Hidden is in the table's compute dtype, as the front end sends it; labels are of the whole table.
            self.batches = tensors({**shape, "V": num_classes, "dtype": "float32"})
            self.gemms = Gemms(self.table.weights.to(LOSS_DTYPES[dtype], copy=True), int(shape["N"]))
            self.gemms.take_fastest(self._next()[0].to(self.gemms.rows.dtype))

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    def step(self) -> Mapping[str, float]:
        """Run one step of the shard and one of the GEMMs, and return both times in ms."""
        with torch.inference_mode():
            hidden, labels = self._next()
            ours = timed(lambda: self._shard_step(hidden, labels))
            in_dtype = hidden.to(self.gemms.rows.dtype)
            gemms = timed(lambda: self.gemms.step(in_dtype))
            return {"ms": ours, "gemm_ms": gemms, "gemm_chunk": self.gemms.chunk}

    def _next(self) -> tuple[Tensor, Tensor]:
        hidden, labels = next(self.batches)
        return hidden.detach(), labels

    def _shard_step(self, hidden: Tensor, labels: Tensor) -> None:
        n = len(labels)
        ones = torch.ones(n)
        part = Part(Batch(hidden, labels[:, None], ones[:, None], ones), None)
        lse = self.table.score(part, True, keep=True).statistics.lse
        version = self.table.version + 1
        upstream = Upstream(lse, torch.full((n,), 1.0 / n))
        self.table.apply_(Record(version, StepKey("floor", version, b""), LEARNING_RATE, 0, (part,), (upstream,)))


if __name__ == "__main__":
    serve(ShardFloor)
