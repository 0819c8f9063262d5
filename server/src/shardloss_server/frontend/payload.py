"""The payload of a request: what must be the same if its key is repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, uint8

from shardloss_server.frontend.request import CommitRequest, LossRequest

DIGEST_BYTES = 16
# What names the table, decides when a step may be applied, or depends on how the request was sent.
NOT_PAYLOAD = {
    "table",
    "after_step",
    "opened_at_version",
    "max_staleness",
    "max_reply_bytes",
    "label_columns",
    "digest",
    "is_one_call",
}


def digest_of(request: LossRequest | CommitRequest) -> bytes:
    """Return DIGEST_BYTES bytes that distinguish the payloads sent under one key.

    They are computed from the decoded request, so they do not depend on the order of its fields, on defaults that are
    written out, on fields that this server does not know, or on how its tensors were sent: inline, beside or in chunks.
    """
    digest = hashlib.sha256()  # in hardware: half of blake2b's time
    for piece in pieces(request):
        digest.update(piece)
    return digest.digest()[:DIGEST_BYTES]


def pieces(value: Any) -> Iterator[Any]:
    """Yield the content of a value, as bytes or as the memory of a tensor."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        if value.numel():  # an empty tensor may have strides that forbid a view
            yield value.contiguous().reshape(-1).view(uint8).numpy()
    elif is_dataclass(value):
        for field in fields(value):
            if field.name not in NOT_PAYLOAD:
                yield f";{field.name}=".encode()
                yield from pieces(getattr(value, field.name))
    elif isinstance(value, tuple):
        yield f"{len(value)} of".encode()
        for each in value:
            yield from pieces(each)
    else:
        yield repr(value).encode()
