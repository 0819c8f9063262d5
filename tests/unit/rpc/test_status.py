"""Errors cross the wire complete, and small."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from google.rpc import error_details_pb2
from shardloss import errors
from shardloss.channel import error_info
from shardloss_server.rpc.status import status_of


@pytest.mark.parametrize("leaf", errors.leaves(), ids=lambda leaf: leaf.__name__)
def test_a_status_rebuilds_its_error(leaf: type[errors.ShardlossError]) -> None:
    """Class, reason, message and details are the same after the wire."""
    error = leaf("labels[3] = -7 is wrong", field="labels", index=3)
    status = status_of(error)
    info = error_info(status.SerializeToString())
    assert info is not None
    rebuilt = errors.from_reason(info.reason, leaf.status, status.message, dict(info.metadata))
    assert type(rebuilt) is leaf
    assert (rebuilt.message, rebuilt.field, rebuilt.index) == (error.message, "labels", "3")


LONG = ("x" * 100_000, "\u00e9" * 50_000, "\U0001f600" * 25_000, "%" * 100_000, "\0\n" * 50_000, "\ud800" * 9)


@pytest.mark.parametrize("text", LONG, ids=("ascii", "two-byte", "four-byte", "percent", "control", "surrogate"))
@pytest.mark.parametrize("leaf", errors.leaves(), ids=lambda leaf: leaf.__name__)
def test_status_details_stay_below_four_kilobytes(leaf: type[errors.ShardlossError], text: str) -> None:
    """Above about 8 kB gRPC replaces the details by another error, so long ones are cut, whatever their source."""
    error = leaf(text, field=text, index=text, table=text, retry_after_s=0.5)
    status = status_of(error)
    assert len(status.SerializeToString()) < 4096
    assert len(quote(status.message)) < 4096  # encoded as in grpc-message
    info = error_info(status.SerializeToString())
    assert info is not None
    assert info.reason == leaf.reason


def test_a_bad_field_is_a_bad_request() -> None:
    """Clients of any language find the field where google.rpc defines it."""
    status = status_of(errors.InvalidArgument("labels[3] = -7 is wrong", field="labels", index=3))
    found = error_details_pb2.BadRequest()
    assert any(detail.Unpack(found) for detail in status.details if detail.Is(found.DESCRIPTOR))
    assert [(each.field, each.description) for each in found.field_violations] == [
        ("labels", "labels[3] = -7 is wrong")
    ]


REASONS = {  # Clients of any version know these: add new ones here; never rename, remove or move one.
    "BAD_FILE": "FAILED_PRECONDITION",
    "BAD_REPLY": "INTERNAL",
    "CLIENT_CLOSED": "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "DOUBLE_BACKWARD": "FAILED_PRECONDITION",
    "INTERNAL": "INTERNAL",
    "INVALID_ARGUMENT": "INVALID_ARGUMENT",
    "LIMIT_EXCEEDED": "OUT_OF_RANGE",
    "NOT_SUPPORTED": "UNIMPLEMENTED",
    "OVERLOADED": "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "ROWS_LOST": "DATA_LOSS",
    "SERVER_UNAVAILABLE": "UNAVAILABLE",
    "SESSION_EXPIRED": "FAILED_PRECONDITION",
    "STALE": "FAILED_PRECONDITION",
    "STEP_REUSED": "FAILED_PRECONDITION",
    "STEP_TOO_OLD": "FAILED_PRECONDITION",
    "TABLE_EXISTS": "ALREADY_EXISTS",
    "TABLE_MOVED": "FAILED_PRECONDITION",
    "TABLE_NOT_FOUND": "NOT_FOUND",
    "TABLE_UNAVAILABLE": "UNAVAILABLE",
    "TICKET_ABORTED": "ABORTED",
    "TICKET_EXPIRED": "FAILED_PRECONDITION",
    "TICKET_UNKNOWN": "NOT_FOUND",
    "UNAUTHENTICATED": "UNAUTHENTICATED",
}


def test_reasons_are_stable() -> None:
    """A reason that was once sent keeps its name and its status."""
    now = {leaf.reason: leaf.status for leaf in errors.leaves()}
    assert now == REASONS


def test_the_table_of_errors_is_the_tree() -> None:
    """docs/errors.md has the reason, class and status of each error, and marks those that only a client raises."""
    page = (Path(__file__).resolve().parents[3] / "docs/errors.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(\w+)` \| (\S+) \| (.+) \|$", page, re.M)
    assert {(reason, name) for reason, name, _, _ in rows} == {(leaf.reason, leaf.__name__) for leaf in errors.leaves()}
    for reason, _, status, advice in rows:
        assert status in ("(client)", errors.BY_REASON[reason].status)
        assert advice.endswith((".", "?"))


def test_a_retry_hint_is_a_retry_info() -> None:
    """Clients of any language find the hint where google.rpc defines it."""
    status = status_of(errors.Overloaded("full", retry_after_s=0.25))
    hint = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(hint) for detail in status.details if detail.Is(hint.DESCRIPTOR))
    assert hint.retry_delay.ToTimedelta().total_seconds() == 0.25
