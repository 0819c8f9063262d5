"""One module a rival, each run as a process of its own that speaks `benchmarks.rivals.protocol`."""
