"""Tables of bfloat16: bfloat16 products lose little accuracy, and float32 is used if they do not apply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from shardloss_server.numerics import kernel
from shardloss_server.numerics.exponentials import Narrow
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.numerics.transform import Transform
from shardloss_server.placement import Placement
from shardloss_server.shard import rows as shard_rows
from shardloss_server.shard.columns import is_narrow
from shardloss_server.shard.kept import Kept, Room
from shardloss_server.shard.record import Batch, Part, Record, StepKey, TableSpec, Upstream
from shardloss_server.shard.table import ShardTable
from torch import Tensor

V, D, N = 507, 33, 29  # blocks of 64 rows: seven full ones and a remainder; no size divides another
STANDARD_DEVIATIONS = [0.5, 8.0, 60.0]
RATE = 0.3


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force bfloat16 products. A processor without them makes torch compute them slowly, but with the same rounding."""
    monkeypatch.setattr(shard_rows, "multiplies_bfloat16", lambda _: True)
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 64 * N)


def table_of(spread: float, bias: bool = False, dtype: str = "bfloat16") -> ShardTable:
    """Return one shard whose logits against unit normal hidden have a standard deviation of about `spread`."""
    start = Initializer("normal", spread / D**0.5, 3)
    spec = TableSpec("t", V, D, dtype, bias, Placement("div", V, 1), start, OptimizerSpec("sgd"))
    table = ShardTable(spec, 0, 8)
    table.fill_()
    return table


def part_of(objective: Objective | None = None) -> Part:
    labels = torch.randint(0, V, (N, 1))
    batch = Batch(torch.randn(N, D), labels, torch.ones(N, 1), torch.ones(N))
    return Part(batch, None, objective or Objective())


class Exact:
    """Loss and gradients in float64 for the same rows and hidden."""

    def __init__(self, table: ShardTable, part: Part, g: Tensor) -> None:
        rows = table.weights.double().requires_grad_()
        hidden = part.batch.hidden.double().requires_grad_()
        logits = hidden @ rows.T
        self.losses = torch.nn.functional.cross_entropy(logits, part.batch.labels[:, 0], reduction="none")
        (self.losses * g.double()).sum().backward()
        self.rows, self.hidden = rows.grad, hidden.grad
        rounded = (part.batch.hidden.bfloat16() @ table.weights.T).double()
        self.plain = torch.nn.functional.cross_entropy(rounded, part.batch.labels[:, 0], reduction="none")


def losses_of(table: ShardTable, part: Part) -> Tensor:
    found = table.score(part, True)
    return found.statistics.lse - found.target.target_logit


@pytest.mark.parametrize("spread", STANDARD_DEVIATIONS)
def test_losses_lose_less_than_rounded_logits_lose(spread: float) -> None:
    """The root mean square error against float64, for the same rows and exact hidden, is below that of rounded logits.

    If logits are small, the rounding of hidden is the only error, and both have it.
    """
    table, part = table_of(spread), part_of()
    exact = Exact(table, part, torch.ones(N))
    assert is_narrow(table, part)
    error = (losses_of(table, part) - exact.losses).square().mean().sqrt()
    plain = (exact.plain - exact.losses).square().mean().sqrt()
    assert error <= (0.75 if spread >= 8 else 1.05) * plain, (float(error), float(plain))


@pytest.mark.parametrize("spread", STANDARD_DEVIATIONS)
def test_losses_of_rows_that_fit_well_are_not_negative(spread: float) -> None:
    """If the label has nearly all of the softmax, its logit and the log-sum-exp are rounded alike."""
    table, part = table_of(spread), part_of()
    best = (part.batch.hidden @ table.weights.float().T).argmax(1, keepdim=True)
    confident = dataclasses.replace(part, batch=dataclasses.replace(part.batch, labels=best))
    assert losses_of(table, confident).min() >= -0.01


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["anew", "kept"])
@pytest.mark.parametrize("spread", STANDARD_DEVIATIONS)
def test_gradients_are_those_of_float64_to_the_digits_of_bfloat16(spread: float, kept_bytes: int) -> None:
    """Each gradient is off by at most 2^-6 of its norm, whether exponentials are kept or recomputed.

    At 60 sigma the bound is 2^-5, because rounding hidden alone moves a logit by 0.1.
    """
    table, part, g = table_of(spread), part_of(), torch.rand(N)
    table.kept = Kept(Room(kept_bytes))
    exact = Exact(table, part, g)
    score = table.score(part, True, keep=True)
    assert bool(table.kept.of(part).blocks) == bool(kept_bytes)
    found = table.gradient(part, Upstream(score.statistics.lse, g))
    hidden = score.target.subtracted_from_(score.statistics.mean_row.clone()) * g[:, None]
    for mine, truth in ((found.rows, exact.rows), (hidden, exact.hidden)):
        assert torch.linalg.vector_norm(mine - truth) <= (2**-5 if spread > 8 else 2**-6) * torch.linalg.vector_norm(
            truth
        )


def test_a_block_far_above_those_before_it_is_computed_again() -> None:
    """The loss is right even if a block is e^300 above the first one, whose reference would overflow."""
    table, part = table_of(0.5), part_of()
    table.weights[300:] *= 1000
    exact = Exact(table, part, torch.ones(N))
    torch.testing.assert_close(losses_of(table, part), exact.losses, rtol=2**-9, atol=0.05)
    logits = part.batch.hidden @ table.weights.float().T
    assert (logits.amax(1) - logits[:, :64].amax(1) > 89).any()  # exp of the difference overflows float32


def test_a_step_moves_bfloat16_rows_by_the_gradient() -> None:
    """Rows after a step are the rows before it minus lr times the gradient, rounded to an adjacent bfloat16."""
    table, part, g = table_of(8.0), part_of(), torch.rand(N)
    before, exact = table.weights.double(), Exact(table, part, g)
    lse = table.score(part, True).statistics.lse
    table.apply_(Record(1, StepKey("s", 1, b""), RATE, 0, (part,), (Upstream(lse, g),)))
    wanted = before - RATE * exact.rows
    error = torch.linalg.vector_norm(table.weights.double() - wanted)
    assert error <= 2**-7 * torch.linalg.vector_norm(wanted) * 0.6 + 2**-7 * RATE * torch.linalg.vector_norm(exact.rows)


WIDE: list[tuple[str, Callable[[], tuple[ShardTable, Part]]]] = [
    ("biases", lambda: (table_of(1.0, bias=True), part_of())),
    ("float32", lambda: (table_of(1.0, dtype="float32"), part_of())),
    ("soft cap", lambda: (table_of(1.0), part_of(Objective(transform=Transform(soft_cap=5.0))))),
    ("cosines", lambda: (table_of(1.0), part_of(Objective(transform=Transform(normalize=True))))),
    ("logistic", lambda: (table_of(1.0), part_of(Objective("logistic")))),
    ("learned scale", lambda: (table_of(1.0), part_of(Objective(learned_scale=True)))),
]


@pytest.mark.parametrize("make", [case[1] for case in WIDE], ids=[case[0] for case in WIDE])
def test_everything_else_is_computed_in_float32(make: Callable[[], tuple[ShardTable, Part]]) -> None:
    """Tables with biases, other losses and options, and other dtypes do not use bfloat16 products."""
    assert not is_narrow(*make())


@pytest.mark.parametrize("logit", [20_000.0, 30_000.0, 50_000.0, 100_000.0])
def test_logits_beyond_a_reference_are_right_or_refused(logit: float) -> None:
    """The lse is right or nan, never a wrong finite number: 2^x of such logits leaves every range."""
    narrow = Narrow(torch.tensor([[1.0, 0.0]]))
    exponentials, total = narrow.of(torch.tensor([[logit, 0.0], [0.0, 1.0]], dtype=torch.bfloat16))
    lse = float(exponentials.top + total.log())
    assert math.isnan(lse) or abs(lse - logit) < logit / 256


def test_a_distribution_of_one_label_is_that_label() -> None:
    """Target and lse use the same rounded hidden; otherwise losses of well-fitted rows would be negative."""
    table, part = table_of(60.0), part_of()
    labels = (part.batch.hidden @ table.weights.float().T).argmax(1)
    none = torch.zeros(N, 0)
    spread = Part(Batch(part.batch.hidden, none.long(), none, torch.ones(N)), None, distribution="d")
    one_hot = torch.nn.functional.one_hot(labels, V).float()
    target = table.add_labels_(spread, 0, one_hot, None).target.target_logit
    plain = dataclasses.replace(part, batch=dataclasses.replace(part.batch, labels=labels[:, None]))
    losses = table.score(spread, False).statistics.lse - target
    torch.testing.assert_close(losses, losses_of(table, plain), rtol=0, atol=1e-4)
    assert losses.min() >= -0.01
