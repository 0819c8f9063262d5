"""The table "What combines" of docs/losses.md, cell by cell: what it allows is accepted, and all else refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shardloss
from shardloss.errors import InvalidArgument

DOCS = (Path(__file__).resolve().parents[2] / "docs/losses.md").read_text()
N, T, V, D, S = 7, 2, 11, 5, 4  # all different
ONE, TWO = np.arange(N) % V, np.stack([np.arange(N), np.arange(N) + 3], 1)
FULL, SAMPLED = shardloss.FullSoftmax(), shardloss.SampledSoftmax(S)
LOGISTIC, SIGMOID = shardloss.SampledLogistic(S), shardloss.FullSigmoid()
HITS_GO = shardloss.SampledLogistic(S, remove_accidental_hits=True)
COLUMNS = {"full softmax": FULL, "sampled softmax": SAMPLED, "logistic, sampled": LOGISTIC, "full sigmoid": SIGMOID}
Call = dict[str, Any]  # loss and labels, as compute_loss takes them

CAP = shardloss.LogitTransform(soft_cap=3.0)
WEIGHTS: Call = {"labels": TWO, "label_weights": np.ones((N, T))}
COLUMN: Call = {"labels": None, "label_distribution": np.full((N, V), 1.0 / V)}
MARGIN, UNIT = shardloss.Margin(m2=0.5), shardloss.LogitTransform(scale=8.0, normalize=True)
SHARED = shardloss.SampledValues(np.arange(S), np.ones((N, 1)), np.ones(S))
OWN = shardloss.SampledValues(np.zeros((N, S), np.int64), np.ones((N, 1)), np.ones((N, S)))
HIT_IDS = shardloss.HitIds(ONE[:, None], np.arange(S))
IN_BATCH = shardloss.HitIds(ONE[:, None])


def call(loss: shardloss.types.Loss, given: Call | None = None, **options: Any) -> Call:
    """Return the arguments of a loss with these options, over labels [N] unless others are given."""
    return {"labels": ONE, "loss": replace(loss, **options), **(given or {})}


def margins(loss: shardloss.types.Loss, given: Call | None = None, **options: Any) -> Call:
    """Return the arguments of `call` with a margin over cosines."""
    return call(loss, given, **{"margin": MARGIN, "logits": UNIT, **options})


TAKEN: dict[tuple[str, str], list[Call]] = {
    ("scale, learned scale, normalize", column): [call(loss, {"want_scale_grad": True}, logits=UNIT)]
    for column, loss in COLUMNS.items()
}
TAKEN |= {("soft cap", column): [call(loss, logits=CAP)] for column, loss in COLUMNS.items()}
TAKEN["soft cap", "full softmax"] += [
    call(FULL, logits=CAP, class_weights=np.ones(V)),
    call(FULL, logits=CAP, z_loss=1),
]
TAKEN |= {
    ("z-loss", "full softmax"): [call(FULL, z_loss=0.1), call(FULL, COLUMN, z_loss=0.1), margins(FULL, z_loss=0.1)],
    ("z-loss", "sampled softmax"): [call(SAMPLED, z_loss=0.1), margins(SAMPLED, z_loss=0.1)],
    ("margin", "full softmax"): [margins(FULL)],
    ("margin", "sampled softmax"): [
        margins(SAMPLED),
        margins(SAMPLED, sampler=shardloss.PartialFc(), num_sampled=N + 1),
        margins(SAMPLED, sampler=shardloss.InBatch(), num_sampled=0),
    ],
    ("label smoothing, class weights", "full softmax"): [
        call(FULL, label_smoothing=0.1, class_weights=np.ones(V)),
        call(FULL, WEIGHTS, label_smoothing=0.1, class_weights=np.ones(V), z_loss=0.1, logits=UNIT),
    ],
    ("label_weights [N, T]", "full softmax"): [call(FULL, WEIGHTS)],
    ("label_weights [N, T]", "full sigmoid"): [call(SIGMOID, WEIGHTS)],
    ("label distribution [N, V]", "full softmax"): [call(FULL, COLUMN), call(FULL, COLUMN, logits=UNIT)],
    ("hit removal", "sampled softmax"): [
        call(SAMPLED, hit_removal="last"),
        call(SAMPLED, remove_accidental_hits=False),
    ],
    ("hit removal", "logistic, sampled"): [call(HITS_GO, hit_removal="last"), call(LOGISTIC)],
    ("hit_ids", "sampled softmax"): [
        call(SAMPLED, sampled_values=SHARED, hit_ids=HIT_IDS),
        call(SAMPLED, sampled_values=OWN, hit_ids=replace(HIT_IDS, sampled=np.zeros((N, S), np.int64))),
        call(SAMPLED, sampler=shardloss.InBatch(), num_sampled=0, hit_ids=IN_BATCH),
    ],
    ("hit_ids", "logistic, sampled"): [
        call(HITS_GO, sampled_values=SHARED, hit_ids=HIT_IDS),
        call(HITS_GO, sampler=shardloss.InBatch(), num_sampled=0, hit_ids=IN_BATCH),
    ],
    ("hard negatives", "sampled softmax"): [
        call(SAMPLED, num_hard_negatives=2),
        margins(SAMPLED, num_hard_negatives=2),
        call(SAMPLED, sampled_values=SHARED, num_hard_negatives=2),
    ],
    ("lse in the reply", "full softmax"): [call(FULL, {"want_lse": True}), call(FULL, {**COLUMN, "want_lse": True})],
    ("lse in the reply", "sampled softmax"): [call(SAMPLED, {"want_lse": True})],
}

SMOOTH = "full_softmax.label_smoothing"
REFUSED: dict[tuple[str, str], list[tuple[str, Call]]] = {
    ("soft cap", "full softmax"): [
        ("logits.soft_cap", call(FULL, logits=CAP, label_smoothing=0.1)),
        ("logits.soft_cap", call(FULL, COLUMN, logits=CAP)),
        ("logits.soft_cap", margins(FULL, logits=CAP)),
    ],
    ("soft cap", "sampled softmax"): [("logits.soft_cap", margins(SAMPLED, logits=CAP))],
    ("margin", "full softmax"): [
        ("labels", margins(FULL, {"labels": TWO})),
        ("label_weights", margins(FULL, {"label_weights": np.ones((N, 1))})),
        ("full_softmax.class_weights", margins(FULL, class_weights=np.ones(V))),
        (SMOOTH, margins(FULL, label_smoothing=0.1)),
        ("margin", margins(FULL, COLUMN)),
    ],
    ("margin", "sampled softmax"): [("labels", margins(SAMPLED, {"labels": TWO}))],
    ("label smoothing, class weights", "full softmax"): [
        (SMOOTH, call(FULL, COLUMN, label_smoothing=0.1)),
        ("full_softmax.class_weights", call(FULL, COLUMN, class_weights=np.ones(V))),
    ],
    ("label_weights [N, T]", "sampled softmax"): [("label_weights", call(SAMPLED, WEIGHTS))],
    ("label_weights [N, T]", "logistic, sampled"): [("label_weights", call(LOGISTIC, WEIGHTS))],
    ("label distribution [N, V]", "sampled softmax"): [("label_columns", call(SAMPLED, COLUMN))],
    ("label distribution [N, V]", "logistic, sampled"): [("label_columns", call(LOGISTIC, COLUMN))],
    ("label distribution [N, V]", "full sigmoid"): [("label_columns", call(SIGMOID, COLUMN))],
    ("hit_ids", "sampled softmax"): [("hit_ids", call(SAMPLED, hit_ids=HIT_IDS))],
    ("hit_ids", "logistic, sampled"): [("hit_ids", call(LOGISTIC, sampled_values=SHARED, hit_ids=HIT_IDS))],
    ("hard negatives", "sampled softmax"): [
        ("sampled_softmax.num_hard_negatives", call(SAMPLED, sampled_values=OWN, num_hard_negatives=2))
    ],
    ("lse in the reply", "logistic, sampled"): [("want_lse", call(LOGISTIC, {"want_lse": True}))],
    ("lse in the reply", "full sigmoid"): [("want_lse", call(SIGMOID, {"want_lse": True}))],
}


@pytest.fixture
def compute(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Callable[[Call], object]:
    """compute_loss of a table without biases, as a function of its arguments."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D, num_shards=3, dtype="float64", bias=False)
    hidden = np.random.default_rng(0).normal(size=(N, D))
    return lambda given: table.compute_loss(hidden, **given)


def cells() -> dict[tuple[str, str], str]:
    """Return the table's cells by (row, column); remarks in parentheses are removed from the row's name."""
    section = DOCS.split("## What combines")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    columns = lines[0][1:]
    rows = {re.sub(r" \(.*\)", "", line[0]): line[1:] for line in lines[2:]}
    return {(row, column): cell for row, found in rows.items() for column, cell in zip(columns, found, strict=True)}


def test_the_table_says_yes_where_something_is_taken() -> None:
    """Exactly the "yes" cells of the table have calls in TAKEN; each conditional "yes" has one in REFUSED."""
    says = cells()
    assert {column for _, column in says} == set(COLUMNS)
    assert {place for place, cell in says.items() if cell.startswith("yes")} == set(TAKEN)
    conditional = {place for place, cell in says.items() if cell.startswith("yes") and cell != "yes"}
    assert conditional <= set(REFUSED)
    assert set(REFUSED) <= set(says)


@pytest.mark.parametrize("place", TAKEN, ids=" + ".join)
def test_what_combines_is_taken(compute: Callable[[Call], object], place: tuple[str, str]) -> None:
    for given in TAKEN[place]:
        compute(given)


@pytest.mark.parametrize("place", REFUSED, ids=" + ".join)
def test_what_does_not_combine_is_refused_by_its_field(
    compute: Callable[[Call], object], place: tuple[str, str]
) -> None:
    for field, given in REFUSED[place]:
        with pytest.raises(InvalidArgument) as refused:
            compute(given)
        assert refused.value.field == field


def test_what_a_loss_has_not_is_no_field_of_it() -> None:
    """A cell says "yes" exactly if the client's loss class has a field for the option."""
    fields = {column: set(loss.__dataclass_fields__) for column, loss in COLUMNS.items()}
    names = {
        "z-loss": "z_loss",
        "margin": "margin",
        "label smoothing, class weights": "label_smoothing",
        "hit removal": "hit_removal",
        "hit_ids": "hit_ids",
        "hard negatives": "num_hard_negatives",
    }
    for (row, column), cell in cells().items():
        if row in names:
            assert cell.startswith("yes") == (names[row] in fields[column]), (row, column)


def test_a_margin_needs_a_table_without_biases(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """A margin over a table with biases raises InvalidArgument."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D)
    with pytest.raises(InvalidArgument, match="without biases"):
        table.compute_loss(np.ones((N, D)), **margins(FULL))
