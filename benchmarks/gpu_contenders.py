"""Who is compared on a GPU: one whole softmax step of each, forward + backward + SGD, over the same rows and batch.

A step returns the mean loss of its batch, as it was before the step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Batch, Part, Record, StepKey, TableSpec, Upstream
from shardloss_server.shard.table import ShardTable
from torch import Tensor
from torch.nn import functional as F

LEARNING_RATE = 0.1
OURS = "ours: shard kernels"
Step = Callable[[], Tensor]
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], rows [V, D], labels [N] -> mean loss


@dataclass(frozen=True, slots=True)
class Problem:
    """hidden [N, D], rows [V, D] and labels [N] on one device; nobody changes these."""

    hidden: Tensor
    rows: Tensor
    labels: Tensor


def problem(n: int, d: int, v: int, dtype: str, device: str) -> Problem:
    """A random batch, and rows as a table's: uniform on +-1/sqrt(D)."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device).to(kind)
    rows = torch.empty(v, d, dtype=kind, device=device).uniform_(-(d**-0.5), d**-0.5, generator=generator)
    return Problem(hidden, rows, torch.randint(v, (n,), generator=generator, device=device))


def ours(given: Problem) -> Step:
    """One shard of all classes, scored and stepped as a worker does."""
    device, (num_classes, dim) = given.hidden.device, given.rows.shape
    initializer, optimizer = Initializer("zeros", 0.0, 0), OptimizerSpec("sgd")
    dtype = str(given.rows.dtype).removeprefix("torch.")
    spec = TableSpec("gpu", num_classes, dim, dtype, False, Placement("div", num_classes, 1), initializer, optimizer)
    with torch.inference_mode(), on(device):
        table = ShardTable(spec, 0, 1)
        table.weights.copy_(given.rows)
        # Labels and hidden as the front end hands them on; hidden is in the table's compute dtype.
        hidden, n = given.hidden.to(table.compute_dtype), len(given.labels)
        ones = torch.ones(n)
        g = ones / n

    def step() -> Tensor:
        with torch.inference_mode(), on(device):
            # A part of its own in each step, as batches come.
            part = Part(Batch(hidden, given.labels[:, None], ones[:, None], ones), None)
            score = table.score(part, True, keep=True)
            lse, version = score.statistics.lse, table.version + 1
            key = StepKey("gpu", version, b"")
            table.apply_(Record(version, key, LEARNING_RATE, 0, (part,), (Upstream(lse, g),)))
            return (lse - score.target.target_logit).mean()

    return step


def on(device: torch.device) -> Any:
    """New tensors are made there, as a worker has it."""
    return nullcontext() if device.type == "cpu" else device


def local(loss_of: Callable[[], LossOf]) -> Callable[[Problem], Step]:
    """A contender whose rows are a torch parameter; its loss is imported, or compiled, only when it is built."""

    def build(given: Problem) -> Step:
        loss = loss_of()
        hidden = given.hidden.clone().requires_grad_()
        rows = torch.nn.Parameter(given.rows.clone())
        optimizer = torch.optim.SGD([rows], lr=LEARNING_RATE)

        def step() -> Tensor:
            hidden.grad = None
            optimizer.zero_grad(set_to_none=True)
            found = loss(hidden, rows, given.labels)
            found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return found.detach()

        return step

    return build


def cross_entropy(hidden: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """As a trainer writes it."""
    return F.cross_entropy(hidden @ rows.T, labels)


def compiled() -> LossOf:
    """torch.compile of the same."""
    return torch.compile(cross_entropy, dynamic=False)


def reference_path() -> LossOf:
    """torch's own function as it is called without options."""
    return F.linear_cross_entropy


def chunked() -> LossOf:
    """torch's own function by its chunked path, which holds no [N, V]."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, rows, labels: F.linear_cross_entropy(hidden, rows, labels, options=options)


def liger() -> LossOf:
    """Liger's fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, rows, labels: fused(rows, hidden, labels)


def cut(impl: str) -> Callable[[], LossOf]:
    """Cut Cross-Entropy; "cce", its default, leaves small gradients out, "cce_exact" does not."""

    def loss_of() -> LossOf:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, rows, labels: linear_cross_entropy(hidden, rows, labels, impl=impl)

    return loss_of


COMPILED = "torch.compile of it"
CONTENDERS: dict[str, Callable[[Problem], Step]] = {
    OURS: ours,
    "eager F.cross_entropy(h @ W.T)": local(lambda: cross_entropy),
    COMPILED: local(compiled),
    "F.linear_cross_entropy": local(reference_path),
    "F.linear_cross_entropy, chunked": local(chunked),
    "Liger": local(liger),
    "Cut Cross-Entropy": local(cut("cce")),
    "Cut Cross-Entropy, exact": local(cut("cce_exact")),
}
