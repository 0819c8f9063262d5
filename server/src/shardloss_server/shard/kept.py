"""What the scores of the present version leave behind for their steps: a cache, never a semantics.

A step whose part is found here takes the exponentials from its score, which saves one of its two products of matrices
and the exponentials themselves; any other computes them again. What is kept is of one version of the shard alone, and
goes with its part.
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

KEPT_BYTES = 512 * 2**20  # what a worker keeps between scores and their steps


class Room:
    """Bytes that all shards of a worker may keep together.

    One thread takes; another may give back, as a part goes wherever its last reference does. Memory of all rows' blocks
    that was given back stays for the next score, for fresh memory costs a page fault every 4 kB, a twentieth of a step;
    it counts as well, and makes room for whatever else is taken.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken: dict[int, int] = {}
        self._spare: list[Tensor] = []

    @property
    def taken_bytes(self) -> int:
        """What owners hold."""
        return sum(tuple(self._taken.values()))

    @property
    def spare_bytes(self) -> int:
        """What waits to be lent."""
        return sum(tensor.nbytes for tensor in tuple(self._spare))

    @property
    def held_bytes(self) -> int:
        """All of it: what owners hold and what waits to be lent."""
        return self.taken_bytes + self.spare_bytes

    def take(self, owner: int, num_bytes: int) -> bool:
        """Whether there was room, which is taken now."""
        left = self._max_bytes - self.taken_bytes - num_bytes
        if left < 0:
            return False
        while self._spare and self.spare_bytes > left:
            del self._spare[:1]
        self._taken[owner] = self._taken.get(owner, 0) + num_bytes
        return True

    def give_back(self, owner: int, memory: Sequence[Tensor] = ()) -> None:
        """All that an owner took is free again; the memory of these tensors may be lent. Idempotent."""
        self._taken.pop(owner, None)
        self._spare += memory

    def lend(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor | None:
        """Memory of a tensor [num_rows, num_columns] that was given back; None where there is none."""
        for place, spare in enumerate(self._spare):
            if spare.shape == (num_rows, num_columns) and spare.dtype == dtype:
                del self._spare[place]
                return spare
        return None


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """A block that was scored: its exponentials, and its unit rows [C, D] with their norms where it normalises."""

    exponentials: Exponentials
    rows: Tensor | None
    norms: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.exponentials.num_bytes + sum(x.nbytes for x in (self.rows, self.norms) if x is not None)


@dataclass(frozen=True, slots=True)
class KeptEntries:
    """Candidates of single rows that were scored: whose each is [L], its row in the shard [L], and its logit."""

    batch_row: Tensor
    row_index: Tensor
    columns: Columns

    @staticmethod
    def cat(pieces: Sequence[KeptEntries]) -> KeptEntries:
        """All of them, of at least one piece."""
        columns = [piece.columns for piece in pieces]
        slopes = [one.slope for one in columns if one.slope is not None]
        return KeptEntries(
            torch.cat([piece.batch_row for piece in pieces]),
            torch.cat([piece.row_index for piece in pieces]),
            Columns(torch.cat([one.logits for one in columns]), torch.cat(slopes) if slopes else None, None),
        )

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        own = (self.batch_row, self.row_index, self.columns.logits, self.columns.slope)
        return sum(tensor.nbytes for tensor in own if tensor is not None)


class KeptPart:
    """The blocks of one part by their place in it, its labels' columns, and the candidates of single rows."""

    def __init__(self, room: Room, is_full: bool) -> None:
        self.labels: Entries | None = None
        self.entries: KeptEntries | None = None
        self.blocks: dict[int, KeptBlock] = {}
        self._room, self._is_full = room, is_full

    def keep(self, place: int, block: Block, exponentials: Exponentials | None) -> None:
        """Keep a block, where there is room."""
        if exponentials is None:
            return
        kept = KeptBlock(exponentials, None if block.norms is None else block.rows, block.norms)
        if self._room.take(id(self), kept.num_bytes):
            self.blocks[place] = kept

    def keep_labels(self, labels: Entries) -> None:
        """Keep the gathered rows of labels, where there is room."""
        if self._room.take(id(self), labels.num_bytes):
            self.labels = labels

    def keep_entries(self, entries: KeptEntries) -> None:
        """Keep all of the part's columns of single rows, where there is room."""
        if self._room.take(id(self), entries.num_bytes):
            self.entries = entries

    def memory(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor | None:
        """Where a block's logits [num_rows, num_columns] may be written, to be kept; None: anywhere.

        Blocks of candidates have another size in each step: theirs is not lent.
        """
        return self._room.lend(num_rows, num_columns, dtype) if self._is_full else None

    def free(self) -> None:
        """Forget it all. Idempotent."""
        blocks, self.blocks, self.entries, self.labels = self.blocks, {}, None, None
        self._room.give_back(id(self), [kept.exponentials.values for kept in blocks.values() if self._is_full])


class Kept:
    """All that one shard keeps."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._parts: dict[int, tuple[weakref.ref[Part], KeptPart]] = {}  # by id, which stays a part's while it lives

    def begin(self, part: Part) -> KeptPart:
        """A part is being scored."""
        self.forget(id(part))
        place, kept = id(part), KeptPart(self._room, part.is_full)
        self._parts[place] = weakref.ref(part, lambda _: self.forget(place)), kept
        return kept

    def of(self, part: Part) -> KeptPart:
        """What there is of a part; an empty one where it was not scored at this version."""
        known = self._parts.get(id(part))
        return known[1] if known else KeptPart(self._room, part.is_full)

    def forget(self, place: int) -> None:
        """The part is gone."""
        known = self._parts.pop(place, None)
        if known:
            known[1].free()

    def clear(self) -> None:
        """The version has passed."""
        for place in list(self._parts):
            self.forget(place)
