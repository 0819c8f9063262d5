"""One run of the demo, from names to answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shardloss
import torch
from rich.console import Console

from examples.cities import dataset, evaluate, model, report, service
from examples.cities.dataset import Dataset
from examples.cities.encoder import Encoder
from examples.cities.model import Answer
from examples.cities.names import ATTRIBUTION, normalised
from examples.cities.ngrams import bags
from examples.cities.settings import Settings
from examples.cities.train import TABLE, make_encoder, make_table, train

MISSPELT = ("Koeln", "Sanktpeterburg", "Shanghaj", "Lissabbon", "Мюнхенн", "Nu York")
NUM_ANSWERS = 5
MODEL = "model.npz"


def run(settings: Settings, out: Path, console: Console, address: str | None = None) -> None:
    """Train, evaluate before and after training, answer misspelt names, and write files to out.

    If address is given, use the service there and leave the table on it; otherwise start a service for this run.
    """
    out.mkdir(parents=True, exist_ok=True)
    console.print(ATTRIBUTION)
    with console.status("reading the names"):
        cities = dataset.load(settings, out)
    console.print(
        f"{cities.num_classes:,} cities, {len(cities.class_ids):,} names: {len(cities.training):,} to train on, "
        f"{len(cities.held_out):,} held out"
    )
    if address is not None:
        with service.connected(address) as client:
            service.forget(client, TABLE)
            through_service(settings, cities, client, out, console)
    else:
        console.print(f"starting the service with {settings.num_workers} workers")
        with service.running(settings.num_workers, out / "server.log") as own, shardloss.connect(own) as client:
            through_service(settings, cities, client, out, console)
        console.print("the service has stopped")
    console.print(f"the picture, the figures and the model are in {out}")


def through_service(
    settings: Settings, cities: Dataset, client: shardloss.LossClient, out: Path, console: Console
) -> None:
    """Run the part of the demo that needs the service."""
    encoder = make_encoder(settings)
    table = make_table(client, cities.num_classes, settings)
    names = evaluate.sample(cities, settings)
    with report.evaluating(console, len(names), "before") as on_names:
        before = evaluate.evaluate(cities, encoder, table, names, settings, on_names)
    with report.progress(console, settings.num_steps) as on_step:
        curve = train(cities, encoder, table, settings, on_step)
    with report.evaluating(console, len(names), "after") as on_names:
        after = evaluate.evaluate(cities, encoder, table, names, settings, on_names)
    figures = {"before": before, "after": after, "baseline": evaluate.baseline(cities, names)}
    console.print(f"{len(curve.losses):,} steps in {curve.train_s:.0f} s, {curve.rows_per_s:,.0f} rows/s")
    report.print_answers(console, ask(encoder, table, cities.places, MISSPELT))
    report.print_figures(console, figures, len(names), cities.num_classes)
    report.write_result(out / "result.json", figures, curve, settings, len(names))
    report.draw_curve(curve, out / "curve.png")
    model.save(out / MODEL, encoder, table, cities.places)


@torch.no_grad()
def ask(encoder: Encoder, table: shardloss.Table, places: list[str], names: Sequence[str]) -> dict[str, list[Answer]]:
    """Return the best places for each name, ranked by the live table."""
    hidden = encoder(bags([normalised(name) for name in names], len(encoder.weight)))
    best = table.top_k(hidden.numpy(), NUM_ANSWERS)
    assert best.log_probs is not None
    return {
        name: [Answer(places[class_id], float(p)) for class_id, p in zip(ids, np.exp(log_probs), strict=True)]
        for name, ids, log_probs in zip(names, best.class_ids, best.log_probs, strict=True)
    }


def answer(name: str, out: Path, console: Console) -> None:
    """Print the best places for one name, ranked locally over the rows that a run saved in out, without a service."""
    console.print(ATTRIBUTION)
    report.print_answers(console, {name: model.ask(model.load(out / MODEL), name, NUM_ANSWERS)})
