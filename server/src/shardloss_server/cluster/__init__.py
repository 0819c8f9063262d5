"""Groups of shards behind one port, in this process or on Ray workers."""
