"""Every malformed request gets a specific error and leaves the table, its tickets and the server unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import shardloss
from google.protobuf.message import Message
from shardloss import wire
from shardloss.errors import (
    InvalidArgument,
    LimitExceeded,
    NotSupported,
    SessionExpired,
    ShardlossError,
    StepReused,
    StepTooOld,
    TableExists,
    TableNotFound,
    TicketUnknown,
)
from shardloss.v1 import table_pb2, tensor_pb2
from shardloss_server.rpc.serve import Server

from .world import (
    LIMITS,
    MAX_BATCH,
    MAX_PARTS,
    MAX_SAMPLED,
    MAX_TOP_K,
    MAX_TRUE,
    D,
    N,
    S,
    T,
    V,
    World,
    numbers,
    once,
    serving,
)

NAN, INF = float("nan"), float("inf")
BEYOND = 1e300  # finite in float64, infinite in the float32 that this table computes in

Edit = Callable[[Any], None]


@dataclass(frozen=True)
class Bad:
    """A valid request, the edit that makes it invalid, and the expected error: class, field, first offending index."""

    what: str
    request: Callable[[World], Message]
    spoil: Edit
    error: type[ShardlossError]
    field: str
    index: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.request.__name__}: {self.what}".replace(" ", "-")


def at(message: Any, path: str) -> Any:
    """Return the message or value at a dotted path; "parts.0" is the first element of the list `parts`."""
    for name in path.split("."):
        message = message[int(name)] if name.isdigit() else getattr(message, name)
    return message


def put(path: str, array: np.ndarray | list[Any]) -> Edit:
    """Return an edit that replaces a tensor."""
    return lambda message: at(message, path).CopyFrom(wire.encode(np.asarray(array)))


def cell(path: str, index: tuple[int, ...], value: float) -> Edit:
    """Return an edit that overwrites one element of a tensor; a floating-point tensor becomes float64."""

    def edit(message: Any) -> None:
        array = wire.decode(at(message, path), path).copy()
        array = array.astype(np.float64) if array.dtype.kind == "f" else array
        array[index] = value
        at(message, path).CopyFrom(wire.encode(array))

    return edit


def let(path: str, value: object) -> Edit:
    """Return an edit that sets a number, a string or an enum."""

    def edit(message: Any) -> None:
        *owner, name = path.split(".")
        setattr(at(message, ".".join(owner)) if owner else message, name, value)

    return edit


def both(*edits: Edit) -> Edit:
    """Return an edit that applies several edits in order."""

    def edit(message: Any) -> None:
        for one in edits:
            one(message)

    return edit


def drop(field: str) -> Edit:
    """Return an edit that clears a field."""
    return lambda message: message.ClearField(field)


def shape(path: str, *sizes: int) -> Edit:
    """Return an edit that claims another shape for the same bytes."""

    def edit(message: Any) -> None:
        del at(message, path).shape[:]
        at(message, path).shape.extend(sizes)

    return edit


def inline(path: str, change: Callable[[bytes], bytes]) -> Edit:
    """Return an edit that changes a tensor's inline bytes."""

    def edit(message: Any) -> None:
        at(message, path).inline = change(at(message, path).inline)

    return edit


def touch(path: str) -> Edit:
    """Return an edit that makes a submessage present but leaves it empty."""
    return lambda message: at(message, path).SetInParent()


def name_it(name: str) -> Edit:
    return let("spec.name", name)


def tensors(
    request: Callable[[World], Message], path: str, field: str, sizes: tuple[int, ...], wrong: str
) -> list[Bad]:
    """Return the cases common to all tensors: dtype, shape, bytes, storage; the field does not accept dtype `wrong`."""
    count = int(np.prod(sizes))

    def bad(what: str, spoil: Edit, error: type[ShardlossError] = InvalidArgument) -> Bad:
        return Bad(f"{path} {what}", request, spoil, error, field)

    return [
        bad("of another kind", put(path, np.zeros(sizes, dtype=wrong))),
        bad("without a dtype", let(f"{path}.dtype", 0)),
        bad("of an unknown dtype", let(f"{path}.dtype", 99)),
        bad("one byte short", inline(path, lambda content: content[:-1])),
        bad("one byte long", inline(path, lambda content: content + b"\0")),
        bad("without content", inline(path, lambda content: b"")),
        bad("with a negative size", shape(path, -1, count)),
        bad("with two negative sizes", shape(path, -count, -1)),
        bad("of a product beyond 64 bits", shape(path, 2**62, 2**62)),
        bad("of a product that is 0 modulo 2^64", both(shape(path, 2**32, 2**32), inline(path, lambda content: b""))),
        bad("of a size beyond memory", shape(path, 2**62)),
        bad("of rank 9", shape(path, *sizes, *[1] * (9 - len(sizes)))),
        bad("of rank 3", shape(path, *sizes, *[1] * (3 - len(sizes)))),
        bad("as a scalar", put(path, np.zeros((), dtype="int64" if wrong.startswith("float") else "float32"))),
        bad("with no rows and a size beyond memory", both(shape(path, 2**62, 0), inline(path, lambda content: b""))),
        bad("in shared memory", let(f"{path}.shared_memory.name", "block"), NotSupported),
        bad("as a chunk outside a stream", let(f"{path}.chunk.num_bytes", 8 * count)),
    ]


def not_finite(request: Callable[[World], Message], path: str, field: str, index: tuple[int, ...]) -> list[Bad]:
    """Return cases of floats that are not finite, or not finite once converted to the table's float32."""
    values = {"nan": NAN, "inf": INF, "minus inf": -INF, "beyond float32": BEYOND, "below minus float32": -BEYOND}
    return [
        Bad(f"{path} {what}", request, cell(path, index, value), InvalidArgument, field, index)
        for what, value in values.items()
    ]


def not_a_class(
    request: Callable[[World], Message], path: str, field: str, index: tuple[int, ...], error: Any = InvalidArgument
) -> list[Bad]:
    """Return cases of class ids outside [0, V)."""
    values = {"minus one": -1, "num_classes": V, "beyond int32": 2**40, "least int64": -(2**63), "most": 2**63 - 1}
    return [
        Bad(f"{path} {what}", request, cell(path, index, value), error, field, index) for what, value in values.items()
    ]


def not_a_count(path: str, field: str, index: tuple[int, ...]) -> list[Bad]:
    """Return cases of expected counts Q that are not positive and finite."""
    values = {"zero": 0.0, "negative": -0.5, "nan": NAN, "inf": INF}
    return [
        Bad(f"{path} {what}", World.values, cell(path, index, value), InvalidArgument, field, index)
        for what, value in values.items()
    ]


def not_a_rate(request: Callable[[World], Message], path: str) -> list[Bad]:
    """Return cases of learning rates that are negative, or not finite in float32."""
    values = {"negative": -0.1, "nan": NAN, "inf": INF, "beyond float32": BEYOND}
    return [Bad(f"{path} {what}", request, let(path, value), InvalidArgument, path) for what, value in values.items()]


def not_a_factor(request: Callable[[World], Message], path: str) -> list[Bad]:
    """Return cases of a scale or soft cap of the logits that is not positive and finite."""
    values = {"zero": 0.0, "negative": -1.0, "nan": NAN, "inf": INF, "minus inf": -INF}
    return [Bad(f"{path} {what}", request, let(path, value), InvalidArgument, path) for what, value in values.items()]


def bad(request: Callable[[World], Message], error: type[ShardlossError], *rows: tuple[Any, ...]) -> list[Bad]:
    """Return a case per (what, spoil, field[, index]), all with the same request and error class."""
    return [Bad(what, request, spoil, error, field, *index) for what, spoil, field, *index in rows]


VALUES, PREFIX = "sampled_softmax.sampled_values.", "sampled_values."
SAMPLER = "sampled_softmax.sampler."

LOSSES = [
    *tensors(World.full, "hidden", "hidden", (N, D), "int64"),
    *tensors(World.full, "labels", "labels", (N, T), "float64"),
    *not_finite(World.full, "hidden", "hidden", (3, 2)),
    *not_a_class(World.full, "labels", "labels", (3, 1)),
    *bad(
        World.full,
        InvalidArgument,
        ("no hidden", drop("hidden"), "hidden"),
        ("no labels", drop("labels"), "labels"),
        ("hidden of rank 1", put("hidden", numbers(D)), "hidden"),
        ("hidden of another dim", put("hidden", numbers(N, D - 1)), "hidden"),
        ("hidden of dim 0", put("hidden", np.zeros((N, 0))), "hidden"),
        ("hidden of a wide dim and no rows", put("hidden", np.zeros((0, D + 1))), "hidden"),
        ("hidden with two nans", both(cell("hidden", (5, 0), NAN), cell("hidden", (2, 4), NAN)), "hidden", (2, 4)),
        ("half hidden inf", put("hidden", np.full((N, D), INF, np.float16)), "hidden", (0, 0)),
        ("labels of another length", put("labels", np.zeros((N - 1, T), int)), "labels"),
        ("labels without a column", put("labels", np.zeros((N, 0), int)), "labels"),
        ("labels wrong twice", both(cell("labels", (6, 0), -1), cell("labels", (1, 1), V)), "labels", (1, 1)),
        ("int32 label", put("labels", np.full((N, T), -7, np.int32)), "labels", (0, 0)),
        (
            "a label that is not the ignored one",
            both(let("ignore_index", -1), cell("labels", (0, 0), -1), cell("labels", (2, 0), -2)),
            "labels",
            (2, 0),
        ),
        ("no loss", drop("full_softmax"), "loss"),
        ("weights of another shape", put("label_weights", numbers(N, T + 1)), "label_weights"),
        ("weights of a vector", put("label_weights", numbers(N)), "label_weights"),
        ("integer weights", put("label_weights", np.ones((N, T), int)), "label_weights"),
        (
            "negative weight",
            both(put("label_weights", np.ones((N, T))), cell("label_weights", (4, 1), -0.1)),
            "label_weights",
            (4, 1),
        ),
        ("upstream of another length", put("upstream", numbers(N + 1)), "upstream"),
        ("upstream of rank 2", put("upstream", numbers(N, 1)), "upstream"),
        ("integer upstream", put("upstream", np.ones(N, int)), "upstream"),
        ("integer grad_dtype", let("grad_dtype", tensor_pb2.DTYPE_INT64), "grad_dtype"),
        ("unknown grad_dtype", let("grad_dtype", 99), "grad_dtype"),
        ("logits beyond float32", cell("hidden", (4,), 3e38), "hidden", (4,)),
        ("step below 0", let("step", -1), "step"),
        ("after_step without a session", let("after_step", 1), "session"),
        ("commit_now without a session", let("commit_now.learning_rate", 0.1), "session"),
        ("sampled without candidates", touch("sampled_softmax"), "sampled_softmax.candidates"),
    ),
    *[
        Bad(f"label weight {what}", World.full, both(put("label_weights", np.ones((N, T))), row.spoil), *rest)
        for row in not_finite(World.full, "label_weights", "label_weights", (5, 1))
        for what, rest in [(row.what, (row.error, row.field, row.index))]
    ],
    *bad(
        World.full,
        LimitExceeded,
        (
            "too many rows",
            both(put("hidden", numbers(MAX_BATCH + 1, D)), put("labels", [0] * (MAX_BATCH + 1))),
            "hidden",
        ),
        ("too many labels", put("labels", np.zeros((N, MAX_TRUE + 1), int)), "labels"),
        (
            "a reply of too many rows",
            both(put("hidden", numbers(60, D)), put("labels", [0] * 60), let("want_hidden_grad", True)),
            "want_hidden_grad",
        ),
    ),
    *bad(
        World.full,
        NotSupported,
        ("max_staleness", let("max_staleness", 1), "max_staleness"),
        ("group", let("group.size", 2), "group"),
        ("empty group", touch("group"), "group"),
    ),
    *bad(
        World.full,
        TableNotFound,
        ("an unknown table", let("table", "nowhere"), "table"),
        ("no table", let("table", ""), "table"),
        ("a table of another case", lambda message: let("table", message.table.upper())(message), "table"),
    ),
    *bad(
        World.keyed,
        InvalidArgument,
        ("a long session", let("session", "s" * 65), "session"),
        ("an unprintable session", let("session", "a\nb"), "session"),
        ("step 0", let("step", 0), "step"),
        ("negative step", let("step", -3), "step"),
        ("negative part", let("part", -1), "part"),
        ("after itself", let("after_step", 1), "after_step"),
        ("after a later step", let("after_step", 2), "after_step"),
        ("after a negative step", let("after_step", -1), "after_step"),
    ),
    *bad(World.keyed, LimitExceeded, ("a part number above the limit", let("part", MAX_PARTS), "part")),
    *bad(
        World.keyed,
        StepReused,
        (
            "another batch under an open key",
            both(let("session", "open"), let("step", 3), cell("labels", (0, 0), 9)),
            "step",
        ),
        (
            "another option under an open key",
            both(let("session", "open"), let("step", 3), let("want_lse", False)),
            "step",
        ),
    ),
    *bad(
        World.keyed,
        StepTooOld,
        ("a committed step", both(let("session", "open"), let("step", 2)), "step"),
        ("a step before a committed one", both(let("session", "open"), let("step", 1)), "step"),
        ("a step that was given up", both(let("session", "done"), let("step", 1)), "step"),
    ),
    *not_finite(World.one_call, "upstream", "upstream", (4,)),
    *not_a_rate(World.one_call, "commit_now.learning_rate"),
    *bad(
        World.one_call,
        InvalidArgument,
        ("grad_scale nan", let("commit_now.grad_scale", NAN), "commit_now.grad_scale"),
        ("grad_scale inf", let("commit_now.grad_scale", -INF), "commit_now.grad_scale"),
    ),
    *bad(World.one_call, SessionExpired, ("a step of an unknown session", let("step", 2), "session")),
    *bad(World.one_call, StepTooOld, ("a step that was given up", let("session", "done"), "step")),
    *bad(World.one_call, StepReused, ("a committed step", both(let("session", "open"), let("step", 2)), "step")),
]

SAMPLED = [
    *bad(
        World.drawn,
        InvalidArgument,
        ("no kind", let(SAMPLER + "kind", 0), "sampler.kind"),
        ("an unknown kind", let(SAMPLER + "kind", 42), "sampler.kind"),
        ("no samples", let(SAMPLER + "num_sampled", 0), "sampler.num_sampled"),
        ("negative samples", let(SAMPLER + "num_sampled", -S), "sampler.num_sampled"),
        ("more distinct samples than classes", let(SAMPLER + "num_sampled", V + 1), "sampler.num_sampled"),
        ("an unknown hit_removal", let("sampled_softmax.hit_removal", 7), "sampled_softmax.hit_removal"),
        ("label weights", put("label_weights", np.ones((N, T))), "label_weights"),
    ),
    *bad(
        World.drawn,
        LimitExceeded,
        (
            "too many samples",
            both(let(SAMPLER + "unique", False), let(SAMPLER + "num_sampled", MAX_SAMPLED + 1)),
            "sampler.num_sampled",
        ),
        (
            "2^62 samples",
            both(let(SAMPLER + "unique", False), let(SAMPLER + "num_sampled", 2**62)),
            "sampler.num_sampled",
        ),
    ),
    *tensors(World.values, VALUES + "sampled", PREFIX + "sampled", (S,), "float32"),
    *tensors(World.values, VALUES + "true_expected_count", PREFIX + "true_expected_count", (N, T), "int64"),
    *tensors(World.values, VALUES + "sampled_expected_count", PREFIX + "sampled_expected_count", (S,), "int64"),
    *not_a_class(World.values, VALUES + "sampled", PREFIX + "sampled", (4,)),
    *not_a_count(VALUES + "true_expected_count", PREFIX + "true_expected_count", (2, 1)),
    *not_a_count(VALUES + "sampled_expected_count", PREFIX + "sampled_expected_count", (5,)),
    *bad(
        World.values,
        InvalidArgument,
        (
            "an expected count for each label but one",
            put(VALUES + "true_expected_count", np.ones((N - 1, T))),
            PREFIX + "true_expected_count",
        ),
        (
            "an expected count for each sample but one",
            put(VALUES + "sampled_expected_count", np.ones(S - 1)),
            PREFIX + "sampled_expected_count",
        ),
    ),
    *bad(
        World.values,
        LimitExceeded,
        (
            "too many given samples",
            both(
                put(VALUES + "sampled", np.zeros(MAX_SAMPLED + 1, int)),
                put(VALUES + "sampled_expected_count", np.ones(MAX_SAMPLED + 1)),
            ),
            PREFIX + "sampled",
        ),
    ),
    *bad(
        World.sample,
        InvalidArgument,
        ("no kind", let("sampler.kind", 0), "sampler.kind"),
        ("no sampler", drop("sampler"), "sampler.kind"),
        ("no samples", let("sampler.num_sampled", 0), "sampler.num_sampled"),
        ("more distinct samples than classes", let("sampler.num_sampled", V + 1), "sampler.num_sampled"),
        ("negative step", let("step", -1), "step"),
    ),
    *bad(
        World.sample,
        LimitExceeded,
        ("too many samples", both(let("sampler.unique", False), let("sampler.num_sampled", 51)), "sampler.num_sampled"),
        ("too many labels", put("labels", np.zeros((N, MAX_TRUE + 1), int)), "labels"),
    ),
    *bad(World.sample, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
    *tensors(World.sample, "labels", "labels", (N, T), "float64"),
    *not_a_class(World.sample, "labels", "labels", (6, 0)),
]

COMMITS = [
    *tensors(World.commit, "parts.0.g", "parts[0].g", (N,), "int64"),
    *not_finite(World.commit, "parts.0.g", "parts[0].g", (2,)),
    *not_a_rate(World.commit, "learning_rate"),
    *bad(
        World.commit,
        InvalidArgument,
        ("no parts", drop("parts"), "parts"),
        ("a ticket twice", lambda message: message.parts.add(ticket=message.parts[0].ticket), "parts", (1,)),
        ("g of another length", put("parts.0.g", numbers(N + 1)), "parts[0].g"),
        ("g of rank 2", put("parts.0.g", numbers(N, 1)), "parts[0].g"),
        ("grad_scale nan", let("grad_scale", NAN), "grad_scale"),
        ("grad_scale inf", let("grad_scale", INF), "grad_scale"),
        ("a scaled g beyond float32", both(cell("parts.0.g", (2,), 1e30), let("grad_scale", 1e30)), "parts[0].g", (2,)),
        ("negative max_staleness", let("max_staleness", -1), "max_staleness"),
        ("step 0", let("step", 0), "step"),
        ("negative step", let("step", -1), "step"),
        ("no session", let("session", ""), "session"),
        ("a long session", let("session", "s" * 65), "session"),
        ("a ticket of another step", let("step", 4), "parts", (0,)),
    ),
    *bad(
        World.commit,
        LimitExceeded,
        ("too many parts", lambda message: [message.parts.add(ticket=str(i)) for i in range(MAX_PARTS)], "parts"),
    ),
    *bad(
        World.commit,
        TicketUnknown,
        ("an unknown ticket", let("parts.0.ticket", "nothing"), "parts", (0,)),
        ("an empty ticket", let("parts.0.ticket", ""), "parts", (0,)),
        ("an unknown second ticket", lambda message: message.parts.add(ticket="nothing"), "parts", (1,)),
        ("another session's ticket", both(let("session", "done"), let("step", 3)), "parts", (0,)),
    ),
    *bad(World.commit, SessionExpired, ("an unknown session", let("session", "nobody"), "session")),
    *bad(World.commit, StepReused, ("a committed step", let("step", 2), "step")),
    *bad(World.commit, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
    *bad(
        World.commit,
        NotSupported,
        ("external gradients", lambda message: message.external_gradients.add(), "external_gradients"),
    ),
    *bad(World.abort, SessionExpired, ("an unknown session", let("session", "nobody"), "session")),
    *bad(World.abort, InvalidArgument, ("no session", let("session", ""), "session")),
    *bad(World.abort, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
]

OPTIMIZER = "spec.optimizer."
NAMES = ["", "-a", ".a", "_a", "A", "aB", "a b", "a/b", "a\n", "a\0", "\xe9", "\uff41", "a" * 129, "../a", "table$"]
SPECS = [
    *[Bad(f"the name {name!r:.10}", World.create, name_it(name), InvalidArgument, "spec.name") for name in NAMES],
    *bad(
        World.create,
        InvalidArgument,
        ("no spec", drop("spec"), "spec.name"),
        ("no classes", let("spec.num_classes", 0), "spec.num_classes"),
        ("negative classes", let("spec.num_classes", -V), "spec.num_classes"),
        ("no dim", let("spec.dim", 0), "spec.dim"),
        ("negative dim", let("spec.dim", -D), "spec.dim"),
        ("negative shards", let("spec.num_shards", -1), "spec.num_shards"),
        ("half rows", let("spec.dtype", tensor_pb2.DTYPE_FLOAT16), "spec.dtype"),
        ("integer rows", let("spec.dtype", tensor_pb2.DTYPE_INT64), "spec.dtype"),
        ("an unknown dtype", let("spec.dtype", 99), "spec.dtype"),
        ("an unknown placement", let("spec.placement", 9), "spec.placement"),
        ("a negative placement", let("spec.placement", -1), "spec.placement"),
        ("nesterov without momentum", let(OPTIMIZER + "sgd.nesterov", True), OPTIMIZER + "sgd.nesterov"),
    ),
    *[
        Bad(f"{path} = {value}", World.create, let(f"spec.{path}", value), InvalidArgument, f"spec.{path}")
        for path, values in {
            "initializer.normal.stddev": (0.0, -1.0, NAN, INF, BEYOND),
            "initializer.uniform.limit": (0.0, -1.0, NAN, INF, BEYOND),
            "optimizer.sgd.momentum": (-0.1, 1.0, NAN),
            "optimizer.sgd.weight_decay": (-0.1, NAN, INF),
            "optimizer.adagrad.initial_accumulator_value": (-0.1, NAN),
            "optimizer.adagrad.eps": (0.0, -1e-9, NAN, 1e-40),
            "optimizer.row_adagrad.initial_accumulator_value": (-0.1, INF),
            "optimizer.row_adagrad.eps": (0.0, INF, 1e39),
            "optimizer.adam.beta1": (-0.1, 1.0, NAN),
            "optimizer.adam.beta2": (-0.1, 1.0, INF),
            "optimizer.adam.eps": (0.0, NAN),
            "optimizer.adam.weight_decay": (-0.1, NAN),
            "optimizer.adamw.beta1": (-0.1, 1.0),
            "optimizer.adamw.beta2": (-0.1, 1.0),
            "optimizer.adamw.eps": (0.0, -1.0),
            "optimizer.adamw.weight_decay": (-0.1, INF),
            "optimizer.sparse_adam.beta1": (-0.1, 1.0),
            "optimizer.sparse_adam.beta2": (-0.1, 1.0),
            "optimizer.sparse_adam.eps": (0.0, NAN),
        }.items()
        for value in values
    ],
    *bad(
        World.create,
        LimitExceeded,
        ("too many classes", let("spec.num_classes", 1001), "spec.num_classes"),
        ("2^62 classes", let("spec.num_classes", 2**62), "spec.num_classes"),
        ("too wide rows", let("spec.dim", 17), "spec.dim"),
        ("2^62 columns", let("spec.dim", 2**62), "spec.dim"),
        ("too many shards", let("spec.num_shards", 10), "spec.num_shards"),
        ("2^62 shards", let("spec.num_shards", 2**62), "spec.num_shards"),
        ("too many bytes", both(let("spec.num_classes", 1000), let("spec.dim", 16)), "spec.num_classes"),
        (
            "too many bytes of optimizer state",
            both(let("spec.num_classes", 900), touch(OPTIMIZER + "adam")),
            "spec.num_classes",
        ),
    ),
    *bad(
        World.create,
        NotSupported,
        ("a durable log", let("spec.durability", table_pb2.DURABILITY_LOG), "spec.durability"),
        ("an unknown durability", let("spec.durability", 77), "spec.durability"),
        ("limits of its own", touch("spec.limits"), "spec.limits"),
    ),
    *bad(
        World.again,
        TableExists,
        ("other num_classes", let("spec.num_classes", V + 1), "spec.num_classes"),
        ("other dim", let("spec.dim", D + 1), "spec.dim"),
        ("other dtype", let("spec.dtype", tensor_pb2.DTYPE_FLOAT64), "spec.dtype"),
        ("other bias", let("spec.bias", False), "spec.bias"),
        ("other num_shards", let("spec.num_shards", 2), "spec.num_shards"),
        ("default num_shards", let("spec.num_shards", 0), "spec.num_shards"),
        ("other placement", let("spec.placement", table_pb2.PLACEMENT_DIV), "spec.placement"),
        ("other initializer", touch("spec.initializer.zeros"), "spec.initializer"),
        ("other stddev", let("spec.initializer.normal.stddev", 0.25), "spec.initializer"),
        ("other seed", let("spec.initializer.seed", 5), "spec.initializer"),
        ("other optimizer", touch("spec.optimizer.adam"), "spec.optimizer"),
        ("other momentum", let("spec.optimizer.sgd.momentum", 0.5), "spec.optimizer"),
    ),
    *bad(World.get, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
    *bad(
        World.delete,
        TableNotFound,
        ("an unknown table", let("table", "nowhere"), "table"),
        ("no table", let("table", ""), "table"),
    ),
]

ROWS = [
    *tensors(World.read, "class_ids", "class_ids", (3,), "float64"),
    *not_a_class(World.read, "class_ids", "class_ids", (1,)),
    *bad(World.read, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
    *bad(World.read, InvalidArgument, ("no class_ids", drop("class_ids"), "class_ids")),
    *bad(
        World.read,
        LimitExceeded,
        ("more rows than a message holds", put("class_ids", np.zeros(90_000, int)), "class_ids"),
    ),
    *tensors(World.write, "class_ids", "class_ids", (3,), "float64"),
    *tensors(World.write, "rows", "rows", (3, D), "int64"),
    *tensors(World.write, "biases", "biases", (3,), "int64"),
    *not_a_class(World.write, "class_ids", "class_ids", (2,)),
    *not_finite(World.write, "rows", "rows", (1, 3)),
    *not_finite(World.write, "biases", "biases", (2,)),
    *bad(
        World.write,
        InvalidArgument,
        ("a class twice", put("class_ids", [4, 0, 4]), "class_ids", (2,)),
        ("rows of another dim", put("rows", numbers(3, D + 1)), "rows"),
        ("fewer rows than ids", put("rows", numbers(2, D)), "rows"),
        ("no rows", drop("rows"), "rows"),
        ("fewer biases than ids", put("biases", numbers(2)), "biases"),
        (
            "rows beyond bfloat16",
            both(let("table", "bfloat16"), put("rows", numbers(3, D, dtype="float32")), cell("rows", (1, 3), 3.4e38)),
            "rows",
            (1, 3),
        ),
        ("biases for a table without", let("table", "no-bias"), "biases"),
    ),
    *bad(
        World.write,
        LimitExceeded,
        (
            "too many rows",
            both(
                let("table", "wide"),
                put("class_ids", np.arange(MAX_BATCH + 1)),
                put("rows", numbers(MAX_BATCH + 1, D)),
                drop("biases"),
            ),
            "rows",
        ),
    ),
    *bad(World.write, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
]

QUESTIONS = [
    *[
        row
        for request in (World.evaluate, World.top_k, World.score, World.sample_classes)
        for row in (
            *not_a_factor(request, "logits.scale"),
            *not_a_factor(request, "logits.soft_cap"),
            *tensors(request, "hidden", "hidden", (N, D), "int64"),
            *not_finite(request, "hidden", "hidden", (6, 4)),
            *bad(request, InvalidArgument, ("logits beyond float32", cell("hidden", (4,), 3e38), "hidden", (4,))),
            *bad(request, TableNotFound, ("an unknown table", let("table", "nowhere"), "table")),
        )
    ],
    *tensors(World.evaluate, "labels", "labels", (N,), "float64"),
    *not_a_class(World.evaluate, "labels", "labels", (3,)),
    *bad(
        World.evaluate,
        InvalidArgument,
        ("labels of rank 2", put("labels", np.zeros((N, 1), int)), "labels"),
        ("labels of another length", put("labels", np.zeros(N + 1, int)), "labels"),
    ),
    *bad(
        World.top_k,
        InvalidArgument,
        ("k = 0", let("k", 0), "k"),
        ("negative k", let("k", -1), "k"),
        ("more than all classes", let("k", V + 1), "k"),
        ("k = 2^62", let("k", 2**62), "k"),
    ),
    *bad(
        World.top_k,
        LimitExceeded,
        ("k above the limit", let("k", MAX_TOP_K + 1), "k"),
        ("a reply above the limit", both(put("hidden", numbers(60, D)), let("k", MAX_TOP_K)), "k"),
        ("too many rows", put("hidden", numbers(MAX_BATCH + 1, D)), "hidden"),
    ),
    *tensors(World.score, "class_ids", "class_ids", (3,), "float64"),
    *not_a_class(World.score, "class_ids", "class_ids", (2,)),
    *bad(
        World.score,
        InvalidArgument,
        ("class_ids of another length", put("class_ids", np.zeros((N + 1, 2), int)), "class_ids"),
        (
            "a class that is none",
            both(put("class_ids", np.zeros((N, 2), int)), cell("class_ids", (4, 1), V)),
            "class_ids",
            (4, 1),
        ),
    ),
    *bad(
        World.sample_classes,
        InvalidArgument,
        ("no samples", let("num_samples", 0), "num_samples"),
        ("negative samples", let("num_samples", -S), "num_samples"),
        ("a negative row", let("first_row", -1), "first_row"),
        ("a row beyond 2^62", let("first_row", 2**62), "first_row"),
        ("the best 0", let("top_k", 0), "top_k"),
        ("the best of a negative number", let("top_k", -1), "top_k"),
        ("more than all classes", let("top_k", V + 1), "top_k"),
    ),
    *bad(
        World.sample_classes,
        LimitExceeded,
        ("2^62 samples", let("num_samples", 2**62), "num_samples"),
        ("a reply above the limit", let("num_samples", 40), "num_samples"),
        ("2^62 samples of no row", both(put("hidden", np.zeros((0, D))), let("num_samples", 2**62)), "num_samples"),
        ("more of the best than the limit", let("top_k", MAX_TOP_K + 1), "top_k"),
        ("too many rows", put("hidden", numbers(MAX_BATCH + 1, D)), "hidden"),
    ),
    *bad(World.score, LimitExceeded, ("a reply above the limit", put("class_ids", np.zeros(40, int)), "class_ids")),
]

TABLE = [*LOSSES, *SAMPLED, *COMMITS, *SPECS, *ROWS, *QUESTIONS]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    """A client, with three more tables: without biases, in bfloat16, and with more classes than a batch has rows."""
    with shardloss.connect(server.address) as client:
        client.create_table("no-bias", num_classes=V, dim=D, bias=False)
        client.create_table("bfloat16", num_classes=V, dim=D, dtype="bfloat16")
        client.create_table("wide", num_classes=MAX_BATCH + 3, dim=D)
        yield client


def assert_refused(world: World, row: Bad) -> None:
    """Assert that a case is refused with its error, field and first index, and that the world is unchanged."""
    request = row.request(world)
    row.spoil(request)
    with pytest.raises(ShardlossError) as caught:
        once(world.method(request), request)
    error = caught.value
    assert (type(error), error.field) == (row.error, row.field), error
    if row.index is not None:
        assert error.index is not None
        assert tuple(int(i) for i in error.index.split(",")) == row.index, error
    assert 0 < len(str(error)) <= 1024
    world.assert_untouched()


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_bad_request_is_refused_by_name_and_changes_nothing(world: World, row: Bad) -> None:
    """The error has the class, field and first index listed above; rows, version and tickets are unchanged."""
    assert_refused(world, row)


BASES = sorted({row.request for row in TABLE}, key=lambda request: request.__name__)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_request_that_is_spoiled_is_good(world: World, base: Callable[[World], Any]) -> None:
    """Every request above is answered when unmodified, so a refusal is caused by the edit and nothing else."""
    request = base(world)
    once(world.method(request), request)


def test_a_table_too_many_is_refused(world: World) -> None:
    """If max_tables tables exist, creating another raises LimitExceeded; re-creating an existing one still succeeds."""
    num_free = LIMITS.max_tables - len(world.client.list_tables())
    made = [world.client.create_table(f"small-{i}", num_classes=1, dim=1) for i in range(num_free)]
    with pytest.raises(LimitExceeded) as caught:
        once(world.client.tables.CreateTable, world.create())
    assert caught.value.field == "spec"
    assert not once(world.client.tables.CreateTable, world.again()).created
    for table in made:
        world.client.delete_table(table.name)
    world.assert_untouched()


@pytest.mark.parametrize("base", [World.full, World.drawn, World.values], ids=lambda base: base.__name__)
def test_a_batch_without_rows_is_legal(world: World, base: Callable[[World], Any]) -> None:
    """A batch with N = 0 yields losses [0], a hidden gradient [0, D] and a table gradient of zeros."""
    request = base(world)
    put("hidden", np.zeros((0, D)))(request)
    put("labels", np.zeros((0, T), int))(request)
    if base is World.values:
        put(VALUES + "true_expected_count", np.ones((0, T)))(request)
    request.want_hidden_grad = request.want_table_grad = True
    reply = once(world.client.losses.ComputeLoss, request)
    assert list(reply.loss.shape) == [0]
    assert list(reply.hidden_grad.shape) == [0, D]
    assert not wire.decode(reply.table_grad.rows, "rows").any()
    world.assert_untouched()


@pytest.mark.parametrize("count", [1e-300, 1e300])
def test_an_expected_count_beyond_float32_is_legal(world: World, count: float) -> None:
    """Only log Q enters the loss, so the loss is finite even if float32 cannot represent Q."""
    request = world.values()
    put(VALUES + "true_expected_count", np.full((N, T), count))(request)
    put(VALUES + "sampled_expected_count", np.full(S, count))(request)
    loss = wire.decode(once(world.client.losses.ComputeLoss, request).loss, "loss")
    even = world.values()
    put(VALUES + "true_expected_count", np.ones((N, T)))(even)
    put(VALUES + "sampled_expected_count", np.ones(S))(even)
    np.testing.assert_allclose(
        loss, wire.decode(once(world.client.losses.ComputeLoss, even).loss, "loss"), rtol=1e-3, atol=1e-3
    )
    world.assert_untouched()


def test_a_step_without_rows_is_legal(world: World) -> None:
    """A batch with N = 0 opens a ticket and commits: the version increases by one and no bit of a row changes."""
    request = world.keyed()
    put("hidden", np.zeros((0, D)))(request)
    put("labels", np.zeros((0, T), int))(request)
    ticket = once(world.client.losses.ComputeLoss, request).ticket
    commit = world.commit("fresh", 1, [ticket])
    put("parts.0.g", np.zeros(0))(commit)
    rows = world.look()[2:]
    assert once(world.client.losses.Commit, commit).version == world.table.info().version
    assert world.look()[2:] == rows


def test_questions_without_rows_are_legal(world: World) -> None:
    """Every exact question with N = 0 is answered with 0 rows, and ReadRows without ids returns [0, D]."""
    hidden = np.zeros((0, D))
    evaluation = world.table.evaluate(hidden, np.zeros(0, int))
    assert (evaluation.loss.shape, evaluation.rank.shape) == ((0,), (0,))
    assert world.table.top_k(hidden, 3).logits.shape == (0, 3)
    assert world.table.score(hidden, np.arange(4), want_log_probs=True).log_probs.shape == (0, 4)
    assert world.table.sample_classes(hidden, 4, top_k=2, want_log_probs=True).log_probs.shape == (0, 4)
    assert world.table.sample_classes(hidden, 4).class_ids.shape == (0, 4)
    assert world.table.read_rows(np.zeros(0, int)).rows.shape == (0, D)
    world.assert_untouched()
