"""Optimizers over touched rows.

Each is torch.optim's formula applied only to the rows of a step (lazy semantics): a row that no candidate or label
touched keeps its value and its state. Bias correction counts the table's commits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The kind and hyperparameters of an optimizer, defaults filled in; fields that a kind does not use are 0."""

    kind: str
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0


KINDS = ("sgd", "adagrad", "row_adagrad", "adam", "adamw", "sparse_adam")


SUMS_OF_SQUARES = ("sum", "second_moment")  # never negative


def state_widths(spec: OptimizerSpec, dim: int) -> dict[str, int]:
    """Return the width of each state entry (its numbers per row of dim D), ordered by name."""
    if spec.kind == "sgd":
        return {"momentum": dim} if spec.momentum else {}
    if spec.kind in ("adagrad", "row_adagrad"):
        return {"sum": dim if spec.kind == "adagrad" else 1}
    return {"first_moment": dim, "second_moment": dim}


def new_state(spec: OptimizerSpec, num_rows: int, dim: int, dtype: torch.dtype) -> State:
    """Allocate the state of num_rows rows, not filled yet; each entry is [num_rows, W], W from `state_widths`."""
    return {name: torch.empty(num_rows, width, dtype=dtype) for name, width in state_widths(spec, dim).items()}


def fill_state_(spec: OptimizerSpec, state: State, first_row: int, end_row: int) -> None:
    """Overwrite the state of a range of rows with the one before any step: 0, except for the Adagrad kinds."""
    for values in state.values():
        values[first_row:end_row] = spec.initial_accumulator_value


def update_(spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int) -> None:
    """Change rows [M, D] and their state by one step, in place; gradient [M, D] is overwritten.

    gradient is summed over everything that touched a row; step counts the table's commits from 1.
    """
    UPDATES[spec.kind](spec, rows, gradient, state, learning_rate, step)


def sgd_(spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, _step: int) -> None:
    """Apply SGD: buf = momentum * buf + grad; p -= lr * buf (torch.optim.SGD; nesterov: grad + momentum * buf).

    Dampening is 0.
    """
    if spec.weight_decay:
        gradient.add_(rows, alpha=spec.weight_decay)
    if spec.momentum:
        momentum = state["momentum"].mul_(spec.momentum).add_(gradient)
        gradient = gradient.add_(momentum, alpha=spec.momentum) if spec.nesterov else momentum
    rows.sub_(gradient, alpha=learning_rate)


def adagrad_(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, _step: int
) -> None:
    """Apply Adagrad: sum += grad^2; p -= lr * grad / (sqrt(sum) + eps) (torch.optim.Adagrad)."""
    total = state["sum"].addcmul_(gradient, gradient)
    rows.addcdiv_(gradient, root(total).add_(spec.eps), value=-learning_rate)


def row_adagrad_(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, _step: int
) -> None:
    """Apply Adagrad with sum [M, 1] += mean over D of grad^2 (row-wise Adagrad of FBGEMM, "exact_row_wise_adagrad")."""
    total = state["sum"].add_((gradient * gradient).mean(1, keepdim=True))
    rows.addcmul_(gradient, root(total).add_(spec.eps).reciprocal_(), value=-learning_rate)


def moments_(spec: OptimizerSpec, gradient: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Update and return the moments: m = b1 m + (1 - b1) grad; v = b2 v + (1 - b2) grad^2."""
    first = state["first_moment"].mul_(spec.beta1).add_(gradient, alpha=1 - spec.beta1)
    second = state["second_moment"].mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
    return first, second


def adam_(spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int) -> None:
    """Apply Adam: p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps).

    adam adds weight_decay * p to the gradient; adamw first scales p by 1 - lr * weight_decay.
    """
    if spec.kind == "adam" and spec.weight_decay:
        gradient.add_(rows, alpha=spec.weight_decay)
    if spec.kind == "adamw":
        rows.mul_(1 - learning_rate * spec.weight_decay)
    first, second = moments_(spec, gradient, state)
    denominator = root(second).div_((1 - spec.beta2**step) ** 0.5).add_(spec.eps)
    rows.addcdiv_(first / (1 - spec.beta1**step), denominator, value=-learning_rate)


def sparse_adam_(
    spec: OptimizerSpec, rows: Tensor, gradient: Tensor, state: State, learning_rate: float, step: int
) -> None:
    """Apply SparseAdam: p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps) (torch.optim.SparseAdam)."""
    first, second = moments_(spec, gradient, state)
    step_size = learning_rate * (1 - spec.beta2**step) ** 0.5
    rows.addcdiv_(first / (1 - spec.beta1**step), root(second).add_(spec.eps), value=-step_size)


def root(values: Tensor) -> Tensor:
    """Return sqrt(values) of values >= 0, first raised to the smallest normal number (its root is 1e-19 in float32).

    MKL's vector library, which torch uses, takes 8 times as long for 0 and 40 times as long for denormal numbers, which
    sums of squares of small gradients often are.
    """
    return values.clamp(min=torch.finfo(values.dtype).tiny).sqrt_()


Update = Callable[[OptimizerSpec, Tensor, Tensor, State, float, int], None]
UPDATES: dict[str, Update] = {
    "sgd": sgd_,
    "adagrad": adagrad_,
    "row_adagrad": row_adagrad_,
    "adam": adam_,
    "adamw": adam_,
    "sparse_adam": sparse_adam_,
}
