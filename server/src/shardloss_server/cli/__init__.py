"""The commands of shardloss-server."""
