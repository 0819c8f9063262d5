"""The picture of a profile: a stacked bar per shape, its two floors below it, and a table of the figures next to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.profile import FRONT_END, Profile

COLOURS = {
    "client": "#9aa5b1",
    "wire": "#4c9be8",
    "front end": "#f2b134",
    "fan-out": "#a06cd5",
    "kernel, score": "#2a9d5c",
    "merge": "#e4572e",
    "kernel, apply": "#8bd17c",
    "unaccounted": "#e3e3e3",
}
FLOORS = {"floor, flops": "#333333", "floor, bytes": "#c2185b"}
NOTE = (
    "Medians; unaccounted is the median step minus the medians of the parts. Kernel: the slowest worker.\n"
    "Floor, flops: the three bare GEMMs of one shard on one thread, alone (both workers do as much, in parallel).\n"
    "Floor, bytes: hidden sent and as many bytes returned over a bare Unix socket."
)
LEAST_LABELLED = 0.045  # share of a bar that has room for its figure


def layers_of(profile: Profile) -> dict[str, float]:
    """Sum the parts by layer, in the order of COLOURS."""
    layers = dict.fromkeys(COLOURS, 0.0)
    for name, value in profile.parts.items():
        layers[layer_of(name)] += value
    layers["unaccounted"] = profile.unaccounted_ms
    return layers


def layer_of(name: str) -> str:
    """Return the layer of a part."""
    call, _, part = name.partition(": ")
    if call == "client":
        return call
    if part == "kernel":
        return "kernel, score" if call == "loss" else "kernel, apply"
    return "front end" if part in FRONT_END else part


def draw(profiles: Sequence[Profile], path: Path) -> None:
    """Draw one panel per shape, each with its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(profiles), figsize=(10, 3.5 * len(profiles) + 0.7), squeeze=False)
    for axes, profile in zip(panels[:, 0], profiles, strict=True):
        draw_one(axes, profile)
    figure.text(0.02, 0.01, NOTE, fontsize=9)
    figure.tight_layout(h_pad=2.0, rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_one(axes: Any, profile: Profile) -> None:
    """Draw a step and its two floors."""
    layers, left = layers_of(profile), 0.0
    for name, value in layers.items():
        shown, share = max(value, 0.0), value / profile.step_ms
        label = f"{name}: {value:.2f} ms, {100 * share:.1f}%"
        axes.barh(0, shown, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.5, label=label, height=0.8)
        if share >= LEAST_LABELLED:
            axes.text(left + shown / 2, 0, f"{value:.1f}\n{100 * share:.0f}%", ha="center", va="center", fontsize=9)
        left += shown
    floors = (profile.flops_floor_ms, profile.bytes_floor_ms)
    for place, ((name, colour), value) in enumerate(zip(FLOORS.items(), floors, strict=True), 1):
        label = f"{name}: {value:.2f} ms, {100 * value / profile.step_ms:.1f}%"
        axes.barh(place, value, color=colour, height=0.45, label=label)
        axes.text(value + 0.01 * profile.step_ms, place, f"{value:.2f} ms", va="center", fontsize=9)
    axes.set_yticks(range(3), ["one step", *FLOORS], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(profile.step_ms, left))
    axes.set_xlabel(f"ms        ({front_end_of(profile)})", fontsize=9)
    axes.set_title(title_of(profile), fontsize=11, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def title_of(profile: Profile) -> str:
    """Return the title of a panel: the shape and the time of the whole step."""
    shape = ", ".join(f"{key}={profile.shape[key]:,}" for key in ("N", "D", "V", "S", "K") if key in profile.shape)
    return f"{profile.name}: {profile.step_ms:.1f} ms per step (median of {profile.num_steps}). {shape}"


def front_end_of(profile: Profile) -> str:
    """Return the parts of the front end as text, loss and commit together."""
    sums = {part: sum(profile.parts[f"{call}: {part}"] for call in ("loss", "commit")) for part in FRONT_END}
    return "front end: " + ", ".join(f"{part} {value:.2f}" for part, value in sums.items())
