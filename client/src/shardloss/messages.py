"""Conversion between public values and the messages of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from shardloss import cost, types, wire
from shardloss.errors import BadReply, InvalidArgument, LimitExceeded, NotSupported, ShardlossError
from shardloss.splice import Spliced
from shardloss.v1 import evaluation_pb2, logits_pb2, loss_pb2, server_pb2, table_pb2, tensor_pb2
from shardloss.wire import Array

OPTIMIZER_FIELDS = {
    types.Sgd: "sgd",
    types.Adagrad: "adagrad",
    types.RowAdagrad: "row_adagrad",
    types.Adam: "adam",
    types.AdamW: "adamw",
    types.SparseAdam: "sparse_adam",
}
SAMPLER_KINDS = {
    "log_uniform": loss_pb2.Sampler.KIND_LOG_UNIFORM,
    "uniform": loss_pb2.Sampler.KIND_UNIFORM,
    "fixed_unigram": loss_pb2.Sampler.KIND_FIXED_UNIGRAM,
    "learned_unigram": loss_pb2.Sampler.KIND_LEARNED_UNIGRAM,
    "all": loss_pb2.Sampler.KIND_ALL,
}
HIT_REMOVALS = {"every": loss_pb2.HIT_REMOVAL_EVERY, "last": loss_pb2.HIT_REMOVAL_LAST}
TABLE_DTYPES = {name: wire.WIRE_DTYPES[name] for name in ("float32", "float64", "bfloat16")}
FLOATS = {name: dtype for name, dtype in wire.WIRE_DTYPES.items() if "float" in name}
STATES = {
    table_pb2.TABLE_STATE_READY: "ready",
    table_pb2.TABLE_STATE_CREATING: "creating",
    table_pb2.TABLE_STATE_ROWS_LOST: "rows_lost",
}
PLACEMENTS = {"div": table_pb2.PLACEMENT_DIV, "mod": table_pb2.PLACEMENT_MOD}


Numbers: TypeAlias = Array | wire.Encoded  # an Encoded is used unchanged; bfloat16 is passed this way


def numbers(array: Numbers, field: str) -> tensor_pb2.Tensor:
    """Return an array as a Tensor message."""
    return beside(array, field).whole()


def beside(array: Numbers, field: str) -> wire.Encoded:
    """Return an array as a header with its content; an `Encoded` is returned unchanged."""
    return array if isinstance(array, wire.Encoded) else wire.encode_beside(np.asarray(array), field)


@contextmanager
def writing_request() -> Iterator[None]:
    """Convert errors raised while a request is written to `InvalidArgument`: the caller's value does not fit a field.

    Raises:
        InvalidArgument: a value has the wrong type or is outside a field's range.
    """
    try:
        yield
    except ShardlossError:
        raise
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"the request cannot be written: {error}") from error


@contextmanager
def reading_reply() -> Iterator[None]:
    """Convert errors raised while a reply is read to `BadReply`: the fault is the server's, not the caller's.

    Raises:
        BadReply: the reply violates the contract.
    """
    try:
        yield
    except (InvalidArgument, LimitExceeded, NotSupported, KeyError) as error:
        raise BadReply(f"the reply violates the contract: {error}") from error


def choose(table: Mapping[str, Any], value: str, field: str) -> Any:
    """Return the entry of table for a named option.

    Raises:
        InvalidArgument: there is no option of this name.
    """
    if value not in table:
        raise InvalidArgument(f"{field} = {value!r} must be one of {', '.join(map(repr, table))}", field=field)
    return table[value]


def optional(message: tensor_pb2.Tensor, present: bool, field: str, contents: wire.Contents | None) -> Array | None:
    """Return the array of a Tensor message, or None if the field is absent."""
    return wire.decode_numbers(message, field, contents) if present else None


@writing_request()
def table_spec(
    name: str,
    num_classes: int,
    dim: int,
    dtype: str,
    bias: bool,
    num_shards: int,
    placement: str,
    initializer: types.Initializer | None,
    optimizer: types.Optimizer | None,
    count_labels: bool,
) -> table_pb2.TableSpec:
    """Return the message of a table's spec."""
    spec = table_pb2.TableSpec(
        name=name,
        num_classes=num_classes,
        dim=dim,
        dtype=choose(TABLE_DTYPES, dtype, "dtype"),
        bias=bias,
        num_shards=num_shards,
        placement=choose(PLACEMENTS, placement, "placement"),
        count_labels=count_labels,
    )
    if optimizer is not None:
        if type(optimizer) not in OPTIMIZER_FIELDS:
            raise InvalidArgument(f"optimizer is a {type(optimizer).__name__}; pass one such as shardloss.Sgd()")
        one = getattr(spec.optimizer, OPTIMIZER_FIELDS[type(optimizer)])
        one.SetInParent()
        for field, value in asdict(optimizer).items():
            setattr(one, field, value)
    if initializer is not None:
        if isinstance(initializer, types.Normal):
            spec.initializer.normal.stddev = initializer.stddev
        elif isinstance(initializer, types.Uniform):
            spec.initializer.uniform.limit = initializer.limit
        elif isinstance(initializer, types.Zeros):
            spec.initializer.zeros.SetInParent()
        else:
            raise InvalidArgument(f"initializer is a {type(initializer).__name__}; pass Normal, Uniform or Zeros")
        spec.initializer.seed = initializer.seed
    return spec


def optimizer_of(message: table_pb2.Optimizer) -> types.Optimizer:
    """Return a table's optimizer with every default filled in."""
    kinds = {field: kind for kind, field in OPTIMIZER_FIELDS.items()}
    kind = kinds[message.WhichOneof("kind") or "sgd"]
    one = getattr(message, OPTIMIZER_FIELDS[kind])
    made: types.Optimizer = kind(**{field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields})
    return made


def initializer_of(message: table_pb2.Initializer) -> types.Initializer:
    """Return the initializer of a table's rows."""
    kind = message.WhichOneof("kind")
    if kind == "normal":
        return types.Normal(message.normal.stddev, message.seed)
    if kind == "uniform":
        return types.Uniform(message.uniform.limit, message.seed)
    return types.Zeros(message.seed)


@reading_reply()
def table_info(message: table_pb2.Table) -> types.TableInfo:
    """Return the spec and current state of a table."""
    spec, state = message.spec, STATES.get(message.state, "ready")  # a server of version 0.1 sends none
    return types.TableInfo(
        name=spec.name,
        num_classes=spec.num_classes,
        dim=spec.dim,
        dtype=wire.NAMES[spec.dtype],
        bias=spec.bias,
        num_shards=spec.num_shards,
        placement="mod" if spec.placement == table_pb2.PLACEMENT_MOD else "div",
        initializer=initializer_of(spec.initializer),
        optimizer=optimizer_of(spec.optimizer),
        count_labels=spec.count_labels,
        version=message.version,
        num_commits=message.num_commits,
        num_open_tickets=message.num_open_tickets,
        reference=message.reference or spec.name,  # a server of version 0.1 sends none
        state=state,
        filled=message.filled if state == "creating" else 1.0,
    )


@writing_request()
def sampler(loss: types.SampledSoftmax | types.SampledLogistic) -> loss_pb2.Sampler:
    """Return the message of a loss's sampler."""
    if isinstance(loss.sampler, (types.InBatch, types.PartialFc)):
        raise InvalidArgument(f"{type(loss.sampler).__name__} needs a batch; pass another sampler", field="sampler")
    message = distribution(loss.sampler)
    message.num_sampled, message.seed = draw_of(loss)
    message.unique = loss.unique
    return message


def draw_of(loss: types.SampledSoftmax | types.SampledLogistic) -> tuple[int, int]:
    """Return (num_sampled, seed) of a loss."""
    return wire.integer(loss.num_sampled, "num_sampled"), wire.integer(loss.seed, "seed", wire.UINT64)


def distribution(sampler: str | types.FixedUnigram | types.Mixture) -> loss_pb2.Sampler:
    """Return a sampler message with the distribution that a sampler draws from."""
    if isinstance(sampler, types.FixedUnigram):
        return loss_pb2.Sampler(
            kind=loss_pb2.Sampler.KIND_FIXED_UNIGRAM,
            distortion=sampler.distortion,
            num_reserved_ids=sampler.num_reserved_ids,
        )
    if isinstance(sampler, types.Mixture):
        mixture = loss_pb2.Sampler.Mixture(
            first=distribution(sampler.first), second=distribution(sampler.second), share=sampler.share
        )
        return loss_pb2.Sampler(kind=loss_pb2.Sampler.KIND_MIXTURE, mixture=mixture)
    if not isinstance(sampler, str):
        raise InvalidArgument(f"sampler is a {type(sampler).__name__}; pass a name, FixedUnigram or Mixture")
    return loss_pb2.Sampler(kind=choose(SAMPLER_KINDS, sampler, "sampler"))


@writing_request()
def set_loss(message: loss_pb2.ComputeLossRequest, loss: types.Loss) -> None:
    """Write a loss into a request."""
    if not isinstance(loss, types.Loss):
        raise InvalidArgument(f"loss is a {type(loss).__name__}; pass shardloss.FullSoftmax(), ...", field="loss")
    transform = logit_transform(None if loss.logits == types.LogitTransform() else loss.logits)
    if transform is not None:
        message.logits.CopyFrom(transform)
    if isinstance(loss, types.FullSoftmax):
        message.full_softmax.SetInParent()
        message.full_softmax.label_smoothing = loss.label_smoothing
        message.full_softmax.unit_mass_gradient = loss.unit_mass_gradient
        if loss.class_weights is not None:
            message.full_softmax.class_weights.CopyFrom(numbers(loss.class_weights, "class_weights"))
        set_softmax(message, loss)
    elif isinstance(loss, types.SampledSoftmax):
        set_columns(message.sampled_softmax, loss)
        message.sampled_softmax.num_hard_negatives = loss.num_hard_negatives
        set_hit_ids(message, loss.hit_ids)
        set_softmax(message, loss)
    elif isinstance(loss, types.SampledLogistic):
        set_columns(message.sampled_logistic.columns, loss)
        message.sampled_logistic.subtract_log_q = loss.subtract_log_q
        set_hit_ids(message, loss.hit_ids)
    else:
        message.full_sigmoid.SetInParent()


def check_loss(loss: types.Loss) -> None:
    """Raise `InvalidArgument` for an unknown option now rather than at the first step.

    Raises:
        InvalidArgument: an option of the loss is unknown; the error names it.
    """
    set_loss(loss_pb2.ComputeLossRequest(), loss)


def set_softmax(message: loss_pb2.ComputeLossRequest, loss: types.FullSoftmax | types.SampledSoftmax) -> None:
    """Write the options that only softmax losses have: z-loss and margin."""
    message.z_loss = loss.z_loss
    if loss.margin is not None:
        message.margin.m1, message.margin.m2, message.margin.m3 = loss.margin.m1, loss.margin.m2, loss.margin.m3


def set_hit_ids(message: loss_pb2.ComputeLossRequest, hit_ids: types.HitIds | None) -> None:
    """Write the ids by which accidental hits are found."""
    if hit_ids is None:
        return
    message.hit_ids.labels.CopyFrom(numbers(hit_ids.labels, "hit_ids.labels"))
    if hit_ids.sampled is not None:
        message.hit_ids.sampled.CopyFrom(numbers(hit_ids.sampled, "hit_ids.sampled"))


def set_columns(message: loss_pb2.SampledSoftmax, loss: types.SampledSoftmax | types.SampledLogistic) -> None:
    """Write the candidates of a sampled loss and the removal of accidental hits."""
    message.remove_accidental_hits = loss.remove_accidental_hits
    message.hit_removal = choose(HIT_REMOVALS, loss.hit_removal, "hit_removal")
    if loss.sampled_values is not None:
        for field in ("sampled", "true_expected_count", "sampled_expected_count"):
            tensor = numbers(getattr(loss.sampled_values, field), f"sampled_values.{field}")
            getattr(message.sampled_values, field).CopyFrom(tensor)
    elif isinstance(loss.sampler, types.InBatch):
        message.in_batch.correct_log_q = loss.sampler.correct_log_q
    elif isinstance(loss.sampler, types.PartialFc):
        message.partial_fc.num_sampled, message.partial_fc.seed = draw_of(loss)
    else:
        message.sampler.CopyFrom(sampler(loss))


@writing_request()
def loss_request(
    table: str,
    hidden: Numbers,
    labels: Numbers | None,
    loss: types.Loss,
    *,
    label_weights: Numbers | None = None,
    ignore_index: int | None = None,
    upstream: Numbers | None = None,
    want_lse: bool = False,
    want_hidden_grad: bool = False,
    want_table_grad: bool = False,
    want_scale_grad: bool = False,
    grad_dtype: str | None = None,
    want_cost: bool = False,
) -> Spliced[loss_pb2.ComputeLossRequest]:
    """Return a ComputeLoss request without its key (session, step, part); hidden is not copied."""
    encoded = beside(hidden, "hidden")
    message = loss_pb2.ComputeLossRequest(
        table=table,
        hidden=encoded.header,
        labels=None if labels is None else numbers(labels, "labels"),
        label_columns=labels is None,
        ignore_index=None if ignore_index is None else wire.integer(ignore_index, "ignore_index"),
        want_lse=want_lse,
        want_hidden_grad=want_hidden_grad,
        want_table_grad=want_table_grad,
        want_scale_grad=want_scale_grad,
        grad_dtype=None if grad_dtype is None else choose(FLOATS, grad_dtype, "grad_dtype"),
        want_cost=want_cost,
    )
    set_loss(message, loss)
    if label_weights is not None:
        message.label_weights.CopyFrom(numbers(label_weights, "label_weights"))
    if upstream is not None:
        message.upstream.CopyFrom(numbers(upstream, "upstream"))
    return Spliced(message, encoded.content)


def label_columns(distribution: Array, max_chunk_bytes: int) -> Iterator[loss_pb2.LabelColumns]:
    """Yield a label distribution [N, V] in pieces of at most max_chunk_bytes, but at least one column.

    Pieces of zeros are left out, but there is at least one piece. The last piece is marked, so that the server knows
    that all have arrived.
    """
    num_rows, num_classes = distribution.shape
    size = max(1, max_chunk_bytes // max(1, num_rows * distribution.itemsize))
    starts = [start for start in range(0, num_classes, size) if distribution[:, start : start + size].any()] or [0]
    for start in starts:
        weights = numbers(distribution[:, start : start + size], "label_distribution")
        yield loss_pb2.LabelColumns(first_class=start, weights=weights, last=start == starts[-1])


@reading_reply()
def loss_result(message: loss_pb2.ComputeLossResponse, contents: wire.Contents | None = None) -> types.LossResult:
    """Return the result for a batch."""
    gradient = None
    if message.HasField("table_grad"):
        grad = message.table_grad
        gradient = types.TableGradient(
            wire.decode(grad.class_ids, "table_grad.class_ids", contents),
            wire.decode_numbers(grad.rows, "table_grad.rows", contents),
            optional(grad.biases, grad.HasField("biases"), "table_grad.biases", contents),
        )
    return types.LossResult(
        loss=optional(message.loss, message.HasField("loss"), "loss", contents),
        lse=optional(message.lse, message.HasField("lse"), "lse", contents),
        hidden_grad=optional(message.hidden_grad, message.HasField("hidden_grad"), "hidden_grad", contents),
        table_grad=gradient,
        ticket=message.ticket,
        version=message.version,
        replayed=message.replayed,
        num_candidates=message.cost.num_candidates,
        committed=commit_result(message.committed) if message.HasField("committed") else None,
        scale_grad=optional(message.scale_grad, message.HasField("scale_grad"), "scale_grad", contents),
        cost=cost_of(message),
    )


@reading_reply()
def commit_result(message: loss_pb2.CommitResponse) -> types.CommitResult:
    """Return the result of a commit."""
    return types.CommitResult(message.version, message.staleness, message.replayed, cost_of(message))


def cost_of(message: Any) -> types.CallCost | None:
    """Return the cost of a call, or None if it was not requested."""
    return cost.call_cost(message.call_cost) if message.HasField("call_cost") else None


@writing_request()
def logit_transform(transform: types.LogitTransform | None) -> logits_pb2.LogitTransform | None:
    """Return the message of a logit transform, or None, which leaves the field absent."""
    if transform is None:
        return None
    return logits_pb2.LogitTransform(scale=transform.scale, soft_cap=transform.soft_cap, normalize=transform.normalize)


@reading_reply()
def evaluation(message: evaluation_pb2.EvaluateResponse) -> types.Evaluation:
    """Return the exact losses and ranks in a reply."""
    return types.Evaluation(
        wire.decode(message.loss, "loss"),
        optional(message.rank, message.HasField("rank"), "rank", None),
        message.version,
        message.last_version,
        optional(message.sigmoid, message.HasField("sigmoid"), "sigmoid", None),
        cost=cost_of(message),
    )


@reading_reply()
def class_samples(message: evaluation_pb2.SampleClassesResponse) -> types.ClassSamples:
    """Return the draws from the exact softmax in a reply."""
    return types.ClassSamples(
        wire.decode(message.class_ids, "class_ids"),
        optional(message.log_probs, message.HasField("log_probs"), "log_probs", None),
        message.version,
        message.last_version,
        cost_of(message),
    )


@reading_reply()
def top_k(message: evaluation_pb2.TopKResponse) -> types.TopK:
    """Return the best classes of each row in a reply."""
    return types.TopK(
        wire.decode(message.class_ids, "class_ids"),
        wire.decode(message.logits, "logits"),
        optional(message.log_probs, message.HasField("log_probs"), "log_probs", None),
        message.version,
        message.last_version,
        cost_of(message),
    )


@reading_reply()
def scores(message: evaluation_pb2.ScoreResponse) -> types.Scores:
    """Return the logits of the requested classes in a reply."""
    return types.Scores(
        wire.decode(message.logits, "logits"),
        optional(message.log_probs, message.HasField("log_probs"), "log_probs", None),
        message.version,
        message.last_version,
        cost_of(message),
    )


@reading_reply()
def rows(message: table_pb2.ReadRowsResponse) -> types.Rows:
    """Return the rows in a reply."""
    biases = optional(message.biases, message.HasField("biases"), "biases", None)
    return types.Rows(wire.decode_numbers(message.rows, "rows"), biases, message.version)


@reading_reply()
def table_rows(message: table_pb2.ReadRowsResponse) -> types.TableRows:
    """Return the rows in a reply with their optimizer state, bit for bit."""
    biases = wire.decode(message.biases, "biases") if message.HasField("biases") else None
    of_rows = {state.name: wire.decode(state.values, "weight_state") for state in message.weight_state}
    of_biases = {state.name: wire.decode(state.values, "bias_state") for state in message.bias_state}
    rows = wire.decode(message.rows, "rows")
    return types.TableRows(rows, biases, of_rows, of_biases, message.version, message.num_commits)


@writing_request()
def row_write(
    table: str, class_ids: Array, page: types.TableRows, num_commits: int | None, *, bfloat16: bool
) -> table_pb2.WriteRowsRequest:
    """Return a request to overwrite rows and their state; with bfloat16, uint16 rows contain the bits of bfloat16."""
    return table_pb2.WriteRowsRequest(
        table=table,
        class_ids=numbers(class_ids, "class_ids"),
        rows=wire.encode(page.rows, "rows", bfloat16=bfloat16 and page.rows.dtype == np.uint16),
        biases=None if page.biases is None else numbers(page.biases, "biases"),
        weight_state=row_states(page.weight_state, "weight_state"),
        bias_state=row_states(page.bias_state, "bias_state"),
        num_commits=num_commits,
    )


def row_states(state: Mapping[str, Array], field: str) -> list[table_pb2.RowState]:
    """Return the messages of optimizer state given by name."""
    return [table_pb2.RowState(name=name, values=numbers(values, field)) for name, values in state.items()]


@reading_reply()
def class_counts(message: table_pb2.ReadClassCountsResponse) -> types.ClassCounts:
    """Return the class counts in a reply."""
    written = wire.decode(message.counts, "counts") if message.HasField("counts") else None
    learned = wire.decode(message.learned, "learned") if message.HasField("learned") else None
    return types.ClassCounts(written, learned, message.version)


@reading_reply()
def candidates(message: loss_pb2.SampleCandidatesResponse) -> types.Candidates:
    """Return the drawn candidates in a reply."""
    return types.Candidates(
        wire.decode(message.sampled, "sampled"),
        wire.decode(message.true_expected_count, "true_expected_count"),
        wire.decode(message.sampled_expected_count, "sampled_expected_count"),
        message.num_tries,
    )


@reading_reply()
def server_info(message: server_pb2.ServerInfo) -> types.ServerInfo:
    """Return the version, features, devices and limits of a server."""
    limits = {field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields}
    return types.ServerInfo(
        message.version, tuple(message.features), message.num_workers, tuple(message.devices), limits
    )
