"""The demo's settings: sizes, learning rates and limits."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and rates of one run. Learning rates apply to gradients of the summed loss, not of its mean."""

    seed: int = 0
    num_cities: int | None = None  # the most populous ones; None: all
    num_buckets: int = 1 << 17  # rows of the encoder, shared by hashed character n-grams
    dim: int = 128
    batch: int = 1024
    num_sampled: int = 2048
    sampler: str = "uniform"
    table_lr: float = 0.3
    encoder_lr: float = 0.1
    initial_accumulator: float = 0.01  # of both Adagrads: keeps a row's first, noisy steps small
    encoder_stddev: float = 0.05
    num_steps: int = 2500
    max_train_s: float = 300.0
    num_eval: int | None = 10_000  # held-out names to evaluate; None: all
    num_workers: int = 2


def small(settings: Settings) -> Settings:
    """Return settings with 2,000 cities and few steps, for a smoke test of a few seconds."""
    return replace(
        settings, num_cities=2000, num_buckets=1 << 14, batch=256, num_sampled=128, num_steps=120, num_eval=500
    )
