"""Losses with the signatures of other frameworks train a remote table as their formulas train a local one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, NUM_FEATURES, encoder, table_of
from shardloss.compat import tensorflow, tfrs
from shardloss.errors import InvalidArgument, NotSupported
from torch import Tensor

from ..extent import scaled

STEPS, LR, NUM_TRUE, NUM_SAMPLED = scaled(15, 40), 0.1, 2, 9
MakeTable = Callable[..., shardloss.Table]


@pytest.fixture
def make_table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> MakeTable:
    def make(**options: object) -> shardloss.Table:
        spec = {"num_classes": NUM_CLASSES, "dim": DIM, "num_shards": 3, "dtype": "float64", **options}
        return client.create_table(fresh_name(), **spec)

    return make


def assert_equal(ours: Tensor | list[float], theirs: Tensor | list[float]) -> None:
    """Assert that both are equal to 1e-9."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def train(net: torch.nn.Linear, table_optimizer: torch.optim.Optimizer, losses: Iterator[Tensor]) -> list[float]:
    """Take one step of net and table for each loss, and return the losses."""
    found = []
    optimizers = [torch.optim.SGD(net.parameters(), 0.1), table_optimizer]
    for loss in losses:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


# TensorFlow

Triple = tuple[Tensor, Tensor, Tensor]


def nce_batches(num_steps: int) -> Iterator[tuple[Tensor, Tensor, Triple]]:
    """Yield features [N, F], labels [N, T] and a draw with repeats for each step."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        features = torch.randn(BATCH, NUM_FEATURES, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, NUM_CLASSES, (BATCH, NUM_TRUE), generator=generator)
        sampled = torch.randint(0, NUM_CLASSES, (NUM_SAMPLED,), generator=generator)
        counts = [
            0.1 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in (labels.shape, NUM_SAMPLED)
        ]
        yield features, labels, (sampled, *counts)


def sampled_logits(
    rows: Tensor, biases: Tensor, labels: Tensor, hidden: Tensor, values: Triple, removed: bool
) -> tuple[Tensor, Tensor]:
    """Return TensorFlow's corrected logits of the true and sampled classes; the last copy of each hit is -inf."""
    sampled, true_count, sampled_count = values
    of_labels = torch.einsum("nd,ntd->nt", hidden, rows[labels]) + biases[labels] - true_count.log()
    of_sampled = hidden @ rows[sampled].T + biases[sampled] - sampled_count.log()
    if removed:
        is_last = torch.tensor([class_id not in sampled[s + 1 :] for s, class_id in enumerate(sampled)])
        hit = (labels[:, :, None] == sampled).any(1) & is_last
        of_sampled = of_sampled.masked_fill(hit, -torch.inf)
    return of_labels, of_sampled


def local_nce(*args: object) -> Tensor:
    """Return nce_loss [N]: the targets are 1 / T for true classes and 0 for sampled ones."""
    of_labels, of_sampled = sampled_logits(*args)  # type: ignore[arg-type]
    softplus = torch.nn.functional.softplus
    return (softplus(of_labels) - of_labels / of_labels.shape[1]).sum(1) + softplus(of_sampled).sum(1)


def local_sampled_softmax(*args: object) -> Tensor:
    """Return sampled_softmax_loss [N]."""
    of_labels, of_sampled = sampled_logits(*args)  # type: ignore[arg-type]
    return torch.logsumexp(torch.cat([of_labels, of_sampled], 1), 1) - of_labels.mean(1)


@pytest.mark.parametrize("removed", [False, True], ids=["nce", "sampled logistic"])
@pytest.mark.parametrize("version", ["v2", "v1"])
def test_an_nce_trainer_equals_torch_alone(make_table: MakeTable, removed: bool, version: str) -> None:
    """Losses, rows, biases and encoder agree with torch's to 1e-9 over all steps."""
    table, net, twin = make_table(placement="div"), encoder(torch.float64), encoder(torch.float64)
    rows, biases = (value.requires_grad_() for value in table_of(table))

    def remote() -> Iterator[Tensor]:
        for features, labels, values in nce_batches(STEPS):
            given = (table, table, labels, net(features), NUM_SAMPLED, NUM_CLASSES, NUM_TRUE, values, removed)
            if version == "v1":
                yield tensorflow.v1.nce_loss(*given, "div").mean()
            else:
                yield tensorflow.nce_loss(*given).mean()

    def local() -> Iterator[Tensor]:
        for features, labels, values in nce_batches(STEPS):
            yield local_nce(rows, biases, labels, twin(features), values, removed).mean()

    ours = train(net, tensorflow.optimizer(table, LR), remote())
    theirs = train(twin, torch.optim.SGD([rows, biases], LR), local())
    assert_equal(ours, theirs)
    assert_equal(table_of(table)[0], rows.detach())
    assert_equal(table_of(table)[1], biases.detach())
    assert_equal(net.weight.detach(), twin.weight.detach())


def test_losses_of_every_kind_are_one_commit(make_table: MakeTable) -> None:
    """One step over all four losses of a table moves its rows by the sum of their gradients."""
    table = make_table()
    rows, biases = (value.requires_grad_() for value in table_of(table))
    optimizer = tensorflow.optimizer(table, LR)
    features, labels, values = next(nce_batches(1))
    hidden, one = features @ torch.randn(NUM_FEATURES, DIM, dtype=torch.float64), labels[:, 0]
    given = (table, table, labels, hidden, NUM_SAMPLED, NUM_CLASSES, NUM_TRUE, values)
    loss = tensorflow.nce_loss(*given).sum() + 2.0 * tensorflow.sampled_softmax_loss(*given).sum()
    loss = loss + 3.0 * tensorflow.full_sigmoid_loss(table, table, one, hidden).sum()
    loss = loss + 4.0 * tensorflow.full_softmax_loss(table, table, one, hidden).sum()
    loss.backward()
    optimizer.step()
    here = (rows, biases, labels, hidden, values)
    logits, one_hot = hidden @ rows.T + biases, torch.nn.functional.one_hot(one, NUM_CLASSES).double()
    expected = local_nce(*here, False).sum() + 2.0 * local_sampled_softmax(*here, True).sum()
    expected = expected + 3.0 * torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum")
    expected = expected + 4.0 * torch.nn.functional.cross_entropy(logits, one, reduction="sum")
    expected.backward()
    assert_equal(loss.detach(), expected.detach())
    assert rows.grad is not None
    assert_equal(table_of(table)[0], (rows - LR * rows.grad).detach())
    assert table.info().num_commits == 1


@pytest.mark.parametrize("labels_shape", [(BATCH,), (BATCH, 1), (BATCH, 3)], ids=str)
def test_the_exact_losses_are_tensorflows_evaluation(make_table: MakeTable, labels_shape: tuple[int, ...]) -> None:
    """The losses are cross-entropies with the one-hot labels of TensorFlow's documented recipe; no ticket is opened."""
    table = make_table()
    rows, biases = table_of(table)
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64)
    labels = torch.stack([torch.randperm(NUM_CLASSES)[: int(np.prod(labels_shape[1:]))] for _ in range(BATCH)])
    targets = torch.zeros(BATCH, NUM_CLASSES, dtype=torch.float64).scatter_(1, labels, 1.0)
    logits = hidden @ rows.T + biases
    with torch.no_grad():
        sigmoid = tensorflow.full_sigmoid_loss(table, table, labels.reshape(labels_shape), hidden)
        softmax = tensorflow.full_softmax_loss(table, table, labels.reshape(labels_shape), hidden)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    assert_equal(sigmoid, each.sum(1))
    assert_equal(softmax, torch.nn.functional.cross_entropy(logits, targets / labels.shape[1], reduction="none"))
    assert table.info().num_open_tickets == 0


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(
    "function, local",
    [(tensorflow.nce_loss, local_nce), (tensorflow.sampled_softmax_loss, local_sampled_softmax)],
    ids=["nce", "softmax"],
)
def test_a_samplers_answer_is_a_losss_sampled_values(
    make_table: MakeTable, function: Callable[..., Tensor], local: Callable[..., Tensor], unique: bool
) -> None:
    """The result of log_uniform_candidate_sampler is accepted unchanged as the loss's sampled_values."""
    table = make_table()
    _, labels, _ = next(nce_batches(1))
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64)
    values = tensorflow.log_uniform_candidate_sampler(labels, NUM_TRUE, NUM_SAMPLED, unique, NUM_CLASSES, seed=19)
    loss = function(table, table, labels, hidden, NUM_SAMPLED, NUM_CLASSES, NUM_TRUE, values, True)
    counts = (values.true_expected_count.double(), values.sampled_expected_count.double())
    expected = local(*table_of(table), labels, hidden, (values.sampled_candidates, *counts), True)
    assert_equal(loss.detach(), expected)


@pytest.mark.parametrize("function", [tensorflow.nce_loss, tensorflow.sampled_softmax_loss])
@pytest.mark.parametrize(
    "field, given",
    [
        ("weights", {"weights": torch.zeros(NUM_CLASSES, DIM)}),
        ("biases", {"biases": torch.zeros(NUM_CLASSES)}),
        ("biases", {"biases": None}),
        ("labels", {"labels": [[0, 1]] * BATCH}),
        ("labels", {"labels": torch.zeros(BATCH, dtype=torch.int64)}),
        ("labels", {"labels": torch.full((BATCH, NUM_TRUE), -(2**63))}),
        ("inputs", {"inputs": [[0.0] * DIM] * BATCH}),
        ("inputs", {"inputs": torch.zeros(BATCH, NUM_TRUE, DIM)}),
        ("num_classes", {"num_classes": NUM_CLASSES + 1}),
        ("sampled_values", {"sampled_values": (torch.arange(2), torch.ones(BATCH, NUM_TRUE))}),
        ("sampled_values.sampled", {"sampled_values": ("ab", torch.ones(BATCH, NUM_TRUE), torch.ones(2))}),
        ("sampled_values.sampled", {"sampled_values": (torch.tensor(1), torch.ones(BATCH, NUM_TRUE), torch.ones(1))}),
        (
            "sampled_values.sampled",
            {
                "sampled_values": (
                    torch.zeros(BATCH, 2).long(),
                    torch.ones(BATCH, NUM_TRUE),
                    torch.ones(BATCH, 2),
                ),
                "num_sampled": BATCH,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fits_no_table_is_refused_by_its_argument(
    make_table: MakeTable, function: Callable[..., Tensor], field: str, given: dict[str, object]
) -> None:
    """InvalidArgument names the argument, such as a dense weight or an array, and no ticket is left open."""
    table = make_table()
    arguments = {
        "weights": table,
        "biases": table,
        "labels": torch.zeros(BATCH, NUM_TRUE, dtype=torch.int64),
        "inputs": torch.zeros(BATCH, DIM),
        "num_sampled": 2,
        "num_classes": NUM_CLASSES,
        "num_true": NUM_TRUE,
    }
    with pytest.raises(InvalidArgument) as refused:
        function(**{**arguments, **given})
    assert refused.value.field == field
    assert table.info().num_open_tickets == 0


def test_any_integer_is_a_seed(make_table: MakeTable) -> None:
    """Seeds are taken modulo 2^64, so -3 draws as 2^64 - 3 does; a float is refused."""
    table = make_table()
    labels, hidden = torch.zeros(BATCH, 1, dtype=torch.int64), torch.randn(BATCH, DIM, dtype=torch.float64)

    def loss(seed: object) -> Tensor:
        given = (table, table, labels, hidden, 3, NUM_CLASSES)
        with torch.no_grad():
            return tensorflow.sampled_softmax_loss(*given, seed=seed)  # type: ignore[arg-type]

    assert_equal(loss(-3), loss(2**64 - 3))
    with pytest.raises(InvalidArgument) as refused:
        loss(1.5)
    assert refused.value.field == "seed"


def test_nce_draws_its_own_candidates_anew_for_each_step(make_table: MakeTable) -> None:
    """The loss is the same when computed twice within a step, and changes after a commit, even with learning rate 0."""
    table = make_table()
    optimizer = tensorflow.optimizer(table, 0.0)
    _, labels, _ = next(nce_batches(1))
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64)

    def loss() -> Tensor:
        return tensorflow.nce_loss(table, table, labels, hidden, NUM_SAMPLED, NUM_CLASSES, NUM_TRUE)

    first = loss()
    assert_equal(first.detach(), loss().detach())
    first.sum().backward()
    optimizer.step()
    assert (loss() - first).abs().max() > 1e-3


# TensorFlow Recommenders

NUM_QUERIES, NUM_CANDIDATES = BATCH, 12  # five extra negatives
Lookup = tuple[Tensor, Tensor, Tensor, Tensor]


def retrieval_batches(num_steps: int) -> Iterator[tuple[Tensor, Lookup]]:
    """Yield features [Q, F]; class ids, sampling probabilities and item ids [C]; and sample weights [Q].

    There are 23 classes and 5 items, so both repeat in a batch; one class occurs with different probabilities.
    """
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        features = torch.randn(NUM_QUERIES, NUM_FEATURES, generator=generator, dtype=torch.float64)
        class_ids = torch.randint(0, NUM_CLASSES, (NUM_CANDIDATES,), generator=generator)
        class_ids[3] = class_ids[1] = class_ids[0]
        p = 0.01 + 0.9 * torch.rand(NUM_CANDIDATES, generator=generator, dtype=torch.float64)
        weight = torch.rand(NUM_QUERIES, generator=generator, dtype=torch.float64)
        yield features, (class_ids, p, class_ids % 5 - 2, weight)


def local_retrieval(
    rows: Tensor, queries: Tensor, lookup: Lookup, temperature: float, k: int | None, removed: bool
) -> Tensor:
    """Return the sum over the rows of the weighted cross-entropies, computed in plain loops."""
    class_ids, p, item_ids, weight = lookup
    scores = queries @ rows[class_ids].T / temperature - p.log()
    total = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(scores):
        negatives = [c for c in range(NUM_CANDIDATES) if c != n and not (removed and item_ids[c] == item_ids[n])]
        best = sorted(negatives, key=lambda c: -float(row[c]))[:k]
        total = total + weight[n] * (torch.logsumexp(row[[n, *best]], 0) - row[n])
    return total


@pytest.mark.parametrize("removed", [False, True], ids=["hits kept", "hits removed"])
@pytest.mark.parametrize("k", [None, 4], ids=["all negatives", "hard negatives"])
@pytest.mark.parametrize("temperature", [None, 0.25])
def test_a_two_tower_trainer_equals_torch_alone(
    make_table: MakeTable, removed: bool, k: int | None, temperature: float | None
) -> None:
    """Losses, rows and encoder agree with torch's to 1e-9, also if a class repeats with different probabilities."""
    table, net, twin = make_table(bias=False), encoder(torch.float64), encoder(torch.float64)
    rows = torch.tensor(table.read_rows(np.arange(NUM_CLASSES)).rows, requires_grad=True)
    task = tfrs.Retrieval(temperature=temperature, num_hard_negatives=k, remove_accidental_hits=removed)

    def remote() -> Iterator[Tensor]:
        for features, (class_ids, p, item_ids, weight) in retrieval_batches(STEPS):
            yield task(net(features), table.embeddings(class_ids), weight, p, item_ids)

    def local() -> Iterator[Tensor]:
        for features, lookup in retrieval_batches(STEPS):
            yield local_retrieval(rows, twin(features), lookup, temperature or 1.0, k, removed)

    lr = 0.01
    ours = train(net, tfrs.optimizer(table, lr), remote())
    theirs = train(twin, torch.optim.SGD([rows], lr), local())
    assert_equal(ours, theirs)
    assert_equal(torch.tensor(table.read_rows(np.arange(NUM_CLASSES)).rows), rows.detach())
    assert_equal(net.weight.detach(), twin.weight.detach())
    assert table.info().num_commits == STEPS


@pytest.fixture
def lookup(make_table: MakeTable) -> shardloss.LazyRows:
    """A lookup of 12 rows of a table without biases."""
    return make_table(bias=False).embeddings(next(retrieval_batches(1))[1][0])


def test_a_lookup_is_of_its_shape_and_keeps_its_ids(make_table: MakeTable) -> None:
    """A lookup copies the caller's ids, so later writes do not change it; int32 ids are accepted."""
    ids = np.array([4, 4, 0], dtype=np.int32)
    lookup = make_table().embeddings(ids)
    ids[:] = 1
    assert (lookup.shape, len(lookup), lookup.class_ids.tolist()) == ((3, DIM), 3, [4, 4, 0])


@pytest.mark.parametrize("ids", [[0, NUM_CLASSES], [-1], [[0]], [0.5]], ids=str)
def test_a_lookup_of_no_class_is_refused(make_table: MakeTable, ids: list[object]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        make_table().embeddings(torch.tensor(ids))
    assert refused.value.field == "class_ids"


def queries() -> Tensor:
    """Return queries [Q, D], the same in each call."""
    return torch.linspace(-1.0, 1.0, NUM_QUERIES * DIM, dtype=torch.float64).reshape(NUM_QUERIES, DIM)


def test_item_ids_may_be_texts(lookup: shardloss.LazyRows) -> None:
    """Item ids given as texts, as is common in TFRS, find the same accidental hits as numbers."""
    numbers = lookup.class_ids % 5
    task = tfrs.Retrieval(remove_accidental_hits=True)
    with torch.no_grad():
        by_text = task(queries(), lookup, candidate_ids=np.array([f"film {i}" for i in numbers]))
        assert_equal(by_text, task(queries(), lookup, candidate_ids=numbers))
        assert by_text < tfrs.Retrieval()(queries(), lookup)
    assert lookup.table.info().num_open_tickets == 0


@pytest.mark.parametrize("k", [None, 0, -1, NUM_CANDIDATES - 1, 10**6])
def test_hard_negatives_beyond_the_batch_are_all_negatives(lookup: shardloss.LazyRows, k: int | None) -> None:
    """A num_hard_negatives of None, at most 0, or beyond the batch means all negatives, as TFRS documents."""
    with torch.no_grad():
        all_negatives = tfrs.Retrieval()(queries(), lookup)
        assert_equal(tfrs.Retrieval(num_hard_negatives=k)(queries(), lookup), all_negatives)


@pytest.mark.parametrize("shape", [(NUM_QUERIES,), (NUM_QUERIES, 1), ()], ids=str)
def test_sample_weights_have_the_shapes_of_keras(lookup: shardloss.LazyRows, shape: tuple[int, ...]) -> None:
    """Weights may have shape [Q], [Q, 1] or []; a weight that requires a gradient gets one."""
    weight = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
    loss = tfrs.Retrieval()(queries(), lookup, weight)
    with torch.no_grad():
        plain = tfrs.Retrieval()(queries(), lookup)
    assert_equal(loss.detach(), 2.0 * plain)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.shape == shape
    assert_equal(weight.grad.sum(), plain)


def test_an_empty_batch_has_loss_0(make_table: MakeTable) -> None:
    """Without queries the loss is the scalar 0, with and without candidates."""
    table = make_table(bias=False)
    for ids in ([], [3, 4]):
        loss = tfrs.Retrieval()(torch.zeros(0, DIM), table.embeddings(np.array(ids, dtype=np.int64)))
        assert (loss.shape, float(loss)) == ((), 0.0)


@pytest.mark.parametrize("field", ["loss", "metrics", "batch_metrics", "loss_metrics"])
def test_a_task_refuses_a_loss_or_metrics_of_its_own_by_name(field: str) -> None:
    with pytest.raises(NotSupported) as refused:
        tfrs.Retrieval(**{field: [object()]})
    assert refused.value.field == field


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_finite_and_positive(temperature: float) -> None:
    with pytest.raises(InvalidArgument) as refused:
        tfrs.Retrieval(temperature=temperature)
    assert refused.value.field == "temperature"


@pytest.mark.parametrize(
    "field, given",
    [
        ("query_embeddings", {"query_embeddings": torch.zeros(3, DIM + 1)}),
        ("query_embeddings", {"query_embeddings": torch.zeros(DIM)}),
        ("query_embeddings", {"query_embeddings": np.zeros((3, DIM), dtype=np.int64)}),
        ("candidate_embeddings", {"query_embeddings": torch.zeros(NUM_CANDIDATES + 1, DIM)}),
        ("candidate_embeddings", {"candidate_embeddings": torch.zeros(NUM_CANDIDATES, DIM)}),
        ("sample_weight", {"sample_weight": torch.ones(NUM_QUERIES + 1)}),
        ("candidate_sampling_probability", {"candidate_sampling_probability": torch.ones(NUM_QUERIES)}),
        ("candidate_sampling_probability", {"candidate_sampling_probability": torch.full((NUM_CANDIDATES,), -0.5)}),
        ("candidate_ids", {"candidate_ids": None}),
        ("candidate_ids", {"candidate_ids": torch.zeros(NUM_QUERIES)}),
        ("candidate_ids", {"candidate_ids": np.array([*range(NUM_CANDIDATES - 1), "text"], dtype=object)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_task_refuses_what_does_not_fit_by_name(
    lookup: shardloss.LazyRows, field: str, given: dict[str, object]
) -> None:
    """InvalidArgument names the argument, and no ticket is left open."""
    arguments = {
        "query_embeddings": queries(),
        "candidate_embeddings": lookup,
        "candidate_ids": torch.arange(NUM_CANDIDATES),
    }
    with pytest.raises(InvalidArgument) as refused:
        tfrs.Retrieval(remove_accidental_hits=True)(**{**arguments, **given})
    assert refused.value.field == field
    assert lookup.table.info().num_open_tickets == 0


@pytest.mark.parametrize(
    "field, given",
    [
        ("score_mask", {"score_mask": torch.ones(NUM_QUERIES, NUM_CANDIDATES, dtype=torch.bool)}),
        ("query_embeddings", {"query_embeddings": torch.zeros(NUM_QUERIES, 2, DIM)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_task_refuses_what_it_has_not_by_name(
    lookup: shardloss.LazyRows, field: str, given: dict[str, object]
) -> None:
    """Masks of single scores and several query heads raise NotSupported with the argument's name."""
    with pytest.raises(NotSupported) as refused:
        tfrs.Retrieval()(**{"query_embeddings": queries(), "candidate_embeddings": lookup, **given})
    assert refused.value.field == field


def test_sampling_probabilities_are_clipped_as_tfrs_does(lookup: shardloss.LazyRows) -> None:
    """Probabilities are clipped to [1e-6, 1], so that a class that was never seen has a finite score."""
    given = torch.linspace(0.1, 0.9, NUM_CANDIDATES)
    given[2], given[5], given[9] = 0.0, 1e-9, 3.0
    clipped = given.clone()
    clipped[2], clipped[5], clipped[9] = 1e-6, 1e-6, 1.0
    task = tfrs.Retrieval()
    with torch.no_grad():
        ours = task(queries(), lookup, candidate_sampling_probability=given)
        torch.testing.assert_close(
            ours, task(queries(), lookup, candidate_sampling_probability=clipped), rtol=1e-6, atol=0
        )
        assert ours > task(queries(), lookup)


def test_a_table_with_biases_has_no_two_tower_scores(make_table: MakeTable) -> None:
    with pytest.raises(InvalidArgument, match="bias=False"):
        tfrs.Retrieval()(queries(), make_table().embeddings(np.arange(NUM_QUERIES)))
