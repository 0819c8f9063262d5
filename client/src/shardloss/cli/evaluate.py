"""`shardloss evaluate`: exact figures over a data set in files, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from shardloss import types
from shardloss.cli.invocation import Invocation, command
from shardloss.cli.output import grid, progress
from shardloss.errors import BadFile
from shardloss.files import Stored, open_file
from shardloss.files.importing import FLOATS, widened
from shardloss.wire import Array

INTEGERS = ("int64", "int32")


def tensor(path: Path, name: str, what: str, rank: int, dtypes: tuple[str, ...]) -> Stored:
    """The one array of a .npy file, or a tensor of a safetensors file."""
    opened = open_file(path)
    found = opened.tensor(next(iter(opened.tensors)) if path.suffix == ".npy" else name, what, rank)
    if found.shape.dtype not in dtypes:
        raise BadFile(f"{path}: {what} are {found.shape}; one of {', '.join(dtypes)} is needed")
    return found


def batches(hidden: Stored, labels: Stored, size: int) -> Iterator[tuple[Array, Array]]:
    """Rows of both, so many at a time."""
    for start in range(0, hidden.num_rows, size):
        rows = hidden.read(start, start + size)
        yield (widened(rows) if hidden.shape.dtype == "bfloat16" else rows), labels.read(start, start + size)


@command
def evaluate(
    call: Invocation,
    table: Annotated[str, typer.Argument(help="Name of the table.")],
    hidden: Annotated[Path, typer.Option(help="Hidden activations [N, D]: .npy, or safetensors.")],
    labels: Annotated[Path, typer.Option(help="True classes [N]: .npy, or safetensors.")],
    hidden_name: Annotated[str, typer.Option(help="Tensor of a safetensors file.")] = "hidden",
    labels_name: Annotated[str, typer.Option(help="Tensor of a safetensors file.")] = "labels",
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="Report the hit rate at k; repeat it. Default: 1, 10.")
    ] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of rows that do not count.")] = -100,
    scale: Annotated[float, typer.Option(help="Logits times this: 1 / temperature.")] = 1.0,
    soft_cap: Annotated[float | None, typer.Option(help="Cap of the logits, as the model was trained.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Logits are cosines.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are read at a time.")] = 1024,
) -> None:
    """Exact negative log likelihood, hit rates and mean reciprocal rank over all classes of the live table."""
    rows = tensor(hidden, hidden_name, "hidden (--hidden-name)", 2, FLOATS)
    truth = tensor(labels, labels_name, "labels (--labels-name)", 1, INTEGERS)
    if truth.num_rows != rows.num_rows:
        raise BadFile(f"{labels} has {truth.num_rows} labels for {rows.num_rows} rows of {hidden}")
    with call.connection.connect() as client, progress(f"evaluate {table}") as bar:
        found = client.table(table).evaluate_batches(
            batches(rows, truth, batch),
            progress=lambda done: bar(done, rows.num_rows),
            ignore_index=ignore_index,
            logits=types.LogitTransform(scale, soft_cap, normalize),
        )
    result = figures(found, k or [1, 10])
    shown = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in result.items()]
    call.emit(result, lambda: grid(("", ""), shown))


def figures(found: types.EvaluationSummary, ks: list[int]) -> dict[str, Any]:
    """What is reported, by name; nats, shares and counts."""
    return {
        "rows": found.num_rows,
        "counted": found.num_counted,
        "nll": found.mean_loss,
        "perplexity": found.perplexity,
        **{f"hit@{k}": found.hit_rate(k) for k in dict.fromkeys(ks)},
        "mrr": found.mrr(),
        "version": found.version,
        "last_version": found.last_version,
    }
