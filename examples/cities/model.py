"""A trained model as one file, and answers from it without a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shardloss
from numpy.typing import NDArray

from examples.cities import ngrams
from examples.cities.dataset import packed, unpacked
from examples.cities.encoder import Encoder
from examples.cities.names import normalised


@dataclass(frozen=True, slots=True)
class Answer:
    """One guess: a place and its probability among all places."""

    place: str
    probability: float


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model: encoder [B, D], rows [V, D], biases [V] and the V places."""

    encoder: NDArray[np.float32]
    rows: NDArray[np.float32]
    biases: NDArray[np.float32]
    places: list[str]


def save(path: Path, encoder: Encoder, table: shardloss.Table, places: list[str]) -> None:
    """Read the table's rows page by page, and write them to one file together with the encoder's."""
    read = table.read_rows(np.arange(len(places)))
    assert read.biases is not None
    unfinished = path.with_suffix(".part.npz")
    np.savez(
        unfinished,
        encoder=encoder.weight.detach().numpy(),
        rows=read.rows,
        biases=read.biases,
        places=packed(places),
    )
    unfinished.rename(path)


def load(path: Path) -> Model:
    """Return the model that `save` wrote."""
    with np.load(path) as arrays:
        return Model(arrays["encoder"], arrays["rows"], arrays["biases"], unpacked(arrays["places"]))


def encode(model: Model, name: str) -> NDArray[np.float32]:
    """Return hidden [D] of one name, equal to that of `Encoder`."""
    gram_ids = ngrams.bags([normalised(name)], len(model.encoder)).gram_ids
    hidden: NDArray[np.float32] = model.encoder[gram_ids].sum(0) / np.float32(np.sqrt(max(1, len(gram_ids))))
    return hidden


def ask(model: Model, name: str, k: int = 5) -> list[Answer]:
    """Return the k most probable places for a name by a softmax over all V rows, computed locally."""
    logits = (model.rows @ encode(model, name) + model.biases).astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits)
    best = np.argsort(-log_probs, kind="stable")[:k]
    return [Answer(model.places[class_id], float(np.exp(log_probs[class_id]))) for class_id in best]
