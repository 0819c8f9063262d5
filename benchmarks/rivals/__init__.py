"""One module per rival, each run as a separate process that speaks `benchmarks.rivals.protocol`."""
