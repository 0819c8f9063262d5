"""The gain from concurrency: several trainers of one table, and a trainer that has a backbone."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row
from benchmarks.scenarios import full
from benchmarks.scenarios import sampled as sampled_scenarios

TRAINERS, ROWS_EACH = 4, 64
PROBE_STEPS = 5


def many_trainers(context: Context) -> list[Row]:
    """Compare 4 trainers x N=64 at once with the same 4 calls one after another, in threads of one client process."""
    exact = full.shape_of(context, ROWS_EACH, 100_000)
    drawn = {**sampled_scenarios.shape_of(context, 4096), "N": ROWS_EACH}
    kinds: dict[str, dict[str, Any]] = {
        "full-100k": {**exact, "kind": "full", "optimizer": "sgd"},
        "sampled-4k": {**drawn, "kind": "sampled", "optimizer": "adagrad"},
    }
    return [at_once(context, name, shape) for name, shape in list(kinds.items())[: 1 if context.quick else None]]


def at_once(context: Context, name: str, ours: dict[str, Any]) -> Row:
    """Return one row; a step is one step of each trainer."""
    ours = {**ours, "trainers": TRAINERS}
    shape = {key: ours[key] for key in ("N", "D", "V", "S", "K", "dtype")}
    with context.service() as service, context.ours(service, {**ours, "concurrent": True}) as concurrent:
        rival = context.ours(service, {**ours, "concurrent": False})
        note = f"a step is one step of each of {TRAINERS} trainers"
        return context.row("many-trainers", f"one after another, {name}", shape, concurrent, rival, note=note)


def overlap(context: Context) -> list[Row]:
    """Compare a step() that returns at once with one that waits, for a backbone that takes as long as the commit."""
    shape = full.shape_of(context, 256, 100_000)
    with context.service() as service:
        commit_ms = time_of_commit(context, service.address, full.ours_of(shape))
        ours = {**full.ours_of(shape), "sleep_ms": commit_ms}
        with context.ours(service, {**ours, "overlap": True}) as overlapped:
            note = f"the trainer sleeps {commit_ms:.1f} ms per step, the median time of a blocking commit"
            rival = context.ours(service, {**ours, "overlap": False})
            return [context.row("overlap", "blocking commit", shape, overlapped, rival, note=note)]


def time_of_commit(context: Context, address: str, shape: dict[str, Any]) -> float:
    """Return the median time of a blocking optimizer.step() in ms."""
    with context.side("ours", {**shape, "address": address, "overlap": False}, threads=1) as side:
        return median(side.step(PROBE_STEPS).extra["commit_ms"])
