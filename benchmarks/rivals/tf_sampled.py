"""TensorFlow's sampled softmax with sparse Adagrad, all in one tf.function. Runs in .venv-tensorflow.

The update sums repeated rows and then uses TensorFlow's own sparse kernel, like its AdagradOptimizer of version 1.
Keras 3's Adagrad takes the root of the whole accumulator in each step, which is 3.5 times as slow at V = 300k and gets
slower with V.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

from benchmarks.rivals.batches import NUM_BATCHES, batches
from benchmarks.rivals.protocol import serve

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf  # reads the variables above

LEARNING_RATE = 0.1
FIRST_ACCUMULATOR = 0.1
EPSILON = 1e-10
THREADS = 2  # inside an op; ops run one after another, as two at once were no faster


class SampledSoftmax:
    """The weights [V, D] and biases [V] with their accumulators."""

    def __init__(self, shape: dict[str, Any]) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(THREADS)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.random.set_seed(0)
        num_classes, dim = shape["V"], shape["D"]
        bound = dim**-0.5
        self.weights = tf.Variable(tf.random.uniform([num_classes, dim], -bound, bound))
        self.biases = tf.Variable(tf.zeros([num_classes]))
        self.accumulators = [tf.Variable(tf.fill(v.shape, FIRST_ACCUMULATOR)) for v in (self.weights, self.biases)]
        pool = [(tf.constant(h), tf.constant(y[:, None])) for h, y in islice(batches(shape), NUM_BATCHES)]
        self.batches = cycle(pool)
        self.num_sampled, self.num_classes = shape["S"], num_classes
        self.graph = tf.function(self._step)

    def versions(self) -> Mapping[str, str]:
        return {"tensorflow": str(tf.__version__)}

    def step(self) -> None:
        _, hidden_grad = self.graph(*next(self.batches))
        hidden_grad.numpy()  # waits for the result

    def _step(self, hidden: Any, labels: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            losses = tf.nn.sampled_softmax_loss(
                self.weights, self.biases, labels, hidden, self.num_sampled, self.num_classes
            )
            loss = tf.reduce_mean(losses)
        *of_rows, hidden_grad = tape.gradient(loss, [self.weights, self.biases, hidden])
        for variable, accumulator, gradient in zip(
            (self.weights, self.biases), self.accumulators, of_rows, strict=True
        ):
            adagrad(variable, accumulator, gradient)
        return loss, hidden_grad


def adagrad(variable: Any, accumulator: Any, gradient: Any) -> None:
    """Update the rows of an IndexedSlices gradient; repeated rows are summed first."""
    ids, place = tf.unique(gradient.indices)
    summed = tf.math.unsorted_segment_sum(gradient.values, place, tf.shape(ids)[0])
    tf.raw_ops.ResourceSparseApplyAdagradV2(
        var=variable.handle, accum=accumulator.handle, lr=LEARNING_RATE, epsilon=EPSILON, grad=summed, indices=ids
    )


if __name__ == "__main__":
    serve(SampledSoftmax)
