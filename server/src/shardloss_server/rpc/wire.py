"""Conversion between the contract's protobuf messages and the front end's values, with their torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from google.protobuf.message import Message
from shardloss import wire
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.splice import Spliced
from shardloss.v1 import evaluation_pb2, logits_pb2, loss_pb2, table_pb2, tensor_pb2
from torch import Tensor

from shardloss_server.evaluation.passes import Draws, Evaluation, Ranked, Samples
from shardloss_server.frontend.payload import digest_of
from shardloss_server.frontend.request import (
    CommitNow,
    CommitPart,
    CommitReply,
    CommitRequest,
    HitIds,
    InBatch,
    LabelColumns,
    LossReply,
    LossRequest,
    Mixture,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
    Want,
)
from shardloss_server.numerics.margin import Margin
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform

Chunks = wire.Contents
T = TypeVar("T", Tensor, Tensor | None)
FLOAT_DTYPES = ("float32", "float64", "float16", "bfloat16")
SAMPLER_KINDS = {
    loss_pb2.Sampler.KIND_LOG_UNIFORM: "log_uniform",
    loss_pb2.Sampler.KIND_UNIFORM: "uniform",
    loss_pb2.Sampler.KIND_FIXED_UNIGRAM: "fixed_unigram",
    loss_pb2.Sampler.KIND_LEARNED_UNIGRAM: "learned_unigram",
    loss_pb2.Sampler.KIND_ALL: "all",
    loss_pb2.Sampler.KIND_MIXTURE: "mixture",
}
HIT_REMOVALS = {
    loss_pb2.HIT_REMOVAL_UNSPECIFIED: "every",
    loss_pb2.HIT_REMOVAL_EVERY: "every",
    loss_pb2.HIT_REMOVAL_LAST: "last",
}


def to_tensor(message: tensor_pb2.Tensor, field: str, chunks: Chunks | None = None) -> Tensor:
    """Decode a tensor into memory of its own."""
    array = wire.decode(message, field, chunks)
    array = array if array.flags.writeable else array.copy()
    if message.dtype == tensor_pb2.DTYPE_BFLOAT16:
        return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_ids(message: tensor_pb2.Tensor, field: str, chunks: Chunks | None = None) -> Tensor:
    """Decode class ids as int64.

    Raises:
        InvalidArgument: the tensor is absent, or neither int64 nor int32.
    """
    if message.dtype not in (tensor_pb2.DTYPE_INT64, tensor_pb2.DTYPE_INT32):
        name = wire.NAMES.get(message.dtype, "absent" if not message.ByteSize() else str(message.dtype))
        raise InvalidArgument(f"{field} is {name}; int64 or int32 class ids are needed", field=field)
    return to_tensor(message, field, chunks).long()


def to_counts(message: tensor_pb2.Tensor, field: str) -> Tensor:
    """Decode counts as int64.

    Raises:
        InvalidArgument: the tensor has a wrong dtype.
    """
    if message.dtype != tensor_pb2.DTYPE_INT64:
        name = wire.NAMES.get(message.dtype, str(message.dtype))
        raise InvalidArgument(f"{field} is {name}; int64 counts are needed", field=field)
    return to_tensor(message, field)


def to_state(messages: Sequence[table_pb2.RowState], field: str) -> dict[str, Tensor]:
    """Decode optimizer state by name.

    Raises:
        InvalidArgument: a name occurs twice.
    """
    found: dict[str, Tensor] = {}
    for place, message in enumerate(messages):
        if message.name in found:
            raise InvalidArgument(f"{field}[{place}].name = {message.name!r} occurs twice", field=field, index=place)
        found[message.name] = to_tensor(message.values, f"{field}[{place}].values")
    return found


def from_state(state: Mapping[str, Tensor]) -> list[table_pb2.RowState]:
    """Encode optimizer state, sorted by name."""
    return [table_pb2.RowState(name=name, values=from_tensor(state[name])) for name in sorted(state)]


def optional_tensor(owner: Message, field: str, chunks: Chunks | None = None, prefix: str = "") -> Tensor | None:
    """Decode the tensor of a field, or return None if it is absent; prefix is the owner's path in an error."""
    return to_tensor(getattr(owner, field), prefix + field, chunks) if owner.HasField(field) else None


def from_tensor(tensor: Tensor) -> tensor_pb2.Tensor:
    """Encode a tensor as a message."""
    return beside(tensor).whole()


def beside(tensor: Tensor) -> wire.Encoded:
    """Encode a tensor as a message without content and, separately, the memory of its content."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return wire.encode_beside(tensor.view(torch.int16).numpy().view("<u2"), bfloat16=True)
    return wire.encode_beside(tensor.numpy())


def column(tensor: T) -> T:
    """Return [N] as [N, 1], and everything else unchanged."""
    return tensor[:, None] if tensor is not None and tensor.dim() == 1 else tensor


def loss_request(
    message: loss_pb2.ComputeLossRequest,
    max_reply_bytes: int,
    chunks: Chunks | None = None,
    columns: Iterable[LabelColumns] | None = None,
) -> LossRequest:
    """Decode a ComputeLoss request; the front end validates its values later.

    Raises:
        InvalidArgument, NotSupported: the message cannot be decoded, or uses a reserved field.
    """
    refuse_reserved(message, "max_staleness", "group")
    if message.label_columns and columns is None:
        raise InvalidArgument("label_columns must be sent through StreamLoss", field="label_columns")
    hidden = to_tensor(message.hidden, "hidden", chunks)
    if message.label_columns and not message.HasField("labels"):
        labels = torch.zeros(len(hidden) if hidden.dim() else 0, 0, dtype=torch.int64)
    else:
        labels = to_ids(message.labels, "labels", chunks)
    request = LossRequest(
        table=message.table,
        session=message.session,
        step=message.step,
        part=message.part,
        after_step=message.after_step if message.HasField("after_step") else None,
        hidden=hidden,
        labels=column(labels),
        label_weights=column(optional_tensor(message, "label_weights", chunks)),
        ignore_index=message.ignore_index if message.HasField("ignore_index") else None,
        sampled=sampled_softmax(message, chunks),
        upstream=optional_tensor(message, "upstream", chunks),
        commit_now=commit_now(message),
        want=want(message),
        digest=b"",
        max_reply_bytes=max_reply_bytes,
        objective=objective(message),
        class_weights=optional_tensor(message.full_softmax, "class_weights", chunks, "full_softmax."),
        label_columns=columns if message.label_columns else None,
    )
    return replace(request, digest=digest_of(request)) if request.session else request


def label_columns(message: loss_pb2.LabelColumns) -> LabelColumns:
    """Decode one piece of a label distribution."""
    return LabelColumns(message.first_class, to_tensor(message.weights, "columns.weights"))


def objective(message: loss_pb2.ComputeLossRequest) -> Objective:
    """Decode the objective of a request: its loss without tensors."""
    is_logistic = message.WhichOneof("loss") in ("sampled_logistic", "full_sigmoid")
    one = message.margin
    margin = Margin(one.m1 if one.HasField("m1") else 1.0, one.m2, one.m3) if message.HasField("margin") else None
    return Objective(
        "logistic" if is_logistic else "softmax",
        logit_transform(message.logits),
        margin,
        message.full_softmax.label_smoothing,
        message.z_loss,
        message.want_scale_grad,
        message.full_softmax.unit_mass_gradient,
    )


def refuse_reserved(message: Message, *fields: str) -> None:
    """Refuse fields of the contract that are reserved and not implemented."""
    for field in fields:
        if message.HasField(field):
            raise NotSupported(f"{field} is reserved and not yet supported; leave it out", field=field)


def want(message: loss_pb2.ComputeLossRequest) -> Want:
    """Decode the outputs that a reply must contain."""
    grad_dtype = None
    if message.grad_dtype != tensor_pb2.DTYPE_UNSPECIFIED:
        grad_dtype = wire.NAMES.get(message.grad_dtype)
        if grad_dtype not in FLOAT_DTYPES:
            raise InvalidArgument(f"grad_dtype = {message.grad_dtype} is not a float dtype", field="grad_dtype")
    want_loss = message.want_loss if message.HasField("want_loss") else True
    return Want(want_loss, message.want_lse, message.want_hidden_grad, message.want_table_grad, grad_dtype)


def commit_now(message: loss_pb2.ComputeLossRequest) -> CommitNow | None:
    """Decode the commit of a one-call loss, or return None if the request has none."""
    if not message.HasField("commit_now"):
        return None
    now = message.commit_now
    grad_scale = now.grad_scale if now.HasField("grad_scale") else 1.0
    return CommitNow(now.learning_rate, grad_scale, now.opened_at_version)


def sampled_softmax(message: loss_pb2.ComputeLossRequest, chunks: Chunks | None) -> SampledSoftmax | None:
    """Decode the columns of a sampled loss, or return None for a loss over all classes."""
    kind = message.WhichOneof("loss")
    if kind is None:
        raise InvalidArgument(
            "loss is absent; set full_softmax, sampled_softmax, sampled_logistic or full_sigmoid", field="loss"
        )
    if kind in ("full_softmax", "full_sigmoid"):
        refuse_hit_ids(message)
        return None
    logistic = message.sampled_logistic
    is_corrected = kind == "sampled_softmax" or not logistic.HasField("subtract_log_q") or logistic.subtract_log_q
    sampled = message.sampled_softmax if kind == "sampled_softmax" else logistic.columns
    if sampled.hit_removal not in HIT_REMOVALS:
        raise InvalidArgument(f"hit_removal = {sampled.hit_removal} is unknown", field="sampled_softmax.hit_removal")
    remove = sampled.remove_accidental_hits if sampled.HasField("remove_accidental_hits") else True
    hit_removal = HIT_REMOVALS[sampled.hit_removal] if remove else "none"
    if not remove and sampled.WhichOneof("candidates") in ("in_batch", "partial_fc"):
        hit_removal = "last"  # one of the batch's copies of a label is the row's own
    draw = candidates(sampled, chunks)
    return SampledSoftmax(draw, hit_removal, hit_ids(message, chunks), sampled.num_hard_negatives, is_corrected)


def refuse_hit_ids(message: loss_pb2.ComputeLossRequest) -> None:
    """Refuse hit_ids for a loss over all classes, which has no accidental hits."""
    if message.HasField("hit_ids"):
        raise InvalidArgument("hit_ids are only allowed for a sampled loss", field="hit_ids")


def hit_ids(message: loss_pb2.ComputeLossRequest, chunks: Chunks | None) -> HitIds | None:
    """Decode the ids by which accidental hits are found, or return None if those are the class ids."""
    if not message.HasField("hit_ids"):
        return None
    given = message.hit_ids
    sampled = to_ids(given.sampled, "hit_ids.sampled", chunks) if given.HasField("sampled") else None
    return HitIds(column(to_ids(given.labels, "hit_ids.labels", chunks)), sampled)


def candidates(
    sampled: loss_pb2.SampledSoftmax, chunks: Chunks | None
) -> SamplerSpec | SampledValues | InBatch | PartialFc:
    """Decode the source of candidates: a sampler, the caller's draw, or the batch itself."""
    kind = sampled.WhichOneof("candidates")
    if kind == "sampler":
        return sampler(sampled.sampler)
    if kind == "in_batch":
        return InBatch(sampled.in_batch.correct_log_q)
    if kind == "partial_fc":
        return PartialFc(sampled.partial_fc.num_sampled, sampled.partial_fc.seed)
    if kind is None:
        raise InvalidArgument(
            "candidates is absent; set sampler, sampled_values, in_batch or partial_fc",
            field="sampled_softmax.candidates",
        )
    values, prefix = sampled.sampled_values, "sampled_values."
    true_count = to_tensor(values.true_expected_count, prefix + "true_expected_count", chunks)
    return SampledValues(
        to_ids(values.sampled, prefix + "sampled", chunks),
        column(true_count),
        to_tensor(values.sampled_expected_count, prefix + "sampled_expected_count", chunks),
    )


def sampler(message: loss_pb2.Sampler, field: str = "sampler") -> SamplerSpec:
    """Decode a sampler of candidates."""
    if message.kind not in SAMPLER_KINDS:
        raise InvalidArgument(f"{field}.kind = {message.kind} is unknown", field=f"{field}.kind")
    mixture = None
    if message.HasField("mixture") and field != "sampler":
        raise InvalidArgument(f"{field}.mixture: a mixture needs two plain distributions", field=f"{field}.mixture")
    if message.HasField("mixture"):
        first = sampler(message.mixture.first, "sampler.mixture.first")
        second = sampler(message.mixture.second, "sampler.mixture.second")
        mixture = Mixture(first, second, message.mixture.share)
    return SamplerSpec(
        SAMPLER_KINDS[message.kind],
        message.num_sampled,
        message.unique if message.HasField("unique") else True,
        message.seed,
        message.distortion if message.HasField("distortion") else 1.0,
        message.num_reserved_ids,
        mixture,
    )


def loss_response(reply: LossReply) -> Spliced[loss_pb2.ComputeLossResponse]:
    """Encode the reply to a ComputeLoss, with the content of the gradient of hidden outside the message."""
    message = loss_pb2.ComputeLossResponse(
        ticket=reply.ticket, version=reply.version, replayed=reply.replayed, cost=cost_of(reply)
    )
    for field in ("loss", "lse", "scale_grad"):
        value = getattr(reply, field)
        if value is not None:
            getattr(message, field).CopyFrom(from_tensor(value))
    if reply.table_grad is not None:
        of_table = message.table_grad
        of_table.class_ids.CopyFrom(from_tensor(reply.table_grad.class_ids))
        of_table.rows.CopyFrom(from_tensor(reply.table_grad.rows))
        if reply.has_bias:
            of_table.biases.CopyFrom(from_tensor(reply.table_grad.biases))
    if reply.committed is not None:
        message.committed.CopyFrom(commit_response(reply.committed))
        message.staleness = reply.committed.staleness
    if reply.hidden_grad is None:
        return Spliced(message)
    gradient = beside(reply.hidden_grad)
    message.hidden_grad.CopyFrom(gradient.header)
    return Spliced(message, gradient.content)


def cost_of(reply: LossReply) -> loss_pb2.Cost:
    """Encode the cost of a loss."""
    cost = reply.cost
    return loss_pb2.Cost(queue_us=cost.queue_us, score_us=cost.score_us, num_candidates=cost.num_candidates)


def commit_request(message: loss_pb2.CommitRequest) -> CommitRequest:
    """Decode a Commit request."""
    if message.external_gradients:
        raise NotSupported("external_gradients is reserved and not yet supported", field="external_gradients")
    parts = tuple(
        CommitPart(part.ticket, to_tensor(part.g, f"parts[{i}].g") if part.HasField("g") else None)
        for i, part in enumerate(message.parts)
    )
    request = CommitRequest(
        message.table,
        message.session,
        message.step,
        parts,
        message.learning_rate,
        message.grad_scale if message.HasField("grad_scale") else 1.0,
        message.max_staleness if message.HasField("max_staleness") else None,
        digest=b"",
    )
    return replace(request, digest=digest_of(request))


def commit_response(reply: CommitReply) -> loss_pb2.CommitResponse:
    """Encode the reply to a Commit."""
    return loss_pb2.CommitResponse(version=reply.version, staleness=reply.staleness, replayed=reply.replayed)


def logit_transform(message: logits_pb2.LogitTransform) -> Transform:
    """Decode a logit transform; the default leaves logits unchanged."""
    return Transform(
        scale=message.scale if message.HasField("scale") else 1.0,
        soft_cap=message.soft_cap if message.HasField("soft_cap") else None,
        normalize=message.normalize,
    )


def draws(message: evaluation_pb2.SampleClassesRequest) -> Draws:
    """Decode the draws from the exact softmax that a SampleClasses requests."""
    top_k = message.top_k if message.HasField("top_k") else None
    return Draws(message.num_samples, message.seed, message.first_row, top_k)


def evaluate_response(evaluation: Evaluation) -> evaluation_pb2.EvaluateResponse:
    """Encode the reply to an Evaluate."""
    message = evaluation_pb2.EvaluateResponse(
        loss=from_tensor(evaluation.loss), version=evaluation.version, last_version=evaluation.last_version
    )
    if evaluation.rank is not None:
        message.rank.CopyFrom(from_tensor(evaluation.rank))
    if evaluation.sigmoid is not None:
        message.sigmoid.CopyFrom(from_tensor(evaluation.sigmoid))
    return message


def top_k_response(ranked: Ranked) -> evaluation_pb2.TopKResponse:
    """Encode the reply to a TopK."""
    message = evaluation_pb2.TopKResponse(
        class_ids=from_tensor(ranked.class_ids),
        logits=from_tensor(ranked.logits),
        version=ranked.version,
        last_version=ranked.last_version,
    )
    if ranked.log_probs is not None:
        message.log_probs.CopyFrom(from_tensor(ranked.log_probs))
    return message


def score_response(ranked: Ranked) -> evaluation_pb2.ScoreResponse:
    """Encode the reply to a Score."""
    message = evaluation_pb2.ScoreResponse(
        logits=from_tensor(ranked.logits), version=ranked.version, last_version=ranked.last_version
    )
    if ranked.log_probs is not None:
        message.log_probs.CopyFrom(from_tensor(ranked.log_probs))
    return message


def sample_classes_response(samples: Samples) -> evaluation_pb2.SampleClassesResponse:
    """Encode the reply to a SampleClasses."""
    message = evaluation_pb2.SampleClassesResponse(
        class_ids=from_tensor(samples.class_ids), version=samples.version, last_version=samples.last_version
    )
    if samples.log_probs is not None:
        message.log_probs.CopyFrom(from_tensor(samples.log_probs))
    return message
