"""Our functions of a framework's name take its parameters: the same names, order and defaults.

The originals' parameters are written down here from their documentation, so that a change of ours shows.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

# By module of ours: what each original takes, written as in Python.
PADDLE = {  # paddle.nn.functional 3.3.1; the sampled one is of paddle.fluid.layers, which Paddle 3 no longer has
    "softmax_with_cross_entropy": (
        "logits, label, soft_label=False, ignore_index=-100, numeric_stable_mode=True, return_softmax=False, axis=-1"
    ),
    "cross_entropy": (
        "input, label, weight=None, ignore_index=-100, reduction='mean', soft_label=False, axis=-1, use_softmax=True, "
        "label_smoothing=0.0, name=None"
    ),
    "sampled_softmax_with_cross_entropy": (
        "logits, label, num_samples, num_true=1, remove_accidental_hits=True, use_customized_samples=False, "
        "customized_samples=None, customized_probabilities=None, seed=0"
    ),
    "margin_cross_entropy": (
        "logits, label, margin1=1.0, margin2=0.5, margin3=0.0, scale=64.0, group=None, return_softmax=False, "
        "reduction='mean'"
    ),
    "class_center_sample": "label, num_classes, num_samples, group=None",
}
ORIGINALS = {"shardloss.compat.paddle": PADDLE}
OURS = {"shardloss.compat.paddle": {"optimizer"}}  # public names beside the originals'


def parameters(function: object) -> str:
    """The parameters of a function as written in Python, without their types."""
    assert callable(function)
    signature = inspect.signature(function)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(
    "module, name, original",
    [(module, name, original) for module, all_of in ORIGINALS.items() for name, original in all_of.items()],
)
def test_a_function_takes_what_the_original_takes(module: str, name: str, original: str) -> None:
    """Names, order, defaults, and which may be given by position."""
    assert parameters(getattr(importlib.import_module(module), name)) == f"({original})"


@pytest.mark.parametrize("module", ORIGINALS)
def test_every_public_function_is_an_original_or_known_as_ours(module: str) -> None:
    """A new one is written down here before it is public."""
    public = set(importlib.import_module(module).__all__)
    assert public == set(ORIGINALS[module]) | OURS[module]
