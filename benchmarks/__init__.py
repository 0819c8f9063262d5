"""The service against its rivals, interleaved in one run: `python -m benchmarks run`."""
