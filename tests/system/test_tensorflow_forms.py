"""The losses of compat.tensorflow answer the argument forms that TensorFlow 2.21 answers, and refuse the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import shardloss
import torch
from forms import (
    BATCH,
    COUNT,
    DIM,
    INPUTS,
    LABELS,
    NAN,
    NUM_CLASSES,
    SAMPLED,
    TRUE_COUNT,
    Given,
    S,
    T,
    refused,
    same,
    unchanged_table,
)
from shardloss.compat import tensorflow
from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss_server.rpc.serve import Server
from torch import Tensor


@pytest.fixture(scope="module")
def table(local_server: Server) -> Iterator[shardloss.Table]:
    with unchanged_table(local_server, bias=True) as table:
        yield table


def loss(function: Callable[..., Tensor], table: shardloss.Table, **given: Any) -> Tensor:
    """Return a sampled loss of good arguments, except for those given."""
    arguments = {
        "weights": table, "biases": table, "labels": LABELS, "inputs": INPUTS, "num_sampled": S,
        "num_classes": NUM_CLASSES, "num_true": T, "sampled_values": (SAMPLED, TRUE_COUNT, COUNT),
    }  # fmt: skip
    with torch.no_grad():
        return function(**{**arguments, **given})


def values(sampled: object = SAMPLED, true_count: object = TRUE_COUNT, count: object = COUNT) -> Given:
    return {"sampled_values": (sampled, true_count, count)}


LOSSES = [tensorflow.sampled_softmax_loss, tensorflow.nce_loss, tensorflow.v1.sampled_softmax_loss]
NAMES = ["softmax", "nce", "v1"]
FOURS = np.broadcast_to(4, (BATCH, T))  # cannot be written
ANSWERED: dict[str, tuple[Given, Given]] = {  # the form, and the same call in tensors of the documented shapes
    "labels int32 array": ({"labels": LABELS.numpy().astype(np.int32)}, {}),
    "labels uint8 array": ({"labels": LABELS.numpy().astype(np.uint8)}, {}),
    "labels uint64 array": ({"labels": LABELS.numpy().astype(np.uint64)}, {}),
    "labels big-endian array": ({"labels": LABELS.numpy().astype(">i4")}, {}),
    "labels float array": ({"labels": LABELS.numpy().astype(np.float32)}, {}),
    "labels read-only array": ({"labels": FOURS}, {"labels": torch.full_like(LABELS, 4)}),
    "labels uint8 tensor": ({"labels": LABELS.to(torch.uint8)}, {}),
    "labels int16 tensor": ({"labels": LABELS.to(torch.int16)}, {}),
    "labels float tensor": ({"labels": LABELS.float()}, {}),
    "labels bfloat16 tensor": ({"labels": LABELS.bfloat16()}, {}),
    "labels bool tensor": ({"labels": LABELS > 5}, {"labels": (LABELS > 5).long()}),
    "inputs array": ({"inputs": INPUTS.numpy()}, {}),
    "inputs float32 array": ({"inputs": INPUTS.numpy().astype(np.float32)}, {"inputs": INPUTS.float()}),
    "num_sampled 5.0": ({"num_sampled": 5.0}, {}),
    "num_sampled NumPy": ({"num_sampled": np.int32(5)}, {}),
    "num_sampled array": ({"num_sampled": np.array(5)}, {}),
    "num_sampled tensor": ({"num_sampled": torch.tensor(5)}, {}),
    "num_classes float": ({"num_classes": float(NUM_CLASSES)}, {}),
    "num_classes NumPy": ({"num_classes": np.int64(NUM_CLASSES)}, {}),
    "num_true NumPy": ({"num_true": np.int64(T)}, {}),
    "num_true float": ({"num_true": np.float64(T)}, {}),
    "values list": ({"sampled_values": [SAMPLED, TRUE_COUNT, COUNT]}, {}),
    "sampled list": (values(SAMPLED.tolist()), {}),
    "sampled tuple": (values(tuple(SAMPLED.tolist())), {}),
    "sampled float array": (values(SAMPLED.numpy().astype(np.float32)), {}),
    "sampled int32 tensor": (values(SAMPLED.int()), {}),
    "counts arrays": (values(SAMPLED.numpy(), TRUE_COUNT.numpy(), COUNT.numpy()), {}),
    "counts lists": (values(SAMPLED, TRUE_COUNT.tolist(), COUNT.tolist()), {}),
    "true count [N, 1]": (values(true_count=TRUE_COUNT[:, :1]), values(true_count=TRUE_COUNT[:, :1].repeat(1, T))),
    "true count [1, T]": (values(true_count=TRUE_COUNT[:1]), values(true_count=TRUE_COUNT[:1].repeat(BATCH, 1))),
    "true count [T]": (values(true_count=TRUE_COUNT[0]), values(true_count=TRUE_COUNT[:1].repeat(BATCH, 1))),
    "true count []": (values(true_count=0.5), values(true_count=torch.full((BATCH, T), 0.5))),
    "count [1, S]": (values(count=COUNT[None]), {}),
    "count [N, S]": (values(count=COUNT.repeat(BATCH, 1)), {}),
    "count [1]": (values(count=[0.5]), values(count=torch.full((S,), 0.5))),
    "count []": (values(count=torch.tensor(0.5)), values(count=torch.full((S,), 0.5))),
    "hits None": ({"remove_accidental_hits": None}, {"remove_accidental_hits": False}),
    "hits 0": ({"remove_accidental_hits": 0}, {"remove_accidental_hits": False}),
    "hits 1": ({"remove_accidental_hits": 1}, {"remove_accidental_hits": True}),
    "hits []": ({"remove_accidental_hits": []}, {"remove_accidental_hits": False}),
    "hits NumPy": ({"remove_accidental_hits": np.bool_(True)}, {"remove_accidental_hits": True}),
    "name": ({"name": None}, {}),
}  # fmt: skip


@pytest.mark.parametrize("function", LOSSES, ids=NAMES)
@pytest.mark.parametrize("form", ANSWERED)
def test_a_sampled_loss_answers_the_forms_that_tensorflow_answers(
    table: shardloss.Table, function: Callable[..., Tensor], form: str
) -> None:
    given, plain = ANSWERED[form]
    assert same(loss(function, table, **given), loss(function, table, **plain))


@pytest.mark.parametrize("function", LOSSES, ids=NAMES)
def test_counts_of_each_row_correct_that_row(table: shardloss.Table, function: Callable[..., Tensor]) -> None:
    """sampled_expected_count [N, S] gives each row the loss that it has alone, with its own counts [S]."""
    counts = torch.linspace(0.1, 0.9, BATCH * S, dtype=torch.float64).reshape(BATCH, S)
    for removed in (False, True):
        found = loss(function, table, **values(count=counts), remove_accidental_hits=removed)
        alone = [
            loss(
                function, table, labels=LABELS[n : n + 1], inputs=INPUTS[n : n + 1], remove_accidental_hits=removed,
                **values(true_count=TRUE_COUNT[n : n + 1], count=counts[n]),
            )
            for n in range(BATCH)
        ]  # fmt: skip
        assert same(found, torch.cat(alone))


@pytest.mark.parametrize("form", ["labels float array", "labels uint8 tensor", "labels bool tensor", "inputs array"])
@pytest.mark.parametrize("function", [tensorflow.full_softmax_loss, tensorflow.full_sigmoid_loss])
def test_the_exact_losses_answer_the_same_forms(
    table: shardloss.Table, function: Callable[..., Tensor], form: str
) -> None:
    with torch.no_grad():
        found, plain = (
            function(table, table, given.get("labels", LABELS)[:, :1], given.get("inputs", INPUTS))
            for given in ANSWERED[form]
        )
    assert same(found, plain)


DRAWS = {"sampled_values": None}
REFUSED: list[tuple[str, Given]] = [
    ("weights", {"weights": INPUTS}),
    ("biases", {"biases": INPUTS[0]}),
    ("labels", {"labels": LABELS.tolist()}),
    ("labels", {"labels": None}),
    ("labels", {"labels": LABELS + 0.5}),
    ("labels", {"labels": torch.where(LABELS == 3, NAN, LABELS)}),
    ("labels", {"labels": np.where(LABELS == 3, np.inf, LABELS)}),
    ("labels", {"labels": LABELS.to(torch.complex64)}),
    ("labels", {"labels": LABELS.numpy().astype(str)}),
    ("labels", {"labels": LABELS - 1}),
    ("labels", {"labels": LABELS + NUM_CLASSES}),
    ("labels", {"labels": LABELS[:, 0]}),
    ("labels", {"num_true": 1}),
    ("inputs", {"labels": LABELS[:2]}),
    ("inputs", {"inputs": INPUTS.tolist()}),
    ("inputs", {"inputs": INPUTS.long()}),
    ("inputs", {"inputs": INPUTS * NAN}),
    ("inputs", {"inputs": INPUTS[:, :3]}),
    ("inputs", {"inputs": INPUTS[None]}),
    ("num_sampled", {"num_sampled": 5.5}),
    ("num_sampled", {"num_sampled": "5"}),
    ("num_sampled", {"num_sampled": None}),
    ("num_sampled", {"num_sampled": 0, **DRAWS}),
    ("num_sampled", {"num_sampled": -1, **DRAWS}),
    ("num_sampled", {"num_sampled": NUM_CLASSES + 1, **DRAWS}),
    ("num_sampled", {"num_sampled": 2**70, **DRAWS}),
    ("num_sampled", {"num_sampled": NAN, **DRAWS}),
    ("num_classes", {"num_classes": None}),
    ("num_classes", {"num_classes": str(NUM_CLASSES)}),
    ("num_classes", {"num_classes": NUM_CLASSES + 1}),
    ("num_true", {"num_true": None}),
    ("num_true", {"num_true": 0}),
    ("num_true", {"num_true": [2]}),
    ("sampled_values", {"sampled_values": 5}),
    ("sampled_values", {"sampled_values": (SAMPLED, TRUE_COUNT)}),
    ("sampled_values.sampled", {"sampled_values": "abc"}),
    ("sampled_values.sampled", values([[1, 2], [3]])),
    ("sampled_values.sampled", values(SAMPLED[None])),
    ("sampled_values.sampled", values(SAMPLED[1:])),
    ("sampled_values.sampled", values(SAMPLED - 1)),
    ("sampled_values.sampled", values(SAMPLED + NUM_CLASSES)),
    ("sampled_values.sampled", values(SAMPLED + 0.5)),
    ("sampled_values.true_expected_count", values(true_count=TRUE_COUNT.long() + 1)),
    ("sampled_values.true_expected_count", values(true_count=TRUE_COUNT[:, 0])),
    ("sampled_values.true_expected_count", values(true_count=TRUE_COUNT * 0)),
    ("sampled_values.true_expected_count", values(true_count=TRUE_COUNT * NAN)),
    ("sampled_values.true_expected_count", values(true_count=None)),
    ("sampled_values.sampled_expected_count", values(count=COUNT.repeat(2, 1))),
    ("sampled_values.sampled_expected_count", values(count=[1] * S)),
    ("sampled_values.sampled_expected_count", values(count=-COUNT)),
    ("remove_accidental_hits", {"remove_accidental_hits": np.array([True, False])}),
]  # fmt: skip


@pytest.mark.parametrize("function", LOSSES, ids=NAMES)
@pytest.mark.parametrize("row", range(len(REFUSED)), ids=lambda row: f"{row}-{REFUSED[row][0]}")
def test_a_sampled_loss_refuses_any_other_form_by_the_callers_name(
    table: shardloss.Table, function: Callable[..., Tensor], row: int
) -> None:
    field, given = REFUSED[row]
    assert refused(lambda: loss(function, table, **given)) == (InvalidArgument, field)


def test_the_exact_losses_name_their_own_arguments(table: shardloss.Table) -> None:
    """Labels that do not fit the inputs are refused without a field of the contract in the message."""
    for function in (tensorflow.full_softmax_loss, tensorflow.full_sigmoid_loss):
        for field, labels, inputs in (
            ("labels", LABELS[:2], INPUTS),
            ("labels", LABELS.tolist(), INPUTS),
            ("inputs", LABELS, INPUTS.tolist()),
            ("inputs", LABELS, INPUTS[:, :3]),
            ("inputs", LABELS, INPUTS * NAN),
        ):
            with pytest.raises(InvalidArgument) as refused, torch.no_grad():
                function(table, table, labels, inputs)  # type: ignore[arg-type]
            assert refused.value.field == field
            assert "hidden" not in refused.value.message


def test_no_rows_are_no_losses(table: shardloss.Table) -> None:
    """An empty batch is answered, also with counts of each row."""
    for count in (COUNT, COUNT.repeat(2, 1)[:0]):
        given = {"labels": LABELS[:0], "inputs": INPUTS[:0], **values(true_count=TRUE_COUNT[:0], count=count)}
        assert loss(tensorflow.nce_loss, table, **given).shape == (0,)


def test_a_batch_above_the_limits_names_inputs(table: shardloss.Table) -> None:
    """A refusal by the server names the argument and not a field of the contract."""
    rows = int(table.client.info.limits["max_batch"]) + 1
    given = {"labels": torch.zeros(rows, T, dtype=torch.int64), "inputs": torch.zeros(rows, DIM)}
    assert refused(lambda: loss(tensorflow.nce_loss, table, **given, **DRAWS)) == (LimitExceeded, "inputs")


@pytest.mark.parametrize("seed", [7, 7.0, np.int64(7), np.float64(7), torch.tensor(7), 7 + 2**64])
def test_a_seed_may_be_any_whole_number(table: shardloss.Table, seed: object) -> None:
    found = loss(tensorflow.sampled_softmax_loss, table, seed=seed, **DRAWS)
    assert same(found, loss(tensorflow.sampled_softmax_loss, table, seed=7, **DRAWS))


@pytest.mark.parametrize("strategy", ["div", "mod", "MOD", b"mod", None])
def test_a_table_of_one_shard_has_any_partition_strategy(
    client: shardloss.LossClient, fresh_name: Callable[[], str], strategy: object
) -> None:
    """As in TensorFlow, the strategy has no effect on one partition; of several shards only the table's is right."""
    one, two = (
        client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, num_shards=shards) for shards in (1, 2)
    )
    given = {"partition_strategy": strategy}
    assert loss(tensorflow.v1.nce_loss, one, **given).shape == (BATCH,)
    if strategy != two.spec.placement:
        found = refused(lambda: loss(tensorflow.v1.nce_loss, two, **given))
        assert found == (InvalidArgument, "partition_strategy")
