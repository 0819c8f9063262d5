"""Client of shardloss."""
