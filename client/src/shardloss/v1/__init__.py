"""Stubs generated from proto/shardloss/v1 (`make protos`); checked by `make protos-check`."""
