"""The GPU comparison runs on the CPU at a tiny shape; nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import gpu
from benchmarks.gpu_contenders import COMPILED, CONTENDERS, LEARNING_RATE, OURS, problem

N, D, V = 8, 16, 64
QUICK = [name for name in CONTENDERS if name != COMPILED]


def torch_losses(dtype: str) -> list[float]:
    """Return the losses of the first two SGD steps on one batch, in float64."""
    given = problem(N, D, V, dtype, "cpu")
    rows = given.rows.double().requires_grad_()
    first = F.cross_entropy(given.hidden.double() @ rows.T, given.labels)
    (grad,) = torch.autograd.grad(first, rows)
    second = F.cross_entropy(given.hidden.double() @ (rows - LEARNING_RATE * grad).T, given.labels)
    return [float(first.detach()), float(second.detach())]


@pytest.mark.slow
def test_every_contender_is_a_row_with_the_same_loss_or_a_reason():
    rows = gpu.compare(N, D, V, "float32", "cpu", goal=0.8, names=QUICK, warm=1, counted=3)
    assert [row.contender for row in rows] == QUICK
    for row in rows:
        assert (row.reason is None) == (row.share is not None)
        if row.reason is None:
            assert row.loss == pytest.approx(torch_losses("float32")[0], rel=1e-5)
    there = [row for row in rows if row.reason is None]
    assert {OURS, "F.linear_cross_entropy", "eager F.cross_entropy(h @ W.T)"} <= {row.contender for row in there}
    assert [row.goal for row in rows] == [0.8] + [None] * (len(rows) - 1)
    assert rows[0].met is not None


@pytest.mark.parametrize("name", [OURS, "eager F.cross_entropy(h @ W.T)", "F.linear_cross_entropy, chunked"])
def test_a_step_trains_the_rows(name: str):
    step = CONTENDERS[name](problem(N, D, V, "float32", "cpu"))
    assert [float(step()), float(step())] == pytest.approx(torch_losses("float32"), rel=1e-5)


def test_bfloat16_runs_too():
    (row,) = gpu.compare(N, D, V, "bfloat16", "cpu", names=[OURS], warm=1, counted=2)
    assert row.reason is None
    assert row.loss == pytest.approx(torch_losses("bfloat16")[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_the_compiled_contender_runs_too():
    (row,) = gpu.compare(N, D, V, "float32", "cpu", names=[COMPILED], warm=1, counted=2)
    assert row.reason is None
    assert row.loss == pytest.approx(torch_losses("float32")[0], rel=1e-5)


def test_a_contender_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fails(_given: object) -> None:
        raise RuntimeError("CUDA | out of\nmemory")

    monkeypatch.setitem(CONTENDERS, "broken", fails)
    rows = gpu.compare(N, D, V, "float32", "cpu", names=["broken", OURS], warm=0, counted=2)
    assert rows[0].reason == "RuntimeError: CUDA / out of memory"
    gpu.write(rows, tmp_path, "a GPU")
    page = (tmp_path / "RESULTS-gpu.md").read_text()
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {len(gpu.HEADER) + 1}
    found = json.loads((tmp_path / "results-gpu.json").read_text())
    assert [row["contender"] for row in found["rows"]] == ["broken", OURS]
    assert found["rows"][0]["share"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    assert gpu.run(tmp_path) == gpu.NO_GPU
    assert not list(tmp_path.iterdir())
