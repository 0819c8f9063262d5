"""What calls cost the server, where it was asked to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from shardloss.v1 import cost_pb2


@dataclass(frozen=True, slots=True)
class CallCost:
    """What a call, or the pages of one question together, cost the server.

    total_s holds wait_s (for its place, and the step before it), plan_s, fanout_s (until all shards had answered) and
    finish_s, which do not overlap; fanout_s holds kernel_s, what the slowest worker computed. received_bytes and
    sent_bytes are messages; flops those of the matrix products that were asked for (docs/metrics.md).
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
    """The cost in a reply."""
    times = {name: getattr(message, f"{name[:-2]}_us") / 1e6 for name in NAMES if name.endswith("_s")}
    return CallCost(**times, received_bytes=message.received_bytes, sent_bytes=message.sent_bytes, flops=message.flops)


NAMES = tuple(field.name for field in fields(CallCost))


def sum_of(costs: Sequence[CallCost | None]) -> CallCost | None:
    """The cost of several calls together; None where they were not asked for it."""
    present = [cost for cost in costs if cost is not None]
    if not present:
        return None
    return CallCost(*(sum(getattr(cost, name) for cost in present) for name in NAMES))
