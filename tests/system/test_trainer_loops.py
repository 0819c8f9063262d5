"""Mistakes in a trainer's loop are named once or cost nothing; features of torch work or are refused by name."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, table_of
from shardloss import LogitTransform
from shardloss.compat import paddle, tensorflow, tfrs
from shardloss.errors import DoubleBackward, NotSupported
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MANY = 20  # more losses than a warning waits for
Batch = tuple[Tensor, Tensor]


def num_open(table: shardloss.Table) -> int:
    return table.info().num_open_tickets


def warned(run: Callable[[], object], match: str) -> list[warnings.WarningMessage]:
    """Return the warnings of run(); one of them matches."""
    with pytest.warns(UserWarning, match=match) as caught:
        run()
    return list(caught)


# Losses that nothing can commit


@pytest.mark.parametrize("kind", ["head", "compat"])
def test_a_head_without_an_optimizer_keeps_nothing_on_the_server(
    table: shardloss.Table, batch: Batch, kind: str
) -> None:
    """After a few losses one warning says what to do, all tickets are closed and later losses open none."""
    hidden, labels = batch
    head = table.softmax()

    def loss() -> Tensor:
        return head(hidden, labels) if kind == "head" else tensorflow.full_softmax_loss(table, table, labels, hidden)

    def train() -> None:
        for _ in range(MANY):
            loss().sum().backward()

    (warning,) = warned(train, r"optimizer\(.*lr\) first")
    assert warning.filename == __file__
    assert (num_open(table), table.info().num_commits) == (0, 0)
    optimizer = head.optimizer(0.1) if kind == "head" else tensorflow.optimizer(table, 0.1)
    loss().sum().backward()
    optimizer.step()
    assert table.info().num_commits == 1


def test_an_optimizer_may_be_created_after_the_first_loss(table: shardloss.Table, batch: Batch) -> None:
    """Its step() commits the loss, as an optimizer of a local table would apply its gradient."""
    head = table.softmax()
    head(*batch).backward()
    head.optimizer(0.1).step()
    assert table.info().num_commits == 1


@pytest.mark.parametrize("learning_rate", [None, 0.1])
def test_a_frozen_head_costs_nothing(table: shardloss.Table, batch: Batch, learning_rate: float | None) -> None:
    """After requires_grad_(False) hidden gets its gradient, no ticket is open and no step is taken, without a warning;
    requires_grad_() trains again, and a copy of the head is frozen as well."""
    head = table.softmax(learning_rate=learning_rate).requires_grad_(False)
    optimizer = head.optimizer(0.1)
    for frozen in (head, copy.deepcopy(head)):
        for _ in range(MANY):
            frozen(*batch).backward()
            optimizer.step()
            assert num_open(table) == 0
    assert batch[0].grad is not None
    assert table.info().num_commits == 0
    head.requires_grad_()(*batch).backward()
    optimizer.step()
    assert table.info().num_commits == 1


def test_a_frozen_head_of_hidden_without_a_gradient_is_a_constant(table: shardloss.Table, batch: Batch) -> None:
    """Its loss requires no gradient, like that of frozen layers of torch."""
    head = table.softmax()
    assert head(batch[0].detach(), batch[1]).requires_grad
    assert not head.requires_grad_(False)(batch[0].detach(), batch[1]).requires_grad


def test_a_step_after_losses_in_eval_mode_says_so_once(table: shardloss.Table, batch: Batch) -> None:
    """The table is not trained, and step() warns once that names train() and requires_grad_(False)."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    head.eval()

    def train() -> None:
        for _ in range(3):
            head(*batch).backward()
            optimizer.step()

    assert len(warned(train, r"head\.train\(\).*requires_grad_\(False\)")) == 1
    assert table.info().num_commits == 0


def test_a_validation_between_steps_is_no_mistake(table: shardloss.Table, batch: Batch) -> None:
    """Losses in eval mode, with or without gradients, raise no warning if the next step has gradients."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    for _ in range(3):
        head.train()(*batch).backward()
        optimizer.step()
        head.eval()(*batch)
        with torch.no_grad():
            head(*batch)
    assert table.info().num_commits == 3


@pytest.mark.parametrize("has_backward", [True, False])
def test_a_forgotten_step_is_named_once(table: shardloss.Table, batch: Batch, has_backward: bool) -> None:
    """A warning names step() if many losses wait for their commit, whether or not their backward has run."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    losses = []

    def train() -> None:
        for _ in range(50):
            losses.append(head(*batch))
            if has_backward:
                losses[-1].backward()

    assert len(warned(train, r"step\(\)")) == 1
    losses.clear()
    optimizer.zero_grad()
    assert num_open(table) == 0


def test_gradients_that_zero_grad_drops_again_and_again_are_named_once(table: shardloss.Table, batch: Batch) -> None:
    """A loop with zero_grad() and without step() gets a warning; steps that are skipped now and then do not."""
    head = table.softmax()
    optimizer = head.optimizer(0.1)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            head(*batch).backward()

    for _ in range(3):
        train(MANY // 2)
        optimizer.step()
    (warning,) = warned(lambda: train(2 * MANY), r"zero_grad\(\).*step\(\)")
    assert warning.filename == __file__
    assert table.info().num_commits == 3


# What a loss keeps


def saved_by(loss: Tensor) -> list[weakref.ref[Tensor]]:
    """Return weak references to the tensors [N, ...] that the nodes of a loss save."""
    found, todo, seen = [], [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = getattr(node, "saved_tensors", ()) if "Backward" in type(node).__name__ else ()
        found += [weakref.ref(tensor) for tensor in saved if tensor is not None and tensor.numel() > 1]
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", ["labels", "distribution"])
def test_backward_frees_what_the_loss_keeps(table: shardloss.Table, batch: Batch, kind: str) -> None:
    """A loss that is still referenced keeps neither the gradient of hidden nor a label distribution after its step, and
    a second backward raises torch's own error; with retain_graph=True it is allowed."""
    hidden, labels = batch
    head = table.softmax()
    optimizer = head.optimizer(0.1)
    given = labels if kind == "labels" else torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    loss = head(hidden, given)
    kept = saved_by(loss)
    assert kept
    loss.backward(retain_graph=True)
    first, hidden.grad = hidden.grad, None
    loss.backward()
    assert hidden.grad is not None
    assert first is not None
    torch.testing.assert_close(hidden.grad, first, rtol=0, atol=0)
    optimizer.step()
    gc.collect()
    assert [tensor() for tensor in kept] == [None] * len(kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert table.info().num_commits == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_commit_may_take_the_time_of_its_losses(
    table: shardloss.Table, batch: Batch, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """A step over 3 losses of 100 s each gets 600 s more than the client's timeout_s, and the next step starts anew."""
    optimizer = (head := table.softmax()).optimizer(0.1, overlap=overlap)
    channel, clock, given = table.client.channel, count(0.0, 100.0), []
    call = channel.unary

    def unary(method: object, request: object, timeout_s: float | None, **options: bool) -> object:
        if method is table.client.losses.Commit:
            given.append(timeout_s)
        return call(method, request, None, **options)

    monkeypatch.setattr(channel, "unary", unary)
    monkeypatch.setattr("shardloss.session.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for num_losses in (3, 1):
        for _ in range(num_losses):
            head(*batch).backward()
        optimizer.step()
    optimizer.synchronize()
    assert given == [channel.timeout_s + 600.0, channel.timeout_s + 200.0]


def test_a_second_backward_of_a_loss_of_fixed_hidden_is_torchs_error(table: shardloss.Table, batch: Batch) -> None:
    """Even if hidden needs no gradient, g is recorded once."""
    head = table.softmax()
    head.optimizer(0.1)
    loss = head(batch[0].detach(), batch[1])
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# Features of torch


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo reads the .grad of non-leaf tensors
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["labels", "sampled", "distribution", "compat", "lazy"])
def test_a_compiled_step_with_its_backward_trains_a_table(
    table: shardloss.Table, batch: Batch, backend: str, kind: str
) -> None:
    """loss, backward and step() inside one compiled function give torch's gradient and one commit for each call."""
    hidden, labels = batch
    head = table.sampled_softmax(6) if kind == "sampled" else table.softmax()
    is_compat = kind in ("compat", "lazy")
    optimizer = tensorflow.optimizer(table, 0.1) if is_compat else head.optimizer(0.1)

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        if kind == "compat":
            return tensorflow.full_softmax_loss(table, table, labels, 2.0 * hidden).mean()
        if kind == "lazy":
            return paddle.cross_entropy(table.logits(2.0 * hidden), labels)
        if kind == "distribution":
            return head(2.0 * hidden, torch.nn.functional.one_hot(labels, NUM_CLASSES).double())
        return head(2.0 * hidden, labels)

    def step(hidden: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(hidden, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    with torch.no_grad():
        expected = loss_of(hidden, labels)
    compiled = torch.compile(step, backend=backend)
    torch.testing.assert_close(compiled(hidden, labels), expected, rtol=0, atol=1e-12)
    compiled(hidden, labels)
    assert hidden.grad is not None
    assert table.info().num_commits == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", ["logits", "margin"])
def test_probabilities_of_lazy_logits_are_the_same_in_a_compiled_function(
    client: shardloss.LossClient, fresh_name: Callable[[], str], batch: Batch, kind: str
) -> None:
    """Questions about the table run between the compiled graphs, as losses do."""
    table = client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, dtype="float64", bias=False)

    def asked(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = table.logits(2.0 * hidden)
        if kind == "logits":
            return 2.0 * logits.probabilities([0, 3])
        _, softmax = paddle.margin_cross_entropy(logits, labels, return_softmax=True)
        return 2.0 * softmax.probabilities([0, 3])

    with torch.no_grad():
        hidden, labels = torch.nn.functional.normalize(batch[0]), batch[1]
        torch.testing.assert_close(torch.compile(asked, backend="eager")(hidden, labels), asked(hidden, labels))


def losses_over(table: shardloss.Table, labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return a function of hidden for every way to a remote loss or to remote values."""
    head, sampled, ids, column = table.softmax(), table.sampled_softmax(4), torch.arange(BATCH), labels[:, None]
    weights = torch.full((BATCH, NUM_CLASSES), 1.0 / NUM_CLASSES, dtype=torch.float64)
    return {
        "softmax": lambda hidden: head(hidden, labels),
        "sampled": lambda hidden: sampled(hidden, labels),
        "distribution": lambda hidden: head(hidden, weights),
        "tensorflow": lambda hidden: tensorflow.full_softmax_loss(table, table, column, hidden).sum(),
        "paddle": lambda hidden: paddle.cross_entropy(table.logits(hidden), labels),
        "tfrs": lambda hidden: tfrs.Retrieval()(hidden, table.embeddings(ids)),
        "probabilities": lambda hidden: table.logits(hidden, LogitTransform()).probabilities([0, 1]).sum(),
    }


def forward_mode(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return loss(torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden)))


def fake(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return loss(mode.from_tensor(hidden))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda loss, hidden: torch.func.vmap(loss)(hidden[None]),
    "grad": lambda loss, hidden: torch.func.grad(loss)(hidden),
    "jvp": lambda loss, hidden: torch.func.jvp(loss, (hidden,), (hidden,)),
    "vjp": torch.func.vjp,
    "jacrev": lambda loss, hidden: torch.func.jacrev(loss)(hidden),
    "hessian": lambda loss, hidden: torch.func.hessian(loss)(hidden),
    "forward mode": forward_mode,
    "meta": lambda loss, hidden: loss(hidden.to("meta")),
    "sparse": lambda loss, hidden: loss(hidden.to_sparse()),
    "jit.trace": lambda loss, hidden: torch.jit.trace(loss, (hidden,)),
    "make_fx": lambda loss, hidden: torch.fx.experimental.proxy_tensor.make_fx(loss)(hidden),
    "fake": fake,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "kind", ["softmax", "sampled", "distribution", "tensorflow", "paddle", "tfrs", "probabilities"]
)
def test_a_transform_of_torch_is_refused_by_name(
    client: shardloss.LossClient, fresh_name: Callable[[], str], batch: Batch, transform: str, kind: str
) -> None:
    """Each transform raises NotSupported and leaves no ticket; the next loss trains as usual."""
    table = client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, dtype="float64", bias=kind != "tfrs")
    hidden, labels = batch[0].detach(), batch[1]
    loss = losses_over(table, labels)[kind]
    with pytest.raises(NotSupported, match="remote loss"):
        TRANSFORMS[transform](loss, hidden)
    assert num_open(table) == 0
    assert loss(hidden).isfinite()


def test_an_export_is_refused_by_name(table: shardloss.Table, batch: Batch) -> None:
    """torch.export reports that the head's part of the model cannot be traced."""
    head = table.softmax()
    with pytest.raises(NotSupported, match="traced or exported"):
        torch.export.export(head, (batch[0].detach(), batch[1]), strict=False)


AUTOGRAD: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "hessian": torch.autograd.functional.hessian,
    "hvp": lambda loss, hidden: torch.autograd.functional.hvp(loss, hidden, hidden),
    "vhp": lambda loss, hidden: torch.autograd.functional.vhp(loss, hidden, hidden),
    "jvp": lambda loss, hidden: torch.autograd.functional.jvp(loss, hidden, hidden),
    "create_graph": lambda loss, hidden: torch.autograd.functional.jacobian(loss, hidden, create_graph=True),
    "vectorize": lambda loss, hidden: torch.autograd.functional.jacobian(loss, hidden, vectorize=True),
    "forward mode": lambda loss, hidden: torch.autograd.functional.jacobian(
        loss, hidden, vectorize=True, strategy="forward-mode"
    ),
    "batched": lambda loss, hidden: torch.autograd.grad(
        loss(hidden), hidden, torch.ones(3, dtype=torch.float64), is_grads_batched=True
    ),
}


@pytest.mark.parametrize("function", AUTOGRAD)
def test_second_and_batched_derivatives_are_refused_by_name(
    table: shardloss.Table, batch: Batch, function: str
) -> None:
    """What torch.autograd.functional computes by a second or a batched backward raises an error of shardloss."""
    head = table.softmax(reduction="sum")
    with pytest.raises((DoubleBackward, NotSupported)):
        AUTOGRAD[function](lambda hidden: head(hidden, batch[1]), batch[0])


def test_first_derivatives_of_torch_autograd_functional_work(table: shardloss.Table, batch: Batch) -> None:
    """jacobian and vjp of unreduced losses are the gradients of hidden."""
    head = table.softmax(reduction="none")
    hidden, labels = batch
    weights, biases = table_of(table)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weights.T + biases, labels, reduction="sum"), hidden
    )
    jacobian = torch.autograd.functional.jacobian(lambda given: head(given, labels), hidden)
    torch.testing.assert_close(jacobian.sum(0), expected, rtol=0, atol=1e-12)
    _, product = torch.autograd.functional.vjp(
        lambda given: head(given, labels), hidden, torch.ones(BATCH, dtype=torch.float64)
    )
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("learning_rate", [None, 0.5])
def test_a_checkpointed_loss_is_one_commit(
    table: shardloss.Table, batch: Batch, use_reentrant: bool, learning_rate: float | None
) -> None:
    """Computing the activations and the loss again in backward trains the table once, with torch's gradient."""
    hidden, labels = batch
    weights, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax(learning_rate=learning_rate)
    optimizer = None if learning_rate else head.optimizer(0.5)
    loss = checkpoint(lambda given: head(2.0 * given, labels), hidden, use_reentrant=use_reentrant)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    torch.nn.functional.cross_entropy(2.0 * hidden.detach() @ weights.T + biases, labels).backward()
    assert weights.grad is not None
    torch.testing.assert_close(table_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=0, atol=1e-12)
    assert (table.info().num_commits, num_open(table)) == (1, 0)


def test_saved_tensor_hooks_see_the_gradient_of_hidden(table: shardloss.Table, batch: Batch) -> None:
    """torch.autograd.graph.save_on_cpu and hooks like it work as for a local loss."""
    head = table.softmax()
    hidden, labels = batch
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = head(hidden, labels)
    assert any(tensor.shape == hidden.shape for tensor in packed)
    (expected,) = torch.autograd.grad(head(hidden, labels), hidden)
    loss.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=0)


def test_hooks_of_modules_and_tensors_run(table: shardloss.Table, batch: Batch) -> None:
    """Forward, backward and tensor hooks see a head as any other module."""
    head = table.softmax()
    hidden, labels = batch
    seen: list[str] = []
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    head.register_full_backward_hook(lambda *_: seen.append("backward"))
    hidden.register_hook(lambda _: seen.append("hidden"))
    head(hidden, labels).backward()
    assert sorted(seen) == ["after", "backward", "before", "hidden"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_is_refused_by_name(table: shardloss.Table) -> None:
    """torch.jit.script of a model with a head names the head's limit instead of its first untypable line."""
    with pytest.raises(NotSupported, match=r"torch\.jit\.script"):
        torch.jit.script(torch.nn.Sequential(table.softmax()))


def test_data_parallel_is_refused_by_name(table: shardloss.Table) -> None:
    """Its threads would share one session; the error names DistributedDataParallel."""
    with pytest.raises(NotSupported, match="DistributedDataParallel"):
        table.softmax()._replicate_for_data_parallel()  # as torch.nn.parallel.replicate does, which needs two GPUs


def test_warnings_may_be_errors(table: shardloss.Table, batch: Batch) -> None:
    """A warning that is raised as an error leaves the head usable and is not raised again."""
    head = table.softmax()

    def train() -> None:
        for _ in range(MANY):
            head(*batch).backward()

    with pytest.raises(UserWarning, match="optimizer"):
        train()
    train()
    assert num_open(table) == 0
