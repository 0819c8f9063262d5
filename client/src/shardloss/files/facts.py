"""The description of a table in a file, as JSON, and the tensors that belong to such a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardloss import types
from shardloss.errors import BadFile
from shardloss.files.stored import Shape, Stored
from shardloss.messages import OPTIMIZER_FIELDS

FORMAT_VERSION = 1
WEIGHTS, BIASES, COUNTS, LEARNED = "weights", "biases", "class_counts", "learned_counts"
OF_WEIGHTS, OF_BIASES = "state.weights.", "state.biases."
OPTIMIZERS = {name: kind for kind, name in OPTIMIZER_FIELDS.items()}
INITIALIZERS = {"normal": types.Normal, "uniform": types.Uniform, "zeros": types.Zeros}
KINDS = {kind: name for name, kind in (*OPTIMIZERS.items(), *INITIALIZERS.items())}
NUMBERS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: type(value) is bool,
    "int": lambda value: type(value) is int and 0 <= value < 1 << 64,
    "float": lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
}
SPEC = {
    "name": str,
    "num_classes": int,
    "dim": int,
    "dtype": str,
    "bias": bool,
    "num_shards": int,
    "placement": str,
    "initializer": dict,
    "optimizer": dict,
    "count_labels": bool,
}


@dataclass(frozen=True, slots=True)
class Facts:
    """The description of an exported table; version and last_version differ if it was trained during the export."""

    spec: types.TableInfo
    version: int
    last_version: int
    num_commits: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a JSON object."""
        spec = {name: getattr(self.spec, name) for name in SPEC}
        spec["optimizer"], spec["initializer"] = of_kind(self.spec.optimizer), of_kind(self.spec.initializer)
        numbers = {"version": self.version, "last_version": self.last_version, "num_commits": self.num_commits}
        return {"format_version": FORMAT_VERSION, **numbers, "spec": spec}

    @staticmethod
    def from_json(found: Any, path: Path) -> Facts:
        """Read the facts of a file from JSON.

        Raises:
            BadFile: the facts are malformed, or of a different format version.
        """
        if not isinstance(found, dict):
            raise BadFile(f"{path}: the description of its table is not a JSON object")
        format_version = checked(found, "format_version", int, path)
        if format_version != FORMAT_VERSION:
            raise BadFile(
                f"{path} has format version {format_version}; this client reads {FORMAT_VERSION}: update the client"
            )
        version, last, commits = (
            checked(found, name, int, path) for name in ("version", "last_version", "num_commits")
        )
        return Facts(spec_of(checked(found, "spec", dict, path), version, commits, path), version, last, commits)

    def moved_to(self, version: int, num_commits: int) -> Facts:
        """Return the facts with the version and commits of the last page that was read."""
        return replace(self, last_version=version, num_commits=num_commits)


def of_kind(value: types.Optimizer | types.Initializer) -> dict[str, Any]:
    """Return the kind and the numbers of an optimizer or an initializer."""
    return {"kind": KINDS[type(value)], **asdict(value)}


def checked(found: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """Return an entry of the given type; an integer must be in [0, 2^63).

    Raises:
        BadFile: the entry is missing, of a wrong type or out of range.
    """
    value = found.get(name)
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 63):
        raise BadFile(f"{path}: {name} is {str(value)[:60]!r}; {kind.__name__} is needed")
    return value


def made(kinds: Mapping[str, Any], found: Mapping[str, Any], what: str, path: Path) -> Any:
    """Create an optimizer or an initializer from its kind and numbers.

    Raises:
        BadFile: the kind is unknown, or its numbers are not those of the kind or not numbers.
    """
    kind = kinds.get(str(found.get("kind")))
    if kind is None:
        raise BadFile(f"{path}: {what}.kind is {str(found.get('kind'))[:60]!r}; one of {', '.join(kinds)} is needed")
    numbers = {name: value for name, value in found.items() if name != "kind"}
    kinds_of = {field.name: str(field.type) for field in fields(kind)}
    if numbers.keys() != kinds_of.keys():
        raise BadFile(f"{path}: {what} has {sorted(numbers)}, which are not the numbers of {kind.__name__}")
    for name, value in numbers.items():
        if not NUMBERS[kinds_of[name]](value):
            raise BadFile(f"{path}: {what}.{name} is {str(value)[:60]!r}; {kinds_of[name]} is needed")
    return kind(**numbers)


def spec_of(found: Mapping[str, Any], version: int, num_commits: int, path: Path) -> types.TableInfo:
    """Return the spec in a file; some checks are left to the server, which alone can make them."""
    values = {name: checked(found, name, kind, path) for name, kind in SPEC.items()}
    values["optimizer"] = made(OPTIMIZERS, values["optimizer"], "optimizer", path)
    values["initializer"] = made(INITIALIZERS, values["initializer"], "initializer", path)
    if values["dtype"] not in ("float32", "float64", "bfloat16"):
        raise BadFile(f"{path}: dtype {values['dtype'][:40]!r} is not a dtype of tables")
    if values["placement"] not in ("mod", "div"):
        raise BadFile(f"{path}: placement {values['placement'][:40]!r} is neither mod nor div")
    if values["num_classes"] < 1 or values["dim"] < 1:
        raise BadFile(f"{path}: num_classes and dim must be at least 1")
    return types.TableInfo(**values, version=version, num_commits=num_commits, num_open_tickets=0)


def shapes(spec: types.TableInfo, with_counts: bool) -> dict[str, Shape]:
    """Return the shape of every tensor of such a table, wide dtypes first so that tensors are aligned in the file."""
    num_classes, wide = spec.num_classes, "float64" if spec.dtype == "float64" else "float32"
    found = {WEIGHTS: Shape(spec.dtype, (num_classes, spec.dim))}
    for name, width in types.state_widths(spec.optimizer, spec.dim).items():
        found[OF_WEIGHTS + name] = Shape(wide, (num_classes, width))
    if spec.bias:
        found[BIASES] = Shape(wide, (num_classes,))
        for name, width in types.state_widths(spec.optimizer, 1).items():
            found[OF_BIASES + name] = Shape(wide, (num_classes, width))
    if with_counts:
        found[COUNTS] = Shape("float64", (num_classes,))
    if spec.count_labels:
        found[LEARNED] = Shape("int64", (num_classes,))
    order = ("float64", "int64", "float32", "bfloat16")
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].dtype)))


def check_tensors(facts: Facts, tensors: Mapping[str, Stored], path: Path) -> None:
    """Check that a file contains exactly the tensors of its table.

    Raises:
        BadFile: a tensor is missing, of a wrong shape or unknown; the message names the first.
    """
    needed = shapes(facts.spec, COUNTS in tensors)
    for name, shape in needed.items():
        if name not in tensors:
            raise BadFile(f"{path} lacks {name}, {shape}, which its table needs")
        if tensors[name].shape != shape:
            raise BadFile(f"{path}: {name} is {tensors[name].shape}; its table needs {shape}")
    for name in tensors:
        if name not in needed:
            raise BadFile(f"{path}: {name[:60]!r} belongs to no table of this spec")
