"""Paging of large arrays: split rows into pages, join the answers, and count error indices from the first row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from shardloss.errors import InvalidArgument
from shardloss.wire import Array

PAGE_BYTES = 1 << 20  # rows and requests are sent in pages of about this size

T = TypeVar("T")


def pages(num_rows: int, width: int, most: int | None = None) -> Iterator[slice]:
    """Yield slices of about PAGE_BYTES with width 8-byte numbers per row, each of at most `most` rows.

    For 0 rows there is one empty slice.
    """
    size = max(1, PAGE_BYTES // (8 * width) if most is None else min(most, PAGE_BYTES // (8 * width)))
    for start in range(0, max(num_rows, 1), size):
        yield slice(start, start + size)


def of_rank(array: Array, rank: int, field: str) -> Array:
    """Return array as a NumPy array after checking its rank, so that it can be split into pages."""
    array = np.asarray(array)
    if array.ndim != rank:
        raise InvalidArgument(f"{field} has shape {list(array.shape)}; rank {rank} is needed", field=field)
    return array


def check_length(array: Array, hidden: Array, field: str) -> None:
    """Raise `InvalidArgument` if array is not as long as hidden, which single pages would not reveal."""
    if len(array) != len(hidden):
        raise InvalidArgument(f"{field} has {len(array)} rows, but hidden has {len(hidden)}", field=field)


def count_of(number: int, field: str) -> int:
    """Return a number as an integer >= 1 for the size of a page; the server refuses numbers below 1.

    Raises:
        InvalidArgument: number is not an integer.
    """
    try:
        return max(1, operator.index(number))
    except TypeError:
        raise InvalidArgument(f"{field} = {number!r} is not an integer", field=field) from None


def asked(ask: Callable[[slice], T], page: slice) -> T:
    """Return the answer to a page; the index of an error counts from the first page."""
    return from_row(page.start, lambda: ask(page))


def from_row(row: int, ask: Callable[[], T]) -> T:
    """Return the answer to a request about the rows from index `row`; the index of an error counts from row 0."""
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
    """Return pages as one array, or None if they are all None."""
    present = [page for page in pages if page is not None]
    return np.concatenate(present) if present else None
