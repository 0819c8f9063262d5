"""The shard kernels against local losses on a GPU, and the share of the three bare GEMMs' speed that each reaches.

Contenders are built, measured and freed one at a time, as several do not fit together. The GEMMs are measured right
before each contender, so that both see the same GPU clock.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu_contenders import CONTENDERS, OURS, Problem, Step, problem

N, V, DTYPE = 4096, 1_000_000, "bfloat16"
GOALS = {1024: 0.80, 512: 0.70}  # by D: the share of the floor that ours must reach
WARM, COUNTED = 5, 20
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
NO_GPU = "there is no CUDA GPU: the speed of the shard kernels was not measured, and nothing was written"
SIZES = ("peak MiB", "built MiB")
FIGURES = ("ms (min)", "3 GEMMs ms", "share of the floor", "goal", "met", *SIZES, "loss", "reason")
HEADER = ("N", "D", "V", "dtype", "contender", *FIGURES)


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One contender at one shape: medians in ms, bytes on the GPU, its first loss; reason says why there are none."""

    contender: str
    shape: dict[str, Any]
    floor_ms: float | None = None
    ms: float | None = None
    min_ms: float | None = None
    built_bytes: int | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    goal: float | None = None
    reason: str | None = None

    @property
    def share(self) -> float | None:
        """Share of the floor: 1 is as fast as the GEMMs alone."""
        return None if self.ms is None or self.floor_ms is None else self.floor_ms / self.ms

    @property
    def met(self) -> bool | None:
        """True if the goal is reached; None without a goal or figures."""
        return None if self.goal is None or self.share is None else self.share >= self.goal

    def as_json(self) -> dict[str, Any]:
        """Return the fields with the derived share and met."""
        return {**asdict(self), "share": self.share, "met": self.met}


def run(directory: Path) -> str:
    """Compare on the GPU, write the results and return a message; without a GPU, measure and write nothing."""
    if not torch.cuda.is_available():
        return NO_GPU
    rows: list[GpuRow] = []
    for d, goal in GOALS.items():
        rows += compare(N, d, V, DTYPE, "cuda", goal=goal)
        write(rows, directory, torch.cuda.get_device_name())
    return f"wrote {directory / 'RESULTS-gpu.md'}"


def compare(
    n: int,
    d: int,
    v: int,
    dtype: str,
    device: str,
    *,
    goal: float | None = None,
    names: Iterable[str] = tuple(CONTENDERS),
    warm: int = WARM,
    counted: int = COUNTED,
) -> list[GpuRow]:
    """Return a row for each contender; if a contender is missing or fails, its row has the reason."""
    given = problem(n, d, v, dtype, device)
    shape = {"N": n, "D": d, "V": v, "dtype": dtype}
    rows = []
    for name in names:
        row = GpuRow(name, shape, goal=goal if name == OURS else None)
        try:
            rows.append(measured(row, given, CONTENDERS[name], warm, counted))
        except Exception as error:  # any error of a contender becomes its row's reason
            rows.append(replace(row, reason=f"{type(error).__name__}: {report.one_line(str(error))[:300]}"))
        free(device)
    return rows


def measured(row: GpuRow, given: Problem, build: Callable[[Problem], Step], warm: int, counted: int) -> GpuRow:
    """Measure the floor, then one contender."""
    device = given.hidden.device
    floor_ms = median(times_ms(gemms(given), device, warm, counted))
    free(device.type)
    before = allocated(device)
    step = build(given)
    built = allocated(device)
    loss = float(step())
    for _ in range(warm):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = times_ms(step, device, 0, counted)
    row = replace(row, floor_ms=floor_ms, ms=median(found), min_ms=min(found), loss=loss)
    if built is None or before is None:
        return row
    return replace(row, built_bytes=built - before, peak_bytes=torch.cuda.max_memory_allocated() - before)


def gemms(given: Problem) -> Callable[[], object]:
    """Return a step that computes the three products that every contender needs, into preallocated outputs."""
    hidden, rows = given.hidden, given.rows
    logits = torch.empty(len(hidden), len(rows), dtype=rows.dtype, device=rows.device)
    hidden_grad, row_grad = torch.empty_like(hidden), torch.empty_like(rows)

    def step() -> None:
        torch.mm(hidden, rows.T, out=logits)
        torch.mm(logits, rows, out=hidden_grad)
        torch.mm(logits.T, hidden, out=row_grad)

    return step


def times_ms(step: Callable[[], object], device: torch.device, warm: int, counted: int) -> list[float]:
    """Return the time of each counted step in ms, measured by CUDA events on a GPU."""
    for _ in range(warm):
        step()
    return [time_ms(step, device) for _ in range(counted)]


def time_ms(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one step."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def allocated(device: torch.device) -> int | None:
    """Return the bytes of tensors on a GPU, or None for another device."""
    return int(torch.cuda.memory_allocated()) if device.type == "cuda" else None


def free(device: str) -> None:
    """Free the memory of the last contender."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def write(rows: Sequence[GpuRow], directory: Path, gpu: str) -> None:
    """Write results-gpu.json and RESULTS-gpu.md."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {"date": date.today().isoformat(), "gpu": gpu, "versions": versions(), "rows": [r.as_json() for r in rows]}
    report.finished(directory / "results-gpu.json", json.dumps(found, indent=1) + "\n")
    report.finished(directory / "RESULTS-gpu.md", markdown(rows, gpu))


def markdown(rows: Sequence[GpuRow], gpu: str) -> str:
    """Return the text of RESULTS-gpu.md."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Results on a GPU",
        "",
        f"{date.today().isoformat()}. {gpu}. {known}.",
        f"Each step is forward + backward + SGD, timed by CUDA events: median of {COUNTED} after {WARM} warm-up steps.",
        "The floor is three bare `torch.mm` calls of the same shapes, measured right before each contender.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def cells(row: GpuRow) -> list[str]:
    """Return the cells of one line of the table."""
    return [
        *(str(row.shape[key]) for key in ("N", "D", "V", "dtype")),
        row.contender,
        report.with_least(row.ms, row.min_ms),
        report.number(row.floor_ms),
        report.number(row.share),
        report.number(row.goal),
        {True: "yes", False: "no", None: ""}[row.met],
        *("" if size is None else f"{size / 2**20:.0f}" for size in (row.peak_bytes, row.built_bytes)),
        report.number(row.loss),
        row.reason or "",
    ]


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
