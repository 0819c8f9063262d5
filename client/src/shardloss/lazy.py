"""Logits of a remote table that nobody holds: a shape, and exact answers about chosen classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shardloss import types
from shardloss.autograd import FLOAT_DTYPES, to_numpy, to_torch
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.table import Table

TENSOR_METHODS = frozenset(dir(Tensor))


class Unheld:
    """A value [..., V] of which nothing is held; what would need all of it is refused by name."""

    shape: torch.Size

    def dim(self) -> int:
        """The rank of shape."""
        return len(self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)})"

    def __getattr__(self, name: str) -> NoReturn:
        hint = f": {self._refusal(name)}" if name in TENSOR_METHODS else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_options: Any) -> NoReturn:
        raise NotSupported(cls._refusal(f"torch's {getattr(function, '__name__', function)}"))

    @classmethod
    def _refusal(cls, what: str) -> str:
        return (
            f"{what} would hold all [..., V] values of a {cls.__name__}; ask it for probabilities(class_ids) or "
            "probability_chunks(size), give it to a loss of shardloss.compat.paddle, or call table.softmax(), "
            "table.top_k or table.score; a scale or a soft cap goes into table.logits(hidden, transform)"
        )


def refused(name: str) -> Any:
    """A special method that raises NotSupported."""

    def refuse(self: Unheld, *_args: Any, **_options: Any) -> NoReturn:
        raise NotSupported(self._refusal(name))

    return refuse


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
REFUSED = ["array", "getitem", "setitem", "len", "iter", "contains", "float", "int", "bool", "index", "neg", "abs"]
REFUSED += ["lt", "le", "gt", "ge", *BINARY, *(f"r{name}" for name in BINARY)]
for _name in REFUSED:
    setattr(Unheld, f"__{_name}__", refused(f"__{_name}__"))


class LazyLogits(Unheld):
    """transform(hidden @ rows.T + biases) [..., V] of hidden [..., D], of which nothing is held.

    A loss of shardloss.compat.paddle over it is computed by the service, is differentiable in hidden and trains the
    table. Its probabilities are those of the table when they are asked, and carry no gradient.
    """

    def __init__(self, table: Table, hidden: Tensor, transform: types.LogitTransform | None = None) -> None:
        check_hidden(table, hidden)
        self.table, self.hidden = table, hidden
        self.transform = transform or types.LogitTransform()
        self.shape = torch.Size([*hidden.shape[:-1], table.spec.num_classes])

    def probabilities(self, class_ids: Sequence[int] | Tensor) -> Tensor:
        """softmax(logits)[..., class_ids] of class_ids [S], or of each row's own [..., S]; on hidden's device.

        Costs a pass over the table. float64 for a float64 table, else float32.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `Table.score`.
        """
        log_probs = asked(self, class_ids, want_log_probs=True)[1]
        assert log_probs is not None
        return log_probs.exp()

    def probability_chunks(self, size: int) -> Iterator[tuple[range, Tensor]]:
        """(class ids, their probabilities [..., chunk]) of size classes at a time, 0 to V - 1.

        Costs a pass over the table, and one more over the rows of the chunks. The denominator is that of the first
        chunk: where the table is trained meanwhile, later ones do not fit it.

        Raises:
            InvalidArgument: size is not positive; else as `probabilities`.
        """
        lse = None
        for class_ids in ranges(self.shape[-1], size):
            logits, log_probs = asked(self, class_ids, want_log_probs=lse is None)
            if lse is None:
                assert log_probs is not None
                best = log_probs.argmax(-1, keepdim=True)
                lse = logits.gather(-1, best) - log_probs.gather(-1, best)
            yield class_ids, (logits - lse if log_probs is None else log_probs).exp()


class LazySoftmax(Unheld):
    """softmax(logits) [..., V] of lazy logits, of which nothing is held either."""

    def __init__(self, logits: LazyLogits) -> None:
        self.logits, self.shape = logits, logits.shape

    def probabilities(self, class_ids: Sequence[int] | Tensor) -> Tensor:
        """As `LazyLogits.probabilities`."""
        return self.logits.probabilities(class_ids)

    def probability_chunks(self, size: int) -> Iterator[tuple[range, Tensor]]:
        """As `LazyLogits.probability_chunks`."""
        return self.logits.probability_chunks(size)


def check_hidden(table: Table, hidden: Tensor) -> None:
    """hidden is a float tensor [..., D].

    Raises:
        InvalidArgument: it is not.
    """
    dim = table.spec.dim
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOAT_DTYPES:
        what = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InvalidArgument(f"hidden is {what}; a torch tensor of floats is needed", field="hidden")
    if hidden.dim() == 0 or hidden.shape[-1] != dim:
        raise InvalidArgument(f"hidden has shape {list(hidden.shape)}; [..., {dim}] is needed", field="hidden")


def ranges(num_classes: int, size: int) -> Iterator[range]:
    """0 to V - 1 in ranges of size."""
    if size < 1:
        raise InvalidArgument(f"size = {size} is not positive", field="size")
    for start in range(0, num_classes, size):
        yield range(start, min(start + size, num_classes))


def asked(
    logits: LazyLogits, class_ids: Sequence[int] | Tensor, *, want_log_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """(logits, log probabilities or None) [..., S] of class_ids [S] or [..., S], by the exact Score."""
    ids, batch_shape = ids_of(class_ids), logits.shape[:-1]
    if ids.ndim != 1:
        if ids.shape[:-1] != batch_shape:
            raise InvalidArgument(
                f"class_ids has shape {list(ids.shape)}; [S] or {[*batch_shape, 'S']} is needed", field="class_ids"
            )
        ids = ids.reshape(-1, ids.shape[-1])
    hidden = to_numpy(logits.hidden).reshape(-1, logits.hidden.shape[-1])
    scores = logits.table.score(hidden, ids, want_log_probs=want_log_probs, logits=logits.transform)

    def shaped(array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
        return to_torch(array).reshape(*batch_shape, ids.shape[-1]).to(logits.hidden.device)

    return shaped(scores.logits), None if scores.log_probs is None else shaped(scores.log_probs)


def ids_of(class_ids: Sequence[int] | Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Class ids [S] or [..., S] as int64.

    Raises:
        InvalidArgument: they are not integers, or a scalar.
    """
    ids = to_numpy(class_ids) if isinstance(class_ids, Tensor) else np.asarray(class_ids)
    if ids.ndim == 0 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidArgument(f"class_ids is {ids.dtype} {list(ids.shape)}; integers [S] are needed", field="class_ids")
    return ids.astype(np.int64)
