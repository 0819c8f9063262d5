"""The retrieval task answers the argument forms that TensorFlow Recommenders 0.7.7 answers, and refuses the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import shardloss
import torch
from forms import DIM, INPUTS, NAN, Given, refused, same, unchanged_table
from shardloss.compat import tfrs
from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss_server.rpc.serve import Server
from torch import Tensor

NUM_QUERIES = 3
QUERIES = INPUTS[:NUM_QUERIES]
ROWS = torch.tensor([4, 7, 4, 1, 0, 9])
PROBABILITY = torch.linspace(0.1, 0.9, len(ROWS), dtype=torch.float64)
WEIGHT = torch.linspace(0.5, 1.5, NUM_QUERIES, dtype=torch.float64)
TASK: Given = {"temperature": 0.5, "num_hard_negatives": 2, "remove_accidental_hits": True}


@pytest.fixture(scope="module")
def table(local_server: Server) -> Iterator[shardloss.Table]:
    with unchanged_table(local_server, bias=False) as table:
        yield table


def retrieval(table: shardloss.Table, **given: Any) -> Tensor:
    """Return the loss of the task for good arguments, except for those given."""
    arguments: Given = {
        "query_embeddings": QUERIES, "candidate_embeddings": table.embeddings(ROWS), "sample_weight": WEIGHT,
        "candidate_sampling_probability": PROBABILITY, "candidate_ids": ROWS,
    }  # fmt: skip
    task = {name: given.pop(name, default) for name, default in TASK.items()}
    with torch.no_grad():
        return tfrs.Retrieval(**task)(**{**arguments, **given})


ANSWERED: dict[str, tuple[Given, Given]] = {  # the form, and the same call in tensors
    "queries list": ({"query_embeddings": QUERIES.tolist()}, {}),
    "queries array": ({"query_embeddings": QUERIES.numpy()}, {}),
    "weight list": ({"sample_weight": WEIGHT.tolist()}, {}),
    "weight array [Q, 1]": ({"sample_weight": WEIGHT.numpy()[:, None]}, {}),
    "weight number": ({"sample_weight": 2}, {"sample_weight": torch.full((NUM_QUERIES,), 2.0)}),
    "weight [1]": ({"sample_weight": [0.5]}, {"sample_weight": torch.full((NUM_QUERIES,), 0.5)}),
    "weight bools": ({"sample_weight": [True, False, True]}, {"sample_weight": torch.tensor([1.0, 0.0, 1.0])}),
    "probability list": ({"candidate_sampling_probability": PROBABILITY.tolist()}, {}),
    "probability [1, C]": ({"candidate_sampling_probability": PROBABILITY.numpy()[None]}, {}),
    "probability number": (
        {"candidate_sampling_probability": 0.25}, {"candidate_sampling_probability": torch.full((len(ROWS),), 0.25)},
    ),
    "ids list": ({"candidate_ids": ROWS.tolist()}, {}),
    "ids texts": ({"candidate_ids": [f"film {i}" for i in ROWS.tolist()]}, {}),
    "ids floats": ({"candidate_ids": ROWS.double()}, {}),
    "ids nan": ({"candidate_ids": [NAN] * len(ROWS)}, {"candidate_ids": torch.arange(len(ROWS))}),
    "temperature NumPy": ({"temperature": np.float32(0.5)}, {}),
    "temperature tensor": ({"temperature": torch.tensor(0.5)}, {}),
    "negatives NumPy": ({"num_hard_negatives": np.float64(2)}, {}),
    "hits None": ({"remove_accidental_hits": None}, {"remove_accidental_hits": False}),
    "hits 1": ({"remove_accidental_hits": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", ANSWERED)
def test_a_task_answers_the_forms_that_tensorflow_recommenders_answers(table: shardloss.Table, form: str) -> None:
    given, plain = ANSWERED[form]
    assert same(retrieval(table, **given), retrieval(table, **plain))


@pytest.mark.parametrize(
    "field, value",
    [
        ("query_embeddings", QUERIES.long()),
        ("query_embeddings", None),
        ("query_embeddings", QUERIES * NAN),
        ("candidate_embeddings", INPUTS),
        ("sample_weight", "a"),
        ("sample_weight", WEIGHT[None]),
        ("sample_weight", [[0.5], [0.5, 0.5]]),
        ("candidate_sampling_probability", PROBABILITY[:, None]),
        ("candidate_sampling_probability", -1.0),
        ("candidate_sampling_probability", PROBABILITY * NAN),
        ("candidate_ids", ROWS[None]),
        ("candidate_ids", [[1], [2, 3]]),
        ("temperature", "0.5"),
        ("temperature", [0.5]),
        ("temperature", 1e-45),
        ("num_hard_negatives", "2"),
        ("num_hard_negatives", 2.5),
        ("num_hard_negatives", NAN),
        ("remove_accidental_hits", np.array([True, False])),
    ],
)
def test_a_task_refuses_any_other_form_by_the_callers_name(table: shardloss.Table, field: str, value: object) -> None:
    assert refused(lambda: retrieval(table, **{field: value})) == (InvalidArgument, field)


def test_too_many_hard_negatives_name_the_argument(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """A refusal by the server names the argument and not a field of the contract."""
    k = int(client.info.limits["max_top_k"]) + 1
    table = client.create_table(fresh_name(), num_classes=2, dim=DIM, bias=False)
    task, rows = tfrs.Retrieval(num_hard_negatives=k), table.embeddings(torch.zeros(k + 2, dtype=torch.int64))
    assert refused(lambda: task(torch.zeros(1, DIM), rows)) == (LimitExceeded, "num_hard_negatives")
