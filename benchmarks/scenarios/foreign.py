"""Frameworks in environments of their own: TensorFlow and hivemind; and torch's own RPC as a parameter server."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row
from benchmarks.scenarios.against import against

TF_SHAPES = ((256, 128, 4096), (1024, 128, 4096), (512, 256, 8192))  # N, D, S
K = 2
ADAGRAD = {"kind": "sampled", "optimizer": "adagrad"}
PAYLOAD = "the rival's bytes are its payload alone: ids, rows and biases; ours are all that the connection carried"


def shape_of(n: int, d: int, v: int, s: int | None = None) -> dict[str, Any]:
    """N, D, V, S, K, dtype of a row."""
    return {"N": n, "D": d, "V": v, "S": s, "K": K, "dtype": "float32"}


def sampled_tf(context: Context) -> list[Row]:
    """tf.nn.sampled_softmax_loss with sparse Adagrad; both draw distinct log-uniform candidates and train biases."""
    rows = []
    for n, d, s in TF_SHAPES[: 1 if context.quick else None]:
        shape = shape_of(n, d, 100_000 if context.quick else 1_000_000, s)
        start = partial(context.side, "tf_sampled", shape, environment="tensorflow")
        name = f"tensorflow N={n} D={d} S={s}"
        rows.append(against(context, "sampled-tf", name, shape, {**ADAGRAD, "bias": True}, start))
    return rows


def remote_module(context: Context) -> list[Row]:
    """A hivemind expert around cross entropy: forward, backward and SGD at the server."""
    shape = shape_of(256, 128, 20_000 if context.quick else 100_000)
    start = partial(context.side, "hivemind_expert", shape, environment="hivemind")
    return [against(context, "remote-module", "hivemind", shape, {"kind": "full", "optimizer": "sgd"}, start)]


def parameter_server(context: Context) -> list[Row]:
    """Rows pulled, gradients pushed: time and bytes."""
    shape = shape_of(256, 128, 100_000 if context.quick else 1_000_000, 4096)
    start = partial(context.side, "parameter_server", shape)
    rival = "torch.distributed.rpc"
    return [against(context, "parameter-server", rival, shape, {**ADAGRAD, "bias": True}, start, note=PAYLOAD)]
