"""Exact answers over any cut of a table, on threads and on Ray workers, against NumPy in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import shardloss
from numpy.typing import NDArray
from shardloss import LogitTransform
from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss_server.evaluation import passes, slices
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard import scan
from shardloss_server.shard.table import ShardTable
from torch import Tensor

from ..extent import sample, turn_of

V, D, N = 23, 5, 9  # V is prime, so no number of shards except 1 divides it
IGNORED = -100
Floats = NDArray[np.float64]
MakeTable = Callable[..., shardloss.Table]
CUTS = [(1, "div"), (2, "div"), (3, "div"), (7, "div"), (2, "mod"), (3, "mod"), (7, "mod")]


def every_cut(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on two of the cuts, which depend on its name."""
    return pytest.mark.parametrize("num_shards, placement", sample(CUTS, 2, turn_of(test.__name__)))(test)


TRANSFORMS = {
    "plain": None,
    "defaults": LogitTransform(),
    "cold": LogitTransform(scale=3.5),
    "warm": LogitTransform(scale=0.01),
    "capped": LogitTransform(soft_cap=2.0),
    "cap of no effect": LogitTransform(soft_cap=1e9),
    "cosine": LogitTransform(scale=16.0, normalize=True),
    "all": LogitTransform(scale=8.0, soft_cap=5.0, normalize=True),
}
every_transform = pytest.mark.parametrize(
    "num_shards, placement, transform",
    [(*cut, transform) for i, transform in enumerate(TRANSFORMS.values()) for cut in sample(CUTS, 2, i)],
    ids=[f"{name}-{k}{how}" for i, name in enumerate(TRANSFORMS) for k, how in sample(CUTS, 2, i)],
)


@dataclass(frozen=True)
class Oracle:
    """Rows [V, D], biases [V] and hidden [N, D] that are exact in float32, and the results NumPy computes from them."""

    rows: Floats
    biases: Floats
    hidden: Floats

    def raw(self, transform: LogitTransform | None) -> Floats:
        """Return the sort keys [N, V], rounded under normalize: norms are inexact, and ties must remain ties."""
        if transform is None or not transform.normalize:
            return np.asarray(self.hidden @ self.rows.T + self.biases)
        return np.round(unit(self.hidden) @ unit(self.rows).T + self.biases, 9)

    def logits(self, transform: LogitTransform | None) -> Floats:
        """Return the logits [N, V] that the service should answer."""
        z = self.raw(transform)
        if transform is None:
            return z
        z = transform.scale * z
        return z if transform.soft_cap is None else transform.soft_cap * np.tanh(z / transform.soft_cap)

    def order(self, transform: LogitTransform | None) -> NDArray[np.int64]:
        """Return class ids [N, V] by logit descending, then id ascending."""
        return np.argsort(-self.raw(transform), axis=1, kind="stable")

    def log_probs(self, transform: LogitTransform | None) -> Floats:
        """Return the log-probabilities [N, V]."""
        z = self.logits(transform)
        return z - np.logaddexp.reduce(z, axis=1)[:, None]

    def ranks(self, labels: NDArray[np.int64], transform: LogitTransform | None) -> NDArray[np.int64]:
        """Return the place of each label in the order, starting at 1."""
        return 1 + np.argmax(self.order(transform) == labels[:, None], axis=1)


def unit(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)[:, None]


def sigmoid_cross_entropy(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return TensorFlow's max(z, 0) - z y + log(1 + exp(-|z|)) over one-hot labels, summed over classes."""
    one_hot = np.eye(logits.shape[1])[labels]
    return np.asarray((np.maximum(logits, 0) - logits * one_hot + np.log1p(np.exp(-np.abs(logits)))).sum(1))


@pytest.fixture
def oracle(rng: np.random.Generator) -> Oracle:
    """An oracle on a grid of 1/8, so that sums are exact in any order and ties are exact.

    Classes 1, 9, 16 and 22 share one row, so that every cut has them on several shards. Row 4 is twice row 3, so the
    two tie as directions. Row 6 is zero. Hidden 2 is zero, so its logits are the biases alone.
    """
    rows, hidden = (rng.integers(-16, 17, (n, D)) / 8 for n in (V, N))
    biases = rng.integers(-3, 4, V) / 4
    rows[[9, 16, 22]], biases[[9, 16, 22]] = rows[1], biases[1]
    rows[4], biases[4] = 2 * rows[3], biases[3]
    rows[6], hidden[2] = 0.0, 0.0
    hidden[0] = rows[1]
    return Oracle(rows, biases, hidden)


@pytest.fixture
def make_table(any_client: shardloss.LossClient, fresh_name: Callable[[], str]) -> MakeTable:
    """A function that creates a table with an oracle's rows."""

    def make(
        oracle: Oracle, num_shards: int = 3, placement: str = "mod", client: shardloss.LossClient = any_client
    ) -> shardloss.Table:
        num_classes, dim = oracle.rows.shape
        table = client.create_table(
            fresh_name(), num_classes=num_classes, dim=dim, num_shards=num_shards, placement=placement
        )
        table.write_rows(np.arange(num_classes), oracle.rows, oracle.biases)
        return table

    return make


@every_transform
def test_losses_ranks_and_best_classes_are_those_of_float64(
    make_table: MakeTable, oracle: Oracle, num_shards: int, placement: str, transform: LogitTransform | None
) -> None:
    """Losses, sigmoid cross-entropies, ranks and the order of all classes equal NumPy's; ties go to the lower id."""
    table = make_table(oracle, num_shards, placement)
    logits, log_probs = oracle.logits(transform), oracle.log_probs(transform)
    for shift in range(0, V, 4):
        labels = (np.arange(N) + shift) % V
        found = table.evaluate(oracle.hidden, labels, want_sigmoid=True, logits=transform)
        near(found.loss, -log_probs[np.arange(N), labels])
        near(found.sigmoid, sigmoid_cross_entropy(logits, labels))
        assert found.rank.tolist() == oracle.ranks(labels, transform).tolist()
    best = table.top_k(oracle.hidden, V, logits=transform)
    assert best.class_ids.tolist() == oracle.order(transform).tolist()
    near(best.logits, np.take_along_axis(logits, best.class_ids, 1))
    near(best.log_probs, np.take_along_axis(log_probs, best.class_ids, 1))
    scores = table.score(oracle.hidden, np.arange(V), want_log_probs=True, logits=transform)
    near(scores.logits, logits)
    near(scores.log_probs, log_probs)
    near(table.probabilities(oracle.hidden, np.arange(V), logits=transform), np.exp(log_probs))


def near(found: NDArray[np.floating], expected: Floats) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@every_cut
def test_hit_rates_and_reciprocal_ranks_are_means_over_counted_rows(
    make_table: MakeTable, oracle: Oracle, num_shards: int, placement: str
) -> None:
    """The means are over all rows except the ignored ones, for every k."""
    labels = np.arange(N) * 2
    labels[[3, 7]] = IGNORED
    counted = labels != IGNORED
    found = make_table(oracle, num_shards, placement).evaluate(oracle.hidden, labels)
    ranks = oracle.ranks(labels, None)[counted]
    assert found.num_counted == 7
    assert found.loss[~counted].tolist() == found.rank[~counted].tolist() == [0, 0]
    for k in (1, 2, 5, V):
        assert found.hit_rate(k) == pytest.approx((ranks <= k).mean())
        assert found.mrr(k) == pytest.approx(np.where(ranks <= k, 1 / ranks, 0).mean())
    assert found.mrr() == pytest.approx((1 / ranks).mean())
    expected = -oracle.log_probs(None)[counted, labels[counted]].mean()
    assert found.mean_loss == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(expected), rel=1e-5)


@every_cut
@pytest.mark.parametrize("top_k", [None, 1, 4, V])
def test_draws_do_not_depend_on_the_cut(
    make_table: MakeTable,
    client: shardloss.LossClient,
    oracle: Oracle,
    num_shards: int,
    placement: str,
    top_k: int | None,
) -> None:
    """The ids equal those drawn from one shard, each with the log-probability that it was drawn with."""
    transform = TRANSFORMS["all"]
    uncut = make_table(oracle, 1, "div", client).sample_classes(
        oracle.hidden, 50, seed=7, top_k=top_k, logits=transform
    )
    found = make_table(oracle, num_shards, placement).sample_classes(
        oracle.hidden, 50, seed=7, top_k=top_k, logits=transform, want_log_probs=True
    )
    assert found.class_ids.tolist() == uncut.class_ids.tolist()
    assert uncut.log_probs is None
    log_probs = oracle.log_probs(transform)
    if top_k is not None:
        best = oracle.order(transform)[:, :top_k]
        assert all(set(drawn) <= set(allowed) for drawn, allowed in zip(found.class_ids, best, strict=True))
        log_probs -= np.logaddexp.reduce(np.take_along_axis(log_probs, best, 1), axis=1)[:, None]
    near(found.log_probs, np.take_along_axis(log_probs, found.class_ids, 1))


def test_draws_among_all_classes_are_those_without_top_k(make_table: MakeTable, oracle: Oracle) -> None:
    """Both ways of drawing use the same noise."""
    table = make_table(oracle)
    draws = [table.sample_classes(oracle.hidden, 200, seed=3, top_k=k).class_ids.tolist() for k in (None, V)]
    assert draws[0] == draws[1]


def test_draws_are_the_rows_own(make_table: MakeTable, oracle: Oracle) -> None:
    """A row sampled alone, under its number, draws as in a batch; other seeds, rows and draws use other noise."""
    table = make_table(oracle)
    hidden = np.repeat(oracle.hidden[3:4], N, axis=0)
    drawn = table.sample_classes(hidden, 40, seed=5).class_ids
    for row in range(N):
        alone = table.sample_classes(hidden[row : row + 1], 40, seed=5, first_row=row).class_ids[0]
        assert alone.tolist() == drawn[row].tolist()
    assert table.sample_classes(hidden, 15, seed=5).class_ids.tolist() == drawn[:, :15].tolist()
    assert len({tuple(row) for row in drawn.tolist()}) == N
    assert (table.sample_classes(hidden, 40, seed=2**64 - 1).class_ids != drawn).any()


def test_draws_of_many_pages_and_slices_are_those_of_one(
    client: shardloss.LossClient, fresh_name: Callable[[], str], rng: np.random.Generator
) -> None:
    """4,000 rows of 30 draws use pages of 2,114 rows and slices of 512; 70,000 draws of one row use two slices."""
    table = client.create_table(fresh_name(), num_classes=11, dim=1, initializer=shardloss.Normal(1.0, seed=4))
    hidden = rng.standard_normal((4000, 1))
    drawn = table.sample_classes(hidden, 30, seed=9).class_ids
    for start in (0, 511, 2113, 3990):
        part = table.sample_classes(hidden[start : start + 9], 30, seed=9, first_row=start).class_ids
        assert part.tolist() == drawn[start : start + 9].tolist()
    many = table.sample_classes(hidden[:1], 70_000, seed=9, want_log_probs=True)
    assert many.class_ids[0, :30].tolist() == drawn[0].tolist()
    best = table.sample_classes(hidden[:1], 70_000, seed=9, top_k=11, want_log_probs=True)
    assert best.class_ids.tolist() == many.class_ids.tolist()
    np.testing.assert_allclose(best.log_probs, many.log_probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", sample(["div", "mod"], 1))
def test_answers_do_not_depend_on_the_slices(
    client: shardloss.LossClient,
    make_table: MakeTable,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    placement: str,
) -> None:
    """Slices of one class, of two rows of hidden and of three draws give the same answers as whole shards."""
    table, labels = make_table(oracle, 3, placement, client), np.arange(N)
    transform = TRANSFORMS["all"]

    def answers() -> list[NDArray[np.number]]:
        evaluation = table.evaluate(oracle.hidden, labels, want_sigmoid=True, logits=transform)
        best = table.top_k(oracle.hidden, 6, logits=transform)
        scores = table.score(oracle.hidden, np.arange(V)[::-1], want_log_probs=True, logits=transform)
        draws = [
            table.sample_classes(oracle.hidden, 10, top_k=k, want_log_probs=True, logits=transform) for k in (None, 6)
        ]
        return [
            *(evaluation.loss, evaluation.rank, evaluation.sigmoid, best.class_ids, best.logits),
            *(scores.logits, scores.log_probs),
            *(array for drawn in draws for array in (drawn.class_ids, drawn.log_probs)),
        ]

    whole = answers()
    sizes = {"SLICE_MACS": 1, "SLICE_ROWS": 2, "SLICE_DRAWS": 3, "SLICE_BEST": 6, "SLICE_GATHERED": 7}
    for name, size in sizes.items():
        monkeypatch.setattr(slices, name, size)
    monkeypatch.setattr(passes, "SLICE_ROWS", 2)
    monkeypatch.setattr(passes, "DRAWN_NOISE", 1)
    for found, expected in zip(answers(), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_rows", "num_asked"), [(1, 20_000), (50, 300), (512, 1)])
def test_no_slice_gathers_more_rows_than_a_training_step_may_wait_for(
    client: shardloss.LossClient,
    fresh_name: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    num_asked: int,
) -> None:
    """The limit is kept for many classes and few rows of hidden, and the logits are in the order of the request."""
    dim = 8
    table = client.create_table(fresh_name(), num_classes=29, dim=dim, num_shards=3, initializer=shardloss.Zeros())
    table.write_rows(np.arange(29), np.repeat(np.arange(29.0)[:, None], dim, axis=1).astype(np.float32))
    asked_logits, gathered = scan.asked_logits, []

    def recorded(shard: ShardTable, hidden: Tensor, class_ids: Tensor, transform: Transform) -> scan.AskedLogits:
        gathered.append(class_ids.numel() * dim)
        return asked_logits(shard, hidden, class_ids, transform)

    monkeypatch.setattr(scan, "asked_logits", recorded)
    monkeypatch.setattr(slices, "SLICE_GATHERED", 4096)
    class_ids = np.arange(num_asked) * 7 % 29
    logits = table.score(np.ones((num_rows, dim), np.float32), class_ids).logits
    np.testing.assert_array_equal(logits, np.tile(dim * class_ids, (num_rows, 1)))
    assert max(gathered) <= 4096


def test_a_pass_holds_no_answers_of_the_slices_behind_it(
    make_table: MakeTable, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of 23 slices, no more answers are alive at once than those of two slices of three shards."""
    table, labels = make_table(oracle, 3), np.arange(N)
    monkeypatch.setattr(slices, "SLICE_MACS", 1)
    answers, given, most = slices.Scan.answers, list[weakref.ref[Tensor]](), [0]

    def watched(self: slices.Scan, question: scan.Question) -> Iterator[scan.ScanAnswer]:
        for answer in answers(self, question):
            given.extend(weakref.ref(kept) for kept in (answer.lse, answer.num_before) if kept is not None)
            most[0] = max(most[0], sum(ref() is not None for ref in given))
            yield answer

    monkeypatch.setattr(slices.Scan, "answers", watched)
    table.evaluate(oracle.hidden, labels, want_sigmoid=True)
    table.score(oracle.hidden, labels, want_log_probs=True)
    table.top_k(oracle.hidden, 2)
    assert len(given) > 40
    assert most[0] <= 2 * 2 * 3


@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_that_no_message_holds_are_refused(make_table: MakeTable, oracle: Oracle, top_k: int | None) -> None:
    """Half a million draws of one row raise LimitExceeded."""
    with pytest.raises(LimitExceeded) as refused:
        make_table(oracle).sample_classes(oracle.hidden[:1], 500_000, top_k=top_k)
    assert refused.value.field == "num_samples"


@pytest.mark.parametrize("soft_cap", [None, 1e4, 30.0])
def test_logits_of_ten_thousand_are_no_trouble(make_table: MakeTable, soft_cap: float | None) -> None:
    """Logits of +-1e4 cause no overflow or negative loss, and keep their order even if a cap makes them all equal."""
    rows = np.array([[1e4], [-1e4], [9999.0], [0.0], [1e4]])
    oracle = Oracle(rows, np.zeros(5), np.array([[1.0], [-1.0], [1.0], [1.0]]))
    transform = LogitTransform(soft_cap=soft_cap)
    table, labels = make_table(oracle), np.array([0, 1, 1, 4])
    found = table.evaluate(oracle.hidden, labels, want_sigmoid=True, logits=transform)
    near(found.loss, -oracle.log_probs(transform)[np.arange(4), labels])
    near(found.sigmoid, sigmoid_cross_entropy(oracle.logits(transform), labels))
    assert (found.loss >= 0).all()
    assert (found.sigmoid >= 0).all()
    assert found.rank.tolist() == [1, 1, 5, 2]
    assert table.top_k(oracle.hidden[:1], 5, logits=transform).class_ids.tolist() == [[0, 4, 2, 3, 1]]
    drawn = table.sample_classes(oracle.hidden, 20, logits=transform, want_log_probs=True)
    assert np.isfinite(drawn.log_probs).all()
    if soft_cap is None:
        assert set(drawn.class_ids[0].tolist()) == {0, 2, 4}
        assert set(drawn.class_ids[1].tolist()) == {1}


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, -1e4])
def test_a_single_class_is_certain(make_table: MakeTable, size: float) -> None:
    """With V = 1 the loss is 0, the rank is 1, class 0 is always drawn, and the sigmoid loss is log(1 + exp(-z))."""
    oracle = Oracle(np.array([[size]]), np.zeros(1), np.ones((3, 1)))
    table, labels = make_table(oracle, 1), np.zeros(3, int)
    found = table.evaluate(oracle.hidden, labels, want_sigmoid=True)
    assert found.loss.tolist() == [0.0] * 3
    assert found.rank.tolist() == [1] * 3
    near(found.sigmoid, np.full(3, np.logaddexp(0, -size)))
    drawn = table.sample_classes(oracle.hidden, 4, want_log_probs=True)
    assert not drawn.class_ids.any()
    assert not drawn.log_probs.any()


def test_vectors_of_zeros_have_cosine_zero(make_table: MakeTable) -> None:
    """The logit is the scaled bias if hidden, the row or both are zero."""
    oracle = Oracle(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([0.5, 0.25]), np.array([[0.0, 0.0], [6.0, 8.0]]))
    transform = LogitTransform(scale=2.0, normalize=True)
    near(
        make_table(oracle).score(oracle.hidden, np.arange(2), logits=transform).logits,
        np.array([[1.0, 0.5], [1.0, 2.5]]),
    )


def test_rows_of_one_direction_tie_whatever_their_lengths(make_table: MakeTable, rng: np.random.Generator) -> None:
    """Under normalize their cosines are equal up to rounding, so they rank by id, on any shard."""
    lengths = np.array([7.0, 1.0, 3.0, 1 / 1024, 5.0, 11.0, 13.0, 1000.0, 17.0, 19.0, 23.0])
    for direction in rng.integers(-64, 65, (20, 6)) / 16:
        oracle = Oracle(lengths[:, None] * direction, np.zeros(11), rng.integers(-64, 65, (4, 6)) / 16)
        table, transform = make_table(oracle, 3), LogitTransform(normalize=True)
        best = table.top_k(oracle.hidden, 11, logits=transform).class_ids
        assert best.tolist() == [list(range(11))] * 4
        ranks = [table.evaluate(oracle.hidden, np.full(4, label), logits=transform).rank for label in range(11)]
        assert np.array(ranks).tolist() == [[label + 1] * 4 for label in range(11)]


def test_directions_do_not_overflow(make_table: MakeTable) -> None:
    """A hidden whose plain logits overflow float32 still has finite cosines and capped logits."""
    oracle = Oracle(np.array([[1e38, 0.0], [0.0, 1e38]]), np.zeros(2), np.array([[2e38, 2e38]]))
    table = make_table(oracle)
    with pytest.raises(InvalidArgument):
        table.score(oracle.hidden, np.arange(2))
    cosines = table.score(oracle.hidden, np.arange(2), logits=LogitTransform(normalize=True)).logits
    near(cosines, np.full((1, 2), 0.5**0.5))
    assert table.score(oracle.hidden, np.arange(2), logits=LogitTransform(soft_cap=7.0)).logits.tolist() == [[7.0, 7.0]]


def test_directions_do_not_overflow_in_float64(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """Rows and hidden whose norms overflow float64 still have correct cosines."""
    table = client.create_table(fresh_name(), num_classes=2, dim=2, dtype="float64", num_shards=2)
    table.write_rows(np.arange(2), np.array([[1.7e308, 1.7e308], [1.7e308, 0.0]]))
    hidden = np.array([[1.7e308, 1.7e308], [0.0, 1.7e308]])
    cosines = table.score(hidden, np.arange(2), logits=LogitTransform(normalize=True)).logits
    np.testing.assert_allclose(cosines, [[1.0, 0.5**0.5], [0.5**0.5, 0.0]], rtol=1e-15, atol=0)


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 2.0**-22), ("bfloat16", 2.0**-7), ("float64", 2.0**-31)])
def test_what_the_tables_dtype_tells_apart_does_not_tie(
    client: shardloss.LossClient, fresh_name: Callable[[], str], dtype: str, difference: float
) -> None:
    """The better of two neighbouring rows is the best class, even though its id is higher."""
    table = client.create_table(fresh_name(), num_classes=2, dim=1, dtype=dtype, num_shards=2)
    table.write_rows(np.arange(2), np.array([[1.0], [1.0 + difference]]))
    hidden = np.array([[1.0], [-1.0], [3e-5]])
    assert table.top_k(hidden, 2).class_ids.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert table.evaluate(hidden, np.zeros(3, int)).rank.tolist() == [2, 1, 2]


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["inf - inf", "inf"])
@pytest.mark.parametrize("transform", [None, LogitTransform(soft_cap=3.0), LogitTransform(scale=0.5)])
def test_no_transform_hides_an_overflow(
    client: shardloss.LossClient, fresh_name: Callable[[], str], transform: LogitTransform | None, sign: float
) -> None:
    """A logit of inf - inf or inf, capped or not, is refused with an error that names the row of hidden."""
    table = client.create_table(fresh_name(), num_classes=6, dim=2, dtype="float64", num_shards=2)
    table.write_rows(np.array([5]), np.array([[1e200, sign * 1e200]]))
    hidden, labels = np.array([[0.0, 0.0], [1e200, 1e200]]), np.array([5, 5])
    for ask in (
        lambda: table.evaluate(hidden, labels, logits=transform),
        lambda: table.top_k(hidden, 2, logits=transform),
        lambda: table.score(hidden, labels, logits=transform),
        lambda: table.sample_classes(hidden, 3, logits=transform),
        lambda: table.sample_classes(hidden, 3, top_k=2, logits=transform),
    ):
        with pytest.raises(InvalidArgument) as refused:
            ask()
        assert (refused.value.field, refused.value.index) == ("hidden", "1")
    assert table.sample_classes(hidden[:1], 3, logits=transform).class_ids.shape == (1, 3)


def test_a_data_set_is_evaluated_batch_by_batch(make_table: MakeTable, oracle: Oracle) -> None:
    """Sums over batches of any size equal those over all rows; progress counts rows; batches are read one at a time."""
    table, labels = make_table(oracle), np.arange(N) * 2
    labels[4] = IGNORED
    seen: list[int] = []

    def batches():
        for number, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 5), slice(5, N))):
            assert len(seen) == number
            yield oracle.hidden[rows], labels[rows]

    summary = table.evaluate_batches(batches(), progress=seen.append, want_sigmoid=True)
    whole = table.evaluate(oracle.hidden, labels, want_sigmoid=True)
    assert seen == [4, 5, 5, N]
    assert (summary.num_rows, summary.num_counted) == (N, N - 1)
    for k in (1, 3, V):
        assert summary.hit_rate(k) == whole.hit_rate(k)
        assert summary.mrr(k) == pytest.approx(whole.mrr(k))
    assert summary.mrr() == pytest.approx(whole.mrr())
    assert summary.mean_loss == pytest.approx(whole.mean_loss)
    assert summary.mean_sigmoid == pytest.approx(whole.mean_sigmoid)
    assert (summary.version, summary.last_version) == (1, 1)


@pytest.mark.parametrize("rows", ["none", "all ignored"])
def test_where_no_row_counts_every_mean_is_nan(make_table: MakeTable, oracle: Oracle, rows: str) -> None:
    """Every mean is NaN for N = 0, for no batches at all, and if all rows are ignored."""
    table = make_table(oracle)
    size = 0 if rows == "none" else N
    batch = oracle.hidden[:size], np.full(size, IGNORED)
    found = table.evaluate(*batch, want_sigmoid=True)
    assert found.loss.tolist() == found.rank.tolist() == found.sigmoid.tolist() == [0] * size
    for answer in (found, table.evaluate_batches([batch] if size else [], want_sigmoid=True)):
        assert answer.num_counted == 0
        for figure in (answer.mean_loss, answer.perplexity, answer.mean_sigmoid, answer.hit_rate(1), answer.mrr()):
            assert np.isnan(figure)
    gap = table.sampling_gap(*batch, shardloss.SampledSoftmax(5))
    assert gap.gap.tolist() == [0] * size
    assert np.isnan(gap.mean_gap)


def test_nobody_gets_figures_he_did_not_ask_for(make_table: MakeTable, oracle: Oracle) -> None:
    """Reading ranks or sigmoid sums that were not requested raises InvalidArgument; it does not return NaN."""
    found = make_table(oracle).evaluate(oracle.hidden, np.arange(N), want_rank=False)
    assert (found.rank, found.sigmoid) == (None, None)
    for ask in (found.mrr, lambda: found.hit_rate(3), lambda: found.mean_sigmoid):
        with pytest.raises(InvalidArgument):
            ask()


def test_a_sampled_loss_is_set_beside_the_exact_one(make_table: MakeTable, oracle: Oracle) -> None:
    """Both losses are of one version; with every class as a candidate there is no gap, with few candidates there is."""
    table, labels = make_table(oracle), np.arange(N)
    labels[2] = IGNORED
    every = shardloss.SampledSoftmax(V, sampler="uniform")
    none = table.sampling_gap(oracle.hidden, labels, every)
    assert none.is_one_version
    np.testing.assert_allclose(none.gap, np.zeros(N), atol=2e-6)
    few = table.sampling_gap(oracle.hidden, labels, shardloss.SampledSoftmax(3, seed=1), step=4)
    sampled = table.compute_loss(
        oracle.hidden, labels, shardloss.SampledSoftmax(3, seed=1), step=4, ignore_index=IGNORED
    )
    exact = table.evaluate(oracle.hidden, labels)
    counted = labels != IGNORED
    assert few.sampled.tolist() == sampled.loss.tolist()
    assert few.exact.tolist() == exact.loss.tolist()
    assert few.mean_gap == pytest.approx((sampled.loss - exact.loss)[counted].mean())
    assert few.mean_gap != 0


def test_a_gap_says_that_others_trained_between(
    client: shardloss.LossClient, fresh_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit between the two losses makes both run again; if another follows, both versions are reported."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D)
    hidden, labels = np.ones((2, D)), np.array([1, 2])
    evaluate, num_writes = table.evaluate, 0

    def write_first(*args, **options):
        nonlocal num_writes
        if num_writes < most:
            num_writes += 1
            table.write_rows(np.array([0]), np.ones((1, D)))
        return evaluate(*args, **options)

    monkeypatch.setattr(table, "evaluate", write_first)
    most = 1
    gap = table.sampling_gap(hidden, labels, shardloss.SampledSoftmax(4))
    assert gap.is_one_version
    assert gap.version == 1
    most, num_writes = 99, 0
    gap = table.sampling_gap(hidden, labels, shardloss.SampledSoftmax(4))
    assert not gap.is_one_version
    assert (gap.version, gap.exact_version, gap.exact_last_version) == (3, 4, 4)


def test_exact_questions_change_nothing(make_table: MakeTable, oracle: Oracle) -> None:
    """Version, rows and biases stay the same bit for bit, and so does the next training step."""
    table, labels = make_table(oracle), np.arange(N)
    before, info = table.read_rows(np.arange(V)), table.info()
    transform = LogitTransform(scale=2.0, soft_cap=9.0, normalize=True)
    table.evaluate(oracle.hidden, labels, want_sigmoid=True, logits=transform)
    table.top_k(oracle.hidden, 3, logits=transform)
    table.score(oracle.hidden, labels, want_log_probs=True, logits=transform)
    table.sample_classes(oracle.hidden, 11, logits=transform)
    table.sampling_gap(oracle.hidden, labels, shardloss.SampledSoftmax(4))
    after = table.read_rows(np.arange(V))
    assert after.rows.tobytes() == before.rows.tobytes()
    assert after.biases.tobytes() == before.biases.tobytes()
    assert table.info() == info


@pytest.mark.parametrize(
    "transform", [LogitTransform(scale=0.0), LogitTransform(soft_cap=-1.0), LogitTransform(scale=float("nan"))]
)
def test_a_transform_that_cannot_be_is_refused_by_name(
    make_table: MakeTable, oracle: Oracle, transform: LogitTransform
) -> None:
    """Every call raises InvalidArgument and names the field."""
    table = make_table(oracle)
    field = "logits.soft_cap" if transform.soft_cap else "logits.scale"
    for ask in (
        lambda: table.evaluate(oracle.hidden, np.arange(N), logits=transform),
        lambda: table.top_k(oracle.hidden, 2, logits=transform),
        lambda: table.probabilities(oracle.hidden, np.arange(2), logits=transform),
        lambda: table.sample_classes(oracle.hidden, 2, logits=transform),
    ):
        with pytest.raises(InvalidArgument) as refused:
            ask()
        assert refused.value.field == field


def test_a_client_refuses_what_no_field_holds(make_table: MakeTable, oracle: Oracle) -> None:
    """A seed out of range or a scale that is text raises InvalidArgument, not a bare TypeError."""
    table = make_table(oracle)
    for ask in (
        lambda: table.sample_classes(oracle.hidden, 2, seed=-1),
        lambda: table.sample_classes(oracle.hidden, 2, seed=2**64),
        lambda: table.top_k(oracle.hidden, 2, logits=LogitTransform(scale="hot")),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument):
            ask()
