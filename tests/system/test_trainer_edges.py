"""Trainers that do more than a plain loop: autograd.grad, cleared gradients, deepcopy, odd shapes and failures."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, table_of
from shardloss.compat import tensorflow
from shardloss.errors import ClientClosed, InvalidArgument, NotSupported, StepTooOld, TableNotFound
from shardloss_server.rpc.serve import Server

Batch = tuple[torch.Tensor, torch.Tensor]


def test_a_gradient_of_hidden_alone_trains_no_table(table: shardloss.Table, batch: Batch) -> None:
    """torch.autograd.grad and backward(inputs=...) give hidden its gradient, and the next step commits nothing."""
    head = table.softmax()
    optimizer = head.optimizer(0.5)
    hidden, labels = batch
    (gradient,) = torch.autograd.grad(head(hidden, labels), hidden)
    head(hidden, labels).backward(inputs=[hidden])
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, gradient, rtol=0, atol=0)
    optimizer.step()
    assert table.info().num_commits == 0


def test_a_gradient_that_somebody_cleared_is_not_committed(table: shardloss.Table, batch: Batch) -> None:
    """Setting every parameter's grad to None between two backwards leaves only the second, as with a local table."""
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax(reduction="sum")
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    (3 * head(hidden, labels)).backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    head(hidden, labels).backward()
    optimizer.step()
    torch.nn.functional.cross_entropy(hidden @ weights.T + biases, labels, reduction="sum").backward()
    assert weights.grad is not None
    torch.testing.assert_close(table_of(table)[0], (weights - 0.1 * weights.grad).detach(), rtol=0, atol=1e-12)


def test_two_losses_of_one_step_are_one_commit(table: shardloss.Table, batch: Batch) -> None:
    """The weighted sum of two losses trains the table with both, in one commit."""
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax()
    optimizer = head.optimizer(0.5)
    hidden, labels = batch
    (2.0 * head(hidden, labels) - 0.5 * head(-hidden, labels)).backward()
    optimizer.step()
    loss = torch.nn.functional.cross_entropy
    (2.0 * loss(hidden @ weights.T + biases, labels) - 0.5 * loss(-hidden @ weights.T + biases, labels)).backward()
    assert weights.grad is not None
    torch.testing.assert_close(table_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=0, atol=1e-12)
    assert table.info().num_commits == 1


def test_a_copied_head_takes_steps_of_its_own(table: shardloss.Table, batch: Batch) -> None:
    """copy.deepcopy of a model with a head, as used for weight averaging, shares the table and nothing else."""
    model = torch.nn.ModuleDict({"head": table.softmax()})
    twin = copy.deepcopy(model)
    hidden, labels = batch
    for one in (model, twin):
        optimizer = one["head"].optimizer(0.1)
        one["head"](hidden, labels).backward()
        optimizer.step()
    assert table.info().num_commits == 2
    assert table.info().num_open_tickets == 0


def test_a_shortcut_head_refuses_a_gradient_that_is_not_finite(table: shardloss.Table, batch: Batch) -> None:
    """InvalidArgument is raised, the rows are unchanged, and the next step is committed."""
    head = table.softmax(learning_rate=0.1)
    hidden, labels = batch
    before = table_of(table)[0]
    with pytest.raises(InvalidArgument, match="not finite"):
        (head(hidden, labels) * float("nan")).backward()
    torch.testing.assert_close(table_of(table)[0], before, rtol=0, atol=0)
    head(hidden, labels).backward()
    assert table.info().num_commits == 1


def test_a_refused_commit_does_not_stop_the_trainer(table: shardloss.Table, batch: Batch) -> None:
    """After a refusal the step and its losses without a backward are discarded; the next step is committed."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    head(hidden, labels)
    head(hidden, labels).backward()
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(InvalidArgument) as refused:
        optimizer.step()
    assert refused.value.field == "learning_rate"
    optimizer.param_groups[0]["lr"] = 0.1
    head(hidden, labels).backward()
    optimizer.step()
    assert table.info().num_commits == 1
    assert table.info().num_open_tickets == 0


def test_a_session_passes_a_step_that_was_committed_behind_its_back(table: shardloss.Table, batch: Batch) -> None:
    """If every reply of a commit is lost, one loss raises StepTooOld, and the one after it starts a new step."""
    hidden, labels = batch[0].detach().numpy(), batch[1].numpy()
    session = table.session()
    result = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    session.commit([(result, None)], learning_rate=0.1)
    session.step, session.num_parts = 1, 1
    with pytest.raises(StepTooOld):
        session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    result = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    assert session.commit([(result, None)], learning_rate=0.1).version == 2


def test_an_abort_that_fails_still_ends_the_step(
    client: shardloss.LossClient, table: shardloss.Table, batch: Batch
) -> None:
    """The session moves on to a new step even if the server's abort fails."""
    session = table.session()
    session.compute_loss(batch[0].detach().numpy(), batch[1].numpy(), shardloss.FullSoftmax())
    client.delete_table(table.name)
    with pytest.raises(TableNotFound):
        session.abort()
    assert (session.step, session.num_parts) == (2, 0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("num_true", [None, 2], ids=["one label", "two labels"])
def test_hidden_of_any_rank_is_flattened(table: shardloss.Table, shape: tuple[int, ...], num_true: int | None) -> None:
    """hidden [..., D] with labels [...] or [..., T] gives losses [...], equal to those of the flattened rows."""
    hidden = torch.randn(*shape, DIM, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, shape if num_true is None else (*shape, num_true))
    values = (torch.arange(6), torch.rand(labels.shape).double() + 0.1, torch.rand(6).double() + 0.1)
    for head, more in ((table.softmax(reduction="none"), ()), (table.sampled_softmax(reduction="none"), (values,))):
        losses = head(hidden, labels, *more)
        assert losses.shape == torch.Size(shape)
        flat = head(
            hidden.reshape(-1, DIM),
            labels.reshape(-1, num_true or 1),
            *[(ids, true.reshape(-1, num_true or 1), counts) for ids, true, counts in more],
        )
        torch.testing.assert_close(losses.reshape(-1), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("hidden", "labels", "field"),
    [
        (torch.zeros(()), torch.zeros((), dtype=torch.int64), "hidden"),
        (torch.zeros(3, DIM), torch.zeros(3, 0, dtype=torch.int64), "labels"),
        (torch.zeros(3, DIM), torch.zeros(2, dtype=torch.int64), "labels"),
        (torch.zeros(3, DIM), torch.zeros(3, 1, 1, dtype=torch.int64), "labels"),
        (torch.zeros(3, DIM + 1), torch.zeros(3, dtype=torch.int64), "hidden"),
        (torch.zeros(3, DIM), torch.zeros(3), "labels"),
    ],
    ids=["scalar hidden", "no label", "too few labels", "rank", "width", "float labels"],
)
def test_shapes_that_do_not_fit_are_refused_by_name(
    table: shardloss.Table, hidden: torch.Tensor, labels: torch.Tensor, field: str
) -> None:
    """InvalidArgument names the argument whose shape or dtype is wrong."""
    for head in (table.softmax(), table.sampled_softmax(4)):
        with pytest.raises(InvalidArgument) as refused:
            head(hidden, labels)
        assert refused.value.field == field


def test_numpy_shapes_that_do_not_fit_are_refused_by_name(table: shardloss.Table) -> None:
    """`Table.compute_loss` names hidden if its shape is wrong."""
    for hidden in (np.zeros(()), np.zeros(DIM)):
        with pytest.raises(InvalidArgument) as refused:
            table.compute_loss(hidden, np.zeros(1, int), shardloss.FullSoftmax())
        assert refused.value.field == "hidden"


@pytest.mark.parametrize(
    ("class_ids", "rows", "biases", "field"),
    [
        ([0, 1], np.zeros((3, DIM)), None, "rows"),
        ([0, 1], np.zeros((2, DIM)), np.zeros(3), "biases"),
        ([0, NUM_CLASSES], np.zeros((2, DIM)), None, "class_ids"),
        ([4, 4], np.zeros((2, DIM)), None, "class_ids"),
        ([0, 1], np.array([[0.0] * DIM, [np.nan] * DIM]), None, "rows"),
        ([0, 1], np.zeros((2, DIM)), np.array([0.0, np.inf]), "biases"),
    ],
    ids=["fewer ids", "more biases", "out of range", "twice", "nan", "inf"],
)
def test_rows_are_checked_before_the_first_page_is_written(
    table: shardloss.Table, class_ids: list[int], rows: np.ndarray, biases: np.ndarray | None, field: str
) -> None:
    """If any row of a write is invalid, nothing is written."""
    before = table.info().version
    with pytest.raises(InvalidArgument) as refused:
        table.write_rows(np.array(class_ids), rows, biases)
    assert refused.value.field == field
    assert table.info().version == before


def test_tensorflow_losses_find_the_steps_of_their_table(
    client: shardloss.LossClient, table: shardloss.Table, batch: Batch
) -> None:
    """Two handles of one table share their steps; a table created again under its name does not get them."""
    hidden, labels = batch
    optimizer = tensorflow.optimizer(client.table(table.name), 0.1)
    again = client.table(table.name)
    tensorflow.sampled_softmax_loss(again, again, labels[:, None], hidden, 5, NUM_CLASSES).sum().backward()
    optimizer.step()
    assert table.info().num_commits == 1
    client.delete_table(table.name)
    wider = client.create_table(table.name, num_classes=NUM_CLASSES, dim=DIM + 1, dtype="float64")
    stale, optimizer = optimizer, tensorflow.optimizer(wider, 0.1)
    hidden = torch.randn(BATCH, DIM + 1, dtype=torch.float64)
    tensorflow.sampled_softmax_loss(wider, wider, labels[:, None], hidden, 5, NUM_CLASSES).sum().backward()
    with pytest.raises(TableNotFound, match="create a new optimizer"):
        stale.step()
    optimizer.step()
    assert wider.info().num_commits == 1


def test_losses_that_nobody_differentiates_leave_no_ticket(table: shardloss.Table, batch: Batch) -> None:
    """In a validation loop without no_grad, each forward releases the ticket of the one before it."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    for _ in range(5):
        head(hidden, labels)
        assert table.info().num_open_tickets <= 1
    head(hidden, labels).backward()
    optimizer.step()
    assert (table.info().num_commits, table.info().num_open_tickets) == (1, 0)


def test_a_forgotten_no_grad_never_fills_the_server(table: shardloss.Table, batch: Batch) -> None:
    """If the previous loss is still referenced while the next is computed, at most 20 tickets stay open."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    for _ in range(60):
        loss = head(hidden, labels)
        assert loss.isfinite()
    assert table.info().num_open_tickets <= 20
    loss = head(hidden, labels)
    loss.backward()
    optimizer.step()
    assert (table.info().num_commits, table.info().num_open_tickets) == (1, 0)


def test_a_shortcut_head_takes_the_batch_after_a_skipped_one(table: shardloss.Table, batch: Batch) -> None:
    """A loss that was computed but not differentiated is discarded by the next step."""
    head = table.softmax(learning_rate=0.1)
    hidden, labels = batch
    for is_bad in (True, False, True, True, False):
        loss = head(hidden, labels)
        if not is_bad:
            loss.backward()
    assert table.info().num_commits == 2


def test_a_loss_that_still_lives_keeps_its_step(table: shardloss.Table, batch: Batch) -> None:
    """Two losses that are computed before either is differentiated belong to one commit."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    losses = [head(hidden, labels) for _ in range(2)]
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    optimizer.step()
    assert (table.info().num_commits, table.info().num_open_tickets) == (1, 0)


def test_a_forward_that_failed_leaves_no_step_open(table: shardloss.Table, batch: Batch) -> None:
    """zero_grad() releases the open tickets even after a refused forward."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    hidden, labels = batch
    head(hidden, labels).backward()
    with pytest.raises(InvalidArgument):
        head(hidden, labels + NUM_CLASSES)
    optimizer.zero_grad()
    assert table.info().num_open_tickets == 0


@pytest.mark.parametrize("ignored", [0, 3, BATCH], ids=["none", "some", "all"])
@pytest.mark.parametrize("weighted", [False, True], ids=["labels", "weights"])
def test_the_mean_is_over_the_rows_that_count(
    table: shardloss.Table, batch: Batch, ignored: int, weighted: bool
) -> None:
    """If every row is ignored, the mean is nan and all gradients are 0, as in torch; the table is unchanged."""
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax()
    optimizer = head.optimizer(0.5)
    hidden, labels = batch
    labels = labels.clone()
    labels[:ignored] = -100
    ones = (torch.ones(BATCH, dtype=torch.float64),) if weighted else ()
    loss = head(hidden, labels, *ones)
    loss.backward()
    optimizer.step()
    local = hidden.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(local @ weights.T + biases, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert hidden.grad is not None
    assert local.grad is not None
    assert weights.grad is not None
    torch.testing.assert_close(hidden.grad, local.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(table_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=0, atol=1e-12)


def test_a_shortcut_head_refuses_two_losses_in_one_step(table: shardloss.Table, batch: Batch) -> None:
    """The head cannot know which backward is the last, so the step is refused; the next one is committed."""
    head = table.softmax(learning_rate=0.1)
    hidden, labels = batch
    with pytest.raises(InvalidArgument, match="two losses"):
        (head(hidden, labels) + head(hidden, labels)).backward()
    assert (table.info().num_commits, table.info().num_open_tickets) == (0, 0)
    head(hidden, labels).backward()
    assert table.info().num_commits == 1


def test_a_copied_head_has_hooks_of_its_own(table: shardloss.Table, batch: Batch) -> None:
    """A hook registered on the copy does not run on the original."""
    head = table.softmax()
    twin = copy.deepcopy(head)
    calls: list[str] = []
    twin.register_forward_hook(lambda *_: calls.append("twin"))
    head(*batch)
    assert calls == []
    twin(*batch)
    assert calls == ["twin"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo reads the .grad of non-leaf tensors
@pytest.mark.parametrize("kind", ["labels", "distribution", "compat"])
def test_a_compiled_model_trains_a_table(table: shardloss.Table, batch: Batch, kind: str) -> None:
    """A step with a remote loss, compiled with torch.compile, gives the same loss and one commit."""
    hidden, labels = batch
    head = table.softmax()
    optimizer = tensorflow.optimizer(table, 0.1) if kind == "compat" else head.optimizer(0.1)

    def step(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if kind == "compat":
            return tensorflow.full_softmax_loss(table, table, labels, 2.0 * hidden).mean()
        if kind == "distribution":
            return head(2.0 * hidden, torch.nn.functional.one_hot(labels, NUM_CLASSES).double())
        return head(2.0 * hidden, labels)

    with torch.no_grad():
        expected = step(hidden, labels)
    loss = torch.compile(step, backend="eager")(hidden, labels)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-12)
    loss.backward()
    optimizer.step()
    assert hidden.grad is not None
    assert table.info().num_commits == 1


def test_what_holds_a_connection_is_not_pickled(table: shardloss.Table, batch: Batch) -> None:
    """Pickling raises NotSupported with what to do instead; a head has no entry in a model's state_dict."""
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, DIM), "head": table.softmax()})
    for held in (table.client, table, table.session(), table.logits(batch[0]), table.embeddings([1]), model):
        with pytest.raises(NotSupported, match="connect"):
            pickle.dumps(held)
    with pytest.raises(NotSupported, match="connect"):
        copy.deepcopy(table)
    assert set(model.state_dict()) == {"net.weight", "net.bias"}
    model.load_state_dict(model.state_dict())


def test_an_optimizer_is_neither_copied_nor_given_other_parameters(table: shardloss.Table) -> None:
    """Copying, pickling and add_param_group raise NotSupported instead of having no effect."""
    optimizer = table.softmax().optimizer(0.1)
    for misuse in (copy.deepcopy, pickle.dumps):
        with pytest.raises(NotSupported):
            misuse(optimizer)
    with pytest.raises(NotSupported):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("field", ["hidden", "labels", "label_weights", "scale"])
def test_what_is_no_tensor_is_refused_by_name(table: shardloss.Table, batch: Batch, field: str) -> None:
    """A head names the argument that is a NumPy array or a number; `Table.compute_loss` is the API for NumPy."""
    given: dict[str, object] = dict(zip(("hidden", "labels"), batch, strict=True))
    given[field] = 2.0 if field == "scale" else np.ones((BATCH, DIM))
    with pytest.raises(InvalidArgument) as caught:
        table.softmax()(**given)
    assert caught.value.field == field
    if field != "label_weights":
        with pytest.raises(InvalidArgument, match="tensor"):
            table.sampled_softmax(4)(**given)


@pytest.mark.parametrize(
    "field, given",
    [
        ("sampled_values", {"sampled_values": (torch.arange(2), torch.ones(BATCH))}),
        ("sampled_values.sampled", {"sampled_values": (np.arange(2), torch.ones(BATCH), torch.ones(2))}),
        ("hit_ids.labels", {"hit_ids": (np.zeros(BATCH, np.int64), torch.zeros(2).long())}),
        ("hit_ids.labels", {"hit_ids": (torch.zeros(BATCH - 1).long(), torch.zeros(2).long())}),
        ("hit_ids.sampled", {"hit_ids": (torch.zeros(BATCH).long(), np.zeros(2, np.int64))}),
    ],
    ids=["two", "array", "hit array", "hit shape", "hit sampled"],
)
def test_draws_that_are_none_are_refused_by_name(
    table: shardloss.Table, batch: Batch, field: str, given: dict[str, object]
) -> None:
    """A draw must be three tensors, and hit ids must be tensors of the labels' shape."""
    draw = (torch.arange(2), torch.ones(BATCH), torch.ones(2))
    with pytest.raises(InvalidArgument) as caught:
        table.sampled_softmax()(*batch, **{"sampled_values": draw, **given})
    assert caught.value.field == field


def test_values_of_another_type_are_refused_by_compute_loss(table: shardloss.Table) -> None:
    """A string or a class as the loss, a number as its transform, or no learning rate raises InvalidArgument."""
    hidden, labels = np.zeros((BATCH, DIM)), np.zeros(BATCH, np.int64)
    for loss in ("softmax", shardloss.FullSoftmax, None):
        with pytest.raises(InvalidArgument) as caught:
            table.compute_loss(hidden, labels, loss)  # type: ignore[arg-type]
        assert caught.value.field == "loss"
    with pytest.raises(InvalidArgument):
        table.compute_loss(hidden, labels, shardloss.FullSoftmax(logits=2.0))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        table.session().train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=None)  # type: ignore[arg-type]


def test_names_that_are_none_are_refused_when_the_head_is_made(
    client: shardloss.LossClient, table: shardloss.Table, fresh_name: Callable[[], str]
) -> None:
    """An unknown sampler, removal, reduction, optimizer or initializer is refused, as is a number out of range."""
    for make in (
        lambda: table.sampled_softmax(4, sampler="zipf"),
        lambda: table.sampled_softmax(4, hit_removal="first"),
        lambda: table.sampled_softmax(4, seed=-1),
        lambda: table.softmax(reduction="median"),
        lambda: client.create_table(fresh_name(), num_classes=4, dim=2, optimizer=torch.optim.SGD),  # type: ignore[arg-type]
        lambda: client.create_table(fresh_name(), num_classes=4, dim=2, initializer="zeros"),  # type: ignore[arg-type]
        lambda: client.create_table(fresh_name(), num_classes=2**70, dim=2),
    ):
        with pytest.raises(InvalidArgument):
            make()


def test_a_table_tells_its_optimizer_and_its_first_values(
    client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """The table's spec has its optimizer and initializer, with defaults filled in."""
    for optimizer in (
        shardloss.Sgd(momentum=0.5, nesterov=True),
        shardloss.Adagrad(eps=1e-6),
        shardloss.RowAdagrad(initial_accumulator_value=0.5),
        shardloss.Adam(),
        shardloss.AdamW(weight_decay=0.5),
        shardloss.SparseAdam(beta1=0.5),
    ):
        for first in (shardloss.Normal(0.5, seed=3), shardloss.Uniform(0.25), shardloss.Zeros(seed=7)):
            made = client.create_table(fresh_name(), num_classes=4, dim=2, optimizer=optimizer, initializer=first)
            assert (made.spec.optimizer, made.spec.initializer) == (optimizer, first)
    plain = client.create_table(fresh_name(), num_classes=4, dim=4).spec
    assert (plain.optimizer, plain.initializer) == (shardloss.Sgd(), shardloss.Uniform(0.5))


def test_a_client_closed_by_another_thread_says_so(local_server: Server) -> None:
    """Calls in progress and later ones raise ClientClosed, never a gRPC error."""
    client = shardloss.connect(local_server.address)
    errors: list[Exception] = []

    def call() -> None:
        try:
            while True:
                client.list_tables()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    client.close()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in errors] == [ClientClosed] * 4


def test_another_default_device_does_not_matter(table: shardloss.Table, batch: Batch) -> None:
    """The head's own tensors are on the CPU, whatever torch's default device."""
    hidden, labels = batch
    with torch.device("meta"):
        head = table.sampled_softmax(4)
        optimizer = head.optimizer(0.1)
        head(hidden, labels).backward()
        optimizer.step()
    assert table.info().num_commits == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_bytes_may_cross_the_wire(table: shardloss.Table, batch: Batch, dtype: torch.dtype) -> None:
    """With a 16-bit wire_dtype, hidden and its gradient are rounded once each and sent as two bytes per element."""
    hidden, labels = batch
    head, plain = table.softmax(reduction="sum"), table.softmax(reduction="sum")
    head.wire_dtype = dtype
    carried: list[object] = []
    send, client = table.client.send_loss, table.client
    client.send_loss = lambda request, **options: carried.append(reply := send(request, **options)) or reply  # type: ignore[method-assign,func-returns-value]
    loss = head(hidden, labels)
    client.send_loss = send  # type: ignore[method-assign]
    loss.backward()
    assert hidden.grad is not None
    rounded = hidden.detach().to(dtype).double().requires_grad_()
    expected = plain(rounded, labels)
    expected.backward()
    assert rounded.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, rounded.grad.to(dtype).double(), rtol=0, atol=0)
    (reply,) = carried
    assert len(reply.message.hidden_grad.inline) == 2 * hidden.numel()  # type: ignore[attr-defined]


def test_a_gradient_too_large_for_the_wire_is_refused_by_name(table: shardloss.Table, batch: Batch) -> None:
    """A gradient that overflows the wire dtype raises InvalidArgument instead of becoming inf."""
    table.write_rows(np.arange(2), np.array([[1e6] * DIM, [-1e6] * DIM]), np.zeros(2))
    head = table.softmax()
    head.wire_dtype = torch.float16
    hidden = torch.full((1, DIM), 0.001, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InvalidArgument, match="grad_dtype = float16") as refused:
        head(hidden, torch.tensor([1]))
    assert refused.value.field == "hidden_grad"
    for wrong in (torch.int64, "float16"):
        head.wire_dtype = wrong  # type: ignore[assignment]
        with pytest.raises(InvalidArgument, match="wire_dtype is"):
            head(hidden, torch.tensor([1]))
    head.wire_dtype = torch.float16
    with pytest.raises(InvalidArgument, match="hidden is"):
        head(hidden.long(), torch.tensor([1]))
    with pytest.raises(InvalidArgument, match="grad_dtype"):
        table.compute_loss(np.ones((1, DIM)), np.array([1]), shardloss.FullSoftmax(), grad_dtype="int32")
