"""Options whose value is a kind with numeric parameters: `adam:beta1=0.8,eps=1e-6`, `normal:stddev=0.02`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from shardloss import types
from shardloss.files.facts import INITIALIZERS, OPTIMIZERS


def numbered(kinds: Mapping[str, Any], text: str, option: str) -> Any:
    """Parse KIND or KIND:NAME=NUMBER,... into the dataclass of its kind."""
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(kinds)}", param_hint=option)
    known = {field.name: field.type for field in fields(kinds[name])}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise typer.BadParameter(f"{name} has no parameter {key!r}; it has {', '.join(known)}", param_hint=option)
        given[key] = number(value, str(known[key]), f"{option} {key}")
    try:
        return kinds[name](**given)
    except TypeError:
        needed = next(field.name for field in fields(kinds[name]) if field.name not in given)
        raise typer.BadParameter(f"{name} needs {needed}: write {name}:{needed}=...", param_hint=option) from None


def number(text: str, kind: str, option: str) -> float | int | bool:
    """Parse a float, an int or a bool (true or false), as the field's type requires."""
    readers: dict[str, Any] = {"float": float, "int": int, "bool": {"true": True, "false": False}.__getitem__}
    try:
        value: float | int | bool = readers[kind](text)
    except (ValueError, KeyError):
        raise typer.BadParameter(f"{text!r} is not of type {kind}", param_hint=option) from None
    return value


def optimizer(text: str | None) -> types.Optimizer | None:
    """Parse the value of --optimizer; None if it was not given."""
    made: types.Optimizer | None = None if text is None else numbered(OPTIMIZERS, text, "--optimizer")
    return made


def initializer(text: str | None) -> types.Initializer | None:
    """Parse the value of --initializer; None if it was not given."""
    made: types.Initializer | None = None if text is None else numbered(INITIALIZERS, text, "--initializer")
    return made


Shards = Annotated[int, typer.Option(min=0, help="Number of shards K; 0: one per worker.")]
DTypeOption = Annotated[str | None, typer.Option(help="Dtype of the stored rows: float32, float64 or bfloat16.")]
OptimizerOption = Annotated[
    str | None,
    typer.Option(
        "--optimizer", help=f"KIND or KIND:NAME=NUMBER,...; KIND is one of {', '.join(OPTIMIZERS)}. Default: sgd."
    ),
]
InitializerOption = Annotated[
    str | None,
    typer.Option(
        "--initializer",
        help="normal:stddev=S, uniform:limit=L or zeros, each with seed=N. Default: uniform, 1/sqrt(dim).",
    ),
]
CountLabels = Annotated[bool, typer.Option("--count-labels", help="Count the labels of commits, for learned_unigram.")]
