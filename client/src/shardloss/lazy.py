"""Lazy logits of a remote table: a tensor shape that is never materialised, and exact values of chosen classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shardloss import types
from shardloss.autograd import FLOAT_DTYPES, check_sendable, to_numpy, to_torch
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.optimizer import uncompiled
from shardloss.table import Table

TENSOR_METHODS = frozenset(dir(Tensor))


class Unheld:
    """A value [..., V] that is never materialised; an operation that would need all of it raises an error."""

    shape: torch.Size

    def dim(self) -> int:
        """Return the number of dimensions of shape."""
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
            f"{what} would need all [..., V] values of a {cls.__name__}; call its probabilities(class_ids) or "
            "probability_chunks(size), pass it to a loss of shardloss.compat.paddle, or call table.softmax(), "
            "table.top_k or table.score; pass a scale or a soft cap to table.logits(hidden, transform)"
        )


def refused(name: str) -> Any:
    """Return a special method that raises NotSupported."""

    def refuse(self: Unheld, *_args: Any, **_options: Any) -> NoReturn:
        raise NotSupported(self._refusal(name))

    return refuse


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
REFUSED = ["array", "getitem", "setitem", "len", "iter", "contains", "float", "int", "bool", "index", "neg", "abs"]
REFUSED += ["lt", "le", "gt", "ge", *BINARY, *(f"r{name}" for name in BINARY)]
for _name in REFUSED:
    setattr(Unheld, f"__{_name}__", refused(f"__{_name}__"))


class LazyLogits(Unheld):
    """The logits transform(hidden @ rows.T + biases) [..., V] of hidden [..., D], never materialised.

    A loss of shardloss.compat.paddle over these logits is computed by the service, is differentiable in hidden and
    trains the table. Probabilities are computed from the table's rows at the time of the call and carry no gradient.
    """

    def __init__(self, table: Table, hidden: Tensor, transform: types.LogitTransform | None = None) -> None:
        check_hidden(table, hidden)
        self.table, self.hidden = table, hidden
        self.transform = transform or types.LogitTransform()
        self.shape = torch.Size([*hidden.shape[:-1], table.spec.num_classes])

    def probabilities(self, class_ids: Sequence[int] | Tensor) -> Tensor:
        """Return softmax(logits)[..., class_ids] for class_ids [S], or [..., S] per row, on hidden's device.

        The call costs one pass over the table. The result is float64 for a float64 table, otherwise float32.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `Table.score`.
        """
        log_probs = asked(self, class_ids, want_log_probs=True)[1]
        assert log_probs is not None
        return log_probs.exp()

    def probability_chunks(self, size: int) -> Iterator[tuple[range, Tensor]]:
        """Yield (class ids, their probabilities [..., chunk]) of size classes at a time, from 0 to V - 1.

        A full iteration costs one pass over the table, and one more over the rows of the chunks. All chunks use the
        softmax denominator of the first chunk, which no longer matches if the table is trained in between.

        Raises:
            InvalidArgument: size is not positive; otherwise as in `probabilities`.
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
    """The probabilities softmax(logits) [..., V] of lazy logits, never materialised."""

    def __init__(self, logits: LazyLogits) -> None:
        self.logits, self.shape = logits, logits.shape

    def probabilities(self, class_ids: Sequence[int] | Tensor) -> Tensor:
        """Return the probabilities of chosen classes; see `LazyLogits.probabilities`."""
        return self.logits.probabilities(class_ids)

    def probability_chunks(self, size: int) -> Iterator[tuple[range, Tensor]]:
        """Yield the probabilities of all classes in chunks; see `LazyLogits.probability_chunks`."""
        return self.logits.probability_chunks(size)


def check_hidden(table: Table, hidden: Tensor) -> None:
    """Raise `InvalidArgument` if hidden is not a float tensor [..., D].

    Raises:
        InvalidArgument: hidden is not a tensor, or has a wrong dtype or shape.
        NotSupported: hidden has no values; see `check_sendable`.
    """
    dim = table.spec.dim
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOAT_DTYPES:
        what = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InvalidArgument(f"hidden is {what}; a torch tensor of floats is needed", field="hidden")
    check_sendable(hidden, "hidden")
    if hidden.dim() == 0 or hidden.shape[-1] != dim:
        raise InvalidArgument(f"hidden has shape {list(hidden.shape)}; [..., {dim}] is needed", field="hidden")


def ranges(num_classes: int, size: int) -> Iterator[range]:
    """Yield the class ids 0 to V - 1 in ranges of at most size ids."""
    if size < 1:
        raise InvalidArgument(f"size = {size} is not positive", field="size")
    for start in range(0, num_classes, size):
        yield range(start, min(start + size, num_classes))


@uncompiled
def asked(
    logits: LazyLogits, class_ids: Sequence[int] | Tensor, *, want_log_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (logits, log-probabilities or None) [..., S] of class_ids [S] or [..., S], computed by the Score RPC."""
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
    """Return class ids [S] or [..., S] as int64.

    Raises:
        InvalidArgument: class_ids are not integers, or are a scalar.
    """
    ids = to_numpy(class_ids) if isinstance(class_ids, Tensor) else np.asarray(class_ids)
    if ids.ndim == 0 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidArgument(f"class_ids is {ids.dtype} {list(ids.shape)}; integers [S] are needed", field="class_ids")
    return ids.astype(np.int64)
