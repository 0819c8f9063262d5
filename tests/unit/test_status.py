"""Errors cross the wire whole, and small."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2
from shardloss import errors
from shardloss.channel import error_info
from shardloss_server.rpc.status import status_of


@pytest.mark.parametrize("leaf", errors.leaves(), ids=lambda leaf: leaf.__name__)
def test_a_status_rebuilds_its_error(leaf: type[errors.ShardlossError]) -> None:
    """Reason, message and details survive; the class is the same."""
    error = leaf("labels[3] = -7 is wrong", field="labels", index=3)
    status = status_of(error)
    info = error_info(status.SerializeToString())
    assert info is not None
    rebuilt = errors.from_reason(info.reason, leaf.status, status.message, dict(info.metadata))
    assert type(rebuilt) is leaf
    assert (rebuilt.message, rebuilt.field, rebuilt.index) == (error.message, "labels", "3")


def test_status_details_stay_below_four_kilobytes() -> None:
    """Above about 8 kB gRPC turns details into another error."""
    error = errors.InvalidArgument("x" * 100_000, field="y" * 100_000)
    assert len(status_of(error).SerializeToString()) < 4096


def test_a_retry_hint_is_a_retry_info() -> None:
    """Clients of any language find the hint where google.rpc puts it."""
    status = status_of(errors.Overloaded("full", retry_after_s=0.25))
    hint = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(hint) for detail in status.details if detail.Is(hint.DESCRIPTOR))
    assert hint.retry_delay.ToTimedelta().total_seconds() == 0.25
