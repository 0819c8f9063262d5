"""The service's front end over a shard group, in a rival's child process."""

from __future__ import annotations

from shardloss_server.cluster.group import ShardGroup
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import Server

from benchmarks.rivals.child import serve_child


def serve_front_end(group: ShardGroup) -> None:
    """Serve until stdin closes, then close the group."""
    server = Server(group, ServerConfig())
    server.start()
    serve_child({"address": server.address})
    server.stop(grace_s=1.0)
    group.close()
