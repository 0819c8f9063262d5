"""Conversion of table specs between protobuf and the front end; every default is filled in here."""

from __future__ import annotations

import math

import torch
from shardloss import wire
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.v1 import table_pb2, tensor_pb2

from shardloss_server.frontend.owner import TableOwner
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import TableSpec

STORAGE = ("float32", "float64", "bfloat16")
PLACEMENTS = {
    table_pb2.PLACEMENT_UNSPECIFIED: "div",
    table_pb2.PLACEMENT_DIV: "div",
    table_pb2.PLACEMENT_MOD: "mod",
}


def table_spec(message: table_pb2.TableSpec, default_num_shards: int) -> TableSpec:
    """Decode a table spec.

    Raises:
        InvalidArgument, NotSupported: an unknown enum value, a number out of range, or a reserved field.
    """
    if message.durability not in (table_pb2.DURABILITY_UNSPECIFIED, table_pb2.DURABILITY_MEMORY):
        raise NotSupported("durability: only MEMORY is supported so far", field="spec.durability")
    if message.HasField("limits"):
        raise NotSupported("limits of a table are reserved and not yet supported", field="spec.limits")
    dtype = "float32" if message.dtype == tensor_pb2.DTYPE_UNSPECIFIED else wire.NAMES.get(message.dtype)
    if dtype not in STORAGE:
        raise InvalidArgument(
            f"dtype = {dtype or message.dtype} must be one of {', '.join(STORAGE)}", field="spec.dtype"
        )
    if message.placement not in PLACEMENTS:
        raise InvalidArgument(f"placement = {message.placement} is unknown", field="spec.placement")
    num_shards = message.num_shards if message.num_shards != 0 else default_num_shards
    spec = TableSpec(
        name=message.name,
        num_classes=message.num_classes,
        dim=message.dim,
        dtype=dtype,
        bias=message.bias if message.HasField("bias") else True,
        placement=Placement(PLACEMENTS[message.placement], message.num_classes, num_shards),
        initializer=initializer(message.initializer, message.dim),
        optimizer=optimizer(message.optimizer),
        count_labels=message.count_labels,
    )
    refuse_unrepresentable(spec)
    return spec


def refuse_unrepresentable(spec: TableSpec) -> None:
    """Refuse optimizer numbers that are 0 or infinite in the table's compute dtype: rows would become NaN."""
    range_of = torch.finfo(getattr(torch, spec.compute_dtype))
    one = spec.optimizer
    for name, least in (("eps", range_of.tiny), ("weight_decay", 0.0), ("initial_accumulator_value", 0.0)):
        value = getattr(one, name)
        if value and not least <= value <= range_of.max:
            raise InvalidArgument(
                f"optimizer.{one.kind}.{name} = {value} does not fit in {spec.compute_dtype}",
                field=f"spec.optimizer.{one.kind}.{name}",
            )


def initializer(message: table_pb2.Initializer, dim: int) -> Initializer:
    """Decode an initializer; the default is uniform on +-1/sqrt(dim), as in torch.nn.Linear."""
    kind = message.WhichOneof("kind")
    if kind == "zeros":
        return Initializer("zeros", 0.0, message.seed)
    if kind is None:
        return Initializer("uniform", 1.0 / math.sqrt(max(dim, 1)), message.seed)
    scale = message.normal.stddev if kind == "normal" else message.uniform.limit
    name = "normal.stddev" if kind == "normal" else "uniform.limit"
    return Initializer(kind, number(scale, f"initializer.{name}", above=0.0), message.seed)


def optimizer(message: table_pb2.Optimizer) -> OptimizerSpec:
    """Decode an optimizer; the default is plain SGD."""
    kind = message.WhichOneof("kind")
    if kind is None or kind == "sgd":
        return sgd(message.sgd)
    if kind in ("adagrad", "row_adagrad"):
        one = message.adagrad if kind == "adagrad" else message.row_adagrad
        start = number(one.initial_accumulator_value, f"optimizer.{kind}.initial_accumulator_value", least=0.0)
        return OptimizerSpec(kind, initial_accumulator_value=start, eps=eps(one, kind, 1e-10))
    one_adam = getattr(message, kind)
    beta1 = one_adam.beta1 if one_adam.HasField("beta1") else 0.9
    beta2 = one_adam.beta2 if one_adam.HasField("beta2") else 0.999
    return OptimizerSpec(
        kind,
        weight_decay=adam_decay(message, kind),
        beta1=number(beta1, f"optimizer.{kind}.beta1", least=0.0, below=1.0),
        beta2=number(beta2, f"optimizer.{kind}.beta2", least=0.0, below=1.0),
        eps=eps(one_adam, kind, 1e-8),
    )


def sgd(message: table_pb2.Optimizer.Sgd) -> OptimizerSpec:
    """Decode the SGD optimizer."""
    momentum = number(message.momentum, "optimizer.sgd.momentum", least=0.0, below=1.0)
    if message.nesterov and momentum == 0:
        raise InvalidArgument("nesterov needs momentum > 0", field="spec.optimizer.sgd.nesterov")
    decay = number(message.weight_decay, "optimizer.sgd.weight_decay", least=0.0)
    return OptimizerSpec("sgd", momentum=momentum, nesterov=message.nesterov, weight_decay=decay)


def adam_decay(message: table_pb2.Optimizer, kind: str) -> float:
    """Return the weight decay of an optimizer of the Adam family."""
    if kind == "sparse_adam":
        return 0.0
    if kind == "adam":
        return number(message.adam.weight_decay, "optimizer.adam.weight_decay", least=0.0)
    decay = message.adamw.weight_decay if message.adamw.HasField("weight_decay") else 0.01
    return number(decay, "optimizer.adamw.weight_decay", least=0.0)


def eps(message: table_pb2.Optimizer.Adagrad | table_pb2.Optimizer.RowAdagrad, kind: str, default: float) -> float:
    """Return the eps of an optimizer, which must be above 0."""
    value = message.eps if message.HasField("eps") else default
    return number(value, f"optimizer.{kind}.eps", above=0.0)


def number(
    value: float, field: str, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    """Return a number that is finite and within its range.

    Raises:
        InvalidArgument: the number is not finite or out of its range.
    """
    fits = math.isfinite(value)
    fits = fits and (least is None or value >= least) and (above is None or value > above)
    if not (fits and (below is None or value < below)):
        raise InvalidArgument(f"{field} = {value} is out of range", field=f"spec.{field}")
    return value


def spec_message(spec: TableSpec) -> table_pb2.TableSpec:
    """Encode a table spec with every default written out."""
    message = table_pb2.TableSpec(
        name=spec.name,
        num_classes=spec.num_classes,
        dim=spec.dim,
        dtype=wire.WIRE_DTYPES[spec.dtype],
        bias=spec.bias,
        num_shards=spec.placement.num_shards,
        placement=table_pb2.PLACEMENT_MOD if spec.placement.strategy == "mod" else table_pb2.PLACEMENT_DIV,
        durability=table_pb2.DURABILITY_MEMORY,
        count_labels=spec.count_labels,
    )
    start = spec.initializer
    message.initializer.seed = start.seed
    if start.kind == "normal":
        message.initializer.normal.stddev = start.scale
    elif start.kind == "uniform":
        message.initializer.uniform.limit = start.scale
    else:
        message.initializer.zeros.SetInParent()
    one = getattr(message.optimizer, spec.optimizer.kind)
    one.SetInParent()
    for field in one.DESCRIPTOR.fields:
        setattr(one, field.name, getattr(spec.optimizer, field.name))
    return message


def state_of(owner: TableOwner) -> table_pb2.TableState:
    """Return what can be done with a table."""
    if owner.lost is not None:
        return table_pb2.TABLE_STATE_ROWS_LOST
    return table_pb2.TABLE_STATE_READY if owner.is_filled else table_pb2.TABLE_STATE_CREATING


def table_message(owner: TableOwner) -> table_pb2.Table:
    """Encode the current state of a table."""
    return table_pb2.Table(
        spec=spec_message(owner.spec),
        version=owner.steps.version,
        num_commits=owner.steps.num_commits,
        num_open_tickets=owner.sessions.num_open,
        reference=owner.reference,
        state=state_of(owner),
        filled=owner.filled,
    )
