"""Statistics of calls: counts since the start, rates and quantiles of the last minute."""

from __future__ import annotations

import pytest
from shardloss_server.rpc.calls import KEPT, Method


def test_quantiles_and_rate_are_of_the_last_minute() -> None:
    """Older calls still count in the totals and as errors."""
    method = Method()
    for _ in range(50):
        method.note(now=5.0, seconds=9.0, reason="OVERLOADED")
    for number in range(100):
        method.note(now=100.0 + number / 10, seconds=(number + 1) / 1000, reason=None)
    seen = method.seen("ComputeLoss", now=110.0, age_s=1000.0)
    assert (seen.name, seen.num_calls, seen.errors) == ("ComputeLoss", 150, {"OVERLOADED": 50})
    assert seen.rate == pytest.approx(100 / 60)
    assert (seen.median_s, seen.p90_s, seen.p99_s) == (0.051, 0.091, 0.1)


def test_a_young_server_has_the_rate_of_its_own_time() -> None:
    """Ten calls in five seconds are two calls per second."""
    method = Method()
    for second in range(5):
        method.note(now=second, seconds=0.1, reason=None)
        method.note(now=second + 0.5, seconds=0.1, reason=None)
    assert method.seen("x", now=5.0, age_s=5.0).rate == 2.0


def test_a_method_that_rests_has_no_latency() -> None:
    method = Method()
    method.note(now=1.0, seconds=3.0, reason=None)
    seen = method.seen("x", now=100.0, age_s=100.0)
    assert (seen.num_calls, seen.rate, seen.median_s, seen.p99_s) == (1, 0.0, 0.0, 0.0)


def test_what_is_remembered_is_bounded() -> None:
    """A fast method's rate counts every call and its quantiles only the latest ones, so its memory does not grow."""
    method = Method()
    for number in range(10 * KEPT):
        method.note(now=number / KEPT, seconds=float(number >= 9 * KEPT), reason=None)
    assert len(method.times) == KEPT
    assert len(method.by_second) <= 61
    seen = method.seen("x", now=10.0, age_s=10.0)
    assert seen.rate == KEPT
    assert seen.median_s == 1.0
