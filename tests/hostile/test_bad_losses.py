"""Every malformed loss option gets a specific error and leaves the table, its tickets and the server unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import shardloss
from google.protobuf.message import Message
from shardloss import wire
from shardloss.errors import InvalidArgument, LimitExceeded, TableNotFound
from shardloss.v1 import loss_pb2
from shardloss_server.rpc.serve import Server

from .losses import (
    KIND,
    counted,
    in_batch,
    in_batch_hit_ids,
    margin,
    mixture,
    nce,
    own_values,
    partial_fc,
    sigmoid,
    smoothed,
    with_hit_ids,
    write_counts,
)
from .test_bad_input import (
    BEYOND,
    INF,
    NAN,
    Bad,
    Edit,
    assert_refused,
    at,
    bad,
    both,
    cell,
    drop,
    let,
    not_finite,
    put,
    tensors,
    touch,
)
from .world import LIMITS, MAX_SAMPLED, MAX_TOP_K, D, N, S, T, V, World, once, serving

HUGE = 2**62
COUNTS = np.array([0, 3, 1, 2, 5, 1, 2, 0, 1, 4, 1.0])  # for the table "counted": classes 0 and 7 are never drawn
SAMPLED = "sampled_softmax."
VALUES, SAMPLER, MIXTURE = SAMPLED + "sampled_values.", SAMPLED + "sampler.", SAMPLED + "sampler.mixture."


# Refusals


def drop_in(path: str, field: str) -> Edit:
    """Return an edit that clears a field of a submessage."""
    return lambda message: at(message, path).ClearField(field)


LOGITS = [
    *[
        Bad(f"logits.{name} = {value}", World.full, let(f"logits.{name}", value), InvalidArgument, f"logits.{name}")
        for name in ("scale", "soft_cap")
        for value in (0.0, -1.0, NAN, INF, BEYOND, 1e-300)  # 1e-300 is 0 in the table's float32
    ],
    *[
        Bad(f"label_smoothing = {value}", World.full, let("full_softmax.label_smoothing", value), *rest)
        for value in (-0.1, 1.1, NAN, INF, -INF)
        for rest in [(InvalidArgument, "full_softmax.label_smoothing")]
    ],
    *[
        Bad(f"z_loss = {value}", World.full, let("z_loss", value), InvalidArgument, "z_loss")
        for value in (-0.1, NAN, INF, -INF)
    ],
    *tensors(smoothed, "full_softmax.class_weights", "full_softmax.class_weights", (V,), "int64"),
    *not_finite(smoothed, "full_softmax.class_weights", "full_softmax.class_weights", (4,)),
    *bad(
        smoothed,
        InvalidArgument,
        ("a class too few", put("full_softmax.class_weights", np.ones(V - 1)), "full_softmax.class_weights"),
        ("a class too many", put("full_softmax.class_weights", np.ones(V + 1)), "full_softmax.class_weights"),
        (
            "negative class weights",
            both(cell("full_softmax.class_weights", (8,), -1.0), cell("full_softmax.class_weights", (3,), -0.5)),
            "full_softmax.class_weights",
            (3,),
        ),
        ("a soft cap beside smoothing", let("logits.soft_cap", 5.0), "logits.soft_cap"),
        ("hit_ids", put("hit_ids.labels", np.zeros((N, T), int)), "hit_ids"),
        ("z_loss beyond float32", let("z_loss", BEYOND), "hidden", (0,)),
        ("a scale whose logits overflow", let("logits.scale", 3e38), "hidden", (0,)),
    ),
]

MARGINS = [
    *[
        Bad(f"margin.{name} = {value}", margin, let(f"margin.{name}", value), InvalidArgument, f"margin.{name}")
        for name, values in {"m1": (-0.1, NAN, INF), "m2": (NAN, INF, -INF), "m3": (NAN, INF, -INF)}.items()
        for value in values
    ],
    *bad(
        margin,
        InvalidArgument,
        ("a table with biases", let("table", "counted"), "margin"),
        ("two labels a row", put("labels", np.zeros((N, 2), int)), "labels"),
        ("label weights", put("label_weights", np.ones(N)), "label_weights"),
        ("class weights", put("full_softmax.class_weights", np.ones(V)), "full_softmax.class_weights"),
        ("label smoothing", let("full_softmax.label_smoothing", 0.1), "full_softmax.label_smoothing"),
        ("a soft cap", let("logits.soft_cap", 5.0), "logits.soft_cap"),
        ("a sigmoid loss", touch("full_sigmoid"), "margin"),
    ),
]

LOGISTIC = [
    *[
        Bad(f"{what} of a logistic loss", request, spoil, InvalidArgument, field)
        for request in (sigmoid, nce)
        for what, spoil, field in (
            ("want_lse", let("want_lse", True), "want_lse"),
            ("z_loss", let("z_loss", 0.1), "z_loss"),
            ("margin", touch("margin"), "margin"),
        )
    ],
    *bad(
        nce,
        InvalidArgument,
        ("no candidates", drop("sampled_logistic"), "loss"),
        ("no columns", both(drop("sampled_logistic"), touch("sampled_logistic")), "sampled_softmax.candidates"),
        (
            "hard negatives",
            let("sampled_logistic.columns.num_hard_negatives", 2),
            "sampled_softmax.num_hard_negatives",
        ),
        ("label weights", put("label_weights", np.ones((N, T))), "label_weights"),
        ("an unknown hit_removal", let("sampled_logistic.columns.hit_removal", 7), "sampled_softmax.hit_removal"),
    ),
    *bad(sigmoid, InvalidArgument, ("hit_ids", touch("hit_ids"), "hit_ids")),
]

CANDIDATES = [
    *bad(
        World.drawn,
        InvalidArgument,
        ("hit_ids with a sampler", put("hit_ids.labels", np.zeros((N, T), int)), "hit_ids"),
        ("negative num_hard_negatives", let(SAMPLED + "num_hard_negatives", -1), SAMPLED + "num_hard_negatives"),
        ("a negative kind", let(SAMPLER + "kind", -1), "sampler.kind"),
        ("a kind beyond all", let(SAMPLER + "kind", 2**31 - 1), "sampler.kind"),
        ("fixed_unigram without counts", let(SAMPLER + "kind", KIND.KIND_FIXED_UNIGRAM), "sampler.kind"),
        ("learned_unigram without count_labels", let(SAMPLER + "kind", KIND.KIND_LEARNED_UNIGRAM), "sampler.kind"),
        ("all but some", let(SAMPLER + "kind", KIND.KIND_ALL), "sampler.num_sampled"),
        ("a mixture of nothing", let(SAMPLER + "kind", KIND.KIND_MIXTURE), "sampler.mixture"),
        ("a mixture of another kind", let(MIXTURE + "share", 0.5), "sampler.mixture.first.kind"),
        ("negative distortion", let(SAMPLER + "distortion", -0.5), "sampler.distortion"),
        ("distortion nan", let(SAMPLER + "distortion", NAN), "sampler.distortion"),
        ("distortion inf", let(SAMPLER + "distortion", INF), "sampler.distortion"),
        ("negative num_reserved_ids", let(SAMPLER + "num_reserved_ids", -1), "sampler.num_reserved_ids"),
        ("all ids reserved", let(SAMPLER + "num_reserved_ids", V), "sampler.num_reserved_ids"),
        ("2^62 ids reserved", let(SAMPLER + "num_reserved_ids", HUGE), "sampler.num_reserved_ids"),
    ),
    *bad(
        World.drawn,
        LimitExceeded,
        ("many hard negatives", let(SAMPLED + "num_hard_negatives", MAX_TOP_K + 1), SAMPLED + "num_hard_negatives"),
        ("2^62 hard negatives", let(SAMPLED + "num_hard_negatives", HUGE), SAMPLED + "num_hard_negatives"),
    ),
    *bad(
        own_values,
        InvalidArgument,
        ("hard negatives", let(SAMPLED + "num_hard_negatives", 2), SAMPLED + "num_hard_negatives"),
        (
            "a row too few",
            both(
                put(VALUES + "sampled", np.zeros((N - 1, S), int)),
                put(VALUES + "sampled_expected_count", np.ones((N - 1, S))),
            ),
            "sampled_values.sampled",
        ),
        ("a shared count", put(VALUES + "sampled_expected_count", np.ones(S)), "sampled_values.sampled_expected_count"),
        (
            "a count too few",
            put(VALUES + "sampled_expected_count", np.ones((N, S - 1))),
            "sampled_values.sampled_expected_count",
        ),
        *[
            (f"a class {value}", cell(VALUES + "sampled", (3, 2), value), "sampled_values.sampled", (3, 2))
            for value in (-1, V, -(2**63), 2**63 - 1)
        ],
        *[
            (
                f"an expected count of {value}",
                cell(VALUES + "sampled_expected_count", (6, 1), value),
                "sampled_values.sampled_expected_count",
                (6, 1),
            )
            for value in (0.0, -1.0, NAN, INF)
        ],
    ),
    *bad(
        own_values,
        LimitExceeded,
        (
            "more draws than the limit",
            both(
                put(VALUES + "sampled", np.zeros((N, 8), int)), put(VALUES + "sampled_expected_count", np.ones((N, 8)))
            ),
            "sampled_values.sampled",
        ),
    ),
    *bad(
        with_hit_ids,
        InvalidArgument,
        ("no hit ids of labels", drop_in("hit_ids", "labels"), "hit_ids.labels"),
        ("no hit ids of samples", drop_in("hit_ids", "sampled"), "hit_ids.sampled"),
        ("float hit ids", put("hit_ids.labels", np.zeros((N, T))), "hit_ids.labels"),
        ("a row too few", put("hit_ids.labels", np.zeros((N - 1, T), int)), "hit_ids.labels"),
        ("a label too many", put("hit_ids.labels", np.zeros((N, T + 1), int)), "hit_ids.labels"),
        ("a sample too many", put("hit_ids.sampled", np.zeros(S + 1, int)), "hit_ids.sampled"),
        ("samples of each row", put("hit_ids.sampled", np.zeros((N, S), int)), "hit_ids.sampled"),
        (
            "negative hit ids of labels",
            both(cell("hit_ids.labels", (4, 0), -1), cell("hit_ids.labels", (2, 1), -9)),
            "hit_ids.labels",
            (2, 1),
        ),
        ("a negative hit id of a sample", cell("hit_ids.sampled", (3,), -(2**63)), "hit_ids.sampled", (3,)),
        ("hits that are kept", let(SAMPLED + "remove_accidental_hits", False), "hit_ids"),
    ),
    *bad(
        in_batch,
        InvalidArgument,
        ("two labels a row", put("labels", np.zeros((N, 2), int)), "labels"),
        ("correct_log_q without counts", let(SAMPLED + "in_batch.correct_log_q", True), "in_batch.correct_log_q"),
        ("label weights", put("label_weights", np.ones(N)), "label_weights"),
    ),
    *bad(
        in_batch_hit_ids,
        InvalidArgument,
        ("hit ids of samples", put("hit_ids.sampled", np.zeros(N, int)), "hit_ids.sampled"),
        ("only last hits", let(SAMPLED + "hit_removal", loss_pb2.HIT_REMOVAL_LAST), "hit_ids"),
        ("hits that are kept", let(SAMPLED + "remove_accidental_hits", False), "hit_ids"),
        ("a row too many", put("hit_ids.labels", np.zeros(N + 1, int)), "hit_ids.labels"),
    ),
    *bad(
        partial_fc,
        InvalidArgument,
        ("no samples", let(SAMPLED + "partial_fc.num_sampled", 0), "partial_fc.num_sampled"),
        ("negative samples", let(SAMPLED + "partial_fc.num_sampled", -1), "partial_fc.num_sampled"),
        ("more samples than classes", let(SAMPLED + "partial_fc.num_sampled", V + 1), "partial_fc.num_sampled"),
        ("2^62 samples", let(SAMPLED + "partial_fc.num_sampled", HUGE), "partial_fc.num_sampled"),
        ("hit_ids", put("hit_ids.labels", np.zeros(N, int)), "hit_ids"),
    ),
    *bad(
        partial_fc,
        LimitExceeded,
        (
            "more samples than the limit",
            both(let("table", "wide"), let(SAMPLED + "partial_fc.num_sampled", MAX_SAMPLED + 1)),
            "partial_fc.num_sampled",
        ),
    ),
]

COUNTED = [
    *bad(
        counted,
        InvalidArgument,
        ("labels without a count", both(cell("labels", (5,), 7), cell("labels", (2,), 0)), "labels", (2, 0)),
        ("more samples than classes with a count", let(SAMPLER + "num_sampled", 10), "sampler.num_sampled"),
        (
            "more samples than classes behind the reserved",
            both(let(SAMPLER + "num_reserved_ids", 8), put("labels", np.full(N, 9))),
            "sampler.num_sampled",
        ),
        ("a distortion that leaves one class", let(SAMPLER + "distortion", 1e6), "sampler.num_sampled"),
        (
            "a reserved label",
            both(let(SAMPLER + "num_reserved_ids", 3), let(SAMPLER + "num_sampled", 3)),
            "labels",
            (0, 0),
        ),
    ),
    *bad(
        mixture,
        InvalidArgument,
        ("share below 0", let(MIXTURE + "share", -0.1), "sampler.mixture.share"),
        ("share above 1", let(MIXTURE + "share", 1.1), "sampler.mixture.share"),
        ("share nan", let(MIXTURE + "share", NAN), "sampler.mixture.share"),
        ("no first", drop_in(MIXTURE[:-1], "first"), "sampler.mixture.first.kind"),
        ("no second", drop_in(MIXTURE[:-1], "second"), "sampler.mixture.second.kind"),
        ("an unknown second", let(MIXTURE + "second.kind", 99), "sampler.mixture.second.kind"),
        ("a nested mixture", let(MIXTURE + "first.kind", KIND.KIND_MIXTURE), "sampler.mixture.first.kind"),
        ("a mixture deep inside", touch(MIXTURE + "second.mixture.first"), "sampler.mixture.second.mixture"),
        ("all of them", let(MIXTURE + "first.kind", KIND.KIND_ALL), "sampler.mixture.first.kind"),
        ("a component's num_sampled", let(MIXTURE + "first.num_sampled", 3), "sampler.mixture.first.num_sampled"),
        ("a component's seed", let(MIXTURE + "second.seed", 1), "sampler.mixture.second.seed"),
        ("a component's unique", let(MIXTURE + "second.unique", False), "sampler.mixture.second.unique"),
        ("a component's distortion", let(MIXTURE + "first.distortion", NAN), "sampler.mixture.first.distortion"),
        (
            "a component's reserved ids",
            let(MIXTURE + "first.num_reserved_ids", V),
            "sampler.mixture.first.num_reserved_ids",
        ),
        ("a label that neither draws", both(let(MIXTURE + "share", 1.0), cell("labels", (3,), 7)), "labels", (3, 0)),
        (
            "a component without count_labels",
            both(let("table", "no-bias"), let(MIXTURE + "first.kind", KIND.KIND_LEARNED_UNIGRAM)),
            "sampler.mixture.first.kind",
        ),
    ),
    *tensors(write_counts, "counts", "counts", (3,), "int64"),
    *bad(
        write_counts,
        InvalidArgument,
        ("no counts", drop("counts"), "counts"),
        ("counts of rank 2", put("counts", np.ones((3, 1))), "counts"),
        ("a negative count", both(cell("counts", (2,), -1.0), cell("counts", (1,), -2.0)), "counts", (1,)),
        ("a count nan", cell("counts", (2,), NAN), "counts", (2,)),
        ("a count inf", cell("counts", (0,), INF), "counts", (0,)),
        ("a negative first_class", let("first_class", -1), "first_class"),
        ("a range beyond the table", let("first_class", V - 2), "first_class"),
        ("a range beyond 64 bits", let("first_class", 2**63 - 1), "first_class"),
    ),
    *bad(write_counts, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
]

TABLE = [*LOGITS, *MARGINS, *LOGISTIC, *CANDIDATES, *COUNTED]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    """A client, with three more tables: without biases, with class counts, and with many classes."""
    with shardloss.connect(server.address) as client:
        client.create_table("no-bias", num_classes=V, dim=D, bias=False, initializer=shardloss.Normal(0.5))
        client.create_table("counted", num_classes=V, dim=D, count_labels=True).write_class_counts(COUNTS)
        client.create_table("wide", num_classes=MAX_SAMPLED + 3, dim=D)
        yield client


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_bad_loss_is_refused_by_name_and_changes_nothing(world: World, row: Bad) -> None:
    """The error has the class, field and first index listed above; rows, version and tickets are unchanged."""
    assert_refused(world, row)


BASES = sorted({row.request for row in TABLE}, key=lambda request: request.__name__)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_request_that_is_spoiled_is_good(world: World, base: Callable[[World], Message]) -> None:
    """Every request above is answered when unmodified, so a refusal is caused by the edit and nothing else."""
    request = base(world)
    once(world.method(request), request)


def test_a_label_without_a_count_needs_no_log_q(world: World) -> None:
    """A label with count 0 is legal in negative sampling, which does not correct the logits by log Q."""
    request = counted(world)
    request.labels.CopyFrom(wire.encode(np.zeros(N, int)))
    sampler = request.sampled_softmax.sampler
    columns = loss_pb2.SampledSoftmax(sampler=sampler)
    request.sampled_logistic.CopyFrom(loss_pb2.SampledLogistic(columns=columns, subtract_log_q=False))
    request.want_lse = False
    assert np.isfinite(wire.decode(once(world.client.losses.ComputeLoss, request).loss, "loss")).all()
    sample = loss_pb2.SampleCandidatesRequest(table="counted", sampler=sampler, labels=wire.encode(np.arange(V)))
    counts = wire.decode(once(world.client.losses.SampleCandidates, sample).true_expected_count, "count")[:, 0]
    np.testing.assert_array_equal(counts == 0, COUNTS == 0)


def test_the_gradient_of_the_scale_is_of_the_loss_dtype(world: World) -> None:
    """The gradient of the scale has the dtype of the loss: float32 for a float32 table."""
    request = smoothed(world)
    request.want_scale_grad = True
    reply = once(world.client.losses.ComputeLoss, request)
    assert reply.scale_grad.dtype == reply.loss.dtype


def test_class_counts_are_written_in_ranges(world: World) -> None:
    """Classes outside the written range keep their counts, initially 0; repeating a write changes nothing."""
    for _ in range(2):
        once(world.client.tables.WriteClassCounts, write_counts(world))
    sample = loss_pb2.SampleCandidatesRequest(table=world.name, labels=wire.encode(np.arange(V)))
    sample.sampler.kind, sample.sampler.num_sampled = KIND.KIND_FIXED_UNIGRAM, 3
    reply = once(world.client.losses.SampleCandidates, sample)
    counts = wire.decode(reply.true_expected_count, "count")[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(counts), [2, 3, 4])
    assert sorted(wire.decode(reply.sampled, "sampled")) == [2, 3, 4]
