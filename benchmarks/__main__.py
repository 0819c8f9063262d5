"""Benchmarks of the service: `python -m benchmarks run` measures the scenarios.

`soak` measures memory over many steps, `profile` reports where a step's time goes, and `gpu` compares the shard
kernels on a GPU.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report, soak
from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.scenarios import NOT_IN_QUICK, SCENARIOS
from benchmarks.side import ROOT

NUM_CORES = 2
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
FULL_OUT, QUICK_OUT = ROOT / "benchmarks", ROOT / "build" / "bench-quick"
Only = Annotated[list[str] | None, typer.Option(help="Measure only this scenario and keep other rows; repeatable.")]


@app.callback()
def main() -> None:
    """Handle SIGTERM like Ctrl-C: end the run with the service and every side."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command()
def run(
    quick: Annotated[bool, typer.Option(help="Use smaller shapes and few steps to check that it all works.")] = False,
    only: Only = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the results.")] = None,
) -> None:
    """Measure the scenarios, and write results.json, RESULTS.md and ratios.png after each one."""
    unknown = set(only or ()) - set(SCENARIOS)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; the scenarios are {', '.join(SCENARIOS)}")
    keep_to_cores()
    directory = out or (QUICK_OUT if quick else FULL_OUT)
    names = only or [name for name in SCENARIOS if not (quick and name in NOT_IN_QUICK)]
    rows = report.read(directory) if only else []
    with Context(quick) as context:
        for name in names:
            rows = report.merged(rows, name, rows_of(name, context))
            report.write(rows, directory, list(SCENARIOS), quick)
    typer.echo(f"wrote {directory / 'RESULTS.md'}")


def keep_to_cores() -> None:
    """Restrict this process, and all processes that it starts, to NUM_CORES cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])


def rows_of(name: str, context: Context) -> list[Row]:
    """Run a scenario, print its rows and return them; if it raises, return a row with the reason and go on."""
    began = time.monotonic()
    try:
        rows = SCENARIOS[name](context)
    except Exception as error:
        traceback.print_exc()
        rows = [missing(name, "(the scenario failed)", {}, f"{type(error).__name__}: {error}")]
    rows = [row.but(day=date.today().isoformat()) for row in rows]
    for row in rows:
        told = row.reason or f"ratio {report.number(row.ratio) or '-'} (goal {report.number(row.goal.ratio) or '-'})"
        typer.echo(f"{row.scenario}, {row.rival}: {report.one_line(told)}")
    typer.echo(f"{name} took {time.monotonic() - began:.0f} s")
    return rows


@app.command(name="report")
def report_command(
    quick: Annotated[bool, typer.Option(help="Use the results of the quick run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory of the results.")] = None,
) -> None:
    """Write RESULTS.md and ratios.png again from results.json, without measuring."""
    directory = out or (QUICK_OUT if quick else FULL_OUT)
    report.write(report.read(directory), directory, list(SCENARIOS), quick)


@app.command(name="profile")
def profile_command(
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each shape.")] = 40,
    picture: Annotated[Path, typer.Option(help="Path of the picture.")] = ROOT / "docs" / "performance.png",
    out: Annotated[Path, typer.Option(help="Directory for profile.json.")] = ROOT / "build",
) -> None:
    """Report where the time of one training step goes, as figures and a picture."""
    from benchmarks import profile  # imports Ray, which other commands leave to the service

    keep_to_cores()
    profile.run(picture, out, steps)
    typer.echo(f"wrote {picture} and {out / 'profile.json'}")


@app.command(name="gpu")
def gpu_command(out: Annotated[Path, typer.Option(help="Directory for results-gpu.json.")] = FULL_OUT) -> None:
    """Compare the shard kernels with local losses on a CUDA GPU; without one, report that and write nothing."""
    from benchmarks import gpu  # imports torch, which other commands leave to their sides

    typer.echo(gpu.run(out))


@app.command(name="soak")
def soak_command(
    steps: Annotated[int, typer.Option(min=200, help="Number of training steps.")] = 10_000,
    out: Annotated[Path, typer.Option(help="Directory for soak.json.")] = FULL_OUT,
) -> None:
    """Train a small table for many steps; exit with 1 if the memory of any process, or /dev/shm, keeps growing."""
    found = soak.run(steps, out)
    typer.echo(report.one_line(str(found)))
    if not found["met"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
