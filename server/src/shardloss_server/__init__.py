"""The shardloss server: shards of class tables behind one gRPC front end."""

__version__ = "0.1.0"
