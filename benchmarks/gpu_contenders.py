"""The contenders on a GPU: each has one whole softmax step, forward + backward + SGD, over the same rows and batch.

A step returns the mean loss of its batch before the update.
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
    """Inputs of every contender: hidden [N, D], rows [V, D] and labels [N] on one device; never modified."""

    hidden: Tensor
    rows: Tensor
    labels: Tensor


def problem(n: int, d: int, v: int, dtype: str, device: str) -> Problem:
    """Return a random batch, and rows initialised like a table's: uniform on +-1/sqrt(D)."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device).to(kind)
    rows = torch.empty(v, d, dtype=kind, device=device).uniform_(-(d**-0.5), d**-0.5, generator=generator)
    return Problem(hidden, rows, torch.randint(v, (n,), generator=generator, device=device))


def ours(given: Problem) -> Step:
    """Return a step of one shard that owns all classes, scored and updated as in a worker."""
    device, (num_classes, dim) = given.hidden.device, given.rows.shape
    initializer, optimizer = Initializer("zeros", 0.0, 0), OptimizerSpec("sgd")
    dtype = str(given.rows.dtype).removeprefix("torch.")
    spec = TableSpec("gpu", num_classes, dim, dtype, False, Placement("div", num_classes, 1), initializer, optimizer)
    with torch.inference_mode(), on(device):
        table = ShardTable(spec, 0, 1)
        table.fill_()
        table.weights.copy_(given.rows)
        # Labels and hidden are as the front end sends them; hidden is in the table's compute dtype.
        hidden, n = given.hidden.to(table.compute_dtype), len(given.labels)
        ones = torch.ones(n)
        g = ones / n

    def step() -> Tensor:
        with torch.inference_mode(), on(device):
            # Each step has a new part, as it would with a new batch.
            part = Part(Batch(hidden, given.labels[:, None], ones[:, None], ones), None)
            score = table.score(part, True, keep=True)
            lse, version = score.statistics.lse, table.version + 1
            key = StepKey("gpu", version, b"")
            table.apply_(Record(version, key, LEARNING_RATE, 0, (part,), (Upstream(lse, g),)))
            return (lse - score.target.target_logit).mean()

    return step


def on(device: torch.device) -> Any:
    """Return a context in which new tensors are created on the device, as in a worker."""
    return nullcontext() if device.type == "cpu" else device


def local(loss_of: Callable[[], LossOf]) -> Callable[[Problem], Step]:
    """Return a contender whose rows are a torch parameter; its loss is imported or compiled only when it is built."""

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
    """Return the mean loss, written as in a trainer."""
    return F.cross_entropy(hidden @ rows.T, labels)


def compiled() -> LossOf:
    """Return `cross_entropy` compiled by torch.compile."""
    return torch.compile(cross_entropy, dynamic=False)


def reference_path() -> LossOf:
    """Return torch's own function, to be called without options."""
    return F.linear_cross_entropy


def chunked() -> LossOf:
    """Return torch's own function with its chunked path, which never materialises [N, V]."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, rows, labels: F.linear_cross_entropy(hidden, rows, labels, options=options)


def liger() -> LossOf:
    """Return Liger's fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, rows, labels: fused(rows, hidden, labels)


def cut(impl: str) -> Callable[[], LossOf]:
    """Return the loss of Cut Cross-Entropy; "cce", its default, drops small gradients, "cce_exact" does not."""

    def loss_of() -> LossOf:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, rows, labels: linear_cross_entropy(hidden, rows, labels, impl=impl)

    return loss_of


COMPILED = "torch.compile of the eager loss"
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
