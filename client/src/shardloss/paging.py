"""Arrays of many rows go to the server in pages: rows cut, answers joined, errors counted from the first row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from shardloss.errors import InvalidArgument
from shardloss.wire import Array

PAGE_BYTES = 1 << 20  # rows and questions go in pages of about this size

T = TypeVar("T")


def pages(num_rows: int, width: int, most: int | None = None) -> Iterator[slice]:
    """Slices of rows of about PAGE_BYTES, width numbers of 8 bytes a row, at most so many; one empty slice for none."""
    size = max(1, PAGE_BYTES // (8 * width) if most is None else min(most, PAGE_BYTES // (8 * width)))
    for start in range(0, max(num_rows, 1), size):
        yield slice(start, start + size)


def of_rank(array: Array, rank: int, field: str) -> Array:
    """An array whose rank was checked, so that it can be cut in pages."""
    array = np.asarray(array)
    if array.ndim != rank:
        raise InvalidArgument(f"{field} has shape {list(array.shape)}; rank {rank} is needed", field=field)
    return array


def check_length(array: Array, hidden: Array, field: str) -> None:
    """Refuse what is not as long as hidden: pages alone would not show it."""
    if len(array) != len(hidden):
        raise InvalidArgument(f"{field} has {len(array)} rows for {len(hidden)} of hidden", field=field)


def count_of(number: int, field: str) -> int:
    """What a number counts in a page: at least 1, for the server refuses less.

    Raises:
        InvalidArgument: it is not an integer.
    """
    try:
        return max(1, operator.index(number))
    except TypeError:
        raise InvalidArgument(f"{field} = {number!r} is not an integer", field=field) from None


def asked(ask: Callable[[slice], T], page: slice) -> T:
    """The answer to a page; an error's index counts from the first page."""
    return from_row(page.start, lambda: ask(page))


def from_row(row: int, ask: Callable[[], T]) -> T:
    """The answer about rows from `row` on; an error's index counts from row 0."""
    try:
        return ask()
    except InvalidArgument as error:
        first, *rest = (error.index or "").split(", ")
        if not row or not first.isdigit():
            raise
        index = ", ".join([str(int(first) + row), *rest])
        message = error.message.replace(f"[{error.index}]", f"[{index}]", 1)
        raise InvalidArgument(message, field=error.field, index=index) from None


def joined(pages: Sequence[Array | None]) -> Array | None:
    """Pages in one array; None where they are None."""
    present = [page for page in pages if page is not None]
    return np.concatenate(present) if present else None
