"""The output of a run: progress, tables, a picture and the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.cities.evaluate import Figures
from examples.cities.model import Answer
from examples.cities.settings import Settings
from examples.cities.train import Curve

RECENT = 20  # steps over which the shown loss and speed are averaged
LINE_S = 10.0
SMOOTH = 50  # steps in the running mean of the picture


@contextmanager
def progress(console: Console, num_steps: int) -> Iterator[Callable[[Curve], None]]:
    """Show a bar with the loss and the rows per second of the last steps; yield a function to call after each step.

    Without a terminal, as in a container's log, print a line every LINE_S seconds instead.
    """
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rows_per_s]:,.0f} rows/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("training", total=num_steps, loss=float("nan"), rows_per_s=0.0)

        next_line_s = LINE_S

        def on_step(curve: Curve) -> None:
            nonlocal next_line_s
            num_done, loss, speed = len(curve.losses), float(np.mean(curve.losses[-RECENT:])), recent_speed(curve)
            bar.update(task, completed=num_done, loss=loss, rows_per_s=speed)
            if not console.is_terminal and curve.train_s >= next_line_s:
                console.print(f"training: {num_done:,} of {num_steps:,} steps, loss {loss:.3f}, {speed:,.0f} rows/s")
                next_line_s = curve.train_s + LINE_S

        yield on_step


@contextmanager
def evaluating(console: Console, num_names: int, when: str) -> Iterator[Callable[[int], None]]:
    """Show the number of names evaluated so far, and yield a function that updates it; when is "before" or "after"."""

    def text(done: int) -> str:
        return f"evaluating {when} training: {done:,} of {num_names:,} names"

    with console.status(text(0)) as status:
        yield lambda done: status.update(text(done))


def recent_speed(curve: Curve) -> float:
    """Return rows per second over the last steps."""
    seconds = [0.0, *curve.seconds][-RECENT - 1 :]
    return curve.batch * (len(seconds) - 1) / max(1e-9, seconds[-1] - seconds[0])


def print_figures(console: Console, figures: Mapping[str, Figures], num_names: int, num_classes: int) -> None:
    """Print the figures before training, after training and of the baseline, one row each."""
    table = Table(title=f"exact figures of {num_names:,} held-out names over all {num_classes:,} cities")
    for heading in ("", "nats", "hit@1", "hit@10", "MRR", "sampled - exact"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, row in figures.items():
        gap = "" if row.gap is None else f"{row.gap:+.3f}"
        table.add_row(title, f"{row.nll:.3f}", f"{row.hit_at_1:.4f}", f"{row.hit_at_10:.4f}", f"{row.mrr:.4f}", gap)
    console.print(table)


def print_answers(console: Console, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Print the best places for each name with their probabilities."""
    table = Table(title="answers", show_lines=True)
    table.add_column("name")
    table.add_column("places")
    for name, best in answers.items():
        table.add_row(name, "\n".join(f"{answer.probability:6.1%}  {answer.place}" for answer in best))
    console.print(table)


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw the loss of every step over the seconds of training, and its running mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = min(SMOOTH, len(curve.losses))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(curve.seconds, curve.losses, color="0.8", linewidth=0.8, label="one step")
    mean = np.convolve(curve.losses, np.full(width, 1 / width), "valid")
    axes.plot(curve.seconds[width - 1 :], mean, label=f"mean of {width} steps")
    axes.set(xlabel="seconds of training", ylabel="sampled loss, nats", title="City finder")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_result(path: Path, figures: Mapping[str, Figures], curve: Curve, settings: Settings, num_names: int) -> None:
    """Write the figures as JSON: before, after, baseline, rows_per_s, train_s, seed, eval_names."""
    result = {
        **{title: asdict(row) for title, row in figures.items()},
        "rows_per_s": round(curve.rows_per_s, 1),
        "train_s": round(curve.train_s, 1),
        "seed": settings.seed,
        "eval_names": num_names,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
