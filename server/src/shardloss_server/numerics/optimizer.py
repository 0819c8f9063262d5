"""Optimizers over touched rows.

Each is torch.optim's formula applied to the rows of a step and to nothing else (lazy semantics): a row that no
candidate or label touched keeps its value and its state. Bias correction counts the table's commits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """kind and its numbers, every default filled in; fields that a kind does not use are 0."""

    kind: str
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0


KINDS = ("sgd", "adagrad", "row_adagrad", "adam", "adamw", "sparse_adam")


def initial_state(spec: OptimizerSpec, num_rows: int, dim: int, dtype: torch.dtype) -> State:
    """State of num_rows rows before any step; each entry is [num_rows, D], or [num_rows, 1] where one a row is held."""
    if spec.kind == "sgd":
        return {"momentum": torch.zeros(num_rows, dim, dtype=dtype)} if spec.momentum else {}
    if spec.kind in ("adagrad", "row_adagrad"):
        width = dim if spec.kind == "adagrad" else 1
        return {"sum": torch.full((num_rows, width), spec.initial_accumulator_value, dtype=dtype)}
    return {name: torch.zeros(num_rows, dim, dtype=dtype) for name in ("first_moment", "second_moment")}


def updated(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """New rows [M, D] and their new state after one step.

    gradient [M, D] is summed over everything that touched a row; step counts the table's commits from 1.
    """
    return UPDATES[spec.kind](spec, rows, gradient, state, learning_rate, step)


def sgd(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """buf = momentum * buf + grad; p -= lr * buf (torch.optim.SGD, dampening 0; nesterov: grad + momentum * buf)."""
    if spec.weight_decay:
        gradient = gradient + spec.weight_decay * rows
    if not spec.momentum:
        return rows - learning_rate * gradient, {}
    momentum = spec.momentum * state["momentum"] + gradient
    direction = gradient + spec.momentum * momentum if spec.nesterov else momentum
    return rows - learning_rate * direction, {"momentum": momentum}


def adagrad(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """sum += grad^2; p -= lr * grad / (sqrt(sum) + eps) (torch.optim.Adagrad)."""
    total = state["sum"] + gradient * gradient
    return rows - learning_rate * gradient / (total.sqrt() + spec.eps), {"sum": total}


def row_adagrad(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """As adagrad with sum [M, 1] += mean over D of grad^2 (row-wise Adagrad of FBGEMM, "exact_row_wise_adagrad")."""
    total = state["sum"] + (gradient * gradient).mean(1, keepdim=True)
    return rows - learning_rate * gradient / (total.sqrt() + spec.eps), {"sum": total}


def moments(spec: OptimizerSpec, gradient: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """m = b1 m + (1 - b1) grad; v = b2 v + (1 - b2) grad^2."""
    first = spec.beta1 * state["first_moment"] + (1 - spec.beta1) * gradient
    second = spec.beta2 * state["second_moment"] + (1 - spec.beta2) * gradient * gradient
    return first, second


def adam(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps).

    adam adds weight_decay * p to the gradient, adamw scales p by 1 - lr * weight_decay first.
    """
    if spec.kind == "adam" and spec.weight_decay:
        gradient = gradient + spec.weight_decay * rows
    if spec.kind == "adamw":
        rows = rows * (1 - learning_rate * spec.weight_decay)
    first, second = moments(spec, gradient, state)
    denominator = second.sqrt() / (1 - spec.beta2**step) ** 0.5 + spec.eps
    rows = rows - learning_rate / (1 - spec.beta1**step) * first / denominator
    return rows, {"first_moment": first, "second_moment": second}


def sparse_adam(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> tuple[Tensor, State]:
    """p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps) (torch.optim.SparseAdam)."""
    first, second = moments(spec, gradient, state)
    step_size = learning_rate * (1 - spec.beta2**step) ** 0.5 / (1 - spec.beta1**step)
    rows = rows - step_size * first / (second.sqrt() + spec.eps)
    return rows, {"first_moment": first, "second_moment": second}


Update = Callable[[OptimizerSpec, Tensor, Tensor, State, float, int], tuple[Tensor, State]]
UPDATES: dict[str, Update] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "row_adagrad": row_adagrad,
    "adam": adam,
    "adamw": adam,
    "sparse_adam": sparse_adam,
}
