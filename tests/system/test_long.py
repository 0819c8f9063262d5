"""Tests that take a minute or more: a table of ten million rows, and the demo as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shardloss
import torch

from benchmarks.procfs import command_of, descendants_of, memory_of
from tests.servers import started

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("initializer", [shardloss.Normal(0.01), shardloss.Uniform(0.01)], ids=["normal", "uniform"])
def test_ten_million_rows_are_made_in_a_minute(temp: Path, initializer: shardloss.types.Initializer) -> None:
    """A table of 10M x 128 on two workers is created in less than 60 s, and a first step on it succeeds."""
    with started(temp, "--workers", "2") as server, shardloss.connect(server.address) as client:
        began = time.monotonic()
        table = client.create_table("large", num_classes=10_000_000, dim=128, initializer=initializer)
        made_s = time.monotonic() - began
        print(f"10M x 128, {initializer}: {made_s:.1f} s")
        assert made_s < 60
        hidden, labels = np.ones((8, 128), np.float32), np.arange(8) * 1_000_000
        loss = shardloss.SampledSoftmax(num_sampled=64)
        assert table.session().train_step(hidden, labels, loss, learning_rate=0.1).committed is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.filterwarnings("ignore:.*losses wait for one commit")
def test_micro_batches_cost_their_hidden_once(temp: Path, kind: str) -> None:
    """64 parts of [4096, 1024] add at most 1.25 times their hidden to the memory of the front end and of a worker."""
    flags = ["--keep-mib", "0", *(["--local"] if kind == "local" else ["--workers", "2"])]
    num_parts, num_rows, dim = 64, 4096, 1024
    with started(temp, *flags) as server, shardloss.connect(server.address) as client:
        table = client.create_table("t", num_classes=1000, dim=dim)
        head = table.softmax(reduction="sum")
        optimizer = head.optimizer(0.001)

        def accumulate(num: int) -> None:
            for _ in range(num):
                hidden = torch.randn(num_rows, dim, requires_grad=True)
                head(hidden, torch.randint(0, 1000, (num_rows,))).backward()

        workers = [pid for pid in descendants_of(server.process.pid) if b"WorkerActor" in command_of(pid)]
        assert len(workers) == (0 if kind == "local" else 2)
        accumulate(1)
        optimizer.step()
        before = {pid: memory_of(pid) for pid in (server.process.pid, *workers)}
        accumulate(num_parts)
        times_hidden = [(memory_of(pid) - size) / (4 * num_parts * num_rows * dim) for pid, size in before.items()]
        print(f"{kind}: front end and workers keep {[round(times, 2) for times in times_hidden]} times hidden")
        assert max(times_hidden) <= 1.25
        optimizer.step()
        assert table.info().num_commits == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_the_city_finder_reaches_its_goal(tmp_path: Path) -> None:
    """After at most five minutes of training, hit@10 on held-out names is at least 0.80."""
    command = [sys.executable, "-m", "examples.cities", "train", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1400)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["train_s"] <= 305
    assert result["eval_names"] == 10_000
    assert result["after"]["hit_at_10"] >= 0.80
    assert result["after"]["nll"] < 3.5
    assert result["before"]["nll"] > 12
