"""`shardloss evaluate`: exact metrics of a data set in files, which are read one batch at a time."""

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
    """Return the array of a .npy file, or the named tensor of a safetensors file."""
    opened = open_file(path)
    found = opened.tensor(next(iter(opened.tensors)) if opened.is_array else name, what, rank)
    if found.shape.dtype not in dtypes:
        raise BadFile(f"{path}: {what} is {found.shape}; its dtype must be one of {', '.join(dtypes)}")
    return found


def batches(hidden: Stored, labels: Stored, size: int) -> Iterator[tuple[Array, Array]]:
    """Yield rows of hidden and labels, size rows at a time."""
    for start in range(0, hidden.num_rows, size):
        rows = hidden.read(start, start + size)
        yield (widened(rows) if hidden.shape.dtype == "bfloat16" else rows), labels.read(start, start + size)


@command
def evaluate(
    call: Invocation,
    table: Annotated[str, typer.Argument(help="Name of the table.")],
    hidden: Annotated[Path, typer.Option(help="File of the hidden activations [N, D]: .npy or safetensors.")],
    labels: Annotated[Path, typer.Option(help="File of the true classes [N]: .npy or safetensors.")],
    hidden_name: Annotated[str, typer.Option(help="Tensor in a safetensors file of --hidden.")] = "hidden",
    labels_name: Annotated[str, typer.Option(help="Tensor in a safetensors file of --labels.")] = "labels",
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="Report the hit rate at k; may be repeated. Default: 1 and 10.")
    ] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of rows to leave out.")] = -100,
    scale: Annotated[float, typer.Option(help="Factor of the logits: 1 / temperature.")] = 1.0,
    soft_cap: Annotated[float | None, typer.Option(help="Soft cap of the logits, as in training.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Use cosines as logits.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Number of rows to read at a time.")] = 1024,
) -> None:
    """Compute exact negative log likelihood, hit rates and mean reciprocal rank over all classes of the live table."""
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
    """Return the reported figures by name: in nats, as shares, or as counts."""
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
