"""Optimizers over touched rows follow torch.optim step by step; rows that are not touched stay unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from shardloss_server.frontend.request import SampledSoftmax, SampledValues
from shardloss_server.numerics import reference
from shardloss_server.numerics.optimizer import OptimizerSpec, State, fill_state_, new_state, update_
from torch import Tensor

V, D, NUM_STEPS = 11, 5, 50
RATE = 0.1
MakeCut = Callable[..., Any]
MakeTorch = Callable[[list[Tensor]], torch.optim.Optimizer]

ADAM = OptimizerSpec("adam", beta1=0.9, beta2=0.99, eps=1e-8)
BETAS = (0.9, 0.99)
ADAGRAD = OptimizerSpec("adagrad", eps=1e-10)

DENSE: dict[str, tuple[OptimizerSpec, MakeTorch]] = {
    "sgd": (OptimizerSpec("sgd"), lambda p: torch.optim.SGD(p, RATE)),
    "sgd, weight decay": (
        OptimizerSpec("sgd", weight_decay=0.03),
        lambda p: torch.optim.SGD(p, RATE, weight_decay=0.03),
    ),
    "sgd, momentum": (OptimizerSpec("sgd", momentum=0.9), lambda p: torch.optim.SGD(p, RATE, momentum=0.9)),
    "sgd, momentum and weight decay": (
        OptimizerSpec("sgd", momentum=0.9, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=0.03),
    ),
    "sgd, nesterov": (
        OptimizerSpec("sgd", momentum=0.9, nesterov=True, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True, weight_decay=0.03),
    ),
    "adagrad": (ADAGRAD, lambda p: torch.optim.Adagrad(p, RATE)),
    "adagrad, initial accumulator": (
        replace(ADAGRAD, initial_accumulator_value=0.1, eps=1e-3),
        lambda p: torch.optim.Adagrad(p, RATE, initial_accumulator_value=0.1, eps=1e-3),
    ),
    "adam": (ADAM, lambda p: torch.optim.Adam(p, RATE, betas=BETAS)),
    "adam, weight decay": (
        replace(ADAM, weight_decay=0.03, eps=1e-3),
        lambda p: torch.optim.Adam(p, RATE, betas=BETAS, weight_decay=0.03, eps=1e-3),
    ),
    "adamw": (
        replace(ADAM, kind="adamw", weight_decay=0.03),
        lambda p: torch.optim.AdamW(p, RATE, betas=BETAS, weight_decay=0.03),
    ),
    "adamw, no decay": (
        replace(ADAM, kind="adamw"),
        lambda p: torch.optim.AdamW(p, RATE, betas=BETAS, weight_decay=0.0),
    ),
}
SPARSE: dict[str, tuple[OptimizerSpec, MakeTorch]] = {
    "sparse_adam": (
        replace(ADAM, kind="sparse_adam"),
        lambda p: torch.optim.SparseAdam(p, RATE, betas=BETAS),
    ),
    "sparse_adam, large eps": (
        replace(ADAM, kind="sparse_adam", eps=1e-2),
        lambda p: torch.optim.SparseAdam(p, RATE, betas=BETAS, eps=1e-2),
    ),
    "adagrad": (ADAGRAD, lambda p: torch.optim.Adagrad(p, RATE)),
    "sgd": (OptimizerSpec("sgd"), lambda p: torch.optim.SGD(p, RATE)),
}


def first_state(spec: OptimizerSpec, num_rows: int, dim: int, dtype: torch.dtype) -> State:
    """Return the state of num_rows rows before any step."""
    state = new_state(spec, num_rows, dim, dtype)
    fill_state_(spec, state, 0, num_rows)
    return state


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def rate_at(step: int) -> float:
    """Return a learning rate that changes with the step, as under a scheduler."""
    return RATE / (1 + 0.1 * step)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", DENSE)
def test_steps_equal_torch_optim(name: str) -> None:
    """50 steps in float64 over all rows, with a changing learning rate, equal torch's to 1e-12."""
    spec, make = DENSE[name]
    rows = randn(V, D)
    parameter = torch.nn.Parameter(rows.clone())
    optimizer = make([parameter])
    state = first_state(spec, V, D, torch.float64)
    for step in range(1, NUM_STEPS + 1):
        gradient = randn(V, D)
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate_at(step)
        optimizer.step()
        update_(spec, rows, gradient, state, rate_at(step), step)
        assert_close(rows, parameter.detach())


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_steps_equal_torch_optim(name: str) -> None:
    """50 steps over changing subsets of rows equal torch's over sparse gradients; the step count is the table's."""
    spec, make = SPARSE[name]
    rows = randn(V, D)
    parameter = torch.nn.Parameter(rows.clone())
    optimizer = make([parameter])
    state = first_state(spec, V, D, torch.float64)
    for step in range(1, NUM_STEPS + 1):
        index, gradient = torch.randperm(V)[:4].sort().values, randn(4, D)
        with torch.sparse.check_sparse_tensor_invariants():
            parameter.grad = torch.sparse_coo_tensor(index[None], gradient, (V, D))
            optimizer.step()
        of_rows = {name: value[index] for name, value in state.items()}
        changed = rows[index]
        update_(spec, changed, gradient, of_rows, RATE, step)
        rows[index] = changed
        for entry, value in of_rows.items():
            state[entry][index] = value
        assert_close(rows, parameter.detach())


@pytest.mark.parametrize("initial", [0.0, 0.1])
def test_row_adagrad_holds_one_sum_a_row(initial: float) -> None:
    """As in FBGEMM's exact_row_wise_adagrad, sum += mean over D of grad^2; row -= lr * grad / (sqrt(sum) + eps)."""
    spec = OptimizerSpec("row_adagrad", initial_accumulator_value=initial, eps=1e-3)
    rows = randn(V, D)
    expected, sums = rows.tolist(), [initial] * V
    state = first_state(spec, V, D, torch.float64)
    assert {name: tuple(value.shape) for name, value in state.items()} == {"sum": (V, 1)}
    for step in range(1, NUM_STEPS + 1):
        gradient = randn(V, D)
        update_(spec, rows, gradient.clone(), state, RATE, step)
        for row, g in enumerate(gradient.tolist()):
            sums[row] += sum(x * x for x in g) / D
            expected[row] = [w - RATE * x / (sums[row] ** 0.5 + 1e-3) for w, x in zip(expected[row], g, strict=True)]
    assert_close(rows, torch.tensor(expected, dtype=torch.float64))


# Through a table


LAZY = [*(spec for spec, _ in DENSE.values()), SPARSE["sparse_adam"][0], OptimizerSpec("row_adagrad", eps=1e-10)]


def shards_of(cut: Any) -> list[Any]:
    """Return the shard tables of the workers, in shard order."""
    tables: dict[int, Any] = {}
    for worker in cut.workers:
        tables.update(worker._tables["table"])
    return [tables[k] for k in sorted(tables)]


def everything(cut: Any) -> list[Tensor]:
    """Return rows, biases and both states of all shards, one row per class ("div": shards in class order)."""
    shards = shards_of(cut)
    found = [torch.cat([s.weights for s in shards]), torch.cat([s.biases for s in shards])]
    for state in ("weight_state", "bias_state"):
        found += [torch.cat([getattr(s, state)[name] for s in shards]) for name in getattr(shards[0], state)]
    return [value.clone() for value in found]


@pytest.mark.parametrize("spec", LAZY, ids=lambda spec: f"{spec.kind}-{spec.momentum}-{spec.weight_decay}")
def test_untouched_rows_keep_every_bit(make_cut: MakeCut, spec: OptimizerSpec) -> None:
    """A sampled step changes rows, biases and state of its candidates and labels only.

    Weight decay and momentum also wait until a row is touched again.
    """
    cut = make_cut(randn(V, D), randn(V), num_shards=3, optimizer=spec)

    def commit(labels: list[int], ids: list[int]) -> None:
        counts = torch.ones(len(labels), 1).double(), torch.ones(len(ids)).double()
        values = SampledValues(torch.tensor(ids), *counts)
        sampled = SampledSoftmax(values, "every")
        part = cut.plan(randn(len(labels), D), torch.tensor(labels)[:, None], sampled=sampled)
        cut.apply([part], [randn(len(labels))], RATE)

    commit(list(range(V)), list(range(V)))  # gives every row a state
    before = everything(cut)
    commit([2, 10], [5, 7, 5])
    touched = torch.zeros(V, dtype=torch.bool)
    touched[[2, 5, 7, 10]] = True
    for old, new in zip(before, everything(cut), strict=True):
        assert torch.equal(old[~touched], new[~touched])
        assert (old[touched] != new[touched]).all()


@pytest.mark.parametrize("name", DENSE)
def test_training_a_table_is_training_a_layer(make_cut: MakeCut, name: str) -> None:
    """50 commits of the exact softmax give the weights and biases of 50 torch.optim steps on a linear layer."""
    spec, make = DENSE[name]
    weights, biases = torch.nn.Parameter(randn(V, D)), torch.nn.Parameter(randn(V))
    optimizer = make([weights, biases])
    cut = make_cut(weights.detach(), biases.detach(), num_shards=3, optimizer=spec)
    for step in range(NUM_STEPS):
        hidden, labels, g = randn(7, D), torch.randint(0, V, (7, 1)), randn(7).abs()
        optimizer.param_groups[0]["lr"] = rate_at(step)
        optimizer.zero_grad()
        loss = reference.full_softmax(weights, biases, hidden, labels, torch.ones(7, 1, dtype=torch.float64))
        (g * loss).sum().backward()
        optimizer.step()
        cut.apply([cut.plan(hidden, labels)], [g], rate_at(step))
    served_weights, served_biases = cut.read()
    torch.testing.assert_close(served_weights, weights.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(served_biases, biases.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("initial", [0.0, 0.1])
def test_biases_of_a_row_wise_table_have_a_sum_of_their_own(make_cut: MakeCut, initial: float) -> None:
    """Under row_adagrad a bias is a row of one column, which is plain Adagrad."""
    spec = OptimizerSpec("row_adagrad", initial_accumulator_value=initial, eps=1e-10)
    weights, biases = randn(V, D), torch.nn.Parameter(randn(V))
    optimizer = torch.optim.Adagrad([biases], RATE, initial_accumulator_value=initial)
    cut = make_cut(weights, biases.detach(), num_shards=3, optimizer=spec)
    for _ in range(5):
        hidden, labels = torch.zeros(7, D).double(), torch.randint(0, V, (7, 1))  # rows get no gradient, biases do
        optimizer.zero_grad()
        reference.full_softmax(weights, biases, hidden, labels, torch.ones(7, 1).double()).sum().backward()
        optimizer.step()
        cut.apply([cut.plan(hidden, labels)], [torch.ones(7)], RATE)
    assert torch.equal(cut.read()[0], weights)
    assert_close(cut.read()[1], biases.detach())


@pytest.mark.parametrize("name", ["adagrad", "adam", "sparse_adam"])
def test_squares_that_overflow_or_vanish_leave_rows_finite(name: str) -> None:
    """As in torch, a gradient whose square is inf moves nothing, and zero and denormal squares leave rows finite."""
    spec = OptimizerSpec(name, beta1=0.9, beta2=0.999, eps=1e-8)
    rows = torch.ones(4, 3)
    gradient = torch.tensor([1e30, 1e-30, 0.0, 1.0])[:, None].expand(4, 3).clone()
    state = first_state(spec, 4, 3, torch.float32)
    for step in (1, 2):
        update_(spec, rows, gradient.clone(), state, RATE, step)
    assert torch.isfinite(rows).all()
    assert (rows[0] == 1).all()
    assert (rows[2] == 1).all()
    assert (rows[3] < 1).all()


def test_a_rate_near_the_largest_number_does_not_raise() -> None:
    """The step succeeds even if bias correction would overflow the rate; rows without a gradient are unchanged."""
    spec = OptimizerSpec("adam", beta1=0.9, beta2=0.999, eps=1e-8)
    rows, state = torch.ones(2, 3), first_state(spec, 2, 3, torch.float32)
    update_(spec, rows, torch.zeros(2, 3), state, 1e38, 1)
    assert (rows == 1).all()
