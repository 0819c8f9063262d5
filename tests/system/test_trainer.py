"""A trainer that replaces its local head with a remote one gets the same loss curve and the same final table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, batches, local_run, remote_run, table_of

from ..extent import scaled

STEPS = scaled(40, 200)
Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]

# name, table optimizer, sampled loss or not, learning rate, torch's optimizer
CASES: list[tuple[str, shardloss.types.Optimizer, bool, float, Make]] = [
    ("sgd", shardloss.Sgd(), False, 0.5, lambda p: torch.optim.SGD(p, 0.5)),
    (
        "sgd-momentum-decay",
        shardloss.Sgd(momentum=0.9, weight_decay=0.01),
        False,
        0.1,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ),
    (
        "sgd-nesterov",
        shardloss.Sgd(momentum=0.8, nesterov=True),
        False,
        0.1,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True),
    ),
    ("sgd-sampled", shardloss.Sgd(), True, 0.5, lambda p: torch.optim.SGD(p, 0.5)),
    ("adagrad", shardloss.Adagrad(), False, 0.1, lambda p: torch.optim.Adagrad(p, 0.1)),
    (
        "adagrad-sampled",
        shardloss.Adagrad(initial_accumulator_value=0.1),
        True,
        0.1,
        lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    ),
    ("sparse-adam-sampled", shardloss.SparseAdam(), True, 0.01, lambda p: torch.optim.SparseAdam(p, 0.01)),
    (
        "adam",
        shardloss.Adam(weight_decay=0.02),
        False,
        0.01,
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.02),
    ),
    ("adamw", shardloss.AdamW(), False, 0.01, lambda p: torch.optim.AdamW(p, 0.01)),
]


@pytest.fixture
def make_table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Callable[..., shardloss.Table]:
    def make(dtype: str = "float64", **options: object) -> shardloss.Table:
        return client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, num_shards=3, dtype=dtype, **options)

    return make


@pytest.mark.parametrize(("name", "optimizer", "sampled", "lr", "make"), CASES, ids=[case[0] for case in CASES])
def test_float64_curve_and_table_equal_torch_alone(
    make_table: Callable[..., shardloss.Table],
    name: str,
    optimizer: shardloss.types.Optimizer,
    sampled: bool,
    lr: float,
    make: Make,
) -> None:
    """Over all steps the losses, the table and the encoder agree with a local torch trainer to 1e-9."""
    table = make_table(optimizer=optimizer)
    local = local_run(table, sampled, make, STEPS, torch.float64)
    remote = remote_run(table, sampled, lr, STEPS, torch.float64)
    torch.testing.assert_close(remote.losses, local.losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(remote.weights, local.weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(remote.biases, local.biases, rtol=0, atol=1e-9)
    torch.testing.assert_close(remote.encoder, local.encoder, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampled", [False, True], ids=["full", "sampled"])
def test_float32_is_as_close_to_float64_as_torch_itself(
    make_table: Callable[..., shardloss.Table], sampled: bool
) -> None:
    """Float32's distance from the float64 run is at most a few times that of a local float32 trainer."""

    def make(p: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, 0.1)

    table64, table32 = make_table(), make_table("float32")
    exact = local_run(table64, sampled, make, STEPS, torch.float64)
    naive = local_run(table32, sampled, make, STEPS, torch.float32)
    remote = remote_run(table32, sampled, 0.1, STEPS, torch.float32)
    naive_error = (naive.weights.double() - exact.weights).abs().max()
    assert (remote.weights.double() - exact.weights).abs().max() <= 4 * naive_error + 1e-6


def test_three_uneven_micro_batches_are_one_batch(make_table: Callable[..., shardloss.Table]) -> None:
    """Accumulated parts of 1, 2 and 4 rows of a sampled loss give the same step as all 7 rows at once."""
    tables = [make_table(optimizer=shardloss.Adam()) for _ in range(2)]
    (_, labels), *_ = batches(1, torch.float64)
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64)
    for table, cuts in zip(tables, ([7], [1, 2, 4]), strict=True):
        head = table.sampled_softmax(6, seed=1, reduction="sum")
        optimizer = head.optimizer(0.1)
        for rows, ids in zip(hidden.split(cuts), labels.split(cuts), strict=True):
            (head(rows.clone().requires_grad_(), ids) / BATCH).backward()
        optimizer.step()
        assert table.info().num_commits == 1
    torch.testing.assert_close(table_of(tables[1])[0], table_of(tables[0])[0], rtol=0, atol=1e-12)


def test_a_grad_scaler_unscales_the_commit_and_skips_it_on_inf(make_table: Callable[..., shardloss.Table]) -> None:
    """Scaled steps equal unscaled ones, and a step whose gradient overflowed changes nothing but the scale."""
    scaled, plain = make_table(), make_table()
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    head, plain_head = scaled.softmax(), plain.softmax()
    optimizer, plain_optimizer = head.optimizer(0.5), plain_head.optimizer(0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = head(hidden.clone().requires_grad_(), labels)
        if step == 1:
            before = table_of(scaled)[0]
            loss = loss * torch.tensor(float("inf"))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert torch.equal(table_of(scaled)[0], before)
            assert scaler.get_scale() == 32768.0
            continue
        plain_head(hidden.clone().requires_grad_(), labels).backward()
        plain_optimizer.step()
    torch.testing.assert_close(table_of(scaled)[0], table_of(plain)[0], rtol=0, atol=1e-12)
    assert scaled.info().num_commits == 2


def test_unscale_by_hand_before_the_step_is_respected(make_table: Callable[..., shardloss.Table]) -> None:
    """scaler.unscale_(optimizer) followed by scaler.step(optimizer) unscales the commit once."""
    scaled, plain = make_table(), make_table()
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    head = scaled.softmax()
    optimizer, scaler = head.optimizer(0.5), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(head(hidden.clone().requires_grad_(), labels)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    plain_head = plain.softmax()
    plain_optimizer = plain_head.optimizer(0.5)
    plain_head(hidden.clone().requires_grad_(), labels).backward()
    plain_optimizer.step()
    torch.testing.assert_close(table_of(scaled)[0], table_of(plain)[0], rtol=0, atol=1e-12)


def test_a_scheduler_sets_the_learning_rate_of_each_commit(make_table: Callable[..., shardloss.Table]) -> None:
    """LambdaLR on the remote optimizer equals local SGD with the same schedule."""
    table = make_table()
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    local = torch.optim.SGD([weights, biases], 0.5)
    head = table.softmax()
    remote = head.optimizer(0.5)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch) for o in (local, remote)]
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    for _ in range(4):
        local.zero_grad()
        remote.zero_grad()
        torch.nn.functional.cross_entropy(hidden @ weights.T + biases, labels).backward()
        head(hidden, labels).backward()
        for thing in (local, remote, *schedules):
            thing.step()
    assert remote.param_groups[0]["lr"] == 0.5**5
    torch.testing.assert_close(table_of(table)[0], weights.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 3])
def test_reductions_are_those_of_torch(
    make_table: Callable[..., shardloss.Table], reduction: str, ignored: int
) -> None:
    """Values and gradients equal F.cross_entropy's, with its default ignore_index, for [B, L, D] hidden as well."""
    table = make_table()
    weights, biases = table_of(table)
    labels = torch.randint(0, NUM_CLASSES, (2, 4))
    labels.view(-1)[:ignored] = -100
    hidden = torch.randn(2, 4, DIM, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = table.softmax(reduction=reduction)(ours, labels)
    logits = theirs.view(-1, DIM) @ weights.T + biases
    expected = torch.nn.functional.cross_entropy(logits, labels.view(-1), reduction=reduction)
    torch.testing.assert_close(loss.view(-1), expected.view(-1), rtol=1e-12, atol=1e-12)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_backward_with_create_graph_is_refused_by_name(make_table: Callable[..., shardloss.Table]) -> None:
    """A second derivative is refused with DoubleBackward, not silently wrong."""
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    loss = make_table().softmax()(hidden, torch.randint(0, NUM_CLASSES, (BATCH,)))
    with pytest.raises(shardloss.errors.DoubleBackward):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_evaluation_mode_and_no_grad_leave_the_table_alone(make_table: Callable[..., shardloss.Table]) -> None:
    """A loss in eval mode or under no_grad opens no ticket; in eval mode hidden still gets its gradient."""
    table = make_table()
    head = table.softmax()
    optimizer = head.optimizer(0.5)
    labels = torch.randint(0, NUM_CLASSES, (BATCH,))
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head(hidden, labels)
    head.eval()
    head(hidden, labels).backward()
    with pytest.warns(UserWarning, match="eval mode"):
        optimizer.step()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert table.info().version == 0
    assert table.info().num_open_tickets == 0


def test_zero_grad_drops_a_backward_and_keeps_a_fresh_loss(make_table: Callable[..., shardloss.Table]) -> None:
    """forward, zero_grad, backward, step commits the loss; backward, zero_grad, step commits nothing."""
    table = make_table()
    head = table.softmax()
    optimizer = head.optimizer(0.5)
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    loss = head(hidden, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert table.info().num_commits == 1
    head(hidden, labels).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert table.info().num_commits == 1
    assert table.info().num_open_tickets == 0


def test_a_head_with_its_own_learning_rate_commits_in_backward(make_table: Callable[..., shardloss.Table]) -> None:
    """A head with a learning rate needs no optimizer and commits once per backward."""
    table = make_table()
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax(learning_rate=0.5)
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    head(hidden, labels).backward()
    torch.nn.functional.cross_entropy(hidden @ weights.T + biases, labels).backward()
    assert weights.grad is not None
    torch.testing.assert_close(table_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hidden_in_half_precision_gets_its_gradient_in_its_own_dtype(
    make_table: Callable[..., shardloss.Table], dtype: torch.dtype
) -> None:
    """The loss is computed in float32 from the rounded hidden, and the gradient has hidden's dtype."""
    table = make_table("float32")
    weights, biases = table_of(table)
    hidden = torch.randn(BATCH, DIM).to(dtype).requires_grad_()
    labels = torch.randint(0, NUM_CLASSES, (BATCH,))
    loss = table.softmax()(hidden, labels)
    loss.backward()
    exact = hidden.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ weights.T + biases, labels)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert hidden.grad is not None
    assert exact.grad is not None
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(
        hidden.grad.float(), exact.grad, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
    )


@pytest.mark.ray
def test_ray_workers_give_the_curve_of_torch_alone(
    ray_client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """With Ray worker processes, a sampled loss with Adagrad agrees with a local torch trainer to 1e-9."""
    table = ray_client.create_table(
        fresh_name(), num_classes=NUM_CLASSES, dim=DIM, dtype="float64", optimizer=shardloss.Adagrad()
    )
    local = local_run(table, True, lambda p: torch.optim.Adagrad(p, 0.1), 40, torch.float64)
    remote = remote_run(table, True, 0.1, 40, torch.float64)
    torch.testing.assert_close(remote.losses, local.losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(remote.weights, local.weights, rtol=0, atol=1e-9)
