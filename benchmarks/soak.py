"""Resident memory over many sampled steps: its slope in client, front end and workers, and the size of /dev/shm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from benchmarks import report
from benchmarks.context import Context
from benchmarks.procfs import memory_of, shared_memory_bytes

SHAPE = {"kind": "sampled", "N": 64, "D": 32, "V": 20_000, "S": 256, "dtype": "float32", "optimizer": "adagrad"}
SAMPLE_EVERY = 100
COUNTED_SHARE = 0.8  # the first fifth fills caches, pools and records
MOST_BYTES_A_STEP = 1000.0
SHARED = "/dev/shm"


def run(num_steps: int, directory: Path) -> dict[str, Any]:
    """Train, sample memory every SAMPLE_EVERY steps, and write soak.json."""
    with Context() as context, context.service() as service, context.ours(service, SHAPE) as trainer:
        trainer.ready()
        pids = {"client": trainer.process.pid, "front end": service.front_pid}
        pids |= {f"worker {place}": pid for place, pid in enumerate(service.worker_pids())}
        samples = sampled(lambda: trainer.step(SAMPLE_EVERY), pids, num_steps)
    found = judged(samples)
    directory.mkdir(parents=True, exist_ok=True)
    report.finished(directory / "soak.json", json.dumps({**found, "samples": samples}, indent=1) + "\n")
    return found


def sampled(steps: Callable[[], object], pids: Mapping[str, int], num_steps: int) -> dict[str, list[int]]:
    """Return the resident bytes of each process, and the size of /dev/shm, after every turn of steps."""
    samples: dict[str, list[int]] = {name: [] for name in ("steps", SHARED, *pids)}
    for done in range(SAMPLE_EVERY, num_steps + 1, SAMPLE_EVERY):
        steps()
        samples["steps"].append(done)
        samples[SHARED].append(shared_memory_bytes())
        for name, pid in pids.items():
            samples[name].append(memory_of(pid))
    return samples


def judged(samples: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return slopes in bytes per step; met is True if all are below the limit and /dev/shm has not grown."""
    slopes = {
        name: slope(samples["steps"], values) for name, values in samples.items() if name not in ("steps", SHARED)
    }
    shared_before, *_, shared_after = counted(samples[SHARED])
    met = all(value < MOST_BYTES_A_STEP for value in slopes.values()) and shared_after <= shared_before
    return {
        "num_steps": max(samples["steps"]),
        "bytes_a_step": slopes,
        "shared_memory_before": shared_before,
        "shared_memory_after": shared_after,
        "met": met,
    }


def slope(steps: Sequence[int], values: Sequence[int]) -> float:
    """Return the least-squares slope over the counted samples."""
    return linear_regression(counted(steps), counted(values)).slope


def counted(samples: Sequence[int]) -> Sequence[int]:
    """Return the last COUNTED_SHARE of the samples, but at least two."""
    return samples[len(samples) - max(2, round(COUNTED_SHARE * len(samples))) :]
