"""The cost of calls on the server, which replies contain on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from shardloss.v1 import cost_pb2


@dataclass(frozen=True, slots=True)
class CallCost:
    """The cost on the server of one call, or of all pages of one request.

    total_s includes wait_s (for the call's turn and the preceding step), plan_s, fanout_s (until all shards have
    answered) and finish_s, which do not overlap. fanout_s includes kernel_s, the compute time of the slowest worker.
    received_bytes and sent_bytes are message sizes; flops counts the requested matrix products (docs/metrics.md).
    """

    total_s: float
    wait_s: float
    plan_s: float
    fanout_s: float
    kernel_s: float
    finish_s: float
    received_bytes: int
    sent_bytes: int
    flops: int


def call_cost(message: cost_pb2.CallCost) -> CallCost:
    """Return the cost that a reply contains."""
    times = {name: getattr(message, f"{name[:-2]}_us") / 1e6 for name in NAMES if name.endswith("_s")}
    return CallCost(**times, received_bytes=message.received_bytes, sent_bytes=message.sent_bytes, flops=message.flops)


NAMES = tuple(field.name for field in fields(CallCost))


def sum_of(costs: Sequence[CallCost | None]) -> CallCost | None:
    """Return the total cost of several calls, or None if it was not requested."""
    present = [cost for cost in costs if cost is not None]
    if not present:
        return None
    return CallCost(*(sum(getattr(cost, name) for cost in present) for name in NAMES))
