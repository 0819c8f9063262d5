"""Rivals: TensorFlow and hivemind, each in its own environment, and torch's RPC as a parameter server."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row
from benchmarks.scenarios.against import against

TF_SHAPES = ((256, 128, 4096), (1024, 128, 4096), (512, 256, 8192))  # N, D, S
K = 2
ADAGRAD = {"kind": "sampled", "optimizer": "adagrad"}
PAYLOAD = "the rival's bytes are only its payload (ids, rows and biases); ours are all that the connection carried"


def shape_of(n: int, d: int, v: int, s: int | None = None) -> dict[str, Any]:
    """Return N, D, V, S, K and dtype of a row."""
    return {"N": n, "D": d, "V": v, "S": s, "K": K, "dtype": "float32"}


def sampled_tf(context: Context) -> list[Row]:
    """Compare with tf.nn.sampled_softmax_loss and sparse Adagrad.

    Both sides draw distinct log-uniform candidates and train biases.
    """
    rows = []
    for n, d, s in TF_SHAPES[: 1 if context.quick else None]:
        shape = shape_of(n, d, 100_000 if context.quick else 1_000_000, s)
        start = partial(context.side, "tf_sampled", shape, environment="tensorflow")
        name = f"tensorflow N={n} D={d} S={s}"
        rows.append(against(context, "sampled-tf", name, shape, {**ADAGRAD, "bias": True}, start))
    return rows


def remote_module(context: Context) -> list[Row]:
    """Compare with a hivemind expert around cross entropy: forward, backward and SGD on the server."""
    shape = shape_of(256, 128, 20_000 if context.quick else 100_000)
    start = partial(context.side, "hivemind_expert", shape, environment="hivemind")
    return [against(context, "remote-module", "hivemind", shape, {"kind": "full", "optimizer": "sgd"}, start)]


def parameter_server(context: Context) -> list[Row]:
    """Compare time and bytes with a parameter server: the trainer pulls rows from it and pushes gradients to it."""
    shape = shape_of(256, 128, 100_000 if context.quick else 1_000_000, 4096)
    start = partial(context.side, "parameter_server", shape)
    rival = "torch.distributed.rpc"
    return [against(context, "parameter-server", rival, shape, {**ADAGRAD, "bias": True}, start, note=PAYLOAD)]
