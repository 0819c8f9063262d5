"""The results as results.json, RESULTS.md and ratios.png; all three are rewritten after each scenario."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.goals import GOALS, WHY_MISSED
from benchmarks.row import Row, row_of_json

HEADER = (
    "scenario",
    "rival",
    "shape",
    "ours ms (min)",
    "rival ms (min)",
    "ratio",
    "goal",
    "met",
    "visible ms",
    "visible ratio (goal)",
    "wire MB ours / rival",
    "peak MB ours / rival",
    "steps",
    "note",
)
WIDEST = 3.0  # ratio at the right edge of the picture
CARRIED = ("N", "D", "V", "S", "K", "dtype")


def write(rows: Sequence[Row], directory: Path, order: Sequence[str], is_quick: bool) -> None:
    """Write all three files, with rows in the order of their scenarios."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = in_order(rows, order)
    finished(directory / "results.json", json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    finished(directory / "RESULTS.md", markdown(rows, machine(), is_quick))
    draw(rows, directory / "ratios.png")


def finished(path: Path, text: str) -> None:
    """Replace a file atomically, so that an interrupted run leaves the previous one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def read(directory: Path) -> list[Row]:
    """Return the rows of an earlier run; none if there was no run."""
    path = directory / "results.json"
    return [row_of_json(found) for found in json.loads(path.read_text())] if path.exists() else []


def merged(earlier: Iterable[Row], scenario: str, rows: Iterable[Row]) -> list[Row]:
    """Return the earlier rows with those of one scenario replaced."""
    return [*(row for row in earlier if row.scenario != scenario), *rows]


def in_order(rows: Iterable[Row], order: Sequence[str]) -> list[Row]:
    """Sort rows by the position of their scenario in order; unknown scenarios are last."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(rows, key=lambda row: places.get(row.scenario, len(places)))


def machine() -> str:
    """Return the processor, cores, memory and system of this machine as text."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB, {platform.system()}"


def markdown(rows: Sequence[Row], of_machine: str, is_quick: bool) -> str:
    """Return the text of RESULTS.md."""
    kind = "quick run: smaller shapes and few steps; the figures only show that it works" if is_quick else "full run"
    lines = [
        "# Results",
        "",
        f"{days(rows)}, {kind}. {of_machine}. Python {platform.python_version()}, {versions(rows)}.",
        "How to read it: [README.md](README.md). Ratios are medians of ours divided by medians of the rival's.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
        *missed(rows, is_quick),
        "",
        "![ratios](ratios.png)",
        "",
    ]
    return "\n".join(lines)


def versions(rows: Iterable[Row]) -> str:
    """Return every version that a side reported, each package once."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row.versions.items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found))


def days(rows: Iterable[Row]) -> str:
    """Return the first and the last day of measurement as text."""
    found = sorted({row.day for row in rows if row.day})
    return " to ".join(dict.fromkeys(found[:1] + found[-1:]))


def cells(row: Row) -> list[str]:
    """Return the cells of one line of the table."""
    goal = row.goal
    stretch = " (stretch)" if goal.is_stretch and goal.ratio is not None else ""
    goal_text = number(goal.ratio) + stretch
    if goal.peak_bytes is not None:
        goal_text = f"{megabytes(goal.peak_bytes)} MB"
    visible_goal = "" if goal.visible is None else f" ({goal.visible})"
    note = "; ".join(filter(None, (row.note, row.reason and f"no figure: {row.reason}")))
    return [
        row.scenario,
        row.rival,
        " ".join(f"{key}={row.shape[key]}" for key in CARRIED if row.shape.get(key) is not None),
        with_least(row.ours_ms, row.ours_min_ms),
        with_least(row.rival_ms, row.rival_min_ms),
        number(row.ratio),
        goal_text,
        {True: "yes", False: "**no**", None: ""}[row.met],
        number(row.visible_ms),
        number(row.visible_ratio) + visible_goal,
        pair(row.wire_bytes, row.wire_bytes_rival),
        pair(row.peak_bytes_ours, row.peak_bytes_rival),
        str(row.steps or ""),
        one_line(note),
    ]


def missed(rows: Sequence[Row], is_quick: bool) -> list[str]:
    """Return the section on missed goals; a quick run, which does not have all rows, leaves out goals without a row."""
    lines = misses(rows) if is_quick else [*misses(rows), *absent(rows)]
    return ["## Missed", "", *lines] if lines else ["Every goal is met."]


def absent(rows: Iterable[Row]) -> list[str]:
    """Return a line for each goal that has no row."""
    there = {(row.scenario, row.rival) for row in rows}
    return [f"- {scenario}, {rival}: no row." for scenario, rival in GOALS if (scenario, rival) not in there]


def misses(rows: Sequence[Row]) -> list[str]:
    """Return a line for each missed goal, with the excess, and for each row that has a goal but no figure."""
    found = []
    for row in rows:
        for name, reached, most in row.measured():
            if row.reason is not None:
                found.append(f"- {row.scenario}, {row.rival}: no figure. {one_line(row.reason)}")
                break
            if reached is None:
                found.append(f"- {row.scenario}, {row.rival}: {name} was not measured.")
            elif reached > most:
                stretch = ", a stretch goal" if row.goal.is_stretch else ""
                over = 100 * (reached / most - 1)
                why = WHY_MISSED.get((row.scenario, row.rival), "")
                line = (
                    f"- {row.scenario}, {row.rival}: {name} {reached:.3g}, goal {most:.3g}: {over:.0f}% over{stretch}."
                )
                found.append(f"{line} {why}".strip())
    return found


def number(value: float | None) -> str:
    """Format a number with three significant digits, or without decimals from 1000; empty for None."""
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def with_least(value: float | None, least: float | None) -> str:
    """Format a median with the minimum in brackets; empty for None."""
    return "" if value is None else f"{number(value)} ({number(least)})"


def megabytes(value: float | None) -> str:
    """Format bytes as MB; empty for None."""
    return "" if value is None else number(value / 1e6)


def pair(ours: float | None, rival: float | None) -> str:
    """Format two sizes in MB, with a dash for an unknown one; empty if both are unknown."""
    return "" if ours is None and rival is None else f"{megabytes(ours) or '-'} / {megabytes(rival) or '-'}"


def one_line(text: str) -> str:
    """Make text fit for a table cell: no line breaks, no bars, and no frame drawn around an error."""
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", text).split()).replace("|", "/")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one bar per ratio, with its goal as a mark; rows without a ratio are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.ratio is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.3 * len(shown)), layout="constrained")
    ratios = [row.ratio or 0.0 for row in shown]
    colours = [{True: "tab:green", False: "tab:red", None: "tab:gray"}[row.met] for row in shown]
    axes.barh(range(len(shown)), ratios, color=colours, height=0.65)
    axes.set_xlim(0, WIDEST)  # a longer bar is clipped, and its number is inside it
    axes.margins(y=0.01)
    for place, row in enumerate(shown):
        beside = min(max(ratios[place], row.goal.ratio or 0.0) + 0.03, WIDEST - 0.2)
        axes.text(beside, place, f"{ratios[place]:.2f}", va="center", fontsize=8)
    goals = [(place, row.goal.ratio) for place, row in enumerate(shown) if row.goal.ratio is not None]
    if goals:
        places, marks = zip(*goals, strict=True)
        axes.plot(
            marks, places, linestyle="none", marker="|", markersize=14, markeredgewidth=2.5, color="black", label="goal"
        )
        axes.legend(loc="upper right")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [label(row) for row in shown], fontsize=8)
    axes.set_xlabel("our time / the rival's time: shorter is better, 1 is the rival")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label(row: Row) -> str:
    """Return the label of a bar."""
    wide = f" N={row.shape['N']} V={row.shape['V']}" if row.scenario == "shard-floor" else ""
    return f"{row.scenario}{wide}: {row.rival}"
