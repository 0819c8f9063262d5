"""Implementations of the `ShardGroup` port: workers in this process, or Ray actors."""
