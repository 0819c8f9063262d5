"""Trainers in a separate process, one per table: `python -m tests.load.trainers ADDRESS SECONDS PAUSE_S TABLE...`.

Prints a JSON list of the (start, seconds) of every step, measured on the machine's monotonic clock.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import shardloss

NUM_ROWS, DIM, NUM_CLASSES, NUM_SAMPLED = 256, 128, 200_000, 2048
RATE = 0.01


def train(address: str, name: str, seconds: float, pause_s: float, steps: list[tuple[float, float]]) -> None:
    """Train for `seconds` over a separate connection: a loss, a commit, then a pause of pause_s on average."""
    rng = np.random.default_rng(abs(hash(name)) % 2**32)
    loss, g = shardloss.SampledSoftmax(NUM_SAMPLED), np.full(NUM_ROWS, 1 / NUM_ROWS, np.float32)
    stop = time.monotonic() + seconds
    with shardloss.connect(address, timeout_s=60.0) as client:
        session = client.table(name).session()
        while time.monotonic() < stop:
            hidden = rng.standard_normal((NUM_ROWS, DIM), dtype=np.float32)
            labels = rng.integers(0, NUM_CLASSES, NUM_ROWS)
            began = time.monotonic()
            result = session.compute_loss(hidden, labels, loss, want_hidden_grad=True)
            session.commit([(result, g)], learning_rate=RATE)
            steps.append((began, time.monotonic() - began))
            if pause_s:
                time.sleep(pause_s * rng.uniform(0.5, 1.5))


def main() -> None:
    address, seconds, pause_s, *tables = sys.argv[1:]
    steps: list[tuple[float, float]] = []
    threads = [
        threading.Thread(target=train, args=(address, table, float(seconds), float(pause_s), steps)) for table in tables
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
