"""Timers around the front end's own functions, installed at run time: the server itself has none.

A timer counts the time of its function without that of timed functions inside it, so the parts of a call add up to the
call.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from shardloss_server.cluster.fanout import Gathered
from shardloss_server.frontend import pipeline, validate
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.rpc import wire
from shardloss_server.rpc.servicer import LossServicer

REST, FAN_OUT, KERNEL = "rest", "fan-out", "kernel"
CALLS = {"ComputeLoss": "loss", "Commit": "commit"}
TIMED: tuple[tuple[Any, str, str], ...] = (
    (wire, "loss_request", "decode"),
    (wire, "commit_request", "decode"),
    (validate, "loss_request", "validate"),
    (validate, "commit_request", "validate"),
    (pipeline, "plan", "plan"),
    (TableOwner, "_upstreams", "plan"),
    (TableOwner, "score", FAN_OUT),
    (TableOwner, "_change", FAN_OUT),
    (pipeline, "merge", "merge"),
    (pipeline, "finish", "finish"),
    (pipeline, "steepness", "finish"),
    (TableOwner, "_note", "finish"),
    (wire, "loss_response", "encode"),
    (wire, "commit_response", "encode"),
)
Parts = dict[str, float]  # ms by part


class Timers:
    """Parts of every finished call, by its name. Only the call's own thread is timed; work in others is not counted."""

    def __init__(self) -> None:
        self._open = threading.local()
        self.calls: dict[str, list[Parts]] = {call: [] for call in CALLS.values()}

    def take(self) -> dict[str, list[Parts]]:
        """Return what was counted since the last call of this method."""
        found, self.calls = self.calls, {call: [] for call in CALLS.values()}
        return found

    @contextmanager
    def installed(self) -> Iterator[Timers]:
        """Install the timers for servers that are created in this block."""
        with ExitStack() as stack:
            for owner, name, part in TIMED:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), part)))
            for name, call in CALLS.items():
                handler = self._counted(getattr(LossServicer, name), call)
                stack.enter_context(mock.patch.object(LossServicer, name, handler))
            stack.enter_context(mock.patch.object(Gathered, "result", self._gathered(Gathered.result)))
            yield self

    def _counted(self, handler: Callable[..., Any], call: str) -> Callable[..., Any]:
        """Wrap the handler of a call; the time that no timer inside it counts is recorded as REST."""

        @functools.wraps(handler)
        def counted(*args: Any) -> Any:
            self._open.parts, self._open.inside = {}, [0.0]
            try:
                return self._run(REST, handler, args, {})
            finally:
                self.calls[call].append(self._open.parts)
                del self._open.parts

        return counted

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if not hasattr(self._open, "parts"):
                return function(*args, **options)
            return self._run(part, function, args, options)

        return timed

    def _run(self, part: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        parts, inside = self._open.parts, self._open.inside
        inside.append(0.0)
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            took = 1e3 * (time.perf_counter() - start)
            parts[part] = parts.get(part, 0.0) + took - inside.pop()
            inside[-1] += took

    def _gathered(self, result: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the wait for all workers: the slowest worker's compute time counts as kernel, not as fan-out."""

        def gathered(pending: Any, timeout_s: float) -> Any:
            found = result(pending, timeout_s)
            if hasattr(self._open, "parts"):
                computed = 1e3 * max(pending.computed_s.values())
                self._open.parts[KERNEL] = self._open.parts.get(KERNEL, 0.0) + computed
                self._open.inside[-1] += computed
            return found

        return gathered
