"""One table of a server: its heads, exact evaluation and rows. NumPy in and out; only heads use torch."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np

from shardloss import messages, types
from shardloss.errors import InvalidArgument
from shardloss.losses import Losses
from shardloss.messages import numbers
from shardloss.paging import PAGE_BYTES, asked, joined, of_rank, pages
from shardloss.session import Session
from shardloss.trainable import Trainable
from shardloss.v1 import table_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.client import LossClient

LARGEST = {  # largest finite number of each storage dtype
    "float32": float(np.finfo(np.float32).max),
    "float64": float(np.finfo(np.float64).max),
    "bfloat16": 255 * 2.0**120,
}


class Table(Trainable, Losses):
    """One table of a server: heads that train it, exact evaluation, and its rows.

    It stays this table if that is renamed. Once the table is deleted, or lost by a restart of the server, every call
    raises TableNotFound, even if there is a new table of the same name.
    """

    def __init__(self, client: LossClient, info: types.TableInfo) -> None:
        self.client, self.spec = client, info
        self.name, self.reference = info.name, info.reference or info.name

    def __repr__(self) -> str:
        spec = self.spec
        size = f"{spec.num_classes:,} x {spec.dim} {spec.dtype}"
        state = "" if spec.state == "ready" else f", {spec.state.replace('_', ' ').upper()}"
        return f"<Table {self.name!r} on {self.client.address}, {size}, version {spec.version}{state} when opened>"

    @property
    def id(self) -> str:
        """The part of `reference` that only this table has; a renaming does not change it."""
        return self.reference.rpartition("#")[2]

    def info(self) -> types.TableInfo:
        """Return the spec and current state of the table.

        Raises:
            TableNotFound: the table was deleted, even if there is a new one of its name.
        """
        return self.client.table(self.reference).spec

    def session(self) -> Session:
        """Return a new session for the steps of one trainer.

        Raises:
            TableNotFound: the table was deleted.
        """
        return Session(self, secrets.token_hex(16), self.info().version)

    def read_rows(self, class_ids: Array) -> types.Rows:
        """Return the rows [M, D] and biases [M] of class_ids [M], read in pages; `version` is that of the last page.

        Raises:
            InvalidArgument, TransientError, RowsLost: as in `evaluate`.
        """
        class_ids = of_rank(class_ids, 1, "class_ids")

        def ask(page: slice) -> types.Rows:
            request = table_pb2.ReadRowsRequest(table=self.reference, class_ids=numbers(class_ids[page], "class_ids"))
            return messages.rows(self.client.channel.unary(self.client.tables.ReadRows, request, None))

        found = [asked(ask, page) for page in pages(len(class_ids), self.spec.dim + 1)]
        biases = joined([page.biases for page in found])
        return types.Rows(np.concatenate([page.rows for page in found]), biases, found[-1].version)

    def write_rows(self, class_ids: Array, rows: Array, biases: Array | None = None) -> int:
        """Overwrite rows [M, D] (and biases [M]) of distinct class_ids [M] in pages and return the last version.

        Each page is one version. If its reply is lost, a page is written again, which overwrites whatever another
        trainer has committed to these rows in between.

        Raises:
            InvalidArgument: an argument is invalid; nothing was written.
        """
        class_ids, rows = np.asarray(class_ids), np.asarray(rows)
        biases = None if biases is None else np.asarray(biases)
        check_rows(class_ids, rows, biases, self.spec)

        def ask(page: slice) -> int:
            request = table_pb2.WriteRowsRequest(
                table=self.reference, class_ids=numbers(class_ids[page], "class_ids"), rows=numbers(rows[page], "rows")
            )
            if biases is not None:
                request.biases.CopyFrom(numbers(biases[page], "biases"))
            reply: table_pb2.WriteRowsResponse = self.client.channel.unary(self.client.tables.WriteRows, request, None)
            return reply.version

        return [asked(ask, page) for page in pages(len(class_ids), self.spec.dim + 1)][-1]

    @property
    def page_rows(self) -> int:
        """The number of rows that fit in one message with all their state."""
        return pages_of(self.spec)

    def read_state(self, first_class: int, num_classes: int) -> types.TableRows:
        """Return the rows and all state of a range of at most `page_rows` classes, at one version and bit for bit.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`.
        """
        class_ids = np.arange(first_class, first_class + num_classes)
        request = table_pb2.ReadRowsRequest(
            table=self.reference, class_ids=numbers(class_ids, "class_ids"), want_state=True
        )
        return messages.table_rows(self.client.channel.unary(self.client.tables.ReadRows, request, None))

    def write_state(self, first_class: int, page: types.TableRows, num_commits: int | None = None) -> int:
        """Overwrite at most `page_rows` rows from first_class on, with the state given in page, as one version.

        State that page does not name stays unchanged, as do biases if they are None. num_commits sets the optimizer's
        step; the num_commits and version of page are ignored.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`; index counts within the page.
        """
        class_ids = np.arange(first_class, first_class + len(page.rows))
        bfloat16 = self.spec.dtype == "bfloat16"
        request = messages.row_write(self.reference, class_ids, page, num_commits, bfloat16=bfloat16)
        reply: table_pb2.WriteRowsResponse = self.client.channel.unary(self.client.tables.WriteRows, request, None)
        return reply.version

    def read_class_counts(self, first_class: int, num_classes: int) -> types.ClassCounts:
        """Return the written and learned class counts of a range of at most `paging.PAGE_BYTES` / 16 classes."""
        request = table_pb2.ReadClassCountsRequest(
            table=self.reference, first_class=first_class, num_classes=num_classes
        )
        return messages.class_counts(self.client.channel.unary(self.client.tables.ReadClassCounts, request, None))

    def _write_counts_page(self, first_class: int, written: Array | None, learned: Array | None) -> None:
        """Overwrite the written [M] or learned [M] int64 class counts of a range, or both; None leaves them unchanged.

        Raises:
            InvalidArgument, LimitExceeded: as in `write_class_counts`; index counts within the range.
        """
        request = table_pb2.WriteClassCountsRequest(table=self.reference, first_class=first_class)
        if written is not None:
            request.counts.CopyFrom(numbers(written, "counts"))
        if learned is not None:
            request.learned.CopyFrom(numbers(learned, "learned"))
        self.client.channel.unary(self.client.tables.WriteClassCounts, request, None)

    def write_class_counts(self, counts: Array) -> None:
        """Write, in pages, the class counts [V], each >= 0, that `FixedUnigram` samplers use.

        Raises:
            InvalidArgument, LimitExceeded: the counts are invalid or too many; nothing was written.
        """
        counts = of_rank(counts, 1, "counts").astype(np.float64)
        if len(counts) != self.spec.num_classes:
            raise InvalidArgument(f"counts has {len(counts)} values for {self.spec.num_classes} rows", field="counts")
        refuse_where(~(np.isfinite(counts) & (counts >= 0)), "counts", "is not a finite number >= 0")
        for page in pages(len(counts), 1):
            request = table_pb2.WriteClassCountsRequest(
                table=self.reference, first_class=page.start, counts=numbers(counts[page], "counts")
            )
            self.client.channel.unary(self.client.tables.WriteClassCounts, request, None)


def pages_of(spec: types.TableInfo) -> int:
    """Return the number of rows of a table that fit in one message with all their state."""
    num_tensors = 1 + len(types.state_widths(spec.optimizer, spec.dim))
    return max(1, PAGE_BYTES // (8 * num_tensors * (spec.dim + 1)))


def check_rows(class_ids: Array, rows: Array, biases: Array | None, spec: types.TableInfo) -> None:
    """Raise `InvalidArgument` if rows do not match their ids, or ids are not distinct classes.

    Single pages would not reveal it.
    """
    if class_ids.ndim != 1 or rows.shape != (len(class_ids), spec.dim):
        raise InvalidArgument(
            f"rows {rows.shape} do not match class_ids {class_ids.shape}; [M, {spec.dim}] is needed", field="rows"
        )
    if biases is not None and biases.shape != class_ids.shape:
        raise InvalidArgument(f"biases {biases.shape} do not match class_ids {class_ids.shape}", field="biases")
    refuse_where((class_ids < 0) | (class_ids >= spec.num_classes), "class_ids", f"is outside [0, {spec.num_classes})")
    order = np.argsort(class_ids, kind="stable")
    repeated = np.zeros(len(class_ids), dtype=bool)
    repeated[order[1:]] = class_ids[order][1:] == class_ids[order][:-1]
    refuse_where(repeated, "class_ids", "occurs twice")
    refuse_where(np.asarray(~is_storable(rows, spec.dtype).all(axis=1)), "rows", f"is not finite in {spec.dtype}")
    if biases is not None:
        wide = "float64" if spec.dtype == "float64" else "float32"
        refuse_where(~is_storable(biases, wide), "biases", f"is not finite in {wide}")


def is_storable(values: Array, dtype: str) -> Array:
    """Return a mask of the values that are finite in a table's dtype."""
    most = LARGEST[dtype]
    return np.asarray(np.isfinite(values) & (np.abs(values) <= most))


def refuse_where(wrong: Array, field: str, complaint: str) -> None:
    """Raise `InvalidArgument` if any entry of wrong [M] is True; the error names the first."""
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InvalidArgument(f"{field}[{index}] {complaint}", field=field, index=index)
