"""A cache from scores to their steps at the current version; it never changes a result.

A step whose part is found here reuses the exponentials of its score, which saves one of its two matrix products and
the exponentials themselves; any other step computes them again. An entry is valid for one version of the shard and is
freed together with its part.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.exponentials import Exponentials
from shardloss_server.numerics.kernel import Block, Columns, Entries
from shardloss_server.shard.record import Part

KEPT_BYTES = 512 * 2**20  # a worker's limit for what is kept between scores and their steps


class Room:
    """A limit in bytes on what all shards of a worker may keep together.

    One thread acquires; another may release, because a part is freed by the thread that drops its last reference.
    Released memory of blocks of all rows is reused by the next score, because fresh memory costs a page fault every
    4 kB, a twentieth of a step. It counts towards the limit and is freed if anything else needs the room.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken: dict[int, int] = {}
        self._spare: list[Tensor] = []

    @property
    def taken_bytes(self) -> int:
        """Bytes that owners have acquired."""
        return sum(tuple(self._taken.values()))

    @property
    def spare_bytes(self) -> int:
        """Bytes of released memory that is ready for reuse."""
        return sum(tensor.nbytes for tensor in tuple(self._spare))

    @property
    def held_bytes(self) -> int:
        """Bytes in total: acquired and ready for reuse."""
        return self.taken_bytes + self.spare_bytes

    def take(self, owner: int, num_bytes: int) -> bool:
        """Acquire num_bytes for an owner and return True, or return False if there is no room."""
        left = self._max_bytes - self.taken_bytes - num_bytes
        if left < 0:
            return False
        while self._spare and self.spare_bytes > left:
            del self._spare[:1]
        self._taken[owner] = self._taken.get(owner, 0) + num_bytes
        return True

    def give_back(self, owner: int, memory: Sequence[Tensor] = ()) -> None:
        """Release all that an owner acquired; the memory of these tensors may be reused. Idempotent."""
        self._taken.pop(owner, None)
        self._spare += memory

    def lend(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return a released tensor [num_rows, num_columns] for reuse, or None if there is none."""
        for place, spare in enumerate(self._spare):
            if spare.shape == (num_rows, num_columns) and spare.dtype == dtype:
                del self._spare[place]
                return spare
        return None


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """A scored block: its exponentials and, if the transform normalises, its unit rows [C, D] and their norms."""

    exponentials: Exponentials
    rows: Tensor | None
    norms: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Size of the block in bytes."""
        return self.exponentials.num_bytes + sum(x.nbytes for x in (self.rows, self.norms) if x is not None)


@dataclass(frozen=True, slots=True)
class KeptEntries:
    """Scored candidates of single rows: for each, its row of hidden [L], its row in the shard [L] and its logit [L]."""

    batch_row: Tensor
    row_index: Tensor
    columns: Columns

    @staticmethod
    def cat(pieces: Sequence[KeptEntries]) -> KeptEntries:
        """Concatenate at least one piece."""
        columns = [piece.columns for piece in pieces]
        slopes = [one.slope for one in columns if one.slope is not None]
        return KeptEntries(
            torch.cat([piece.batch_row for piece in pieces]),
            torch.cat([piece.row_index for piece in pieces]),
            Columns(torch.cat([one.logits for one in columns]), torch.cat(slopes) if slopes else None, None),
        )

    @property
    def num_bytes(self) -> int:
        """Size of the entries in bytes."""
        own = (self.batch_row, self.row_index, self.columns.logits, self.columns.slope)
        return sum(tensor.nbytes for tensor in own if tensor is not None)


class KeptPart:
    """The cache of one part: its blocks by position, its labels' columns, and the candidates of single rows."""

    def __init__(self, room: Room, is_full: bool) -> None:
        self.labels: Entries | None = None
        self.entries: KeptEntries | None = None
        self.blocks: dict[int, KeptBlock] = {}
        self._room, self._is_full = room, is_full

    def keep(self, place: int, block: Block, exponentials: Exponentials | None) -> None:
        """Keep a block if there is room."""
        if exponentials is None:
            return
        kept = KeptBlock(exponentials, None if block.norms is None else block.rows, block.norms)
        if self._room.take(id(self), kept.num_bytes):
            self.blocks[place] = kept

    def keep_labels(self, labels: Entries) -> None:
        """Keep the gathered rows of labels if there is room."""
        if self._room.take(id(self), labels.num_bytes):
            self.labels = labels

    def keep_entries(self, entries: KeptEntries) -> None:
        """Keep all of the part's columns of single rows if there is room."""
        if self._room.take(id(self), entries.num_bytes):
            self.entries = entries

    def memory(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return memory to reuse for a block's logits [num_rows, num_columns], or None if there is none.

        Blocks of candidates differ in size from step to step, so their memory is not reused.
        """
        return self._room.lend(num_rows, num_columns, dtype) if self._is_full else None

    def free(self) -> None:
        """Release everything that is kept of the part. Idempotent."""
        blocks, self.blocks, self.entries, self.labels = self.blocks, {}, None, None
        self._room.give_back(id(self), [kept.exponentials.values for kept in blocks.values() if self._is_full])


class Kept:
    """The cache of one shard, by part."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._parts: dict[int, tuple[weakref.ref[Part], KeptPart]] = {}  # by id(part), unique while the part lives

    def begin(self, part: Part) -> KeptPart:
        """Return a new, empty cache for a part that is about to be scored."""
        self.forget(id(part))
        place, kept = id(part), KeptPart(self._room, part.is_full)
        self._parts[place] = weakref.ref(part, lambda _: self.forget(place)), kept
        return kept

    def of(self, part: Part) -> KeptPart:
        """Return what is kept of a part; it is empty if the part was not scored at this version."""
        known = self._parts.get(id(part))
        return known[1] if known else KeptPart(self._room, part.is_full)

    def forget(self, place: int) -> None:
        """Release what is kept of the part whose id is place."""
        known = self._parts.pop(place, None)
        if known:
            known[1].free()

    def clear(self) -> None:
        """Release everything, because the version has changed."""
        for place in list(self._parts):
            self.forget(place)
