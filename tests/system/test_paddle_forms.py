"""The losses of compat.paddle answer the argument forms that Paddle 3.3.1 answers, and refuse the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import shardloss
import torch
from forms import BATCH, DIM, INPUTS, LABELS, NAN, NUM_CLASSES, SAMPLED, Given, S, T, refused, same, unchanged_table
from shardloss.compat import paddle
from shardloss.errors import InvalidArgument
from shardloss_server.rpc.serve import Server
from torch import Tensor

LABEL = LABELS[:, 0]
SOFT = torch.linspace(-1.0, 1.0, BATCH * NUM_CLASSES, dtype=torch.float64).reshape(BATCH, NUM_CLASSES).softmax(-1)
COLUMNS = torch.cat([LABELS, SAMPLED.expand(BATCH, S)], 1)
COUNTS = torch.full((BATCH, T + S), 0.5, dtype=torch.float64)
CROSS, BASE, MARGIN, SAMPLES, CENTERS = (
    "cross_entropy", "softmax_with_cross_entropy", "margin_cross_entropy", "sampled_softmax_with_cross_entropy",
    "class_center_sample",
)  # fmt: skip
GOOD: dict[str, Given] = {  # arguments other than the logits
    CROSS: {"label": LABEL},
    BASE: {"label": LABEL},
    MARGIN: {"label": LABEL, "scale": 2.0},
    SAMPLES: {"label": LABELS, "num_samples": S, "num_true": T, "seed": 9},
    CENTERS: {"label": LABEL, "num_classes": NUM_CLASSES, "num_samples": 12},
}
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def table(local_server: Server) -> Iterator[shardloss.Table]:
    with unchanged_table(local_server, bias=False) as table:
        yield table


@pytest.fixture(params=["lazy", "dense"])
def logits(table: shardloss.Table, request: pytest.FixtureRequest) -> object:
    """Logits [N, V] of a table, or a dense tensor [N, V] of cosines."""
    return table.logits(INPUTS) if request.param == "lazy" else (SOFT * BATCH).cos()


@pytest.fixture
def call(logits: object) -> Call:
    """A function that calls one of Paddle's losses with good arguments, except for those given."""

    def called(name: str, /, **given: Any) -> Any:
        of_logits = {} if name == CENTERS else {"input" if name == CROSS else "logits": logits}
        torch.manual_seed(3)
        with torch.no_grad():
            return getattr(paddle, name)(**{**GOOD[name], **of_logits, **given})

    return called


ANSWERED: list[tuple[str, Given, Given]] = [  # the form, and the same call in plain values
    *((name, {"label": LABEL.to(dtype)}, {}) for name in (CROSS, BASE) for dtype in (
        torch.int32, torch.uint8, torch.float32, torch.float64
    )),
    *((name, {"label": LABEL > 4}, {"label": (LABEL > 4).long()}) for name in (CROSS, BASE)),
    *((name, {"axis": axis}, {}) for name in (CROSS, BASE) for axis in (np.int64(-1), torch.tensor(-1), 1)),
    *((name, {"ignore_index": ignored}, {"ignore_index": 3}) for name in (CROSS, BASE) for ignored in (
        np.int32(3), torch.tensor(3)
    )),
    *((name, {"soft_label": soft}, {}) for name in (CROSS, BASE) for soft in (None, False, np.bool_(False))),
    (BASE, {"numeric_stable_mode": None, "return_softmax": None}, {}),
    (CROSS, {"use_softmax": True, "name": 5}, {}),
    *((CROSS, {"label_smoothing": e}, {"label_smoothing": 0.25}) for e in (np.float32(0.25), torch.tensor(0.25))),
    (CROSS, {"label_smoothing": 1}, {"label_smoothing": 1.0}),
    (CROSS, {"label_smoothing": 0}, {}),
    (MARGIN, {"margin1": 1, "margin2": np.float64(0.5), "margin3": torch.tensor(0.0), "scale": 2}, {}),
    (MARGIN, {"reduction": None, "group": False}, {"reduction": "none"}),
    (SAMPLES, {"num_samples": np.int64(S), "num_true": torch.tensor(T), "seed": np.int64(9)}, {}),
    (CENTERS, {"num_classes": np.int64(NUM_CLASSES), "num_samples": torch.tensor(12)}, {}),
]  # fmt: skip


@pytest.mark.parametrize("name, given, plain", ANSWERED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_loss_answers_the_forms_that_paddle_answers(call: Call, name: str, given: Given, plain: Given) -> None:
    assert same(call(name, **given), call(name, **plain))


def test_the_label_is_also_called_target(logits: Any) -> None:
    """As in Paddle 3.3, target= is another name of cross_entropy's label; both at once are refused."""
    with torch.no_grad():
        assert same(paddle.cross_entropy(logits, target=LABEL), paddle.cross_entropy(logits, LABEL))
    assert refused(lambda: paddle.cross_entropy(logits, LABEL, target=LABEL)) == (InvalidArgument, "target")
    assert refused(lambda: paddle.cross_entropy(logits, label=LABEL, target=LABEL)) == (InvalidArgument, "target")
    with pytest.raises(TypeError, match="label"):
        paddle.cross_entropy(logits)


REFUSED: list[tuple[str, str, Any]] = [
    *((name, "label", label) for name in (CROSS, BASE, MARGIN) for label in (
        None, LABEL.tolist(), LABEL.numpy(), LABEL + 0.5, LABEL * NAN, LABEL - 1, LABEL + NUM_CLASSES,
        torch.where(LABEL == 0, -(2**63), LABEL), LABELS, LABEL[0],
    )),
    *((name, "axis", axis) for name in (CROSS, BASE) for axis in (-1.0, None, True, "1", 2, 2**40)),
    *((name, "ignore_index", ignored) for name in (CROSS, BASE) for ignored in (
        None, -100.0, True, "x", 2**31, -(2**63), 2**70
    )),
    *((name, "soft_label", soft) for name in (CROSS, BASE) for soft in ("no", [])),
    (BASE, "return_softmax", np.array([True, False])),
    *((CROSS, "label_smoothing", e) for e in (None, "0.1", 1.5, -0.1, NAN)),
    *((CROSS, "reduction", reduction) for reduction in (None, "Mean", b"mean")),
    *((CROSS, "weight", weight) for weight in (
        [1.0] * NUM_CLASSES, np.ones(NUM_CLASSES), torch.ones(NUM_CLASSES).long(), torch.ones(1, NUM_CLASSES)
    )),
    (CROSS, "use_softmax", "no"),
    *((MARGIN, name, value) for name in ("margin1", "margin2", "margin3", "scale") for value in (None, "1", [1.0])),
    (MARGIN, "reduction", "Mean"),
    (MARGIN, "group", True),
    *((SAMPLES, "label", label) for label in (LABELS.numpy(), LABELS.float(), LABELS - 1)),
    *((SAMPLES, name, value) for name in ("num_samples", "num_true", "seed") for value in (None, 2.0, "2", True)),
    *((SAMPLES, "num_samples", value) for value in (0, -1, NUM_CLASSES + 1, 2**70)),
    (SAMPLES, "remove_accidental_hits", None),
    (SAMPLES, "use_customized_samples", "no"),
    *((CENTERS, "label", label) for label in (LABEL.numpy(), LABEL.float(), LABEL - 1, LABEL[:, None])),
    *((CENTERS, name, value) for name in ("num_classes", "num_samples") for value in (None, 9.0, "9", True)),
    (CENTERS, "num_samples", 0),
    (CENTERS, "group", True),
]  # fmt: skip


@pytest.mark.parametrize("name, field, value", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_loss_refuses_any_other_form_by_the_callers_name(call: Call, name: str, field: str, value: object) -> None:
    assert refused(lambda: call(name, **{field: value})) == (InvalidArgument, field)


OWN = {"use_customized_samples": True, "customized_samples": COLUMNS, "customized_probabilities": COUNTS}


@pytest.mark.parametrize(
    "field, name, given",
    [
        ("label", BASE, {"label": -SOFT, "soft_label": True}),
        ("label", CROSS, {"label": SOFT * NAN, "soft_label": True}),
        ("margin1", MARGIN, {"margin1": -1.0}),
        ("margin2", MARGIN, {"margin2": NAN}),
        ("scale", MARGIN, {"scale": -1.0}),
        ("customized_samples", SAMPLES, {**OWN, "customized_samples": None}),
        ("customized_probabilities", SAMPLES, {**OWN, "customized_probabilities": None}),
        ("customized_samples", SAMPLES, {**OWN, "customized_samples": COLUMNS[:, :-1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_table_refuses_is_told_in_paddles_names(
    table: shardloss.Table, field: str, name: str, given: Given
) -> None:
    """Refusals by the server name Paddle's arguments, not fields of the contract."""
    logits = {"input" if name == CROSS else "logits": table.logits(INPUTS)}
    function: Callable[..., Tensor] = getattr(paddle, name)
    assert refused(lambda: function(**{**GOOD[name], **logits, **given})) == (InvalidArgument, field)


def test_customized_samples_are_answered(call: Call) -> None:
    """The arguments that some of the refusals above spoil are answered."""
    assert call(SAMPLES, **OWN).shape == (BATCH, 1)


def test_a_long_label_distribution_names_the_label(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """A weight below 0 in soft labels that are streamed in columns names the label."""
    num_classes = int(client.info.limits["max_num_true"]) + 1
    logits = client.create_table(fresh_name(), num_classes=num_classes, dim=DIM).logits(torch.zeros(2, DIM))
    soft = torch.full((2, num_classes), -1.0)
    assert refused(lambda: paddle.cross_entropy(logits, soft, soft_label=True)) == (InvalidArgument, "label")
