"""Tests that use a GPU if there is one: a worker's verbs, and a trainer's CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import shardloss
import torch
from shardloss_server.cluster.group import Order
from shardloss_server.cluster.worker import Worker
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import Batch, Candidates, Part, RowWrite, StepKey, TableSpec, Upstream
from shardloss_server.shard.scan import Question

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")
V, D, N = 23, 4, 6


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return every tensor of an answer, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in sorted(value) for tensor in tensors_of(value[key])]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def answers(worker: Worker, dtype: str, is_sampled: bool) -> list[Any]:
    """Call every verb of a worker once, over two shards, and return the answers."""
    generator = torch.Generator().manual_seed(3)
    compute = torch.float64 if dtype == "float64" else torch.float32
    spec = TableSpec(
        "t", V, D, dtype, True, Placement("mod", V, 2), Initializer("normal", 0.5, 1), OptimizerSpec("adam", eps=1e-8)
    )
    hidden = torch.randn(N, D, generator=generator, dtype=compute)
    labels = torch.randint(0, V, (N, 2), generator=generator)
    weights = torch.full((N, 2), 0.5, dtype=compute)
    candidates = None
    if is_sampled:
        ids = torch.arange(0, V, 3)
        log_weight = torch.zeros(len(ids), dtype=compute)
        after_hit = torch.full_like(log_weight, -torch.inf)
        candidates = Candidates(ids, log_weight, after_hit, torch.zeros(N, 2, dtype=compute))
    part = Part(Batch(hidden, labels, weights, weights.sum(1)), candidates)
    upstream = Upstream(torch.full((N,), 3.0, dtype=torch.float64), torch.ones(N, dtype=compute))
    ids = torch.tensor([5, 0, 22])
    question = Question(hidden, labels[:, 0], torch.zeros(N, dtype=torch.float64), 3, True)
    found: list[Any] = [worker.create(spec, 4), worker.fill("t", 0, 1)]
    found.append(worker.write("t", RowWrite(1, ids, torch.ones(3, D), torch.ones(3))))
    found.append(worker.score("t", True, True, part))
    found.append(worker.gradient("t", upstream, part))
    found.append(worker.apply("t", Order(2, StepKey("s", 1, b""), 0.1, 0, (upstream,)), part))
    found.append(worker.read("t", torch.arange(V)))
    found.append(worker.scan("t", question, 0, 2))
    found.append(worker.asked_logits("t", hidden, labels))
    found.append(worker.catch_up("t", worker.records_since("t", 1)[0]))
    return found


@needs_gpu
@pytest.mark.parametrize("is_sampled", [False, True], ids=["full", "sampled"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_gpu_worker_answers_as_a_cpu_worker(dtype: str, is_sampled: bool) -> None:
    """Every verb gives the same answer on a GPU worker as on a CPU worker, within rounding, as CPU tensors."""
    on_cpu, on_gpu = (answers(Worker(0, 1, device), dtype, is_sampled) for device in ("cpu", "cuda:0"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        for mine, its in zip(tensors_of(cpu), tensors_of(gpu), strict=True):
            assert its.device.type == "cpu"
            wide = 2e-2 if dtype == "bfloat16" else 1e-4 if dtype == "float32" else 1e-10
            torch.testing.assert_close(its, mine, rtol=wide, atol=wide)


def test_every_verb_is_asked_here() -> None:
    """The ten calls of the comparison above succeed on a CPU worker, so they are checked without a GPU too."""
    assert len(answers(Worker(0, 1), "float32", True)) == 10


@needs_gpu
def test_cuda_hidden_trains_through_the_service(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """The loss and the gradient are on hidden's device, and a CUDA GradScaler scales the step."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D)
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    scaler = torch.amp.GradScaler("cuda")
    hidden = torch.randn(N, D, device="cuda", requires_grad=True)
    loss = head(hidden, torch.randint(0, V, (N,), device="cuda"))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert loss.device.type == "cuda"
    assert hidden.grad is not None
    assert hidden.grad.device.type == "cuda"
    assert table.info().num_commits == 1
