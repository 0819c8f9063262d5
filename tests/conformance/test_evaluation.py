"""Exact questions against NumPy in float64: hidden of any size, extreme logits, pages and their errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import shardloss
from shardloss.errors import InvalidArgument, LimitExceeded

V, D, N = 300, 8, 25


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    return client.create_table(
        fresh_name(), num_classes=V, dim=D, num_shards=3, placement="mod", initializer=shardloss.Normal(0.05, seed=2)
    )


def logits_of(table: shardloss.Table, hidden: np.ndarray) -> np.ndarray:
    """Return the logits [N, V] in float64."""
    rows = table.read_rows(np.arange(V))
    assert rows.biases is not None
    return np.asarray(hidden.astype(np.float64) @ rows.rows.astype(np.float64).T + rows.biases.astype(np.float64))


@pytest.mark.parametrize("has_biases", [False, True], ids=["zero biases", "biases"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e3])
def test_ranks_and_best_classes_are_exact_for_hidden_of_any_size(
    table: shardloss.Table, rng: np.random.Generator, size: float, has_biases: bool
) -> None:
    """The comparison grid scales with |hidden| |row|, so logits that differ in float32 are distinguished."""
    if has_biases:
        rows = table.read_rows(np.arange(V)).rows
        table.write_rows(np.arange(V), rows, np.asarray(size * 0.01 * rng.standard_normal(V), np.float32))
    hidden = np.asarray(size * rng.standard_normal((N, D)), np.float32)
    labels = rng.integers(0, V, N)
    logits = logits_of(table, hidden)
    expected = 1 + (logits > logits[np.arange(N), labels][:, None]).sum(1)
    assert table.evaluate(hidden, labels).rank.tolist() == expected.tolist()
    best = table.top_k(hidden, 5)
    assert best.class_ids.tolist() == np.argsort(-logits, axis=1)[:, :5].tolist()


@pytest.mark.parametrize(("hidden_size", "row_size"), [(1.0, 1e-165), (1e155, 1.0), (1e200, 1e-100), (1e-150, 1e-150)])
def test_equal_rows_tie_at_any_size(
    client: shardloss.LossClient,
    fresh_name: Callable[[], str],
    rng: np.random.Generator,
    hidden_size: float,
    row_size: float,
) -> None:
    """Rank and top-k agree even if squares overflow or vanish in float64, and ties go to the lower id."""
    table = client.create_table(fresh_name(), num_classes=40, dim=D, dtype="float64", num_shards=3)
    rows = row_size * np.repeat(rng.standard_normal((8, D)), 5, axis=0)
    table.write_rows(np.arange(40), rows)
    hidden = hidden_size * rng.standard_normal((N, D))
    best = table.top_k(hidden, 40).class_ids
    for label in range(40):
        ranks = table.evaluate(hidden, np.full(N, label)).rank
        assert ranks.tolist() == [int(np.flatnonzero(row == label)[0]) + 1 for row in best]
    assert (np.diff(best.reshape(N, 8, 5), axis=2) > 0).all()


@pytest.mark.parametrize(
    ("hidden_size", "row_size", "bias_size"),
    [(1e154, 1e150, 0.0), (1e-300, 1.79e308, 0.0), (1.0, 1.0, 1e304), (1e307, 0.0, 1e300), (1e200, 1e106, 1e306)],
)
def test_logits_near_the_largest_number_have_their_order(
    client: shardloss.LossClient,
    fresh_name: Callable[[], str],
    rng: np.random.Generator,
    hidden_size: float,
    row_size: float,
    bias_size: float,
) -> None:
    """Every finite logit of a float64 table has its correct rank and its correct place among the best classes."""
    table = client.create_table(fresh_name(), num_classes=23, dim=D, dtype="float64", num_shards=3)
    rows, biases = row_size * rng.uniform(-1, 1, (23, D)), bias_size * rng.uniform(-1, 1, 23)
    table.write_rows(np.arange(23), rows, biases)
    hidden = np.asarray(hidden_size * rng.uniform(-1, 1, (N, D)))
    best = table.top_k(hidden, 23).class_ids
    np.testing.assert_array_equal(best, np.argsort(-(hidden @ rows.T + biases), axis=1, kind="stable"))
    for label in range(23):
        ranks = table.evaluate(hidden, np.full(N, label)).rank
        np.testing.assert_array_equal(ranks, 1 + np.argmax(best == label, axis=1))


def test_a_dominant_class_has_no_negative_loss(
    client: shardloss.LossClient, fresh_name: Callable[[], str], rng: np.random.Generator
) -> None:
    """At logits of 1,500 the loss of the dominant class is 0, not a rounding error of float32."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D, initializer=shardloss.Zeros())
    row = np.asarray(rng.uniform(10, 20, (1, D)), np.float32)
    table.write_rows(np.array([7]), row)
    hidden = np.asarray(rng.uniform(10, 20, (N, D)), np.float32)
    loss = table.evaluate(hidden, np.full(N, 7)).loss
    assert (loss == 0).all()
    log_probs = table.score(hidden, np.array([7]), want_log_probs=True).log_probs
    assert log_probs is not None
    assert (log_probs == 0).all()


def test_rows_that_overflow_are_refused_by_name(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """Logits of inf - inf are refused with an error that names the row of hidden; other rows are answered."""
    table = client.create_table(fresh_name(), num_classes=V, dim=2, dtype="float64")
    table.write_rows(np.array([5]), np.array([[1e200, -1e200]]))
    hidden, ids = np.array([[0.0, 0.0], [1e200, 1e200]]), np.array([5, 5])
    for ask in (
        lambda: table.top_k(hidden, 3),
        lambda: table.evaluate(hidden, ids),
        lambda: table.score(hidden, ids),
        lambda: table.compute_loss(hidden, ids, shardloss.FullSoftmax()),
    ):
        with pytest.raises(InvalidArgument) as refused:
            ask()
        assert (refused.value.field, refused.value.index) == ("hidden", "1")
    assert np.isfinite(table.top_k(hidden[:1], 3).logits).all()


def test_a_finite_loss_with_a_gradient_that_is_not_is_refused(
    client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """With huge rows the loss of a zero hidden is finite, but a hidden gradient that overflows is refused."""
    table = client.create_table(fresh_name(), num_classes=4, dim=2)
    table.write_rows(np.arange(4), np.full((4, 2), 3e38, np.float32) * np.array([[1], [1], [-1], [-1]], np.float32))
    hidden, labels = np.zeros((1, 2), np.float32), np.array([2])
    loss = table.compute_loss(hidden, labels, shardloss.FullSoftmax()).loss
    assert loss is not None
    assert np.isfinite(loss).all()
    with pytest.raises(InvalidArgument) as refused:
        table.compute_loss(hidden + np.float32(1), labels, shardloss.FullSoftmax(), want_hidden_grad=True)
    assert refused.value.field == "hidden"


def test_a_loss_that_overflows_is_refused(table: shardloss.Table) -> None:
    """A finite label weight is refused if its product with the lse overflows float32."""
    hidden, labels = np.ones((2, D), np.float32), np.zeros((2, 1), int)
    weights = np.array([[1.0], [3e38]], np.float32)
    with pytest.raises(InvalidArgument) as refused:
        table.compute_loss(hidden, labels, shardloss.FullSoftmax(), label_weights=weights)
    assert (refused.value.field, refused.value.index) == ("hidden", "1")


def test_questions_of_many_pages_name_the_row_among_all(table: shardloss.Table, rng: np.random.Generator) -> None:
    """An error for a label on a later page names its index in the whole array, and no row is lost or repeated."""
    num_rows = 40_000
    hidden = rng.standard_normal((num_rows, D)).astype(np.float32)
    labels = rng.integers(0, V, num_rows)
    labels[num_rows - 2] = V
    with pytest.raises(InvalidArgument) as refused:
        table.evaluate(hidden, labels)
    assert (refused.value.field, refused.value.index) == ("labels", str(num_rows - 2))
    assert f"labels[{num_rows - 2}]" in str(refused.value)
    labels[num_rows - 2] = 0
    loss = table.evaluate(hidden, labels, want_rank=False).loss
    logits = logits_of(table, hidden)
    top = logits.max(1)
    expected = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(num_rows), labels]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=2e-6)


def test_arrays_of_different_lengths_are_refused(table: shardloss.Table) -> None:
    """Arrays whose shapes do not match are refused before the first page is sent."""
    hidden = np.zeros((30_000, D), np.float32)
    for ask, field in (
        (lambda: table.evaluate(hidden, np.zeros(30_001, int)), "labels"),
        (lambda: table.score(hidden, np.zeros((30_001, 2), int)), "class_ids"),
        (lambda: table.score(hidden, np.zeros((), int)), "class_ids"),
        (lambda: table.evaluate(hidden[0], np.zeros(1, int)), "hidden"),
        (lambda: table.read_rows(np.zeros((2, 2), int)), "class_ids"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            ask()
        assert refused.value.field == field


@pytest.mark.parametrize("number", [-3, -1, 0, 2.5, 1 << 70, "7"])
def test_numbers_that_count_nothing_are_refused(
    client: shardloss.LossClient, fresh_name: Callable[[], str], number: int
) -> None:
    """Every such number raises InvalidArgument; with D = 2, k = -1 would give pages of width 0."""
    table = client.create_table(fresh_name(), num_classes=V, dim=2)
    hidden, labels = np.zeros((3, 2), np.float32), np.zeros(3, int)
    asks: list[Callable[[], object]] = [
        lambda: table.top_k(hidden, number),
        lambda: table.sample_classes(hidden, number),
        lambda: table.sample_classes(hidden, 1, top_k=number),
    ]
    if not isinstance(number, int) or number >> 63 > 0:
        asks.append(lambda: table.evaluate(hidden, labels, ignore_index=number))
    for ask in asks:
        with pytest.raises(InvalidArgument):
            ask()


def test_rows_beyond_the_tables_dtype_are_refused_before_a_page_is_written(
    client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """1e39 is finite in float64 but not in a float32 table; 3.4e38 is finite in float32 but not in a bfloat16 table."""
    for dtype, value in (("float32", 1e39), ("bfloat16", 3.4e38)):
        table = client.create_table(fresh_name(), num_classes=40_000, dim=D, dtype=dtype)
        rows = np.zeros((40_000, D))
        rows[-1, 3] = value
        with pytest.raises(InvalidArgument) as refused:
            table.write_rows(np.arange(40_000), rows)
        assert (refused.value.field, refused.value.index) == ("rows", "39999")
        assert table.info().version == 0
    assert table.write_rows(np.zeros(0, int), np.zeros((0, D))) == 0


def test_scores_of_many_classes_are_sliced(table: shardloss.Table, rng: np.random.Generator) -> None:
    """Scores are exact for more classes than fit in one slice."""
    hidden = rng.standard_normal((64, D)).astype(np.float32)
    class_ids = rng.integers(0, V, (64, 2000))
    logits = table.score(hidden, class_ids).logits
    np.testing.assert_allclose(logits, np.take_along_axis(logits_of(table, hidden), class_ids, 1), rtol=1e-6, atol=1e-6)


def test_a_draw_that_no_message_holds_is_refused_before_it_is_made(
    client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """SampleCandidates refuses half a million ids without drawing them."""
    table = client.create_table(fresh_name(), num_classes=1 << 20, dim=1)
    with pytest.raises(LimitExceeded) as refused:
        table.sample_candidates(1 << 19)
    assert refused.value.field == "sampler.num_sampled"
