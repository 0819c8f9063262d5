"""The functions of shardloss.compat have the frameworks' arguments, with the same names, order and defaults."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

# One entry per function: our dotted name below shardloss.compat -> the framework's signature.

TENSORFLOW = {  # TensorFlow 2.21
    "tensorflow.sampled_softmax_loss": (
        "(weights, biases, labels, inputs, num_sampled, num_classes, num_true=1, sampled_values=None, "
        "remove_accidental_hits=True, seed=None, name='sampled_softmax_loss')"
    ),
    "tensorflow.v1.sampled_softmax_loss": (
        "(weights, biases, labels, inputs, num_sampled, num_classes, num_true=1, sampled_values=None, "
        "remove_accidental_hits=True, partition_strategy='mod', name='sampled_softmax_loss', seed=None)"
    ),
    "tensorflow.nce_loss": (
        "(weights, biases, labels, inputs, num_sampled, num_classes, num_true=1, sampled_values=None, "
        "remove_accidental_hits=False, name='nce_loss')"
    ),
    "tensorflow.v1.nce_loss": (
        "(weights, biases, labels, inputs, num_sampled, num_classes, num_true=1, sampled_values=None, "
        "remove_accidental_hits=False, partition_strategy='mod', name='nce_loss')"
    ),
    "tensorflow.in_top_k": "(targets, predictions, k, name=None)",
    "tensorflow.v1.in_top_k": "(predictions, targets, k, name=None)",
}
TENSORFLOW_BOTH_VERSIONS = {  # the same in tf.compat.v1
    "compute_accidental_hits": "(true_classes, sampled_candidates, num_true, seed=None, name=None)",
    "all_candidate_sampler": "(true_classes, num_true, num_sampled, unique, seed=None, name=None)",
    "uniform_candidate_sampler": "(true_classes, num_true, num_sampled, unique, range_max, seed=None, name=None)",
    "log_uniform_candidate_sampler": "(true_classes, num_true, num_sampled, unique, range_max, seed=None, name=None)",
    "learned_unigram_candidate_sampler": (
        "(true_classes, num_true, num_sampled, unique, range_max, seed=None, name=None)"
    ),
    "fixed_unigram_candidate_sampler": (
        "(true_classes, num_true, num_sampled, unique, range_max, vocab_file='', distortion=1.0, num_reserved_ids=0, "
        "num_shards=1, shard=0, unigrams=(), seed=None, name=None)"
    ),
}
TFRS = {  # tensorflow_recommenders v0.7.7
    "tfrs.Retrieval": (
        "(loss=None, metrics=None, batch_metrics=None, loss_metrics=None, temperature=None, num_hard_negatives=None, "
        "remove_accidental_hits=False, name=None)"
    ),
    "tfrs.Retrieval.call": (
        "(self, query_embeddings, candidate_embeddings, sample_weight=None, candidate_sampling_probability=None, "
        "candidate_ids=None, compute_metrics=True, compute_batch_metrics=True, score_mask=None)"
    ),
}
PADDLE = {  # paddle.nn.functional 3.3.1; the sampled loss is from paddle.fluid.layers, which Paddle 3 has removed
    "paddle.softmax_with_cross_entropy": (
        "(logits, label, soft_label=False, ignore_index=-100, numeric_stable_mode=True, return_softmax=False, axis=-1)"
    ),
    "paddle.cross_entropy": (
        "(input, label, weight=None, ignore_index=-100, reduction='mean', soft_label=False, axis=-1, use_softmax=True, "
        "label_smoothing=0.0, name=None)"
    ),
    "paddle.sampled_softmax_with_cross_entropy": (
        "(logits, label, num_samples, num_true=1, remove_accidental_hits=True, use_customized_samples=False, "
        "customized_samples=None, customized_probabilities=None, seed=0)"
    ),
    "paddle.margin_cross_entropy": (
        "(logits, label, margin1=1.0, margin2=0.5, margin3=0.0, scale=64.0, group=None, return_softmax=False, "
        "reduction='mean')"
    ),
    "paddle.class_center_sample": "(label, num_classes, num_samples, group=None)",
}
SIGNATURES = {
    **TENSORFLOW,
    **{f"tensorflow.{name}": signature for name, signature in TENSORFLOW_BOTH_VERSIONS.items()},
    **{f"tensorflow.v1.{name}": signature for name, signature in TENSORFLOW_BOTH_VERSIONS.items()},
    **TFRS,
    **PADDLE,
}
OWN = {  # functions that the framework does not have
    "paddle.optimizer",
    "tensorflow.full_sigmoid_loss",
    "tensorflow.full_softmax_loss",
    "tensorflow.optimizer",
    "tfrs.optimizer",
}


def found(name: str) -> Any:
    """Return the object with this dotted name below shardloss.compat."""
    thing: Any = importlib.import_module(f"shardloss.compat.{name.split('.', maxsplit=1)[0]}")
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def signature_of(function: Any) -> str:
    """Return a function's signature as text, without annotations."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_frameworks(name: str) -> None:
    """The arguments have the framework's names, order and defaults."""
    assert signature_of(found(name)) == SIGNATURES[name]


@pytest.mark.parametrize("module", sorted({name.rpartition(".")[0] for name in SIGNATURES} - {"tfrs.Retrieval"}))
def test_every_public_function_has_a_signature_to_keep(module: str) -> None:
    """Every public function is listed above with its framework's signature, or has no counterpart there."""
    public = found(module)
    functions = {f"{module}.{name}" for name in public.__all__ if inspect.isfunction(getattr(public, name))}
    assert functions <= SIGNATURES.keys() | OWN


@pytest.mark.parametrize("name", TENSORFLOW_BOTH_VERSIONS)
def test_both_versions_share_one_sampler(name: str) -> None:
    """The v1 and v2 functions are the same object, so their calls share one sequence of draws."""
    assert found(f"tensorflow.{name}") is found(f"tensorflow.v1.{name}")
