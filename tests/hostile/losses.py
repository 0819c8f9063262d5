"""Valid requests of every loss and option, which the tests corrupt."""

from __future__ import annotations

import numpy as np
from shardloss import wire
from shardloss.v1 import loss_pb2, table_pb2

from .world import N, S, T, V, World

KIND = loss_pb2.Sampler


def one_label(world: World) -> loss_pb2.ComputeLossRequest:
    """Return a full softmax request with one label per row."""
    request = world.full()
    request.labels.CopyFrom(wire.encode(1 + np.arange(N) % 6))
    return request


def smoothed(world: World) -> loss_pb2.ComputeLossRequest:
    request = world.full()
    request.full_softmax.label_smoothing, request.z_loss = 0.1, 0.01
    request.full_softmax.class_weights.CopyFrom(wire.encode(np.ones(V)))
    request.logits.scale = 2.0
    return request


def margin(world: World) -> loss_pb2.ComputeLossRequest:
    request = one_label(world)
    request.table, request.margin.m2 = "no-bias", 0.5
    request.logits.scale, request.logits.normalize = 16.0, True
    return request


def sigmoid(world: World) -> loss_pb2.ComputeLossRequest:
    request = world.full()
    request.full_sigmoid.SetInParent()
    request.want_lse = False
    return request


def nce(world: World) -> loss_pb2.ComputeLossRequest:
    request = sigmoid(world)
    columns = request.sampled_logistic.columns
    columns.sampler.kind, columns.sampler.num_sampled = KIND.KIND_LOG_UNIFORM, S
    return request


def own_values(world: World) -> loss_pb2.ComputeLossRequest:
    """Return a sampled softmax request in which each row has its own candidates."""
    request = world.values()
    values = request.sampled_softmax.sampled_values
    values.sampled.CopyFrom(wire.encode(np.arange(N * S).reshape(N, S) % V))
    values.sampled_expected_count.CopyFrom(wire.encode(np.full((N, S), 0.7)))
    return request


def with_hit_ids(world: World) -> loss_pb2.ComputeLossRequest:
    request = world.values()
    request.hit_ids.labels.CopyFrom(wire.encode(np.arange(N * T).reshape(N, T)))
    request.hit_ids.sampled.CopyFrom(wire.encode(np.arange(S)))
    return request


def in_batch(world: World) -> loss_pb2.ComputeLossRequest:
    request = one_label(world)
    request.sampled_softmax.in_batch.SetInParent()
    return request


def in_batch_hit_ids(world: World) -> loss_pb2.ComputeLossRequest:
    request = in_batch(world)
    request.hit_ids.labels.CopyFrom(wire.encode(np.arange(N)))
    return request


def partial_fc(world: World) -> loss_pb2.ComputeLossRequest:
    request = one_label(world)
    request.sampled_softmax.partial_fc.num_sampled = S
    return request


def counted(world: World) -> loss_pb2.ComputeLossRequest:
    """Return a request whose candidates are drawn by the class counts of the table "counted"."""
    request = one_label(world)
    request.table = "counted"
    sampler = request.sampled_softmax.sampler
    sampler.kind, sampler.num_sampled, sampler.distortion = KIND.KIND_FIXED_UNIGRAM, 4, 0.75
    return request


def mixture(world: World) -> loss_pb2.ComputeLossRequest:
    request = counted(world)
    sampler = request.sampled_softmax.sampler
    sampler.kind = KIND.KIND_MIXTURE
    sampler.mixture.first.kind, sampler.mixture.second.kind = KIND.KIND_FIXED_UNIGRAM, KIND.KIND_UNIFORM
    sampler.mixture.share = 0.5
    return request


def write_counts(world: World) -> table_pb2.WriteClassCountsRequest:
    return table_pb2.WriteClassCountsRequest(table=world.name, first_class=2, counts=wire.encode(np.ones(3)))


LOSSES = (one_label, smoothed, sigmoid, nce, own_values, with_hit_ids, in_batch, in_batch_hit_ids, partial_fc, mixture)
