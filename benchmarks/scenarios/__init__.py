"""The scenarios by name, in the order they run. Each is `run(context) -> rows`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.context import Context
from benchmarks.row import Row
from benchmarks.scenarios import floor, foreign, full, memory, nodes, ray_naive, sampled, scale, trainers, transport

Scenario = Callable[[Context], list[Row]]

SCENARIOS: dict[str, Scenario] = {
    "full-100k": full.full_100k,
    "full-100k-wide": full.full_100k_wide,
    "full-lce": full.full_lce,
    "full-1M": full.full_1m,
    "sampled-1k": sampled.sampled_1k,
    "sampled-4k": sampled.sampled_4k,
    "sampled-16k": sampled.sampled_16k,
    "sampled-tf": foreign.sampled_tf,
    "sampled-own": sampled.sampled_own,
    "parameter-server": foreign.parameter_server,
    "remote-module": foreign.remote_module,
    "ray-naive": ray_naive.ray_naive,
    "transport": transport.transport,
    "nodes": nodes.nodes,
    "many-trainers": trainers.many_trainers,
    "overlap": trainers.overlap,
    "scale-V": scale.scale_v,
    "full-1M-memory": memory.full_1m_memory,
    "scale-K": scale.scale_k,
    "shard-floor": floor.shard_floor,
}
NOT_IN_QUICK = {  # other scenarios' code at other sizes, and two that start Ray several times, which tests cover
    "full-100k-wide",
    "sampled-1k",
    "sampled-16k",
    "scale-V",
    "scale-K",
    "nodes",
    "ray-naive",
    "full-1M-memory",
}
